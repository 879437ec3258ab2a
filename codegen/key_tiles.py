"""What the forward schedules share: a tile of scores, its weights, and the loops over tiles.

    row_max, row_sum, acc = -inf, 0, 0
    for each tile of keys that the mask does not empty:
        scores  = score(query, key)  where the mask keeps the pair, else -inf
        weight  = exp(scores - new row_max)
        row_sum = row_sum * exp(row_max - new row_max) + sum(weight)
        acc     = acc     * exp(row_max - new row_max) + (weight * gate) @ value

Scores never leave the tile. Exponentials are of base two, and a constant factor of the score is folded into that
base's. Where a bias is loaded, which may hold a finite minimum as a mask, the difference to the maximum is taken before
the factor: a row of nothing but minima must come out as the mean of all values.

What becomes of a row once its sums are known is in `refocus.codegen.forward`; which tiles a program goes through, and
in what order, is a schedule's: `flash`, `decode`, `windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refocus.codegen import listed
from refocus.codegen.flash_fit import dot_dtype, padded, width
from refocus.codegen.kernel_file import precision
from refocus.codegen.placing import row_of
from refocus.codegen.plan import Plan
from refocus.codegen.positions import Positions
from refocus.codegen.printer import MUL, UNARY, Dots, Place, Scope, conjunction, split_scale
from refocus.codegen.writer import Block
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Region
from refocus.key_bounds import KeyBounds, key_bounds
from refocus.simplify import conjuncts, maximum

COLUMN, ROW = "[:, None]", "[None, :]"
# The schedules' own variables, which no operand and no axis may take.
_OWN = (
    "BLOCK_Q", "BLOCK_K", "SCALE", "LOG2E", "out_ptr", "program", "tiles", "batch", "first", "last",
    "start", "key_start", "full_stop", "scores", "weight", "alpha", "shift", "row_max",
    "new_max", "row_sum", "acc", "row_top", "row_log", "row_bits", "sums_ptr",
    "empty", "logits", "logits_start", "logits_max", "logits_sum", "logits_acc", "extra",
    *listed.NAMES,
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """A loop over tiles of keys, from `start` to `stop`, both texts: `mask` is what it is there, and `unmasked` says
    that all keys are in range. `note`: a comment, or nothing."""

    start: str
    stop: str
    mask: Expr
    unmasked: bool = False
    note: str = ""


def marks_empty(region: Region) -> bool:
    """Whether rows may be computed from their fills. The last bit of the second of a row's sums then tells which."""
    return region.empty_row == "logits" and region.mask != TRUE


def tame(score: Expr) -> bool:
    """Whether the score is made of products alone, so that its size is that of numbers, not that of fills."""

    def visit(node: Expr) -> bool:
        if isinstance(node, Dot):
            return True
        if isinstance(node, Load) and node.dtype.startswith(("float", "bfloat")):
            return False
        if isinstance(node, Const):
            return not node.is_float or abs(node.value) < 1e30
        return all(visit(c) for c in node.children)

    return visit(score)


def placed_row(place: Place, region: Region) -> str:
    """The number of the row of values that each query's result is, where `region.output` says: an operand of a product,
    with the queries as they are laid out at the place."""
    row = row_of(region)
    assert row is not None, "flash_fit.supports"
    text = place.named(row, "placed")
    if region.query in row.axes:
        return text
    # A tile has a lane for each query, though there be only one, which is number zero.
    return f"({text} + {place.text(region.query)})"


