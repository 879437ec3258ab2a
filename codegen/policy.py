"""Which engine runs a region fastest on a CPU, or whether to leave it as it is: a cost model drawn from measurements.

The figures come from `benchmarks/engines_cpu.py --clock cpu` (one core with AVX-512, float32, torch 2.13), in
nanoseconds for each (query, key) pair of each head that is visited. Only their ratios matter. With d the width of a
head, of the pairs:

                      visited                     ns a pair     d=16   d=32   d=64   d=128
    eager, compiled   all                         3.8 + d/24     4.3    5.1    7.0    9.0    (half in cache)
    SDPA              all, or half if causal      0.9 + d/25     1.4    2.3    3.4    6.0
    SDPA + mask       all                         1.5 + d/25     2.0    2.7    4.1    7.3
    cpp, 64 x 64      tiles that are not empty    1.7 + d/30     2.2    2.9    3.8    5.9
    cpp, 128 x 128    tiles that are not empty    7% less
    cpp, 32 x 32      tiles that are not empty    25% more

So PyTorch's kernel is never much worse on dense and causal regions, and needs no compilation; a bias or a half-empty
mask already favours cpp; and a window of 256 in 4096 tokens is 24 times faster than compiled eager code and 14 times
faster than SDPA with the mask written out. Tiles below 64 x 64 lose as much in the products as they save (16 x 64 to
32 x 32 within 5% of 64 x 64 on that window, 20% slower on a causal region); above 128 x 128 sparsity is lost.

One query (decoding) costs the reading of keys and values: SDPA is 1.3 to 1.6 times faster than eager code, and 6 times
where eager code repeats grouped keys. Below some 10^5 pairs every way takes the same tenth of a millisecond.

Compiling a cpp kernel takes 2 to 5 seconds for each distinct region and layout (once per machine: Inductor caches it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from refocus import debug
from refocus.codegen import cpp, sdpa
from refocus.codegen.heads import Fitted, fit
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.codegen.readings import live_share, pairs_of
from refocus.evaluate import size_of
from refocus.ir import TRUE, Call, Expr, Load, Region, Sym

# Tiles of the cpp engine, and how its cost for a pair compares.
_TILES = (((32, 32), 1.25), ((64, 64), 1.0), ((128, 128), 0.93))
_FEW_QUERIES = 16
# Scores that stay in the last cache (32 MiB of float32) cost eager code about half: a padded encoder of 1024 tokens
# and 4 heads ran at 3.6 ns a pair, and lost to cpp's 3.8 end to end.
_CACHED_PAIRS = 1 << 23
_NS_A_BYTE = 0.03
_SCATTER = 2.2  # ns to add one element to where it was copied from
LAUNCH = 60e3  # ns: the operator, Inductor's wrapper, making views
_TILE = 1.5e3  # ns: reading the lists of one query tile
_LARGEST_MASK = 64 << 20  # bytes that a written-out mask may take
GAIN = 0.9  # less than a tenth is noise, and not worth a compilation
LEAST_GAIN = 0.2e6  # ns: nor is less than this, which the figures above do not resolve
_SLOW = frozenset(("exp", "log", "tanh", "sigmoid", "erf", "pow", "sin", "cos", "exp2", "log2", "atan", "softplus"))


@dataclass(frozen=True)
class Work:
    """The sizes that decide: `pairs` over all heads, `rows` of keys over all key heads, in elements."""

    pairs: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    value_width: int

    @property
    def reading(self) -> float:
        """ns to read all keys and values once."""
        return self.key_heads * self.keys * (self.width + self.value_width) * 4 * _NS_A_BYTE


def choose_cpu(
    region: Region, numbers: Mapping[Sym, int], was_sdpa: bool = False, written: Region | None = None
) -> Chosen | Leave:
    """The engine that should run `region` at these sizes, with its tiles, or the advice to leave it.

    `was_sdpa`: the model calls PyTorch's attention here itself, so that leaving it costs what that costs. `written`:
    what the model computes there, if not over the same axes (keys gathered for each query).
    """
    fitted = fit(region)
    if isinstance(fitted, str):
        return Leave(f"no CPU engine takes it: {fitted}")
    work = _work(fitted, numbers)
    costs: dict[str, float] = {}
    leave = _eager_cost(work) if written is None else gathered_cost(written, numbers)
    # Read as it is written, the copies are made for our kernels, too.
    copied = written is region
    copying = 2 * work.reading if copied else 0.0
    # Where keys and values differ in width, PyTorch computes the scores densely.
    if sdpa.supports(region) is None and work.width == work.value_width and not debug.disabled("sdpa"):
        cost = _sdpa_cost(region, work, numbers) + copying
        if was_sdpa:
            leave = cost
        elif not _writes_mask(region) or _mask_bytes(region, work, numbers) <= _LARGEST_MASK:
            costs["sdpa"] = cost
    blocks = (64, 64)
    why_not = debug.off("cpp") if debug.disabled("cpp") else cpp.supports(region)
    if why_not is None:
        cost, blocks = _cpp_cost(fitted, work, numbers, None if copied else written)
        costs["cpp"] = cost + copying
    if not costs:
        return Leave(f"no engine is faster: {why_not}")
    engine = "sdpa" if costs.get("sdpa", math.inf) * GAIN <= costs.get("cpp", math.inf) else "cpp"
    if costs[engine] > GAIN * leave or leave - costs[engine] < LEAST_GAIN:
        return Leave(f"no engine is faster at {_sizes(work)}")
    reason = f"about {leave / costs[engine]:.1f} times faster than leaving it, at {_sizes(work)}"
    return Chosen(Plan(engine, block_q=blocks[0], block_k=blocks[1]), reason)


def _sizes(work: Work) -> str:
    return f"{work.heads} heads x {work.queries} queries x {work.keys} keys x {work.width}"


def _work(fitted: Fitted, numbers: Mapping[Sym, int]) -> Work:
    region = fitted.region
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    heads = math.prod(size_of(a.size, numbers) for a in region.batch)
    shared = (*fitted.outer, *fitted.keys) if fitted.keys_batched else fitted.keys
    width = sum(math.prod(size_of(a.size, numbers) for a in p.over) for p in fitted.products)
    value_width = math.prod(size_of(a.size, numbers) for a in region.value)
    key_heads = math.prod(size_of(a.size, numbers) for a in shared)
    return Work(heads * queries * keys, queries, keys, heads, key_heads, width, value_width)


def _eager_cost(work: Work) -> float:
    cached = 0.55 if work.pairs <= _CACHED_PAIRS else 1.0
    copied = 3 * work.heads / work.key_heads if work.heads > work.key_heads else 0.5  # keys and values, or the scores
    return work.pairs * (3.8 + work.width / 24) * cached + work.reading * (1 + copied)


def gathered_cost(region: Region, numbers: Mapping[Sym, int], trained: Region | None = None) -> float:
    """As `_eager_cost`, where keys and values are gathered for each query or block of queries. `trained`: with the
    backward, of the same attention over axes without copies.

    Inductor fuses products of one row with the gather: forward it takes 3.5 to 7.5 ns a pair (d=64), but its backward
    scatters every gathered element, which with the rest takes 265 to 330 ns a pair. Blocks are copied and multiplied:
    8 ns a pair, 11 to 18 with the backward (4096 tokens, window 64, one core, `benchmarks/windows.py`), which for a few
    rows of queries again is less than what scattering takes."""
    pairs, copied = pairs_of(region, numbers), _keys_and_values(region, numbers)
    width = copied / max(1, pairs) * size_of(region.query.size, numbers)
    if size_of(region.query.size, numbers) == 1:
        return pairs * width * (0.045 if trained is None else _SCATTER)
    computed = pairs * (3.8 + width / 48)
    if trained is not None:
        computed = computed * 2.0 + max(0, copied - _keys_and_values(trained, numbers)) * _SCATTER
    return computed + copied * 4 * _NS_A_BYTE * 3


def _keys_and_values(region: Region, numbers: Mapping[Sym, int]) -> int:
    """Elements on the keys' side of all products."""
    sides = [region.values, *(dot.key for dot in region.dots)]
    return sum(math.prod(size_of(a.size, numbers) for a in side.axes) for side in sides)


