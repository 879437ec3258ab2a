"""Which regions the flash schedule fits, and the tile sizes it takes by default."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from refocus.codegen.placing import row_of
from refocus.codegen.plan import Plan
from refocus.codegen.tile_lists import pays
from refocus.ir import FALSE, TRUE, Axis, Call, Const, Dot, Expr, Reduce, Region

OPERAND_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
OUT_DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 512


def width(axes: Iterable[Axis]) -> int | None:
    """The number of lanes that `axes` flatten to, or None when it is not known at compile time."""
    sizes = [a.size.value if isinstance(a.size, Const) else None for a in axes]
    return None if None in sizes else int(prod(sizes))  # type: ignore[arg-type]


def padded(lanes: int) -> int:
    """The power of two (16 at least, for tensor cores) that holds so many lanes."""
    return max(16, 1 << (lanes - 1).bit_length())


def all_dots(region: Region) -> list[Dot]:
    """The distinct Dots of the region, those of its fills included."""
    return list(dict.fromkeys(n for e in region.expressions for n in e.walk() if isinstance(n, Dot)))


def dot_dtype(dot: Dot) -> str:
    """What tl.dot multiplies: the narrow dtype that both sides share, else float32. Sums are float32 always."""
    return dot.query.dtype if dot.query.dtype == dot.key.dtype and dot.query.dtype in OUT_DTYPES else "float32"


def supports(region: Region) -> str | None:
    """Why the flash schedule cannot run this region; None when it can."""
    if not region.operands:
        return "it reads no tensor"
    if region.normalizer != "softmax":
        return f"the flash schedule normalises with a softmax, not with {region.normalizer!r}"
    for operand in region.operands:
        if operand.dtype not in OPERAND_DTYPES:
            return f"operand {operand.name!r} is {operand.dtype}, which the kernel does not load"
    if region.out_dtype not in OUT_DTYPES:
        return f"the result is {region.out_dtype}; the kernel accumulates in float32"
    if region.mask == FALSE:
        return "the mask keeps nothing"
    for root in region.expressions:
        for node in root.walk():
            if isinstance(node, Reduce):
                return f"a reduction ({node.op}) over axis {node.axis.name!r} stands inside the region"
            if node.dtype == "float64":
                return "a part of it is computed in float64"
    if region.output is not None and row_of(region) is None:
        return "its values are to be put apart from one another"
    return _axes_problem(region) or _width_problem(region)


def _axes_problem(region: Region) -> str | None:
    batch, row = set(region.batch), {*region.batch, region.query}
    pair = row | {region.key}
    parts: list[tuple[str, Expr, set[Axis]]] = [
        ("the score", region.score, pair), ("the mask", region.mask, pair), ("the fills", region.logits, pair),
        ("the gate", region.gate, pair), ("the values", region.values, batch | {region.key, *region.value}),
        *(("an extra logit", extra, row) for extra in region.extra),
    ]  # fmt: skip
    for dot in all_dots(region):
        parts.append(("the query side of a product", dot.query, row | set(dot.over)))
        parts.append(("the key side of a product", dot.key, {*batch, region.key, *dot.over}))
        if not set(dot.over) <= dot.query.axes | dot.key.axes:
            return "a product sums over an axis that neither of its sides has"  # which its tiles would count padded
        if any(isinstance(n, Dot) for side in dot.children for n in side.walk()):
            return "a product stands inside another"
    for what, expr, allowed in parts:
        foreign = sorted(a.name for a in expr.axes - allowed)
        if foreign:
            return f"{what} must not depend on axis {', '.join(map(repr, foreign))}"
    if any(isinstance(n, Dot) for e in (region.values, *region.extra) for n in e.walk()):
        return "the values or an extra logit hold a product of their own"
    return None


def _width_problem(region: Region) -> str | None:
    lanes = [("the value", region.value), *(("a product of query and key", d.over) for d in all_dots(region))]
    owner: dict[Axis, tuple[Axis, ...]] = {}
    for what, axes in lanes:
        total = width(axes)
        if total is None:
            return f"the width of {what} is not known at compile time"
        if total > WIDEST:
            return f"{what} is {total} wide; the kernel holds {WIDEST} at most"
        if any(owner.setdefault(a, axes) != axes for a in axes):
            return "two products sum over the same axis in different ways"
    return None


# Widest product or value (padded) -> block_q, block_k, num_warps: large tiles that spill no registers on sm_80 and
# sm_90 (tests/test_triton_aot.py). The second entry is for regions that keep more in registers than scores and sums.
# float32 products run without tensor cores, which takes more registers.
_NARROW = {
    32: ((128, 64, 4), (64, 64, 4)), 64: ((128, 64, 8), (64, 64, 4)), 128: ((128, 64, 8), (64, 64, 8)),
    256: ((64, 32, 4), (32, 32, 4)), 512: ((32, 32, 4), (16, 32, 4)),
}  # fmt: skip
_FLOAT32 = {
    32: ((32, 32, 4), (32, 32, 8)), 64: ((64, 32, 8), (32, 32, 8)), 128: ((64, 16, 8), (32, 16, 8)),
    256: ((32, 16, 8), (16, 16, 8)), 512: ((16, 16, 8), (16, 16, 8)),
}  # fmt: skip


def default_plan(region: Region) -> Plan:
    """Tile sizes by width and dtype, and no larger than the region."""
    dots = all_dots(region)
    widest = max([32, padded(width(region.value) or 1), *(padded(width(d.over) or 1) for d in dots)])
    narrow = all(dot_dtype(d) != "float32" for d in dots) and region.values.dtype in ("float16", "bfloat16")
    largest, block_k, warps = (_NARROW if narrow else _FLOAT32)[widest][is_rich(region)]
    warps = 8 if is_heavy(region) else warps
    block_q, block_k = no_larger(largest, region.query), no_larger(block_k, region.key)
    if block_q < largest:
        warps = min(warps, max(1, block_q // 16))  # a warp multiplies 16 rows at a time
    return Plan("triton", "flash", block_q, block_k, warps, 2, pays(region, block_q, block_k))


def is_rich(region: Region) -> bool:
    """Whether a kernel computes fills, a gate, or something for each pair beyond a single product."""
    fills = region.empty_row == "logits" and region.mask != TRUE
    pairs = [n for n in region.score.walk() if {region.query, region.key} <= n.axes]
    plain = [n for n in pairs if isinstance(n, Call) and n.is_float and n.op in ("add", "mul", "div")]
    return fills or not isinstance(region.gate, Const) or len(pairs) - len(plain) > 1


# What a kernel computes for each pair, beyond products, before a tile is spread over more warps.
_HEAVY = 6


def is_heavy(region: Region) -> bool:
    """Whether so much is computed for each pair (a bucket, a mask of many parts) that it needs registers of its own."""
    pairs = {
        n for e in (region.score, region.mask, region.gate) for n in e.walk() if {region.query, region.key} <= n.axes
    }
    work = [n for n in pairs if isinstance(n, Call) and not (n.is_float and n.op in ("add", "sub", "mul", "div"))]
    return len(work) >= _HEAVY


def no_larger(block: int, axis: Axis) -> int:
    """A tile that is no larger than the axis needs."""
    return min(block, padded(int(axis.size.value))) if isinstance(axis.size, Const) else block