class KeyTiles(Dots):
    """A program with a tile of queries, and what it does with tiles of keys. `saving`: it stores the row sums that the
    backward needs, too. `own`: a schedule's names, besides those that all have. `members`: batch axes along which a
    program moves."""

    def __init__(
        self, region: Region, plan: Plan, wide: bool, saving: bool, own: Sequence[str], members: Sequence[Axis] = ()
    ) -> None:
        self.region, self.plan, self.saving = region, plan, saving
        self.scope = Scope(region, (*_OWN, *own))
        self.body = Block()
        head, self.prologue = self.body.nested(), self.body.nested()
        # What stays the same for all tiles of keys is computed in `setup`.
        self.setup, self.in_loop, moving = self.prologue, False, frozenset(members)
        self.root = Place(self.scope, self.prologue, unknown=moving)
        self.columns = Place(self.scope, self.prologue, {region.query: COLUMN}, (self.root,), unknown=moving)
        batch = tuple(a for a in region.batch if a not in moving)
        flat, whose = ("point", "of several windows") if moving else ("batch", "of one batch position")
        self.positions = Positions(
            self.scope, head, self.root, plan.block_q, plan.block_k, wide, batch=batch, flat=flat, whose=whose
        )
        self.value_lane = self.positions.lane(region.value, "e")
        self.value_lanes = padded(width(region.value) or 1)
        self.scale, self.score = split_scale(region.score)
        self.tame = tame(self.score)
        # Where the tiles of a product are computed, by the axes that it sums over; those of keys in the loop at hand.
        self.queries: dict[tuple[Axis, ...], Place] = {}
        self.keys: dict[tuple[Axis, ...], Place] = {}

    # ---------------------------------------------------------------------------------------------------- products

    def text(self, place: Place, dot: Dot) -> str:
        """tl.dot of the query tile, which stays, and the key tile, which is loaded at `place`."""
        dtype, lanes = dot_dtype(dot), padded(width(dot.over) or 1)
        self.positions.lane(dot.over, "d")
        inner = dict.fromkeys(dot.over, ROW)
        if dot.over not in self.queries:
            self.queries[dot.over] = Place(
                self.scope, self.setup, {self.region.query: COLUMN, **inner}, (self.columns,), self.in_loop
            )
        query = self.queries[dot.over].tile(dot.query, dtype, f"[BLOCK_Q, {lanes}]", "query")
        key = self._key_place(place.block, dot.over).tile(dot.key, dtype, f"[BLOCK_K, {lanes}]", "key")
        return f"tl.dot({query}, tl.trans({key}){precision(dtype)})"

    def _key_place(self, block: Block, axes: tuple[Axis, ...]) -> Place:
        """Where tiles [key, axes] are computed in the loop whose body is `block`."""
        if axes not in self.keys:
            inner = dict.fromkeys(axes, ROW)
            fixed = Place(self.scope, self.setup, inner, (self.root,), self.in_loop)
            outer = (fixed, self.rows)
            self.keys[axes] = Place(self.scope, block, {self.region.key: COLUMN, **inner}, outer, True, self.unmasked)
        return self.keys[axes]

    def _open(self, parent: Block, at: str, start: str, stop: str, unmasked: bool = False) -> Place:
        """A loop over tiles of keys that begin at the variable `at`; returns the place of its [query, key] tiles."""
        block = parent.nested(f"for {at} in range({start}, {stop}, BLOCK_K):")
        return self._inside(block, at, unmasked)

    def _inside(self, block: Block, at: str, unmasked: bool = False) -> Place:
        """The place of the tiles that begin at the variable `at`, in the body of a loop."""
        block.line(f"{self.positions.key} = {at} + tl.arange(0, BLOCK_K){self.positions.cast}")
        key = self.region.key
        self.scope.names.next_loop()
        self.unmasked = frozenset((key,)) if unmasked else frozenset()
        self.keys = {}
        self.rows = Place(self.scope, block, {key: COLUMN}, (self.root,), True, self.unmasked)
        layout = {self.region.query: COLUMN, key: ROW}
        return Place(self.scope, block, layout, (self.columns,), True, self.unmasked, self)

    # ----------------------------------------------------------------------------------------------------- the loops

    def _main(self, body: Block) -> None:
        """The sums of a row, and the loops over tiles of keys: of those that the mask keeps whole, where they come
        first, and of the others."""
        self._start(body)
        if self.plan.listed:
            for block, mask in listed.loops(body, self.root, self.positions, self.plan, self._share):
                self._tile(self._inside(block, "start"), mask)
            return
        ranges = self._ranges(body)
        ends = self._share(body, [(r.start, r.stop) for r in ranges], "BLOCK_K")
        for one, (start, stop) in zip(ranges, ends):
            body.lines((one.note,) if one.note else ())
            self._tile(self._open(body, "start", start, stop, one.unmasked), one.mask)

    def _start(self, body: Block) -> None:
        body.line()
        body.line('row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
        body.line("row_sum = tl.zeros([BLOCK_Q], tl.float32)")
        body.line(f"acc = tl.zeros([BLOCK_Q, {self.value_lanes}], tl.float32)")

    def _share(self, body: Block, ranges: list[listed.Ends], tile: str) -> list[listed.Ends]:
        """What this program does of these adjacent ranges, in which tiles are so far apart: here, all."""
        return ranges

    def _ranges(self, body: Block) -> list[Range]:
        keys = self._keys()
        start = "0"
        if keys.lo is not None:
            start = "key_start"
            body.line(f"key_start = {self.root.text(keys.lo, MUL)} // BLOCK_K * BLOCK_K")
        stop = self.root.text(self.region.key.size if keys.hi is None else keys.hi)
        if keys.full_hi is None:
            return [Range(start, stop, self.region.mask)]
        full_stop = "full_stop"
        if isinstance(keys.full_hi, Const):
            full_stop = str(keys.full_hi.value // self.plan.block_k * self.plan.block_k)
        else:
            body.line(f"full_stop = {self.root.text(keys.full_hi, MUL)} // BLOCK_K * BLOCK_K")
        return [
            Range(start, full_stop, TRUE, True, "# Tiles of which every key counts."),
            Range(full_stop, stop, self.region.mask, False, "# Tiles that are cut."),
        ]

    def _keys(self) -> KeyBounds:
        """Which keys this tile of queries needs. `full_hi`: all keys below are kept by all its queries; None where
        that is not worth a loop of its own."""
        region, block = self.region, self.plan.block_k
        keys = key_bounds(region.mask, region.query, region.key, loads=True)
        lo, hi, full_hi = (None if e is None else self.positions.here(e) for e in (keys.lo, keys.hi, keys.full_hi))
        few = isinstance(region.key.size, Const) and region.key.size.value < 4 * block
        whole = region.mask == TRUE and isinstance(region.key.size, Const) and region.key.size.value % block == 0
        if full_hi is None or keys.full_lo != Const(0) or lo is not None or few or whole:
            return KeyBounds(lo, hi)
        return KeyBounds(lo, hi, Const(0), maximum(full_hi, 0))

    # -------------------------------------------------------------------------------------------------- one tile of it

    def _tile(self, place: Place, mask: Expr) -> None:
        """One tile of keys of the main loop."""
        block, region = place.block, self.region
        place.expect(self.score, mask, region.gate)
        kept = self._masked_scores(place, mask)
        top = "tl.max(scores, 1) * SCALE" if self.tame else "tl.max(scores, 1)"
        block.line(f"new_max = tl.maximum(row_max, {top})")
        shift = self._weigh(block, "new_max", mask != TRUE)
        block.line(f"alpha = {self._power('row_max', shift)}")
        block.line("row_sum = row_sum * alpha + tl.sum(weight, 1)")
        self._accumulate(place, "acc", kept=kept)
        block.line("row_max = new_max")

    def _masked_scores(self, place: Place, mask: Expr) -> str | None:
        """The scores of a tile; and under which name it is known which of them are kept, where a gate needs that."""
        self._scores(place, "scores", self.score)
        kept = [] if mask == TRUE else [place.text(part) for part in conjuncts(mask)]
        kept += place.guards((self.region.key,))
        if not kept:
            return None
        counts, named = conjunction(kept), mask != TRUE and self._gated
        if named:
            place.block.line(f"kept = {counts}")
            counts = "kept"
        place.block.line(f'scores = tl.where({counts}, scores, float("-inf"))')
        return counts if named else None

    @property
    def _gated(self) -> bool:
        return not (isinstance(self.region.gate, Const) and self.region.gate.value == 1.0)

    def _weigh(self, block: Block, top: str, emptied: bool) -> str:
        """The weights of a tile, against the maximum `top` of each row, where it is `emptied` of all keys, zeros.
        Returns what they were shifted by."""
        shift = top
        if emptied or not self.tame:
            shift = "shift"
            block.line(f'shift = tl.where({top} == float("-inf"), 0.0, {top})')
        if self.tame:
            block.line(f"weight = tl.exp2(scores * SCALE - {shift}[:, None])")
        else:
            block.line(f"weight = tl.exp2((scores - {shift}[:, None]) * SCALE)")
        return shift

    def _power(self, larger: str, shift: str) -> str:
        """exp(larger - shift) of two maxima, which are in units of base two, or those of the score without its
        factor."""
        return f"tl.exp2({larger} - {shift})" if self.tame else f"tl.exp2(({larger} - {shift}) * SCALE)"

    def _scores(self, place: Place, name: str, score: Expr) -> None:
        if not {self.region.query, self.region.key} <= score.axes:
            place.block.line(f"{name} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32) + {place.number(score, MUL)}")
        elif score.is_float:
            place.assign(name, score)
        else:
            place.block.line(f"{name} = {place.number(score)}")

    def _accumulate(self, place: Place, acc: str, afresh: bool = False, kept: str | None = None) -> None:
        """acc = acc * alpha + (weight * gate) @ value, or the product alone. `kept`: which keys count, by name."""
        region, block = self.region, place.block
        if self._gated:
            gated = f"weight * {place.number(region.gate, UNARY)}"
            guards = place.guards((region.key,))
            counts = kept or (conjunction(guards) if guards else None)
            # Of what is left out, and past the last key, the weight is zero, but the gate may be anything.
            block.line(f"weight = tl.where({counts}, {gated}, 0.0)" if counts else f"weight = {gated}")
        dtype = region.values.dtype if region.values.dtype in ("float16", "bfloat16") else "float32"
        shape = f"[BLOCK_K, {self.value_lanes}]"
        value = self._key_place(block, region.value).tile(region.values, dtype, shape, "value")
        weight = "weight" if dtype == "float32" else f"weight.to(tl.{dtype})"
        before = "" if afresh else f", {acc} * alpha[:, None]"
        block.line(f"{acc} = tl.dot({weight}, {value}{before}{precision(dtype)})")
