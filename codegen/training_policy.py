"""Whether a region that will be trained on a CPU goes to the portable engine, and in which tiles.

Forward and backward together take 16 to 18 ns a pair compiled, about 7 through SDPA, and in tiles, for each pair of one
that is not empty, 34 ns at 32 x 32, 28 at 64 x 64, 25 at 128 x 128, with a millisecond for each run of them (one core
with AVX-512, d=64): sparsity must pay for it. Small tiles are worth it only where they form runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from refocus.codegen import tiled
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.codegen.policy import GAIN, LAUNCH, LEAST_GAIN, gathered_cost
from refocus.codegen.readings import live_share
from refocus.codegen.runs import Run, Tiled
from refocus.evaluate import size_of
from refocus.ir import TRUE, Const, Region, Sym
from refocus.masks import Tiling, classify

_TILES = (128, 64, 32)
_MOST_TILES = 1 << 18  # of a map; beyond, looking at them costs more than they save
_FEW_ROWS = 16  # products of fewer rows cost as much
_EAGER = 5.0  # ns a pair, forward, compiled (see `refocus.codegen.policy`)
_CALL = 1e6  # ns: what runs one column of a run, forward and backward


def choose_training(
    region: Region, numbers: Mapping[Sym, int], was_sdpa: bool = False, written: Region | None = None
) -> Chosen | Leave:
    """As `choose_cpu`, where a backward will be asked for: only the tiled engine has one on CPU."""
    batch = math.prod(size_of(a.size, numbers) for a in region.batch)
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    plan = training_plan(region, numbers, written)
    leave = batch * queries * keys * (7.0 if was_sdpa else 17.0)
    if written is not None:
        leave = gathered_cost(written, numbers, trained=region)
    cost = _cost(region, plan.block_q, numbers, written) + LAUNCH
    sizes = f"{batch} heads x {queries} queries x {keys} keys"
    if cost > GAIN * leave or leave - cost < LEAST_GAIN:
        return Leave(f"needs gradients, and no engine with a backward is faster at {sizes}; engine='tiled' trains it")
    return Chosen(plan, f"about {leave / cost:.1f} times faster than leaving it, at {sizes}")


def choose_with_sums(region: Region, numbers: Mapping[Sym, int], written: Region | None = None) -> Chosen | Leave:
    """As `choose_cpu`, where the row sums are a result: only the tiled engine tells them on CPU. What it takes is no
    more than with a backward."""
    batch = math.prod(size_of(a.size, numbers) for a in region.batch)
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    plan = training_plan(region, numbers, written)
    leave = batch * queries * keys * _EAGER if written is None else gathered_cost(written, numbers)
    cost = _cost(region, plan.block_q, numbers, written) + LAUNCH
    sizes = f"{batch} heads x {queries} queries x {keys} keys"
    if cost > GAIN * leave or leave - cost < LEAST_GAIN:
        why = "its weights are no softmax" if isinstance(region.score, Const) else "its log-sum-exp is read"
        return Leave(f"{why}, and no engine that takes it is faster at {sizes}")
    return Chosen(plan, f"about {leave / cost:.1f} times faster than leaving it, at {sizes}")


def training_plan(region: Region, numbers: Mapping[Sym, int], written: Region | None = None) -> Plan:
    """Tiles of the portable engine for forward and backward: large enough for the products to outweigh the calls."""
    best = min(_TILES, key=lambda block: _cost(region, block, numbers, written))
    return Plan("tiled", block_q=best, block_k=best)


def _cost(region: Region, block: int, numbers: Mapping[Sym, int], written: Region | None) -> float:
    """ns of forward and backward in tiles of `block` x `block`."""
    batch = math.prod(size_of(a.size, numbers) for a in region.batch)
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    a_pair = (22.0 + 400.0 / block) * max(1.0, _FEW_ROWS / max(1, queries))
    if queries <= block and keys <= block:
        return batch * queries * keys * a_pair
    rows, columns = -(-queries // block), -(-keys // block)
    if region.mask.loads or rows * columns > _MOST_TILES:
        # What is loaded is guessed; tiles then form no runs.
        pairs = batch * queries * keys * live_share(region, block, block, numbers, written)
        return pairs * a_pair + pairs / tiled.TILE_ELEMENTS * _CALL if block == _TILES[0] else math.inf
    pairs, calls = _visited(region, block, numbers)
    return pairs * a_pair + calls * _CALL


def _visited(region: Region, block: int, numbers: Mapping[Sym, int]) -> tuple[float, float]:
    """How many pairs the runs hold, and in how many calls they are computed, over the whole batch."""
    batch = math.prod(size_of(a.size, numbers) for a in region.batch)
    cut = Tiled.of(region, block, block, numbers)
    if region.mask == TRUE:
        return float(batch * cut.queries * cut.keys), batch * cut.queries * cut.keys / tiled.TILE_ELEMENTS
    states = classify(region.mask, Tiling.of(region, block, block, {}, numbers)).state
    maps = states.reshape(-1, *states.shape[-2:])
    some = maps[:: -(-len(maps) // 16)]  # a few heads tell of the others
    heads = batch / len(some)
    pairs = calls = 0.0
    for state in some:
        runs = cut.runs(state)
        pairs += heads * sum(run.pairs for run in runs)
        calls += sum(_calls(run, heads) for run in runs)
    return pairs, calls


def _calls(run: Run, heads: float) -> float:
    """How often something is called for one run of so many heads."""
    if run.overlaps and run.queries * run.widest > tiled.WORTH_A_CALL:
        return heads * len(run.columns)
    return len(run.columns) * max(1.0, heads * run.queries * run.widest / tiled.TILE_ELEMENTS)
