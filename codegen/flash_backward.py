"""The flash schedule, backward: probabilities computed again, tile by tile, from the sums that the forward saved.

    queries_backward    one program a tile of queries        keys_backward    one program a tile of keys
    for each tile of keys that the mask does not empty:      for each tile of queries that needs these keys:
        weight = exp(score - row_max - log_sum)                  weight = exp(score - row_max - log_sum)
        back   = weight * (grad @ value.T - delta)               back   = weight * (value @ grad.T - delta)
        query_grad += back @ key                                 key_grad   += back @ query
                                                                 value_grad += weight @ grad

Here are the loops; a tile of pairs is computed by `refocus.codegen.pair_tiles`, the same for both. Which gradients a
kernel sums is found by `refocus.codegen.backward_fit`; each has one writer and a fixed order of summation, so two runs
give the same bits. The third kernel, of pairs that batch axes share, is in `refocus.codegen.flash_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus.codegen import listed
from refocus.codegen.backward_fit import Gradient
from refocus.codegen.cotangents import Cotangents
from refocus.codegen.kernel_file import Source
from refocus.codegen.pair_tiles import Pairs
from refocus.codegen.plan import Plan
from refocus.codegen.printer import MUL, Place
from refocus.codegen.tile_lists import KEYS, PAIRS
from refocus.codegen.writer import Block
from refocus.differentiate import Share
from refocus.ir import TRUE, Const, Expr, Region
from refocus.key_bounds import KeyBounds, key_bounds
from refocus.simplify import maximum


def write(
    region: Region, flows: Cotangents, gradients: Sequence[Gradient], loop: str, plan: Plan, wide: bool = False
) -> Source:
    """The kernel that sums these gradients, which are the loop's (QUERIES, that of PAIRS without members among them, or
    KEYS). Its outputs are theirs, in order."""
    return _Looping(region, flows, gradients, plan, wide, region.key if loop == KEYS else region.query).write()


class _Looping(Pairs):
    """A program with a tile of one axis, and a loop over tiles of the other."""

    def write(self) -> Source:
        queries = self.own == self.region.query
        main = self.body.nested()
        summed = [(n, g) for n, g in enumerate(self.gradients) if g.loop != PAIRS]
        main.line()
        main.lines(f"{self.sums[n]} = tl.zeros({self._shape(g)}, tl.float32)" for n, g in summed)
        if queries:
            self._load_rows(self.prologue, False, self.pairing, self.emptied)
        if self.pairing and self.plan.listed:
            for block, mask in listed.loops(main, self.root, self.positions, self.plan):
                self._pairs_in(self._inside(block, "start", False), mask)
        elif self.pairing:
            for start, stop, unmasked, mask, comment in self._ranges(main):
                main.lines((f"# {comment}",) if comment else ())
                self._pairs_in(self._open(main, "start", start, stop, unmasked), mask)
        tail = self.body.nested()
        if self.emptied:
            self._empty_rows(tail)
        self._extra(tail)
        tail.lines(("",) if summed else ())
        for n, gradient in summed:
            self._store(tail, n, gradient)
        what = "queries" if queries else "keys"
        return self.file(f"{what}_backward", f"flash attention, backward, what flows to {what}")

    def _open(self, parent: Block, at: str, start: str, stop: str, unmasked: bool, emptied: bool = False) -> Block:
        """A loop over tiles of the other axis that begin at the variable `at`, all in range where `unmasked`."""
        block = parent.nested(f"for {at} in range({start}, {stop}, {self.block[self.other]}):")
        return self._inside(block, at, unmasked, emptied)

    def _inside(self, block: Block, at: str, unmasked: bool, emptied: bool = False) -> Block:
        """The body of a loop, whose tiles begin at the variable `at`."""
        tile, variable = self.block[self.other], self.scope.axes[self.other]
        block.line(f"{variable} = {at} + tl.arange(0, {tile}){self.positions.cast}")
        self.scope.names.next_loop()
        self.unmasked = unmasked
        if self.other == self.region.query:
            self._load_rows(block, True, not emptied, emptied)
        return block

    def _pairs_in(self, block: Block, mask: Expr, emptied: bool = False) -> None:
        self._enter(block, self.unmasked)
        self._pairs(mask, emptied)

    def _ranges(self, body: Block) -> list[tuple[str, str, bool, Expr, str]]:
        """(start, stop, whether all columns are in range, mask, comment) of each loop over tiles of the other axis."""
        region, tile = self.region, self.block[self.other]
        bounds = self._bounds()
        lanes = self.plan.block_k if self.other == region.key else self.plan.block_q
        size = self.other.size
        start, stop = "0", self.root.text(size if bounds.hi is None else bounds.hi)
        if bounds.lo is not None:
            start = "begin"
            body.line(f"begin = {self.root.text(bounds.lo, MUL)} // {tile} * {tile}")
        if bounds.full_hi is not None:
            body.line(f"full_stop = {self.root.text(bounds.full_hi, MUL)} // {tile} * {tile}")
            return [
                (start, "full_stop", True, TRUE, "Tiles of which every pair counts."),
                ("full_stop", stop, False, region.mask, "Tiles that are cut."),
            ]
        if bounds.full_lo is not None:
            body.line(f"full_start = tl.cdiv({self.root.text(bounds.full_lo)}, {tile}) * {tile}")
            whole = isinstance(size, Const) and size.value % lanes == 0
            return [
                (start, f"tl.minimum(full_start, {stop})", False, region.mask, "Tiles that are cut."),
                ("full_start", self.root.text(size), whole, TRUE, "Tiles of which every pair counts."),
            ]
        whole = isinstance(size, Const) and size.value % lanes == 0
        return [(start, stop, whole, region.mask, "")]

    def _bounds(self) -> KeyBounds:
        """Which part of the other axis this tile needs. `full_hi`: all pairs before it are kept; `full_lo`: all from
        it on are; None where that is not worth a loop of its own."""
        region = self.region
        found = key_bounds(region.mask, self.own, self.other, loads=True)
        lo, hi = (None if e is None else self.positions.here(e) for e in (found.lo, found.hi))
        lanes = self.plan.block_k if self.other == region.key else self.plan.block_q
        size = self.other.size
        few = isinstance(size, Const) and size.value < 4 * lanes
        ragged = not (isinstance(size, Const) and size.value % lanes == 0)
        if few or found.full_lo is None or found.full_hi is None or (region.mask == TRUE and not ragged):
            return KeyBounds(lo, hi)
        if found.full_lo == Const(0) and found.lo is None:
            return KeyBounds(lo, hi, None, maximum(self.positions.here(found.full_hi), 0))
        if found.full_hi == size and found.hi is None:
            return KeyBounds(lo, hi, self.positions.here(found.full_lo), None)
        return KeyBounds(lo, hi)

    def _empty_rows(self, tail: Block) -> None:
        """Rows without a key: what flows through the fills of all keys, as in eager code."""
        region = self.region
        tail.line()
        tail.line("# Rows that the mask leaves without a key: their weights come from their fills.")
        test = "if tl.max(tl.cast(empty, tl.int32), 0) == 1:"
        stop = self.root.text(self.other.size)
        if self.own == region.query:
            self._pairs_in(self._open(tail.nested(test), "empty_start", "0", stop, False, True), TRUE, True)
        else:
            self._pairs_in(self._open(tail, "empty_start", "0", stop, False, True).nested(test), TRUE, True)

    def _extra(self, tail: Block) -> None:
        """What flows back into logits without a value."""
        region = self.region
        numbers = sorted({number for g in self.gradients for number, _ in g.extra})
        if not numbers:
            return
        place = Place(self.scope, tail, {region.query: ""}, (self.root,))
        tail.line()
        tail.line("# Logits without a value.")
        place.expect(*(region.extra[n] for n in numbers), *(s.cotangent for g in self.gradients for _, s in g.extra))
        for number in numbers:
            extra = place.number(region.extra[number], MUL)
            tail.line(f"extra_back = -tl.exp2(({extra} - row_max) * LOG2E - log_sum) * delta")
            place.known[self.flows.extra[number], False] = "extra_back"
            for n, gradient in enumerate(self.gradients):
                for share in (s for k, s in gradient.extra if k == number):
                    tail.line(f"{self.sums[n]} += {self._cotangent(place, gradient, share, MUL)}")

    def _receive_pairs(self, n: int, gradient: Gradient, share: Share, text: str, emptied: bool) -> None:
        """A tile of pairs is stored where it belongs; a row is written by one loop only."""
        region, place = self.region, self.pair
        shares = gradient.emptied if emptied else gradient.ordinary
        if share is not shares[0]:
            return
        text = " + ".join(self._cotangent(place, gradient, s, MUL) for s in shares)
        guards = place.guards((region.query, region.key))
        if self.emptied:
            rows = f"empty{self.suffix[region.query]}"
            guards.append(rows if emptied else f"~{rows}")
        if len(shares) > 1:
            text = f"({text})"
        self._store_at(place, n, gradient, guards, text)
