"""Which engine runs a linear attention, with which chunks, or whether to leave it as it is.

A quadratic spelling costs a number of nanoseconds for each pair of positions, the chunked engine one for each position
and each feature of its state. Only the ratios matter (see `choose_linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refocus.codegen.linear_operator import ENGINES
from refocus.codegen.plan import Chosen, Leave, Plan

_GAIN = 0.9  # less than a tenth is noise
_LEAST_GAIN = 0.1e6  # ns
_LAUNCH = 0.15e6  # ns: the operations of one call, whatever the sizes


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
        return work.heads * work.queries * work.width * work.value_width * 4.0
    each = 1.5 + (work.width + work.value_width) / 48
    channels = work.width * 1.5 if work.gate == "channel" else 0.0
    return work.heads * work.queries * work.keys * (each + channels)


def _chunked(work: LinearWork) -> float:
    chunk = linear_plan(work, "tiled").block_k
    inside = chunk * (1.5 + (work.width + work.value_width) / 48)
    between = work.width * work.value_width / 12
    copies = (work.width + work.value_width) * (12.0 if work.gate == "channel" else 2.0)
    return work.heads * work.queries * (inside + between + copies) + _LAUNCH
