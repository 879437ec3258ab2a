"""Forward and backward: eager, `torch.compile` alone and Refocus side by side, time and peak memory.

    python -m benchmarks.training                                    results in benchmarks/results/training.{json,md}
    python -m benchmarks.training --only window --tokens 4096        one kind of attention
    python -m benchmarks.training --only mistral --tokens 2048       the demo's model, all its parameters trained

Each measurement runs in a process of its own; within it the peers take turns. Eager and compiled code are left out
where their scores would not fit the memory that `--limit` allows.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from benchmarks.suite import Measured, Subject, Task, drive, measure, parser, task_of

HEADS, WIDTH = 8, 64
KINDS = ("window", "causal", "documents", "bias", "mistral")


class Attention(nn.Module):
    """Self-attention of 8 heads of 64, as eager code spells it: a score for every pair, a mask of every pair."""

    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__()
        self.kind = kind
        self.bias = nn.Parameter(torch.randn(HEADS, tokens, tokens)) if kind == "bias" else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document: Tensor) -> Tensor:
        at = torch.arange(query.shape[2], device=query.device)
        distance = at[:, None] - at[None, :]
        scores = query @ key.mT / math.sqrt(WIDTH)
        if self.bias is not None:
            scores = scores + self.bias
        keep = distance >= 0
        if self.kind == "window":
            keep = keep & (distance < 256)
        elif self.kind == "documents":
            keep = keep & (document[:, None] == document[None, :])
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ value


def build(task: Task) -> Subject:
    """The model, its inputs, and what gradients are asked for."""
    torch.manual_seed(0)
    if task.kind == "mistral":
        from examples.quickstart import build as demo

        model, given = demo(task.tokens)
        return Subject(model, given, [p for p in model.parameters() if p.requires_grad])
    attention = Attention(task.kind, task.tokens)
    qkv = [torch.randn(1, HEADS, task.tokens, WIDTH, requires_grad=True) for _ in range(3)]
    inputs = dict(zip(("query", "key", "value"), qkv)) | {"document": torch.arange(task.tokens) // 512}
    # Eager code keeps several tensors of all scores.
    fits = 6 * 4 * HEADS * task.tokens**2 <= task.limit * 2**30
    return Subject(attention, inputs, [*qkv, *attention.parameters()], fits)


def run(task: Task) -> Measured:
    """In a worker: gradients of the mean square, by every peer."""
    return measure(task, build(task))


def main(arguments: list[str] | None = None) -> int:
    options = parser("training", __doc__, KINDS, (1024, 2048, 4096, 8192)).parse_args(arguments)
    tasks = [task_of(kind, tokens, options, training=True) for kind in options.only for tokens in options.tokens]
    return drive(run, tasks, options, "Training on the CPU", "Forward and backward.")


if __name__ == "__main__":
    sys.exit(main())
