"""The flash schedule, forward: online softmax over tiles of keys, one program for each tile of queries.

    row_max, row_sum, acc = -inf, 0, 0
    for each tile of keys that the mask does not empty:
        scores  = score(query, key)  where the mask keeps the pair, else -inf
        weight  = exp(scores - new row_max)
        row_sum = row_sum * exp(row_max - new row_max) + sum(weight)
        acc     = acc     * exp(row_max - new row_max) + (weight * gate) @ value
    output = acc / row_sum

Scores never leave the tile. Exponentials are of base two, and a constant factor of the score is folded into that
base's. Where a bias is loaded, which may hold a finite minimum as a mask, the difference to the maximum is taken before
the factor: a row of nothing but minima must come out as the mean of all values.

`write` returns the text of one Python file; nothing in it comes from a user's graph but numbers, and names that have
been checked to be plain identifiers.
"""

from __future__ import annotations

from refocus.codegen import listed
from refocus.codegen.flash_fit import dot_dtype, padded, width
from refocus.codegen.kernel_file import LOG2E, Source, kernel_file, precision
from refocus.codegen.plan import Plan
from refocus.codegen.positions import Positions
from refocus.codegen.printer import MUL, UNARY, Dots, Place, Scope, conjunction, split_scale
from refocus.codegen.writer import Block
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Region
from refocus.key_bounds import KeyBounds, key_bounds
from refocus.simplify import conjuncts, maximum, mul

COLUMN, ROW = "[:, None]", "[None, :]"
NAME = "flash_forward"
# The schedule's own variables, which no operand and no axis may take.
_OWN = (
    "BLOCK_Q", "BLOCK_K", "SCALE", "LOG2E", NAME, "out_ptr", "program", "tiles", "batch", "first", "last",
    "start", "key_start", "full_stop", "scores", "weight", "alpha", "shift", "row_max",
    "new_max", "row_sum", "acc", "row_top", "row_log", "row_bits", "sums_ptr",
    "empty", "logits", "logits_start", "logits_max", "logits_sum", "logits_acc", "extra",
    *listed.NAMES,
)  # fmt: skip


def write(region: Region, plan: Plan, wide: bool = False, saving: bool = False) -> Source:
    """The kernel of a region that `flash_fit.supports`. `wide`: addresses need more than 31 bits. `saving`: it stores
    the row sums that the backward needs, too."""
    return _Forward(region, plan, wide, saving).write()


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


