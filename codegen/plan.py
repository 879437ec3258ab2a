"""How a region is run: engine, schedule and tile sizes, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Plan:
    """Everything about a kernel that is not in its region. `repr` rebuilds it (see `parse`).

    `engine`: "triton", "cpp", "tiled" or "sdpa". `block_q`, `block_k`: tile sizes in queries and keys. `num_warps` and
    `num_stages` are for Triton alone. `listed`: its kernel reads which tiles of keys to visit from lists, made before
    it runs, where loop bounds would visit tiles in vain.
    """

    engine: str
    schedule: str = "flash"
    block_q: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2
    listed: bool = False


@dataclass(frozen=True)
class Chosen:
    """What was planned, and why."""

    plan: Plan
    reason: str


@dataclass(frozen=True)
class Leave:
    """The region is understood, but stays as it is."""

    reason: str


@lru_cache(maxsize=512)
def parse(text: str) -> Plan:
    """Rebuild a plan from its `repr`. The text only ever comes from `repr` of our own values."""
    plan = eval(text, {"Plan": Plan, "__builtins__": {}})
    assert isinstance(plan, Plan)
    return plan