def _sdpa_cost(region: Region, work: Work, numbers: Mapping[Sym, int]) -> float:
    if sdpa.plain(region):
        visited = work.pairs * (1.0 if region.mask == TRUE else 0.55 if work.keys >= 2048 else 0.75)
        return visited * (0.9 + work.width / 25) + work.reading
    written = _mask_bytes(region, work, numbers) * _NS_A_BYTE * 2 if _writes_mask(region) else 0.0
    checked = LAUNCH if region.empty_row == "logits" else 0.0  # then it runs inside the operator
    return work.pairs * (1.5 + work.width / 25) + work.reading + written + checked


def _writes_mask(region: Region) -> bool:
    """Whether an additive tensor must be made for PyTorch: a bias that lies in memory is one already."""
    return not sdpa.plain(region) and (region.mask != TRUE or not isinstance(sdpa.bias(region), Load))


def _mask_bytes(region: Region, work: Work, numbers: Mapping[Sym, int]) -> int:
    axes = (a for group in sdpa.bias_axes(region) for a in group)
    return math.prod(size_of(a.size, numbers) for a in axes) * work.queries * work.keys * 4


def _cpp_cost(
    fitted: Fitted, work: Work, numbers: Mapping[Sym, int], written: Region | None
) -> tuple[float, tuple[int, int]]:
    region = fitted.region
    each = 1.7 + work.width / 30 + _function_cost(fitted.score)
    # Keys and values that are no plain reads are gathered first, outside of what Inductor fuses.
    gathered = sum(not isinstance(e, Load) for p in fitted.products for e in (p.query, p.key))
    fixed = LAUNCH + gathered * work.reading
    best = math.inf, (64, 64)
    tiles = _TILES if work.queries > _FEW_QUERIES else (((16, 128), 1.0),)
    for (block_q, block_k), factor in tiles:
        live = live_share(region, block_q, block_k, numbers, written)
        rows = work.heads * -(-work.queries // block_q)
        cost = fixed + work.pairs * live * each * factor + work.reading * live + rows * _TILE
        best = min(best, (cost, (block_q, block_k)))
    return best


def _function_cost(score: Expr | None) -> float:
    """ns a pair for what score_mod computes: a gathered load is one, a transcendental function somewhat more."""
    if score is None:
        return 0.0
    nodes = list(score.walk())
    loads = sum(isinstance(n, Load) and bool(n.index) for n in nodes)
    return loads * 1.1 + sum(isinstance(n, Call) and n.op in _SLOW for n in nodes) * 1.2
