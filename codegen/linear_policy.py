"""Which engine runs a linear attention, with which chunks, or whether to leave it as it is.

The figures are of one core with AVX-512, float32, torch 2.13, d = e = 16 and 64, in nanoseconds; only their ratios
matter. A quadratic spelling, compiled, costs each pair of positions 1.1 and 3.1 while the weights fit into the caches,
2 more beyond, 0.8 more with a decay, 0.35 more for each channel that decays by itself. A running sum of outer products
costs 5 for each element of each state. The chunked engine costs each position 150 and 520, or 700 and 2700 with a
decay for each channel, and each call a tenth of a millisecond, or four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refocus.codegen.linear_operator import ENGINES
from refocus.codegen.plan import Chosen, Leave, Plan

_GAIN = 0.9  # less than a tenth is noise
_LEAST_GAIN = 0.1e6  # ns
_LAUNCH, _LAUNCH_CHANNELS = 0.12e6, 0.4e6  # ns: the operations of one call, whatever the sizes
_CACHED_PAIRS = 1 << 21


@dataclass(frozen=True)
class LinearWork:
    """The sizes that decide. `spelled`: what the model makes of them, as `LinearSite` has it."""

    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    gate: str
    spelled: str

    def __str__(self) -> str:
        return f"{self.heads} heads x {self.queries} queries x {self.keys} keys"


def choose_linear(work: LinearWork, device: Any, engine: str | None, trained: bool) -> Chosen | Leave:
    """A plan for these sizes, or the advice to leave it. `engine`: the one that was asked for."""
    if engine is not None:
        if engine not in ENGINES:
            return Leave(f"the {engine} engine has no linear attention; engine='tiled' has")
        return Chosen(linear_plan(work, engine), f"engine={engine!r} was asked for")
    if work.spelled == "linear":
        return Leave(f"its cost is linear in the length already, at {work}")
    leave, cost = _left(work), _chunked(work)
    if trained:
        leave, cost = 3 * leave, 3 * cost
    if cost > _GAIN * leave or leave - cost < _LEAST_GAIN:
        return Leave(f"as it is spelled is no slower than in chunks, at {work}; engine='tiled' runs it in chunks")
    plan = linear_plan(work, "tiled")
    return Chosen(plan, f"about {leave / cost:.1f} times faster in chunks of {plan.block_k}, at {work}")


def linear_plan(work: LinearWork, engine: str) -> Plan:
    """Chunks about as long as the state is wide: then what is done inside them and between them costs the same."""
    chunk = 64 if max(work.width, work.value_width) <= 128 else 128
    return Plan(engine, schedule="chunked", block_q=chunk, block_k=chunk)


def _left(work: LinearWork) -> float:
    if work.spelled == "states":  # a state for each position, written, summed up and read
        return work.heads * work.queries * work.width * work.value_width * 5.0
    pairs = work.heads * work.queries * work.keys
    each = 0.4 + (work.width + work.value_width) / 48 + (2.0 if pairs > _CACHED_PAIRS else 0.0)
    decays = {"none": 0.0, "head": 0.8, "channel": work.width * 0.35}[work.gate]
    return pairs * (each + decays)


def _chunked(work: LinearWork) -> float:
    widths = work.width + work.value_width
    inside = linear_plan(work, "tiled").block_k * (0.4 + widths / 48)
    between = work.width * work.value_width / 25
    channels = work.gate == "channel"
    each = inside + between + widths * (18.0 if channels else 1.5)
    return work.heads * work.queries * each + (_LAUNCH_CHANNELS if channels else _LAUNCH)
