"""The third kernel of the flash backward: the gradient of what is read at a query and a key, and shared by batch axes.

    pairs_backward      one program a tile of pairs of bias[h,i,j]
    for each batch position that shares it:
        weight     = exp(score - row_max - log_sum)
        back       = weight * (grad @ value.T - delta)
        bias_grad += back

Nothing larger than the bias itself is ever stored, and the order of summation is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus.codegen import listed
from refocus.codegen.backward_fit import Gradient
from refocus.codegen.cotangents import Cotangents
from refocus.codegen.kernel_file import Source
from refocus.codegen.pair_tiles import Pairs
from refocus.codegen.plan import Plan
from refocus.codegen.printer import ADD, Place, conjunction
from refocus.codegen.writer import Block
from refocus.differentiate import Share
from refocus.ir import TRUE, Expr, Region
from refocus.key_bounds import key_bounds
from refocus.simplify import mul


def write(region: Region, flows: Cotangents, gradients: Sequence[Gradient], plan: Plan, wide: bool = False) -> Source:
    """The kernel that sums these gradients of pairs, all shared by the same batch axes."""
    return Shared(region, flows, gradients, plan, wide).write()


class Shared(Pairs):
    """A program with a tile of pairs, and a loop over the batch positions that share them."""

    name, what = "pairs_backward", "flash attention, backward, what flows to pairs"
    column = "tl.program_id(1)"  # the number of its tile of keys

    def __init__(
        self, region: Region, flows: Cotangents, gradients: Sequence[Gradient], plan: Plan, wide: bool
    ) -> None:
        self.members = gradients[0].members
        batch = tuple(a for a in region.batch if a not in self.members)
        super().__init__(region, flows, gradients, plan, wide, region.query, batch)

    def write(self) -> Source:
        body = self.body.nested()
        body.line()
        body.lines(f"{name} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)" for name in self.sums)
        loop = self.open(body, self.top.text(mul(1, *(a.size for a in self.members))))
        decode, setup = loop.nested(), loop.nested()
        self.root = Place(self.scope, setup, in_loop=True)
        self.own_in_loop = True
        self._load_rows(loop, True, True, self.emptied)
        condition = self._needed()
        self._in(loop.nested(f"if {condition}:") if condition else loop, self.region.mask, False)
        if self.emptied:
            loop.line("# Rows that the mask leaves without a key: their weights come from their fills.")
            self._in(loop.nested("if tl.max(tl.cast(empty, tl.int32), 0) == 1:"), TRUE, True)
        tail = self.body.nested()
        tail.line()
        self.root = self.top
        self.store(tail)
        self.positions.decode(decode, "member", self.members)
        return self.file(self.name, self.what)

    def open(self, body: Block, count: str) -> Block:
        """The loop in which the number of a batch position is `member`; there are so many."""
        head = self.prologue.nested()
        head.line("# ... and BLOCK_K keys, of every batch position that shares these pairs.")
        head.line(f"key_first = tl.program_id(1){self.positions.cast} * BLOCK_K")
        head.line(f"{self.positions.key} = key_first + tl.arange(0, BLOCK_K)")
        wide = bool(self.positions.cast)
        loop = body.nested(f"for {'step' if wide else 'member'} in range(0, {count}):")
        self.scope.names.next_loop()
        if wide:
            loop.line("member = tl.full([], step, tl.int64)")
        return loop

    def store(self, tail: Block) -> None:
        region = self.region
        place = Place(self.scope, tail, self.suffix, (self.top,))
        for n, gradient in enumerate(self.gradients):
            self._store_at(place, n, gradient, place.guards((region.query, region.key)))

    def _needed(self) -> str:
        """Whether the mask may keep a pair of this tile; nothing where it does not say so."""
        region = self.region
        if self.plan.listed:
            return listed.is_used(self.root, self.positions, self.plan, self.column)
        bounds = key_bounds(region.mask, region.query, region.key, loads=True)
        conditions = []
        if bounds.hi is not None:
            conditions.append(f"key_first < {self.root.text(self.positions.here(bounds.hi), ADD)}")
        if bounds.lo is not None:
            conditions.append(f"key_first + BLOCK_K > {self.root.text(self.positions.here(bounds.lo), ADD)}")
        return conjunction(conditions) if conditions else ""

    def _in(self, block: Block, mask: Expr, emptied: bool) -> None:
        self.own_block = block
        self._fresh()
        self._enter(block, False)
        self._pairs(mask, emptied)

    def _receive_pairs(self, n: int, gradient: Gradient, share: Share, text: str, emptied: bool) -> None:
        self.pair.block.line(f"{self.sums[n]} += {text}")