class _Forward(Dots):
    def __init__(self, region: Region, plan: Plan, wide: bool, saving: bool) -> None:
        self.region, self.plan, self.saving = region, plan, saving
        self.scope = Scope(region, _OWN)
        self.body = Block()
        head, self.prologue = self.body.nested(), self.body.nested()
        self.root = Place(self.scope, self.prologue)
        self.columns = Place(self.scope, self.prologue, {region.query: COLUMN}, (self.root,))
        self.positions = Positions(self.scope, head, self.root, plan.block_q, plan.block_k, wide)
        self.value_lane = self.positions.lane(region.value, "e")
        self.value_lanes = padded(width(region.value) or 1)
        self.scale, self.score = split_scale(region.score)
        self.tame = tame(self.score)
        # Where the tiles of a product are computed, by the axes that it sums over; those of keys in the loop at hand.
        self.queries: dict[tuple[Axis, ...], Place] = {}
        self.keys: dict[tuple[Axis, ...], Place] = {}

    # ------------------------------------------------------------------------------------------------------ the file

    def write(self) -> Source:
        self._main(self.body.nested())
        tail = self.body.nested()
        if self.saving:
            tail.line()
            unit = 1 / LOG2E if self.tame else self.scale
            tail.line("row_top = row_max" if unit == 1.0 else f"row_top = row_max * {unit!r}")
        if marks_empty(self.region):
            self._empty_rows(tail)
        self._extra(tail)
        self._store(tail)
        self.positions.finish()
        plan = self.plan
        text = kernel_file(
            self.scope, self.body, NAME, "flash attention, forward", plan.block_q, plan.block_k, self.scale
        )
        return Source(NAME, text, self.scope.arguments)

    # ---------------------------------------------------------------------------------------------------- products

    def text(self, place: Place, dot: Dot) -> str:
        """tl.dot of the query tile, which stays, and the key tile, which is loaded at `place`."""
        dtype, lanes = dot_dtype(dot), padded(width(dot.over) or 1)
        self.positions.lane(dot.over, "d")
        inner = dict.fromkeys(dot.over, ROW)
        if dot.over not in self.queries:
            self.queries[dot.over] = Place(
                self.scope, self.prologue, {self.region.query: COLUMN, **inner}, (self.columns,)
            )
        query = self.queries[dot.over].tile(dot.query, dtype, f"[BLOCK_Q, {lanes}]", "query")
        key = self._key_place(place.block, dot.over).tile(dot.key, dtype, f"[BLOCK_K, {lanes}]", "key")
        return f"tl.dot({query}, tl.trans({key}){precision(dtype)})"

    def _key_place(self, block: Block, axes: tuple[Axis, ...]) -> Place:
        """Where tiles [key, axes] are computed in the loop whose body is `block`."""
        if axes not in self.keys:
            inner = dict.fromkeys(axes, ROW)
            fixed = Place(self.scope, self.prologue, inner, (self.root,))
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
        """The loops over keys: over tiles that the mask keeps whole, where they come first, and over the others."""
        body.line()
        body.line('row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
        body.line("row_sum = tl.zeros([BLOCK_Q], tl.float32)")
        body.line(f"acc = tl.zeros([BLOCK_Q, {self.value_lanes}], tl.float32)")
        if self.plan.listed:
            for block, mask in listed.loops(body, self.root, self.positions, self.plan):
                self._tile(self._inside(block, "start"), mask)
            return
        keys = self._keys()
        start = "0"
        if keys.lo is not None:
            start = "key_start"
            body.line(f"key_start = {self.root.text(keys.lo, MUL)} // BLOCK_K * BLOCK_K")
        stop = self.root.text(self.region.key.size if keys.hi is None else keys.hi)
        if keys.full_hi is not None:
            full_stop = "full_stop"
            if isinstance(keys.full_hi, Const):
                full_stop = str(keys.full_hi.value // self.plan.block_k * self.plan.block_k)
            else:
                body.line(f"full_stop = {self.root.text(keys.full_hi, MUL)} // BLOCK_K * BLOCK_K")
            body.line("# Tiles of which every key counts.")
            self._tile(self._open(body, "start", start, full_stop, unmasked=True), TRUE)
            start = full_stop
            body.line("# Tiles that are cut.")
        self._tile(self._open(body, "start", start, stop), self.region.mask)

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

    def _tile(self, place: Place, mask: Expr) -> None:
        """One tile of keys of the main loop."""
        block, region = place.block, self.region
        place.expect(self.score, mask, region.gate)
        self._scores(place, "scores", self.score)
        kept = [] if mask == TRUE else [place.text(part) for part in conjuncts(mask)]
        kept += place.guards((region.key,))
        if kept:
            block.line(f'scores = tl.where({conjunction(kept)}, scores, float("-inf"))')
        top = "tl.max(scores, 1) * SCALE" if self.tame else "tl.max(scores, 1)"
        block.line(f"new_max = tl.maximum(row_max, {top})")
        shift = "new_max"
        if mask != TRUE or not self.tame:
            shift = "shift"
            block.line('shift = tl.where(new_max == float("-inf"), 0.0, new_max)')
        if self.tame:
            block.line(f"weight = tl.exp2(scores * SCALE - {shift}[:, None])")
            block.line(f"alpha = tl.exp2(row_max - {shift})")
        else:
            block.line(f"weight = tl.exp2((scores - {shift}[:, None]) * SCALE)")
            block.line(f"alpha = tl.exp2((row_max - {shift}) * SCALE)")
        block.line("row_sum = row_sum * alpha + tl.sum(weight, 1)")
        self._accumulate(place, "acc")
        block.line("row_max = new_max")

    def _scores(self, place: Place, name: str, score: Expr) -> None:
        if not {self.region.query, self.region.key} <= score.axes:
            place.block.line(f"{name} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32) + {place.number(score, MUL)}")
        elif score.is_float:
            place.assign(name, score)
        else:
            place.block.line(f"{name} = {place.number(score)}")

    def _accumulate(self, place: Place, acc: str) -> None:
        """acc = acc * alpha + (weight * gate) @ value"""
        region, block = self.region, place.block
        if not (isinstance(region.gate, Const) and region.gate.value == 1.0):
            gated = f"weight * {place.number(region.gate, UNARY)}"
            guards = place.guards((region.key,))
            # Past the last key the weight is zero, but the gate may be anything.
            block.line(f"weight = tl.where({conjunction(guards)}, {gated}, 0.0)" if guards else f"weight = {gated}")
        dtype = region.values.dtype if region.values.dtype in ("float16", "bfloat16") else "float32"
        shape = f"[BLOCK_K, {self.value_lanes}]"
        value = self._key_place(block, region.value).tile(region.values, dtype, shape, "value")
        weight = "weight" if dtype == "float32" else f"weight.to(tl.{dtype})"
        block.line(f"{acc} = tl.dot({weight}, {value}, {acc} * alpha[:, None]{precision(dtype)})")

    # ------------------------------------------------------------------------------------------------------ the tail

    def _empty_rows(self, tail: Block) -> None:
        """Rows without a key: softmax over the fills of all keys, as eager code does."""
        region = self.region
        guards = Place(self.scope, tail, {region.query: ""}).guards((region.query,))
        tail.line()
        tail.line("# Rows that the mask leaves without a key: eager code takes the softmax of its fill values.")
        tail.line(f"empty = {conjunction(['row_sum == 0.0', *guards])}")
        block = tail.nested("if tl.max(empty.to(tl.int32), 0) == 1:")
        block.line('logits_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
        block.line("logits_sum = tl.zeros([BLOCK_Q], tl.float32)")
        block.line(f"logits_acc = tl.zeros([BLOCK_Q, {self.value_lanes}], tl.float32)")
        # A variable that a branch changes must keep its type; the other loop's may be wider.
        place = self._open(block, "logits_start", "0", self.root.text(region.key.size))
        place.expect(region.logits, region.gate)
        inner = place.block
        self._scores(place, "logits", region.logits)
        kept = place.guards((region.key,))
        if kept:
            inner.line(f'logits = tl.where({conjunction(kept)}, logits, float("-inf"))')
        inner.line("new_max = tl.maximum(logits_max, tl.max(logits, 1))")
        inner.line('shift = tl.where(new_max == float("-inf"), 0.0, new_max)')
        inner.line("weight = tl.exp2((logits - shift[:, None]) * LOG2E)")
        inner.line("alpha = tl.exp2((logits_max - shift) * LOG2E)")
        inner.line("logits_sum = logits_sum * alpha + tl.sum(weight, 1)")
        self._accumulate(place, "logits_acc")
        inner.line("logits_max = new_max")
        if region.extra:
            # In the units of row_max: of base two, or those of the score without its factor.
            unit = "logits_max * LOG2E" if self.tame else f"logits_max * {1 / self.scale!r}"
            block.line(f"row_max = tl.where(empty, {unit}, row_max)")
        if self.saving:
            block.line("row_top = tl.where(empty, logits_max, row_top)")
        block.line("row_sum = tl.where(empty, logits_sum, row_sum)")
        block.line("acc = tl.where(empty[:, None], logits_acc, acc)")

    def _extra(self, tail: Block) -> None:
        """Logits without a value: they take their share of the softmax, in units of base two."""
        region = self.region
        if not region.extra:
            return
        place = Place(self.scope, tail, {region.query: ""}, (self.root,))
        tail.line()
        tail.line("# Logits without a value.")
        if not self.tame:
            tail.line("row_max = row_max * SCALE")
        for extra in region.extra:
            place.expect(extra)
            if self.saving:
                tail.line(f"row_top = tl.maximum(row_top, {place.number(extra)})")
            tail.line(f"extra = {place.number(extra, MUL)} * LOG2E")
            tail.line("new_max = tl.maximum(row_max, extra)")
            tail.line("alpha = tl.exp2(row_max - new_max)")
            tail.line("row_sum = row_sum * alpha + tl.exp2(extra - new_max)")
            tail.line("acc = acc * alpha[:, None]")
            tail.line("row_max = new_max")

    def _store(self, tail: Block) -> None:
        region = self.region
        total = width(region.value) or 1
        tail.line()
        if region.empty_row == "zero":
            tail.line("row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # rows without a key are zero")
        tail.line("acc = acc / row_sum[:, None]")
        out = self.scope.argument("out_ptr", "output", dtype=region.out_dtype)
        row = f"{self.positions.query}{COLUMN}"
        if region.batch:
            row = f"(batch * {self.root.text(region.query.size, UNARY)} + {row})"
        guards = Place(self.scope, tail, {region.query: COLUMN}).guards((region.query,))
        if total != self.value_lanes:
            guards.append(f"{self.value_lane}{ROW} < {total}")
        masked = f", mask={conjunction(guards)}" if guards else ""
        narrow = "" if region.out_dtype == "float32" else f".to(tl.{region.out_dtype})"
        tail.line(f"tl.store({out} + {row} * {total} + {self.value_lane}{ROW}, acc{narrow}{masked})")
        if self.saving:
            self._store_sums(tail)

    def _store_sums(self, tail: Block) -> None:
        """The largest logit of each row, then the logarithm of the sum, both natural."""
        region = self.region
        tail.line()
        tail.line("# For the backward: the largest logit of a row, and log(sum(exp(logit - largest))).")
        tail.line("row_log = tl.log(row_sum)")
        if marks_empty(region):
            tail.line("# Its last bit marks the rows that were computed from their fills.")
            tail.line("row_bits = (tl.cast(row_log, tl.int32, bitcast=True) & -2) | tl.cast(empty, tl.int32)")
            tail.line("row_log = tl.cast(row_bits, tl.float32, bitcast=True)")
        sums = self.scope.argument("sums_ptr", "output", 1, dtype="float32")
        size = region.query.size
        row = self.positions.query
        if region.batch:
            row = f"batch * {self.root.text(size, UNARY)} + {row}"
        rows = self.root.text(mul(size, *(a.size for a in region.batch)), MUL)
        guards = Place(self.scope, tail, {region.query: ""}).guards((region.query,))
        masked = f", mask={conjunction(guards)}" if guards else ""
        tail.line(f"tl.store({sums} + {row}, row_top{masked})")
        tail.line(f"tl.store({sums} + {rows} + {row}, row_log{masked})")
