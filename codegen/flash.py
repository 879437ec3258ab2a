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

import math
from collections.abc import Sequence
from dataclasses import dataclass

from refocus.codegen.flash_fit import all_dots, dot_dtype, padded, width
from refocus.codegen.functions import sources
from refocus.codegen.plan import Plan
from refocus.codegen.printer import ADD, MUL, UNARY, Argument, Dots, Place, Scope, conjunction, split_scale
from refocus.codegen.writer import Block
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Region
from refocus.key_bounds import KeyBounds, first_query, key_bounds, last_query
from refocus.simplify import conjuncts, maximum, mul, sub, substitute

LOG2E = math.log2(math.e)
COLUMN, ROW = "[:, None]", "[None, :]"
NAME = "flash_forward"
# The schedule's own variables, which no operand and no axis may take.
_OWN = (
    "BLOCK_Q", "BLOCK_K", "SCALE", "LOG2E", NAME, "out_ptr", "program", "tile", "tiles", "batch", "first", "last",
    "start", "key_start", "key_stop", "full_start", "full_stop", "scores", "weight", "alpha", "shift", "row_max",
    "new_max", "row_sum", "acc", "empty", "logits", "logits_max", "logits_sum", "logits_acc", "extra",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The text of a kernel file, and what to call the function `name` in it with."""

    name: str
    text: str
    arguments: tuple[Argument, ...]


def write(region: Region, plan: Plan, wide: bool = False) -> Source:
    """The kernel of a region that `flash_fit.supports`. `wide`: addresses need more than 31 bits."""
    return _Forward(region, plan, wide).write()


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
    def __init__(self, region: Region, plan: Plan, wide: bool) -> None:
        self.region, self.plan = region, plan
        self.cast = ".to(tl.int64)" if wide else ""
        self.scope = Scope(region, _OWN)
        self.body = Block()
        self.positions, self.prologue = self.body.nested(), self.body.nested()
        self.root = Place(self.scope, self.prologue)
        self.i = self.scope.declare(region.query, "query_index")
        self.j = self.scope.declare(region.key, "key_index")
        for n, axis in enumerate(region.batch):
            self.scope.declare(axis, f"batch_{n}")
        # Lanes: the variable of a flattened product or value, and its padded width.
        self.lanes: dict[tuple[Axis, ...], str] = {}
        self.scale, self.score = split_scale(region.score)
        self.tame = tame(self.score)
        self.value_lanes = padded(width(region.value) or 1)
        self.queries: dict[tuple[Axis, ...], Place] = {}
        self.keys: dict[tuple[Axis, ...], Place] = {}
        self._guard(region.query, self.i, plan.block_q)
        self._guard(region.key, self.j, plan.block_k)

    def _guard(self, axis: Axis, variable: str, block: int) -> None:
        if not (isinstance(axis.size, Const) and axis.size.value % block == 0):
            self.scope.limit(axis, variable, self.root.text(axis.size, ADD))

    # ------------------------------------------------------------------------------------------------------ the file

    def write(self) -> Source:
        region, body = self.region, self.body
        self._positions()
        value_lane = self._lane(region.value, "e")
        columns = Place(self.scope, self.prologue, {region.query: COLUMN}, (self.root,))
        self.columns = columns
        self._main(body.nested())
        tail = body.nested()
        if region.empty_row == "logits" and region.mask != TRUE:
            self._empty_rows(tail)
        self._extra(tail)
        self._store(tail, value_lane)
        self._batch()
        return Source(NAME, self._file(), self.scope.arguments)

    def _file(self) -> str:
        scope, plan = self.scope, self.plan
        text = Block()
        text.line("# Generated by refocus: flash attention, forward.")
        text.lines(f"#     {line}" for line in _notation(self.region))
        text.lines(("", "import triton", "import triton.language as tl", ""))
        text.line(f"BLOCK_Q = tl.constexpr({plan.block_q})")
        text.line(f"BLOCK_K = tl.constexpr({plan.block_k})")
        text.line(f"SCALE = tl.constexpr({self.scale * LOG2E!r})  # {self.scale:.6g} * log2(e)")
        if any("LOG2E" in line for line in self.body.render()):
            text.line(f"LOG2E = tl.constexpr({LOG2E!r})")
        for function in sources(scope.functions):
            text.lines(("", "", *function.split("\n")))
        text.lines(("", "", "@triton.jit", f"def {NAME}("))
        signature = text.nested()
        for kind in ("tensor", "output", "stride", "size"):
            names = [a.name for a in scope.arguments if a.kind == kind]
            signature.lines(f"    {', '.join(names[k : k + 6])}," for k in range(0, len(names), 6))
        text.line("):")
        return "\n".join((*text.render(), *self.body.render(1))) + "\n"

    # ------------------------------------------------------------------------------------------------- where we are

    def _positions(self) -> None:
        region, plan, at = self.region, self.plan, self.positions
        at.line("# One program: BLOCK_Q queries of one batch position.")
        program = f"tl.program_id(0){self.cast}"
        size = region.query.size
        self.tiled = not (isinstance(size, Const) and size.value <= plan.block_q)
        if not self.tiled:
            at.line(f"batch = {program}")
            self.batches = at.nested()
            at.line(f"{self.i} = tl.arange(0, BLOCK_Q)")
            return
        tiles = "tiles"
        if isinstance(size, Const):
            tiles = str(-(-size.value // plan.block_q))
        else:
            at.line(f"tiles = tl.cdiv({self.root.text(size)}, BLOCK_Q)")
        at.line(f"program = {program}")
        at.line(f"batch = program // {tiles}")
        at.line(f"first = program % {tiles} * BLOCK_Q")
        self.ends = at.nested()
        self.batches = at.nested()
        at.line(f"{self.i} = first + tl.arange(0, BLOCK_Q)")

    def _batch(self) -> None:
        """Decode the batch position, the last axis fastest; only the axes that the kernel mentions."""
        axes = [a for a in self.region.batch if a.size != Const(1)]
        for axis in self.region.batch:
            if axis not in self.scope.used_axes:
                continue
            name = self.scope.axes[axis]
            if axis not in axes:
                self.batches.line(f"{name} = 0")
                continue
            place = axes.index(axis)
            inner = mul(1, *(a.size for a in axes[place + 1 :]))
            text = "batch" if inner == Const(1) else f"batch // {self.root.text(inner, UNARY)}"
            self.batches.line(f"{name} = {text}" + (f" % {self.root.text(axis.size, UNARY)}" if place else ""))

    def _lane(self, axes: tuple[Axis, ...], otherwise: str) -> str:
        """The variable of the flattened positions along `axes`, padded to a power of two."""
        if axes in self.lanes:
            return self.lanes[axes]
        total = width(axes)
        assert total is not None
        lanes = padded(total)
        for n, axis in enumerate(axes):
            self.scope.declare(axis, f"{otherwise}_{n}")
        name = self.scope.axes[axes[0]] if len(axes) == 1 else self.scope.names.take("lane")
        self.positions.line(f"{name} = tl.arange(0, {lanes}){self.cast}")
        inner = total
        for n, axis in enumerate(axes if len(axes) > 1 else ()):
            inner //= axis.size.value  # type: ignore[attr-defined]
            text = name if inner == 1 else f"{name} // {inner}"
            self.positions.line(f"{self.scope.axes[axis]} = {text}" + (f" % {axis.size.value}" if n else ""))  # type: ignore[attr-defined]
        if lanes != total:
            for axis in axes:
                self.scope.limit(axis, name, str(total))
        self.lanes[axes] = name
        return name

    # ---------------------------------------------------------------------------------------------------- products

    def text(self, place: Place, dot: Dot) -> str:
        """tl.dot of the query tile, which stays, and the key tile, which is loaded at `place`."""
        dtype, lanes = dot_dtype(dot), padded(width(dot.over) or 1)
        self._lane(dot.over, "d")
        inner = dict.fromkeys(dot.over, ROW)
        if dot.over not in self.queries:
            self.queries[dot.over] = Place(
                self.scope, self.prologue, {self.region.query: COLUMN, **inner}, (self.columns,)
            )
        query = self.queries[dot.over].tile(dot.query, dtype, f"[BLOCK_Q, {lanes}]", "query")
        key = self._key_place(place.block, dot.over).tile(dot.key, dtype, f"[BLOCK_K, {lanes}]", "key")
        return f"tl.dot({query}, tl.trans({key}){_precision(dtype)})"

    def _key_place(self, block: Block, axes: tuple[Axis, ...]) -> Place:
        """Where tiles [key, axes] are computed in the loop whose body is `block`."""
        if axes not in self.keys:
            inner = dict.fromkeys(axes, ROW)
            fixed = Place(self.scope, self.prologue, inner, (self.root,))
            outer = (fixed, self.rows)
            self.keys[axes] = Place(self.scope, block, {self.region.key: COLUMN, **inner}, outer, True, self.unmasked)
        return self.keys[axes]

    def _open(self, parent: Block, start: str, stop: str, unmasked: bool = False) -> Place:
        """A loop over tiles of keys; returns the place of its [query, key] tiles."""
        block = parent.nested(f"for start in range({start}, {stop}, BLOCK_K):")
        block.line(f"{self.j} = start + tl.arange(0, BLOCK_K){self.cast}")
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
            self._tile(self._open(body, start, full_stop, unmasked=True), TRUE)
            start = full_stop
            body.line("# Tiles that are cut.")
        self._tile(self._open(body, start, stop), self.region.mask)

    def _keys(self) -> KeyBounds:
        """Which keys this tile of queries needs. `full_hi`: all keys below are kept by all its queries; None where
        that is not worth a loop of its own."""
        region, block = self.region, self.plan.block_k
        keys = key_bounds(region.mask, region.query, region.key, loads=True)
        lo, hi, full_hi = (None if e is None else self._here(e) for e in (keys.lo, keys.hi, keys.full_hi))
        few = isinstance(region.key.size, Const) and region.key.size.value < 4 * block
        whole = region.mask == TRUE and isinstance(region.key.size, Const) and region.key.size.value % block == 0
        if full_hi is None or keys.full_lo != Const(0) or lo is not None or few or whole:
            return KeyBounds(lo, hi)
        return KeyBounds(lo, hi, Const(0), maximum(full_hi, 0))

    def _here(self, bound: Expr) -> Expr:
        """A bound for a run of queries, for those of this program."""
        query = self.region.query
        first, last = first_query(query), last_query(query)
        if not self.tiled:
            return substitute(bound, {first: Const(0), last: sub(query.size, 1)})
        self.scope.axes[first], self.scope.axes[last] = "first", "last"
        if last in bound.axes and self.ends.empty:
            self.ends.line(f"last = tl.minimum(first + BLOCK_Q, {self.root.text(query.size)}) - 1")
        return bound

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
        if {self.region.query, self.region.key} <= score.axes:
            place.assign(name, score)
        else:
            place.block.line(f"{name} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32) + {place.text(score, MUL)}")

    def _accumulate(self, place: Place, acc: str) -> None:
        """acc = acc * alpha + (weight * gate) @ value"""
        region, block = self.region, place.block
        if not (isinstance(region.gate, Const) and region.gate.value == 1.0):
            gated = f"weight * {place.text(region.gate, UNARY)}"
            guards = place.guards((region.key,))
            # Past the last key the weight is zero, but the gate may be anything.
            block.line(f"weight = tl.where({conjunction(guards)}, {gated}, 0.0)" if guards else f"weight = {gated}")
        dtype = region.values.dtype if region.values.dtype in ("float16", "bfloat16") else "float32"
        shape = f"[BLOCK_K, {self.value_lanes}]"
        value = self._key_place(block, region.value).tile(region.values, dtype, shape, "value")
        weight = "weight" if dtype == "float32" else f"weight.to(tl.{dtype})"
        block.line(f"{acc} = tl.dot({weight}, {value}, {acc} * alpha[:, None]{_precision(dtype)})")

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
        place = self._open(block, "0", self.root.text(region.key.size))
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
            unit = "logits_max * LOG2E" if self.tame else f"logits_max * {1 / self.scale!r}"
            block.line(f"row_max = tl.where(empty, {unit if self.tame or self.scale != 1 else 'logits_max'}, row_max)")
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
            tail.line(f"extra = {place.text(extra, MUL)} * LOG2E")
            tail.line("new_max = tl.maximum(row_max, extra)")
            tail.line("alpha = tl.exp2(row_max - new_max)")
            tail.line("row_sum = row_sum * alpha + tl.exp2(extra - new_max)")
            tail.line("acc = acc * alpha[:, None]")
            tail.line("row_max = new_max")

    def _store(self, tail: Block, lane: str) -> None:
        region = self.region
        total = width(region.value) or 1
        tail.line()
        if region.empty_row == "zero":
            tail.line("row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # rows without a key are zero")
        tail.line("acc = acc / row_sum[:, None]")
        out = self.scope.argument("out_ptr", "output")
        row = f"{self.i}{COLUMN}"
        if region.batch:
            row = f"(batch * {self.root.text(region.query.size, UNARY)} + {row})"
        guards = Place(self.scope, tail, {region.query: COLUMN}).guards((region.query,))
        if total != self.value_lanes:
            guards.append(f"{lane}{ROW} < {total}")
        masked = f", mask={conjunction(guards)}" if guards else ""
        narrow = "" if region.out_dtype == "float32" else f".to(tl.{region.out_dtype})"
        tail.line(f"tl.store({out} + {row} * {total} + {lane}{ROW}, acc{narrow}{masked})")


def _precision(dtype: str) -> str:
    return ', input_precision="ieee"' if dtype == "float32" else ""


def _notation(region: Region) -> Sequence[str]:
    """The region in index notation, as lines that cannot end a comment."""
    try:
        from refocus.notation import notation
    except ImportError:
        text = repr(region)
    else:
        text = notation(region)
    return ["".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines()]
