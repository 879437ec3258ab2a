"""Windows, neighbourhoods and routing as published code spells them: eager, `torch.compile` alone and Refocus.

    python -m benchmarks.windows                              results in benchmarks/results/windows.{json,md}
    python -m benchmarks.windows --only unfold --training     with the backward
    python -m benchmarks.windows --only swin --tokens 512     Swin-T at 512 x 512 pixels (needs timm)

Each measurement runs in a process of its own; within it the peers take turns. For images `--tokens` are pixels a side
(Swin) or tokens in all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.suite import Measured, Subject, Task, drive, measure, parser, task_of
from benchmarks.torchvision_ops import import_torchvision

HEADS, WIDTH, WINDOW = 8, 64, 64
GROUP = 4  # heads of queries to one of keys, where they are grouped
ROUTED = 4  # regions that a region of BiFormer attends to

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfold(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A window of 64 keys around each query, zeros past the border."""
    half = WINDOW // 2
    key, value = (F.pad(t, (0, 0, half, half - 1)).unfold(2, WINDOW, 1) for t in (key, value))
    weights = (torch.einsum("bhnd,bhndw->bhnw", query, key) / math.sqrt(WIDTH)).softmax(-1)
    return torch.einsum("bhnw,bhndw->bhnd", weights, value)


def gather(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by a table of neighbours; the window slides inward at the borders."""
    half, tokens = WINDOW // 2, query.shape[2]
    place = torch.arange(tokens).clamp(half, tokens - half)[:, None] + torch.arange(-half, half)
    key, value = key[:, :, place], value[:, :, place]
    weights = ((query.unsqueeze(3) @ key.mT).squeeze(3) / math.sqrt(WIDTH)).softmax(-1)
    return (weights.unsqueeze(3) @ value).squeeze(3)


def grouped_unfold(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `unfold`, where four heads of queries [b, key head, head, token, d] share one of keys."""
    half = WINDOW // 2
    key, value = (F.pad(t, (0, 0, half, half - 1)).unfold(2, WINDOW, 1) for t in (key, value))
    weights = (torch.einsum("bhgnd,bhndw->bhgnw", query, key) / math.sqrt(WIDTH)).softmax(-1)
    return torch.einsum("bhgnw,bhndw->bhgnd", weights, value)


def grouped_gather(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `gather`, where four heads of queries [b, key head, head, token, d] share one of keys."""
    half, tokens = WINDOW // 2, key.shape[2]
    place = torch.arange(tokens).clamp(half, tokens - half)[:, None] + torch.arange(-half, half)
    key, value = key[:, :, place], value[:, :, place]
    weights = (query.transpose(2, 3) @ key.mT / math.sqrt(WIDTH)).softmax(-1)
    return (weights @ value).transpose(2, 3)


def blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Blocks of 64 queries with three blocks of keys, of which a band is kept."""
    query = query.unflatten(2, (-1, WINDOW))
    place = torch.arange(-WINDOW, WINDOW * (query.shape[2] + 1)).unfold(0, 3 * WINDOW, WINDOW)
    key, value = (F.pad(t, (0, 0, WINDOW, WINDOW)).unfold(2, 3 * WINDOW, WINDOW) for t in (key, value))
    scores = torch.einsum("bhcid,bhcdj->bhcij", query, key) / math.sqrt(WIDTH)
    own = place[:, WINDOW : 2 * WINDOW]
    keep = (own[:, :, None] - place[:, None]).abs() <= WINDOW // 2
    keep = keep & (place >= 0)[:, None] & (place < own.numel())[:, None]
    weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    return torch.einsum("bhcij,bhcdj->bhcid", weights, value).flatten(2, 3)


def neighbours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """7 x 7 neighbours of every token of a square image."""
    side = math.isqrt(query.shape[2])
    query, key, value = (t.unflatten(2, (side, side)) for t in (query, key, value))
    key, value = (F.pad(t, (0, 0, 3, 3, 3, 3)).unfold(2, 7, 1).unfold(3, 7, 1) for t in (key, value))
    scores = torch.einsum("bhyxd,bhyxduv->bhyxuv", query, key).flatten(-2) / math.sqrt(WIDTH)
    weights = scores.softmax(-1).unflatten(-1, (7, 7))
    return torch.einsum("bhyxuv,bhyxduv->bhyxd", weights, value).flatten(2, 3)


def routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """BiFormer: each of 7 x 7 regions attends to the four that its mean is most alike."""
    side = math.isqrt(query.shape[2])

    def regions(x: Tensor) -> Tensor:
        x = x.unflatten(2, (7, side // 7, 7, side // 7))
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)  # [b, region, head, token, d]

    query, key, value = regions(query), regions(key), regions(value)
    alike = query.mean((2, 3)) @ key.mean((2, 3)).mT
    chosen = alike.topk(ROUTED, -1).indices
    at = chosen.reshape(*chosen.shape, 1, 1, 1).expand(*chosen.shape, *key.shape[2:])
    key, value = (t.unsqueeze(1).expand(-1, 49, -1, -1, -1, -1).gather(2, at) for t in (key, value))
    key, value = (t.transpose(2, 3).flatten(3, 4) for t in (key, value))
    weights = (query @ key.mT / math.sqrt(WIDTH)).softmax(-1)
    out = (weights @ value).unflatten(1, (7, 7)).unflatten(4, (side // 7, side // 7))
    return out.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5)


ATTENTIONS: dict[str, Attend] = {
    "unfold": unfold, "gather": gather, "grouped-unfold": grouped_unfold, "grouped-gather": grouped_gather,
    "blocks": blocks, "neighbours": neighbours, "routed": routed,
}  # fmt: skip
SIZES = {"neighbours": 56 * 56, "routed": 56 * 56}
KINDS = (*ATTENTIONS, "swin")


def build(task: Task) -> Subject:
    torch.manual_seed(0)
    if task.kind == "swin":
        import_torchvision()
        import timm

        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=task.tokens).train(task.training)
        return Subject(model, {"x": torch.randn(1, 3, task.tokens, task.tokens)}, list(model.parameters()))
    key_heads = HEADS // GROUP if task.kind.startswith("grouped") else HEADS
    grouped = (1, key_heads, GROUP, task.tokens, WIDTH)
    plain = (1, key_heads, task.tokens, WIDTH)
    shapes = (plain if key_heads == HEADS else grouped, plain, plain)
    qkv = [torch.randn(shape, requires_grad=task.training) for shape in shapes]
    return Subject(ATTENTIONS[task.kind], dict(zip(("query", "key", "value"), qkv)), qkv)


def run(task: Task) -> Measured:
    """In a worker."""
    return measure(task, build(task))


def sizes(kind: str, asked: list[int] | None) -> list[int]:
    """The sizes at which a kind is measured, if none are asked for."""
    return asked or {"swin": [224, 512]}.get(kind) or [SIZES.get(kind, 4096)]


def main(arguments: list[str] | None = None) -> int:
    command = parser("windows", __doc__, KINDS, ())
    command.add_argument("--training", action="store_true", help="with the backward")
    options = command.parse_args(arguments)
    tasks = [
        task_of(kind, tokens, options, options.training)
        for kind in options.only
        for tokens in sizes(kind, options.tokens)
    ]
    return drive(run, tasks, options, "Windows and routing on the CPU", "8 heads of 64, window 64.")


if __name__ == "__main__":
    sys.exit(main())
