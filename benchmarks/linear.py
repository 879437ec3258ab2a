"""Linear attention as papers spell it: eager, `torch.compile` alone and Refocus side by side, time and peak memory.

    python -m benchmarks.linear                                      results in benchmarks/results/linear.{json,md}
    python -m benchmarks.linear --only retention --tokens 8192       one spelling
    python -m benchmarks.linear --training                           forward and backward
    python -m benchmarks.linear --tokens 64 128 256 512 --width 16   where pairs may be cheaper: none should be slower

Each measurement runs in a process of its own; within it the peers take turns. Eager and compiled code are left out
where what they store (a weight for every pair, a state for every position) would not fit the memory that `--limit`
allows. At the end, how well the times of Refocus lie on a line through the lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.suite import Measured, Subject, Task, drive, measure, parser, task_of

HEADS, WIDTH = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def normalised(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A linear transformer: feature maps, a triangle, a division by the sum."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weights = (q @ k.mT).tril()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A fixed decay for each head."""
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at[None, :]
    decay = 1 - torch.exp2(-5 - torch.arange(q.shape[1], device=q.device))
    log = torch.log(decay)[:, None, None] * distance
    return (q @ k.mT * log.masked_fill(distance < 0, float("-inf")).exp().to(q.dtype)) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A decay that the data decide, one for each head: a difference of running sums."""
    sums = gate[..., 0].cumsum(-1)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(~keep, float("-inf"))
    return (q @ k.mT * between.exp().to(q.dtype)) @ v


def channels(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The same for each channel: eager code makes a number for each pair and channel."""
    sums = gate.cumsum(2)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(~keep[..., None], float("-inf"))
    return torch.einsum("bhid,bhjd,bhijd->bhij", q, k, between.exp().to(q.dtype)) @ v


def states(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A running sum of outer products: a state for each position."""
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
KINDS: dict[str, Function] = {f.__name__: f for f in (normalised, retention, gated, channels, states)}


def build(task: Task) -> Subject:
    torch.manual_seed(0)
    heads, tokens, width = task.heads or HEADS, task.tokens, task.width or WIDTH
    given = {name: torch.randn(1, heads, tokens, width) * width**-0.25 for name in ("q", "k", "v")}
    given["gate"] = -0.1 * torch.rand(1, heads, tokens, width)
    given = {name: x.requires_grad_(task.training) for name, x in given.items()}
    # Eager code keeps several of its largest tensors.
    numbers = {"states": tokens * width**2, "channels": tokens**2 * width}
    kept = 6 if task.training else 3
    fits = kept * 4 * heads * numbers.get(task.kind, tokens**2) <= task.limit * 2**30
    return Subject(KINDS[task.kind], given, list(given.values()), fits)


def run(task: Task) -> Measured:
    """In a worker: the output, or the gradients of its mean square, by every peer."""
    return measure(task, build(task))


def main(arguments: list[str] | None = None) -> int:
    command = parser("linear", __doc__, list(KINDS), LENGTHS)
    command.add_argument("--training", action="store_true", help="with the backward")
    command.add_argument("--heads", type=int, default=HEADS)
    command.add_argument("--width", type=int, default=WIDTH, help="of queries, keys and values")
    options = command.parse_args(arguments)
    asked = [(kind, tokens) for kind in options.only for tokens in options.tokens]
    tasks = [
        replace(task_of(kind, tokens, options, options.training), heads=options.heads, width=options.width)
        for kind, tokens in asked
    ]
    return drive(run, tasks, options, "Linear attention on the CPU", f"{options.heads} heads of {options.width}.")


if __name__ == "__main__":
    sys.exit(main())
