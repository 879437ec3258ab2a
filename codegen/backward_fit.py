"""What the generated backward sums up, in which kernel, and where it declines; and the tile sizes that it takes.

Every share of `refocus.codegen.cotangents` belongs to a tensor that is read at some positions. By what its index
depends on, its gradient is summed by

    keys       keys, not queries: k, v, a vector over keys      one program for each tile of keys
    queries    queries, not keys, or neither: q, slopes[h]      one program for each tile of queries
    pairs      both: bias[h,i,j]                                stored tile by tile, by the program of its queries;
                                                                where batch axes share it, by a program of its own,
                                                                which goes through these

to the positions that the region reads it at. What is then left to sum (a slope over the queries, a key over the heads
that share it) is linear in the sequence, and done by `refocus.codegen.triton_backward` in torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from refocus.codegen.cotangents import Cotangents, cotangents
from refocus.codegen.flash_fit import (
    OUT_DTYPES,
    all_dots,
    default_plan,
    dot_dtype,
    is_heavy,
    is_rich,
    no_larger,
    padded,
    supports,
    width,
)
from refocus.codegen.plan import Plan
from refocus.codegen.tile_lists import KEYS, PAIRS, QUERIES
from refocus.differentiate import NotDifferentiable, Share
from refocus.ir import TRUE, Axis, Const, Load, Region
from refocus.simplify import add, sub, substitute

DIAGONALS, MIXED = "diagonals", "mixed"


@dataclass(frozen=True)
class Gradient:
    """What flows back into one load, summed to the positions `axes` at which the region reads it.

    `place`: the load as a function of these positions. `over`: the axes along which it is a tile (those of a product,
    or the values'); None: one number a position. `loop`: KEYS, QUERIES, PAIRS, DIAGONALS or MIXED; `members`: the batch
    axes that a program of pairs goes through, which share the load. `ordinary`, `emptied`: its shares in pairs that the
    mask keeps, and in rows that it leaves no key; `extra`: those of the extra logits, with their number. `dtype`: that
    of the operand where this is all of its gradient, in the operand's order of axes (`direct`), else float32.
    """

    load: Load
    place: Load
    over: tuple[Axis, ...] | None
    loop: str
    members: tuple[Axis, ...]
    axes: tuple[Axis, ...]
    ordinary: tuple[Share, ...]
    emptied: tuple[Share, ...]
    extra: tuple[tuple[int, Share], ...]
    dtype: str = "float32"
    direct: bool = False


@lru_cache(maxsize=256)
def gradients(region: Region, wanted: frozenset[str]) -> tuple[Gradient, ...]:
    """All gradients of the wanted operands. Raises NotDifferentiable."""
    flows = cotangents(region, wanted)
    found: dict[tuple[Load, tuple[Axis, ...] | None, str], list[list[tuple[int, Share]]]] = {}
    for kind, number, share in _shares(region, flows):
        key = (share.load, _lanes(region, share), _loop(region, share))
        found.setdefault(key, [[], [], []])[kind].append((number, share))
    out = []
    for (load, over, loop), (ordinary, emptied, extra) in found.items():
        members = _members(region, load) if loop in (PAIRS, DIAGONALS, MIXED) else ()
        batch = tuple(a for a in region.batch if a not in members)
        place, own = load, {KEYS: (region.key,), QUERIES: (region.query,)}.get(loop, (region.query, region.key))
        if loop == DIAGONALS:
            place, own = by_difference(region, load) or load, (differences(region),)
        alone = sum(other[0].tensor == load.tensor for other in found) == 1
        order = _order(region, load, (*batch, *own, *(over or ()))) if alone and place == load else None
        shares = tuple(s for _, s in ordinary), tuple(s for _, s in emptied), tuple(extra)
        axes, dtype = order or (*batch, *own, *(over or ())), region.operand(load.tensor).dtype if order else "float32"
        out.append(Gradient(load, place, over, loop, members, axes, *shares, dtype, order is not None))
    return tuple(out)


def _shares(region: Region, flows: Cotangents) -> Iterable[tuple[int, int, Share]]:
    """(0: ordinary, 1: in rows without a key, 2: of an extra logit, its number; a share)"""
    always = (*flows.of_values, *flows.of_gate)
    yield from ((0, 0, share) for share in (*always, *flows.of_score))
    if region.empty_row == "logits" and region.mask != TRUE:
        of_logits = flows.of_logits if region.logits != region.score else flows.of_score
        yield from ((1, 0, share) for share in (*always, *of_logits))
    for number, shares in enumerate(flows.of_extra):
        yield from ((2, number, share) for share in shares)


def _lanes(region: Region, share: Share) -> tuple[Axis, ...] | None:
    if share.other is None:
        return None
    return share.over or region.value


def _loop(region: Region, share: Share) -> str:
    load = share.load
    if {region.query, region.key} <= load.axes:
        if all(a in load.index and sum(a in x.axes for x in load.index) == 1 for a in (region.query, region.key)):
            return PAIRS
        return MIXED if by_difference(region, load) is None else DIAGONALS
    if region.key in load.axes:
        return KEYS
    # What depends on neither is summed over the axis that the other side of its product depends on.
    other = share.other is not None and region.query not in load.axes and region.query in share.other.axes
    return KEYS if other else QUERIES


def differences(region: Region) -> Axis:
    """The values of query - key, in order: those of the first query and the last key come at zero."""
    return Axis("@difference", sub(add(region.query.size, region.key.size), 1))


@lru_cache(maxsize=256)
def by_difference(region: Region, load: Load) -> Load | None:
    """The load as a function of `differences`, where it is one: every query then reads it alike."""
    key = sub(add(region.query, region.key.size, -1), differences(region))
    found = substitute(load, {region.key: key})
    return found if isinstance(found, Load) and region.query not in found.axes else None


def _members(region: Region, load: Load) -> tuple[Axis, ...]:
    return tuple(a for a in region.batch if a not in load.axes and a.size != Const(1))


def _order(region: Region, load: Load, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes in the operand's order, where its elements are read once each; else None."""
    order: list[Axis] = []
    for index, size in zip(load.index, region.operand(load.tensor).shape):
        if isinstance(index, Axis) and index.size == size and index not in order:
            order.append(index)
        elif not (index == Const(0) and size == Const(1)):
            return None
    return tuple(order) if {a for a in axes if a.size != Const(1)} <= set(order) <= set(axes) else None


def supports_backward(region: Region, wanted: Collection[str]) -> str | None:
    """Why the generated kernels cannot differentiate this region with respect to these operands; None when they can."""
    reason = supports(region)
    if reason is not None:
        return reason
    try:
        found = gradients(region, frozenset(wanted))
    except NotDifferentiable as problem:
        return str(problem)
    for one in found:
        if region.operand(one.load.tensor).dtype not in OUT_DTYPES:
            return f"the gradient of {one.load.tensor!r} is {region.operand(one.load.tensor).dtype}"
        if not one.place.axes <= set(one.axes):
            return f"{one.load.tensor!r} is read at an axis over which its gradient would be summed"
    return None


# Widest product or value (padded) -> (block_q, block_k, num_warps) of the program of queries, of that of keys, and of
# that of shared pairs: large tiles that spill no registers on sm_80 and sm_90 (tests/test_triton_aot.py). The
# second entry is for regions that keep more in registers than one product and its mask, and for sizes that are symbols.
# float32 products run without tensor cores, which takes more registers.
_NARROW = {
    32: (((128, 64, 8), (64, 64, 4), (64, 32, 4)), ((64, 32, 4), (32, 32, 4), (64, 32, 4))),
    64: (((128, 64, 8), (64, 64, 4), (64, 32, 4)), ((64, 32, 4), (32, 64, 8), (64, 32, 4))),
    128: (((64, 64, 8), (64, 64, 8), (64, 32, 8)), ((64, 32, 8), (32, 64, 8), (64, 32, 8))),
    256: (((64, 32, 8), (32, 32, 8), (16, 16, 4)), ((32, 32, 8), (32, 32, 8), (16, 16, 4))),
    512: (((32, 32, 8), (32, 32, 8), (16, 16, 4)), ((16, 16, 4), (16, 16, 4), (16, 16, 4))),
}
_FLOAT32 = {
    32: (((32, 32, 8), (32, 32, 8), (32, 32, 8)), ((32, 32, 8), (16, 32, 8), (16, 32, 8))),
    64: (((32, 32, 8), (16, 32, 8), (16, 32, 8)), ((16, 32, 8), (16, 32, 8), (16, 32, 8))),
    128: (((32, 16, 8), (16, 32, 8), (16, 16, 8)), ((16, 16, 8), (16, 16, 8), (16, 16, 8))),
    256: (((16, 16, 8), (16, 16, 8), (16, 16, 8)), ((16, 16, 8), (16, 16, 8), (16, 16, 8))),
    512: (((16, 16, 8), (16, 16, 8), (16, 16, 8)), ((16, 16, 8), (16, 16, 8), (16, 16, 8))),
}


@lru_cache(maxsize=512)
def backward_plan(region: Region, plan: Plan, loop: str) -> Plan:
    """Tile sizes of one backward kernel: by width and dtype, no larger than the region, nor than those of `plan`, the
    forward's, where these are smaller than they would be by default."""
    dots = all_dots(region)
    widest = max([32, padded(width(region.value) or 1), *(padded(width(d.over) or 1) for d in dots)])
    narrow = all(dot_dtype(d) != "float32" for d in dots) and value_dtype(region) != "float32"
    rich = is_rich(region) or not all(isinstance(a.size, Const) for a in (region.query, region.key))
    rich = rich or (plan.listed and loop == KEYS)  # two loops, and two sums
    largest_q, largest_k, warps = (_NARROW if narrow else _FLOAT32)[widest][rich][{QUERIES: 0, KEYS: 1}.get(loop, 2)]
    warps = 8 if loop == QUERIES and (is_heavy(region) or (rich and plan.listed)) else warps
    block_q, block_k = no_larger(largest_q, region.query), no_larger(largest_k, region.key)
    usual = default_plan(region)
    block_q = min(block_q, plan.block_q) if plan.block_q < usual.block_q else block_q
    block_k = min(block_k, plan.block_k) if plan.block_k < usual.block_k else block_k
    own, largest = (block_k, largest_k) if loop == KEYS else (block_q, largest_q)
    if narrow and own < largest:
        warps = min(warps, max(1, own // 16))  # a warp multiplies 16 rows at a time
    found = Plan("triton", "flash", block_q, block_k, warps, 2, plan.listed)
    return square(found) if loop == DIAGONALS else found


def square(plan: Plan) -> Plan:
    """The largest square tiles that are no larger than the plan's: those of a diagonal."""
    side = min(plan.block_q, plan.block_k)
    return replace(plan, block_q=side, block_k=side)


def value_dtype(region: Region) -> str:
    """What the products of values and what flows back into the result are computed in."""
    narrow = region.values.dtype == region.out_dtype and region.out_dtype in ("float16", "bfloat16")
    return region.out_dtype if narrow else "float32"
