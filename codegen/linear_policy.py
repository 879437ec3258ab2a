"""Which engine runs a linear attention, with which chunks, or whether to leave it as it is.

The figures are of a core with AVX-512, float32, torch 2.13, d = e = 16 and 64, in nanoseconds; only their ratios
matter. A quadratic spelling, compiled, costs each pair of positions 1.0 and 2.2 while the weights fit into the caches,
1 more beyond, 0.6 more with a decay, 0.35 more for each channel that decays by itself. A running sum of outer products
costs 2.5 for each element of each state, and twice that beyond the caches; a loop over the steps costs that, and 20000
for each step. What a model does in chunks itself costs the pairs and the states of these. The chunked engine costs each
position 150 and 520, or 700 and 2700 with a decay for each channel. All that is shared among the threads. Each call
costs a quarter of a millisecond, or 0.7 with decays, on top, and each chunk a fortieth: many small operations, which
other threads only wait for.

On other devices the generated kernels run what they take: what is left to them is longer than a few chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from refocus import debug
from refocus.codegen import linear_triton
from refocus.codegen.choose import must_run
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.linear_operator import ENGINES
from refocus.codegen.plan import Chosen, Leave, Plan

_GAIN = 0.9  # less than a tenth is noise
_LEAST_GAIN = 0.1e6  # ns
_LAUNCH = {"none": 0.25e6, "head": 0.7e6, "channel": 0.7e6}  # ns: the operations of one call, whatever the sizes
_STEP = 20e3  # ns: the operations of one step of a loop
_CHUNK = 25e3  # ns: those of one chunk, whose states follow one another
_CACHED = 1 << 21  # pairs, or elements of states
_FEW_CHUNKS = 2  # no state is worth carrying between so few: the pairs are as cheap, in fewer kernels


@dataclass(frozen=True)
class Sample:
    """What the operator will be called with: its form, and tensors of which only dtypes and sizes are read."""

    form: LinearForm
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    erase: Tensor | None = None
    initial: Tensor | None = None
    lookup: Tensor | None = None

    def unsupported(self, engine: str) -> str | None:
        """Why an engine cannot run it and its gradients; None where it can. `tiled` runs every form."""
        if debug.disabled(engine):
            return debug.off(engine)
        if engine != "triton":
            return None
        rest = self.gate, self.erase, self.initial, self.lookup
        return linear_triton.supports(self.form, self.q, self.k, self.v, *rest)

    def kernel_path(self, plan: Plan) -> str | None:
        """Where the generated source of the kernel that writes the results is kept, for engines that generate it."""
        if plan.engine != "triton":
            return None
        given = self.q, self.k, self.v, self.gate, self.erase, self.initial, self.lookup
        return str(linear_triton.kernel_path(self.form, plan.block_k, *given))


@dataclass(frozen=True)
class Passes:
    """How often a single step goes over its state, reading or writing: compiled as it is spelled, and fused."""

    spelled: int
    fused: int


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
    rows: int = 1  # positions of a chunk, where the model works in chunks
    passes: Passes | None = None  # of a single step

    def __str__(self) -> str:
        return f"{self.heads} heads x {self.queries} queries x {self.keys} keys"


def choose_linear(work: LinearWork, sample: Sample, device: Any, engine: str | None, trained: bool) -> Chosen | Leave:
    """A plan for these sizes, or the advice to leave it. `engine`: the one that was asked for.

    Raises EngineUnavailable when the named engine cannot run on this machine at all.
    """
    if trained and debug.disabled("training"):
        return Leave(f"needs gradients, and {debug.off('training')}")
    if engine is not None:
        return _forced(work, sample, device, engine)
    if not sample.form.causal and not sample.form.sums and work.width >= work.keys:
        return Leave(
            f"a product of three matrices, with no fewer features than keys: no order of them is cheaper, at {work}"
        )
    if work.passes is not None:
        return _single_step(work, work.passes, sample, device)
    if work.spelled == "linear":
        return Leave(f"its cost is linear in the length already, at {work}")
    declined = ""
    if device.type != "cpu":
        reason = sample.unsupported("triton")
        if reason is None:
            return _on_device(work, sample)
        declined = f"; the triton engine does not take it: {reason}"
    reason = sample.unsupported("tiled")
    if reason is not None:
        return Leave(f"{reason}{declined}")
    leave, cost = _left(work), _chunked(work, torch.get_num_threads() if device.type == "cpu" else 1)
    if trained:
        leave, cost = 3 * leave, 3 * cost
    if cost > _GAIN * leave or leave - cost < _LEAST_GAIN:
        note = f"as it is spelled is no slower than in chunks, at {work}; engine='tiled' runs it in chunks"
        return Leave(f"{note}{declined}")
    plan = linear_plan(work, "tiled")
    return Chosen(plan, f"about {leave / cost:.1f} times faster in chunks of {plan.block_k}, at {work}{declined}")


def _forced(work: LinearWork, sample: Sample, device: Any, engine: str) -> Chosen | Leave:
    if engine not in ENGINES:
        return Leave(f"the {engine} engine has no linear attention; engine='tiled' has")
    must_run(engine, device)
    reason = sample.unsupported(engine)
    if reason is not None:
        return Leave(f"the {engine} engine does not take it: {reason}")
    return Chosen(_plan_of(work, sample, engine), f"engine={engine!r} was asked for")


def _single_step(work: LinearWork, passes: Passes, sample: Sample, device: Any) -> Chosen | Leave:
    """What a step costs is the way of its state through memory."""
    reason = sample.unsupported("triton") if device.type != "cpu" else "on a CPU a state stays in the caches"
    if reason is not None:
        return Leave(f"a single step, which is no slower as it is spelled: {reason}; engine='tiled' runs it")
    told = f"a single step: the state goes through memory {passes.spelled} times as it is spelled, fused {passes.fused}"
    if passes.fused >= passes.spelled:
        return Leave(told)
    return Chosen(replace(_plan_of(work, sample, "triton"), schedule="step"), told)


def _on_device(work: LinearWork, sample: Sample) -> Chosen | Leave:
    plan = _plan_of(work, sample, "triton")
    if work.spelled == "pairs" and work.keys <= _FEW_CHUNKS * plan.block_k:
        return Leave(f"{work} are few enough for pairs; engine='triton' runs them in chunks of {plan.block_k}")
    return Chosen(plan, f"the generated kernels, in chunks of {plan.block_k}")


def _plan_of(work: LinearWork, sample: Sample, engine: str) -> Plan:
    if engine != "triton":
        return linear_plan(work, engine)
    others = (sample.erase, sample.lookup) if sample.form.lookup else ()
    chunk = linear_triton.default_chunk(sample.q, sample.k, sample.v, *others)
    return Plan(engine, schedule="chunked", block_q=chunk, block_k=chunk)


def linear_plan(work: LinearWork, engine: str) -> Plan:
    """Chunks about as long as the state is wide: then what is done inside them and between them costs the same."""
    chunk = 64 if max(work.width, work.value_width) <= 128 else 128
    if work.passes is not None:
        steps = 4 if work.gate == "channel" else 1
        return Plan(engine, schedule="step", block_q=steps, block_k=steps)
    return Plan(engine, schedule="chunked", block_q=chunk, block_k=chunk)


def _left(work: LinearWork) -> float:
    states = work.heads * work.queries * work.width * work.value_width
    if work.spelled == "states":  # a state for each position, written, summed up and read
        return states * (5.0 if states > _CACHED else 2.5)
    if work.spelled == "steps":  # the same, one after the other
        return states * 5.0 + work.queries * _STEP
    chunks = work.spelled == "chunks"
    pairs = work.heads * work.queries * (work.rows if chunks else work.keys)
    each = 0.6 + (work.width + work.value_width) / 80 + (1.0 if pairs > _CACHED else 0.0)
    decays = {"none": 0.0, "head": 0.6, "channel": work.width * 0.35}[work.gate]
    if not chunks:
        return pairs * (each + decays)
    # Its pairs are those of chunks; states are written, decayed and read once for each.
    between = states * (1 / 25 + 5.0 / work.rows)
    return pairs * (each + decays) + between + work.queries // work.rows * _STEP


def _chunked(work: LinearWork, threads: int) -> float:
    """In nanoseconds of one thread: what only one of them does counts for all."""
    widths = work.width + work.value_width
    inside = linear_plan(work, "tiled").block_k * (0.4 + widths / 48)
    between = work.width * work.value_width / 25
    each = inside + between + widths * (18.0 if work.gate == "channel" else 1.5)
    chunks = -(-work.queries // linear_plan(work, "tiled").block_k)
    return work.heads * work.queries * each + (_LAUNCH[work.gate] + chunks * _CHUNK) * threads
