"""Which regions are windows, what a program moves along, and how many programs share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod

from refocus.codegen import flash_fit
from refocus.codegen.flash_fit import all_dots, dot_dtype, padded, width
from refocus.codegen.key_tiles import marks_empty
from refocus.codegen.plan import Plan
from refocus.evaluate import size_of
from refocus.ir import Axis, Const, Load, Region, Sym

# Keys and queries of a window, at most; lanes of a product or a value; and windows from which on it pays. Of more keys,
# registers hold the scores of so few queries at once that a loop over tiles of keys reads less.
_MOST_KEYS, _MOST_QUERIES, _WIDEST, _MANY = 64, 256, 64, 256
# What is shared is shared by so many windows at least, else it is loaded for each.
_SHARED_BY = 4
_TYPICAL = 16  # positions along an axis whose size is not known
# Programs on a multiprocessor: more windows than these hold at once are looped over.
_PROGRAMS_EACH = 16
_MOST_PROGRAMS = 65535  # along the grid's second axis


def supports(region: Region, plan: Plan) -> str | None:
    """Why the windows schedule cannot run this region with this plan; None when it can."""
    if not region.batch:
        return "there is no batch axis, along which there could be several windows"
    if not isinstance(region.key.size, Const) or region.key.size.value > plan.block_k:
        return f"its keys are not known to fit into a tile of {plan.block_k}"
    return "its tiles are listed, of which there is but one" if plan.listed else None


@lru_cache(maxsize=512)
def members(region: Region) -> tuple[Axis, ...]:
    """The batch axes that a program moves along: those that no shared load of pairs depends on. Of loads that would
    leave too few windows the smallest are shared, and the others read for each window; all axes where none is."""
    pair = {region.query, region.key}
    loads = {x for e in (region.score, region.mask, region.gate) for x in e.loads if pair <= x.axes}
    shared: set[Axis] = set()
    for axes in sorted((_batch_of(region, x) for x in loads), key=lambda a: (_count(a), len(a))):
        if _count(a for a in region.batch if a not in shared | axes) >= _SHARED_BY:
            shared |= axes
    return tuple(a for a in region.batch if a not in shared)


def _batch_of(region: Region, load: Load) -> frozenset[Axis]:
    return load.axes & frozenset(region.batch)


def _count(axes: Iterable[Axis]) -> int:
    return prod(int(a.size.value) if isinstance(a.size, Const) else _TYPICAL for a in axes)


def suits(region: Region, numbers: Mapping[Sym, int]) -> bool:
    """Whether it is many small attentions, at these sizes. The kernel is right at any number of them."""
    if not all(isinstance(a.size, Const) for a in (region.query, region.key)):
        return False
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    # Fills and float32 products both take registers of their own.
    widest = _WIDEST // 2 if marks_empty(region) and not _is_narrow(region) else _WIDEST
    few = queries <= _MOST_QUERIES and keys <= _MOST_KEYS and _widest(region) <= widest
    return few and prod(size_of(a.size, numbers) for a in region.batch) >= _MANY


def windows_plan(region: Region) -> Plan:
    """All keys in a tile, and as many queries as registers hold scores of (tests/aot_resources.json)."""
    narrow = _is_narrow(region)
    keys = padded(int(region.key.size.value)) if isinstance(region.key.size, Const) else _MOST_KEYS
    scores = 4096 if narrow or _widest(region) <= 32 else 2048
    if marks_empty(region):
        scores = scores // (2 if narrow else 4)  # fills take registers of their own
    queries = flash_fit.no_larger(max(16, min(64, scores // keys)), region.query)
    warps = 1 if queries * keys < 1024 else 4 if narrow else 8
    return Plan("triton", "windows", queries, keys, warps, 1 if marks_empty(region) else 2)


def _is_narrow(region: Region) -> bool:
    dots = all_dots(region)
    return all(dot_dtype(d) != "float32" for d in dots) and region.values.dtype in ("float16", "bfloat16")


def _widest(region: Region) -> int:
    return max([width(region.value) or 1, *(width(d.over) or 1 for d in all_dots(region))])


def grid(region: Region, plan: Plan, sizes: Sequence[int], multiprocessors: int) -> tuple[int, int]:
    """Programs for tiles of what windows do not share, and those that share the windows: as many as the device runs at
    once, no more than there are windows."""
    numbers = dict(zip(region.syms, sizes, strict=True))
    moving = members(region)
    windows = prod(size_of(a.size, numbers) for a in moving)
    fixed = prod(size_of(a.size, numbers) for a in region.batch if a not in moving)
    tiles = fixed * -(-size_of(region.query.size, numbers) // plan.block_q)
    sharing = -(-_PROGRAMS_EACH * multiprocessors // max(1, tiles))
    return tiles, max(1, min(sharing, windows, _MOST_PROGRAMS))
