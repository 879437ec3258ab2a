"""What is measured: a case names it, a subject is made of tensors, and a suite has many cases of one sort."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# What is timed: a call without gradients, the backward alone, or forward and backward as one step.
FORWARD, BACKWARD, STEP = "forward", "backward", "step"


@dataclass(frozen=True)
class Case:
    """One row of a table. `kind` is for the suite to understand; `tokens` are keys. `rank`: 0 for what a target needs,
    1 for what is measured when time is left."""

    suite: str
    kind: str
    tokens: int
    work: str = FORWARD
    queries: int = 0  # as many as keys
    batch: int = 1
    heads: int = 16
    kv_heads: int = 0  # as many as heads
    width: int = 128
    dtype: str = "bfloat16"
    rank: int = 0

    @property
    def key(self) -> str:
        """The case by name, the same in every run."""
        return f"{self.suite}: {self.kind}, {self.work}, {self.sizes}"

    @property
    def sizes(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        queries = f"{self.queries} x " if self.queries else ""
        kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        return f"b={self.batch} h={heads} n={queries}{self.tokens} d={self.width} {kind}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def trained(self) -> bool:
        return self.work != FORWARD

    def no_larger(self, limits: Mapping[str, int]) -> Case:
        """The case with sizes that are at most these."""
        return replace(self, **{name: min(getattr(self, name), most) for name, most in limits.items()})


@dataclass(frozen=True)
class Subject:
    """What a case is made of.

    `call`: the function or module as its authors spell it; `inputs`: what every peer is called with; `leaves`: what
    gradients are asked for. `peers`: makers of other functions of the same inputs; `alone`: makers of calls that are
    timed beside them and return something else. `own`: what stands for Refocus, where no spelling is short enough to
    be captured. `dense_bytes`: what eager code holds at its worst moment; `flops` and `bytes`: what any implementation
    has to do and to move in a forward.
    """

    call: Callable[..., Any]
    inputs: dict[str, Any]
    leaves: Sequence[Tensor] = ()
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    alone: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)
    own: Callable[..., Any] | None = None
    dense_bytes: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Where a subject is built. `tiny`: without a GPU, to see that a case runs: nothing is lowered, kernels are
    interpreted."""

    device: torch.device
    tiny: bool = False

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """By torch.compile alone."""
        return torch.compile(call, dynamic=False, backend="eager" if self.tiny else "inductor")


@dataclass(frozen=True)
class Suite:
    """Cases of one sort. `limits`: the largest sizes of a tiny run; `share`: of the time, in parts; `engines`: what
    Refocus is forced to, beside what its plan chooses; `whole`: times are those that a user waits for, the time
    to launch kernels included."""

    name: str
    about: str
    cases: tuple[Case, ...]
    build: Callable[[Case, Setting], Subject]
    limits: Mapping[str, int]
    share: float = 1.0
    engines: tuple[str, ...] = ()
    whole: bool = False
