"""One tile of pairs of a backward kernel: from the score to what flows back into each operand.

A tile has the axis along its rows that its program has a tile of (`own`): queries where a query's gradient is summed,
keys where a key's is. So no product needs to be turned around,

    own = queries      scores = query @ key.T       query_grad += back @ key
    own = keys         scores = key @ query.T       key_grad   += back @ query

and whatever is computed for a pair is printed the same way, with its two axes laid out the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus.codegen import listed
from refocus.codegen.backward_fit import Gradient, value_dtype
from refocus.codegen.cotangents import Cotangents
from refocus.codegen.flash_fit import OUT_DTYPES, dot_dtype, padded, width
from refocus.codegen.kernel_file import Source, kernel_file, precision
from refocus.codegen.key_tiles import COLUMN, ROW, marks_empty, placed_row, tame
from refocus.codegen.plan import Plan
from refocus.codegen.positions import Positions
from refocus.codegen.printer import ADD, ATOM, MUL, Dots, Place, Scope, conjunction, split_scale, where_kept
from refocus.codegen.tile_lists import KEYS, QUERIES
from refocus.codegen.writer import Block
from refocus.differentiate import Share
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Region
from refocus.simplify import add, conjuncts, mul

# The schedule's own variables, which no operand and no axis may take.
_OWN = (
    "BLOCK_Q", "BLOCK_K", "SCALE", "LOG2E", "queries_backward", "keys_backward", "pairs_backward", "grad_ptr",
    "sums_ptr", "delta_ptr", "program", "tiles", "batch", "first", "last", "start", "begin", "cut_stop", "full_start",
    "full_stop", "scores", "weight", "gated", "back", "gate_back", "row_max", "log_sum", "shift", "delta", "empty",
    "empty_start", "extra", "extra_back", "point", "member", "step", "key_first", "kept", "gate",
    "diagonals_backward", "diagonals", "diagonal", "begin_row", "steps", "row", "along", "place", *listed.NAMES,
)  # fmt: skip


class Pairs(Dots):
    """Tiles of pairs: rows along the axis that the program has a tile of (`own`), columns along the `other`."""

    positions_of = Positions

    def __init__(
        self, region: Region, flows: Cotangents, gradients: Sequence[Gradient], plan: Plan, wide: bool, own: Axis,
        batch: tuple[Axis, ...] | None = None,
    ) -> None:  # fmt: skip
        self.region, self.flows, self.gradients, self.plan = region, flows, gradients, plan
        self.own, self.other = own, region.key if own == region.query else region.query
        self.suffix = {self.own: COLUMN, self.other: ROW}
        self.block = {region.query: "BLOCK_Q", region.key: "BLOCK_K"}
        self.scope = Scope(region, _OWN)
        self.body = Block()
        head, self.prologue = self.body.nested(), self.body.nested()
        # Where numbers are computed that are the same for a whole tile of pairs, and where tiles of the own axis are.
        self.top = Place(self.scope, self.prologue)
        self.root, self.own_block, self.own_in_loop = self.top, self.prologue, False
        flat = "batch" if batch is None else "point"
        self.positions = self.positions_of(
            self.scope, head, self.top, plan.block_q, plan.block_k, wide, own, batch, flat
        )
        self.scale, self.score = split_scale(region.score)
        self.tame = tame(self.score)
        self.value_dtype = value_dtype(region)
        stems = [self.scope.stem(g.load.tensor) for g in gradients]
        self.sums = [self.scope.names.take(f"{stem}_grad", f"gradient_{n}") for n, stem in enumerate(stems)]
        self.pointers = [
            self.scope.argument(self.scope.names.take(f"{stem}_grad_ptr", f"gradient_{n}_ptr"), "output", n, 0, g.dtype)
            for n, (stem, g) in enumerate(zip(stems, gradients))
        ]
        self._fresh()

    def _fresh(self) -> None:
        """Forget the tiles of the own axis: they are computed at `own_block` from now on."""
        self.own_rows = Place(self.scope, self.own_block, {self.own: COLUMN}, (self.root,), self.own_in_loop)
        self.own_tiles: dict[tuple[Axis, ...], Place] = {}
        self.other_tiles: dict[tuple[Axis, ...], Place] = {}

    def file(self, name: str, what: str) -> Source:
        self.positions.finish()
        plan = self.plan
        text = kernel_file(self.scope, self.body, name, what, plan.block_q, plan.block_k, self.scale, True)
        return Source(name, text, self.scope.arguments)

    # ---------------------------------------------------------------------------------------------------- products

    def text(self, place: Place, dot: Dot) -> str:
        """tl.dot of the own tile and the other one."""
        dtype = dot_dtype(dot)
        sides = {self.region.query: dot.query, self.region.key: dot.key}
        own = self._own_tile(dot.over, sides[self.own], dtype)
        other = self._other_tile(dot.over, sides[self.other], dtype)
        return f"tl.dot({own}, tl.trans({other}){precision(dtype)})"

    def _own_tile(self, over: tuple[Axis, ...], expr: Expr, dtype: str) -> str:
        if over not in self.own_tiles:
            self.positions.lane(over, "d" if over != self.region.value else "e")
            layout = {self.own: COLUMN, **dict.fromkeys(over, ROW)}
            self.own_tiles[over] = Place(self.scope, self.own_block, layout, (self.own_rows,), self.own_in_loop)
        return self._tile(self.own_tiles[over], self.own, over, expr, dtype)

    def _other_tile(self, over: tuple[Axis, ...], expr: Expr, dtype: str) -> str:
        if over not in self.other_tiles:
            self.positions.lane(over, "d" if over != self.region.value else "e")
            inner = dict.fromkeys(over, ROW)
            fixed = Place(self.scope, self.own_block, inner, (self.root,), self.own_in_loop)
            layout = {self.other: COLUMN, **inner}
            outer = (fixed, self.rows)
            self.other_tiles[over] = Place(self.scope, self.pair.block, layout, outer, True, self.pair.unmasked)
        return self._tile(self.other_tiles[over], self.other, over, expr, dtype)

    def _tile(self, place: Place, axis: Axis, over: tuple[Axis, ...], expr: Expr, dtype: str) -> str:
        """A tile [axis, over] of one side of a product, or of what flows back into the result."""
        lanes = padded(width(over) or 1)
        if expr == self.flows.out:
            return self._grad(place, dtype)
        wish = "value" if expr == self.region.values else "query" if axis == self.region.query else "key"
        return place.tile(expr, dtype, f"[{self.block[axis]}, {lanes}]", wish)

    def _grad(self, place: Place, dtype: str) -> str:
        """The tile of what flows back into the result, which lies in memory as the result does."""
        region = self.region
        key = (self.flows.out, dtype)
        if key not in place.tiles:
            pointer = self.scope.argument("grad_ptr", "saved", 0, dtype=region.out_dtype)
            at = self._result(place)
            guards = place.guards((region.query, *region.value))
            if not region.value:
                at, guards = self._one_lane(at, guards)
            masked = where_kept(guards, "0")
            cast = f".to(tl.{dtype})" if dtype != region.out_dtype else ""
            name = self.scope.names.take("grad", in_loop=place.in_loop)
            place.block.line(f"{name} = tl.load({pointer} + {at}{masked}){cast}")
            place.tiles[key] = name
        return place.tiles[key]

    def _result(self, place: Place) -> str:
        """The offset of a position of the result."""
        region = self.region
        if region.output is None:
            return self._address(place, (*region.batch, region.query, *region.value))
        first = f"{placed_row(place, region)} * {width(region.value) or 1}"
        return f"{first} + {self._address(place, region.value)}" if region.value else first

    def _address(self, place: Place, axes: Sequence[Axis]) -> str:
        """The offset of the position along these axes in contiguous memory."""
        fixed: list[Expr] = []
        laid: list[Expr] = []
        for n, axis in enumerate(axes):
            term = mul(axis, *(a.size for a in axes[n + 1 :]))
            (laid if axis in place.layout else fixed).append(term)
        parts = [self.root.text(add(*fixed), ADD)] if fixed and add(*fixed) != Const(0) else []
        return " + ".join((*parts, *(place.text(term, MUL) for term in laid))) or "0"

    def _one_lane(self, at: str, guards: list[str]) -> tuple[str, list[str]]:
        """The address and the guards of a tile without an axis along its columns: the first of them counts."""
        lane = self.positions.lane((), "e") + ROW
        return f"{at} + {lane}", [*guards, f"{lane} < 1"]

    # -------------------------------------------------------------------------------------------------------- rows

    @property
    def pairing(self) -> bool:
        """Whether anything comes from pairs at all (extra logits need none)."""
        return any(g.ordinary for g in self.gradients)

    @property
    def follows_score(self) -> bool:
        """Whether what flows back into the score or the gate is asked for."""
        seeds = {self.flows.score, self.flows.gate}
        return any(seeds & set(s.cotangent.loads) for g in self.gradients for s in (*g.ordinary, *g.emptied))

    @property
    def emptied(self) -> bool:
        return marks_empty(self.region) and any(g.emptied for g in self.gradients)

    def _load_rows(self, block: Block, in_loop: bool, ordinary: bool, emptied: bool) -> None:
        """The sums of the rows of this tile, and their delta, for pairs of either kind."""
        region = self.region
        place = Place(self.scope, block, {region.query: ""}, (self.root,), in_loop)
        at = self._address(place, (*region.batch, region.query))
        rows = self.root.text(mul(region.query.size, *(a.size for a in region.batch)), MUL)
        guards = place.guards((region.query,))
        masked = where_kept(guards, "0.0")
        sums = self.scope.argument("sums_ptr", "saved", 1, dtype="float32")
        block.line(f"row_max = tl.load({sums} + {at}{masked})")
        block.line(f"log_sum = tl.load({sums} + {rows} + {at}{masked})")
        if region.empty_row == "zero" and not self.tame:
            block.line("# A row may have no key but such that a tensor adds -inf to.")
            block.line('row_max = tl.where(row_max == float("-inf"), 0.0, row_max)')
        if emptied:
            block.line("empty = (tl.cast(log_sum, tl.int32, bitcast=True) & 1) == 1")
        block.line("log_sum = log_sum * LOG2E")
        if self.tame and ordinary:
            block.line("shift = row_max * LOG2E + log_sum")
        if self.follows_score or any(g.extra for g in self.gradients):
            delta = self.scope.argument("delta_ptr", "saved", 2, dtype="float32")
            at = placed_row(place, region) if region.output is not None else at
            block.line(f"delta = tl.load({delta} + {at}{masked})")

    # ------------------------------------------------------------------------------------------------------- pairs

    def _enter(self, block: Block, unmasked: bool) -> None:
        """A block in which one tile of pairs is computed; `unmasked`: all of its columns are in range."""
        axes = frozenset((self.other,)) if unmasked else frozenset[Axis]()
        self.rows = Place(self.scope, block, {self.other: COLUMN}, (self.root,), True, axes)
        self.pair = Place(self.scope, block, self.suffix, (self.own_rows,), True, axes, self)
        self.other_tiles = {}

    def _pairs(self, mask: Expr, emptied: bool = False) -> None:
        """One tile of pairs, from the score to the sums; `emptied`: for the rows that were computed from fills."""
        region, place, block, flows = self.region, self.pair, self.pair.block, self.flows
        score = region.logits if emptied else self.score
        shares = [s for g in self.gradients for s in (g.emptied if emptied else g.ordinary)]
        place.expect(score, mask, region.gate, *(split_scale(s.cotangent)[1] for s in shares))
        self._scores(score)
        self._weight(emptied)
        if emptied:
            kept = [f"empty{self.suffix[region.query]}"]
        else:
            kept = [] if mask == TRUE else [place.text(part) for part in conjuncts(mask)]
        kept += place.guards((self.other,))
        if kept:
            counts = conjunction(kept)
            if mask != TRUE or emptied:
                block.line(f"kept = {counts}")
                counts = "kept"
            block.line(f"weight = tl.where({counts}, weight, 0.0)")
        weight = "weight"
        gated = not (isinstance(region.gate, Const) and region.gate.value == 1.0)
        used = {load for s in shares for load in s.cotangent.loads}
        if gated:
            block.line(f"gate = {place.number(region.gate)}")
            if flows.weight in used:
                masked = "tl.where(kept, weight * gate, 0.0)"
                block.line(f"gated = {masked if mask != TRUE or emptied else self._in_range('weight * gate')}")
                weight = "gated"
        place.known[flows.weight, False] = weight
        if flows.score in used or flows.gate in used:
            self._back(gated, flows.gate in used)
        if flows.score in used:
            if mask != TRUE or emptied:
                # What does not count gives nothing, whatever is infinite or NaN in its row.
                block.line("back = tl.where(kept, back, 0.0)")
            place.known[flows.score, False] = "back"
        if flows.gate in used:
            place.known[flows.gate, False] = "gate_back"
        for n, gradient in enumerate(self.gradients):
            for share in gradient.emptied if emptied else gradient.ordinary:
                self._receive(n, gradient, share, emptied)

    def _scores(self, score: Expr) -> None:
        place = self.pair
        if {self.region.query, self.region.key} <= score.axes and score.is_float:
            place.assign("scores", score)
            return
        shape = f"[{self.block[self.own]}, {self.block[self.other]}]"
        place.block.line(f"scores = tl.zeros({shape}, tl.float32) + {place.number(score, MUL)}")

    def _weight(self, emptied: bool) -> None:
        """The probability of every pair, from its score."""
        block, rows = self.pair.block, self.suffix[self.region.query]
        if self.tame and not emptied:
            block.line(f"weight = tl.exp2(scores * SCALE - shift{rows})")
            return
        if not emptied and self.scale != 1.0:
            block.line(f"scores = scores * {self.scale!r}")
        if split_scale(self.region.logits if emptied else self.region.score)[0] != 1.0:
            # Exactly zero at the maximum, however large: product and difference must not become one operation.
            block.line(f"scores = tl.where(scores == row_max{rows}, 0.0, scores - row_max{rows})")
        else:
            block.line(f"scores = scores - row_max{rows}")
        block.line(f"weight = tl.exp2(scores * LOG2E - log_sum{rows})")

    def _back(self, gated: bool, into_gate: bool) -> None:
        """What flows back into the score, and into the gate."""
        region, block, dtype = self.region, self.pair.block, self.value_dtype
        sides: dict[Axis, Expr] = {region.query: self.flows.out, region.key: region.values}
        own = self._own_tile(region.value, sides[self.own], dtype)
        other = self._other_tile(region.value, sides[self.other], dtype)
        block.line(f"back = tl.dot({own}, tl.trans({other}){precision(dtype)})")
        if into_gate:
            block.line("gate_back = weight * back")
        block.line(f"back = weight * ({'gate * ' if gated else ''}back - delta{self.suffix[region.query]})")

    def _in_range(self, text: str) -> str:
        """A tile that may be anything past the last position of the other axis, made zero there."""
        guards = self.pair.guards((self.other,))
        return f"tl.where({conjunction(guards)}, {text}, 0.0)" if guards else text

    def _scale_of(self, gradient: Gradient) -> float:
        """The constant factor that all its shares have."""
        shares = (*gradient.ordinary, *gradient.emptied, *(s for _, s in gradient.extra))
        scales = {split_scale(share.cotangent)[0] for share in shares}
        return scales.pop() if len(scales) == 1 else 1.0

    def _cotangent(self, place: Place, gradient: Gradient, share: Share, level: int) -> str:
        """The share's cotangent as text, without the constant factor that the gradient's shares have in common."""
        scale, rest = split_scale(share.cotangent)
        common = self._scale_of(gradient)
        text = place.text(rest if scale == common else share.cotangent, level)
        plain = isinstance(rest, Load) and rest.tensor.startswith("@")
        return text if plain or self.other not in place.layout else self._in_range(text)

    def _receive(self, n: int, gradient: Gradient, share: Share, emptied: bool) -> None:
        place, block = self.pair, self.pair.block
        if gradient.over is None:
            text = self._cotangent(place, gradient, share, MUL)
            if gradient.loop not in (KEYS, QUERIES):
                self._receive_pairs(n, gradient, share, text, emptied)
            else:
                block.line(f"{self.sums[n]} += tl.sum({text}, 1)")
            return
        assert share.other is not None
        if share.other == self.flows.out:
            dtype = self.value_dtype
        else:
            same = share.load.dtype == share.other.dtype and share.other.dtype in OUT_DTYPES
            dtype = share.other.dtype if same else "float32"
        text = self._cotangent(place, gradient, share, ATOM if dtype != "float32" else 0)
        other = self._other_tile(gradient.over, share.other, dtype)
        narrow = f".to(tl.{dtype})" if dtype != "float32" else ""
        block.line(f"{self.sums[n]} = tl.dot({text}{narrow}, {other}, {self.sums[n]}{precision(dtype)})")

    def _receive_pairs(self, n: int, gradient: Gradient, share: Share, text: str, emptied: bool) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ the sums

    def _shape(self, gradient: Gradient) -> str:
        if gradient.over is None:
            return f"[{self.block[self.own]}]"
        return f"[{self.block[self.own]}, {padded(width(gradient.over) or 1)}]"

    def _store(self, tail: Block, n: int, gradient: Gradient) -> None:
        if gradient.over is None:
            layout = {self.own: ""}
        else:
            self.positions.lane(gradient.over, "d" if gradient.over != self.region.value else "e")
            layout = {self.own: COLUMN, **dict.fromkeys(gradient.over, ROW)}
        place = Place(self.scope, tail, layout, (self.root,))
        self._store_at(place, n, gradient, place.guards(gradient.axes))

    def _store_at(self, place: Place, n: int, gradient: Gradient, guards: list[str], text: str = "") -> None:
        scale = self._scale_of(gradient)
        value = f"{text or self.sums[n]} * {scale!r}" if scale != 1.0 else text or self.sums[n]
        if gradient.dtype != "float32":
            value = f"({value}).to(tl.{gradient.dtype})" if " " in value else f"{value}.to(tl.{gradient.dtype})"
        at = self._address(place, gradient.axes)
        for axis, suffix in place.layout.items():
            if axis not in gradient.axes and axis.size == Const(1):  # stored by its only position, which is zero
                at, guards = f"{at} + {self.scope.axes[axis]}{suffix}", [*guards, *place.guards((axis,))]
        if gradient.over == ():
            at, guards = self._one_lane(at, guards)
        masked = where_kept(guards)
        place.block.line(f"tl.store({self.pointers[n]} + {at}, {value}{masked})")
