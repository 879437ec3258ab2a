"""The fourth kernel of the flash backward: the gradient of what is read at the difference of query and key.

    diagonals_backward      one program a diagonal of tiles, for table[bucket(i - j), h]
    for each batch position that shares it, for each tile along the diagonal:
        weight      = exp(score - row_max - log_sum)
        back        = weight * (grad @ value.T - delta)
        table_grad += back

In all tiles of a diagonal, equal places of the tile have equal differences, so they add up where they are. What is
stored has a tile for each diagonal: linear in the sequence. `by_difference` then adds up its small diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from refocus.codegen.backward_fit import Gradient
from refocus.codegen.cotangents import Cotangents
from refocus.codegen.flash_pairs import Shared
from refocus.codegen.kernel_file import Source
from refocus.codegen.plan import Plan
from refocus.codegen.positions import Positions
from refocus.codegen.printer import conjunction
from refocus.codegen.writer import Block
from refocus.differentiate import Share
from refocus.ir import Const, Expr, Region


def write(region: Region, flows: Cotangents, gradients: Sequence[Gradient], plan: Plan, wide: bool = False) -> Source:
    """The kernel that sums these gradients of differences, all shared by the same batch axes. Its tiles are square."""
    assert plan.block_q == plan.block_k
    return _Diagonals(region, flows, gradients, plan, wide).write()


class _Band(Positions):
    """The positions of a program that goes along a diagonal: those of its tile are known in its loop only."""

    def _program(self, size: Expr, lanes: int) -> None:
        at, region = self.block, self.region
        self.tiled, self._tile = True, "BLOCK_Q"
        counts = []
        for axis, tile in ((region.query, "BLOCK_Q"), (region.key, "BLOCK_K")):
            whole = isinstance(axis.size, Const)
            counts.append(
                str(-(-int(axis.size.value) // lanes)) if whole else f"tl.cdiv({self.root.text(axis.size)}, {tile})"  # type: ignore[attr-defined]
            )
        self.tiles, keys = counts
        at.line("# One program: the tiles of one diagonal, of one batch position. Number 0 begins at the first key.")
        at.line(f"program = tl.program_id(0){self.cast}")
        at.line(f"diagonals = {self.tiles} + {keys} - 1")
        at.line(f"{self.flat} = program // diagonals")
        at.line(f"diagonal = program % diagonals - ({keys} - 1)")
        at.line("begin_row = tl.maximum(diagonal, 0)")
        at.line(f"steps = tl.minimum({self.tiles}, {keys} + diagonal) - begin_row")
        self._batch = at.nested()


class _Diagonals(Shared):
    name, what = "diagonals_backward", "flash attention, backward, what flows to differences of positions"
    column = "row - diagonal"
    positions_of = _Band

    def open(self, body: Block, count: str) -> Block:
        positions = self.positions
        loop = body.nested(f"for step in range(0, {count} * steps):")
        self.scope.names.next_loop()
        loop.line("along = tl.full([], step, tl.int64)" if positions.cast else "along = step")
        loop.line("member = along // steps")
        loop.line("row = begin_row + along % steps")
        loop.line("first = row * BLOCK_Q")
        loop.line("key_first = (row - diagonal) * BLOCK_K")
        loop.line(f"{positions.query} = first + tl.arange(0, BLOCK_Q)")
        loop.line(f"{positions.key} = key_first + tl.arange(0, BLOCK_K)")
        positions.last = loop.nested()
        return loop

    def _receive_pairs(self, n: int, gradient: Gradient, share: Share, text: str, emptied: bool) -> None:
        guards = self.pair.guards((self.region.query,))  # what is past the last query must not be added to others
        text = f"tl.where({conjunction(guards)}, {text}, 0.0)" if guards else text
        self.pair.block.line(f"{self.sums[n]} += {text}")

    def store(self, tail: Block) -> None:
        tail.line("place = tl.arange(0, BLOCK_Q)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]")
        for n, gradient in enumerate(self.gradients):
            scale = self._scale_of(gradient)
            value = f"{self.sums[n]} * {scale!r}" if scale != 1.0 else self.sums[n]
            tail.line(f"tl.store({self.pointers[n]} + program * (BLOCK_Q * BLOCK_K) + place, {value})")


def by_difference(tiles: Tensor, queries: int, keys: int) -> Tensor:
    """[.., queries + keys - 1], sums by query - key, of [.., diagonals, side, side], sums by place in a tile."""
    side, count = tiles.shape[-1], tiles.shape[-3]
    # With columns turned around, equal differences lie on anti-diagonals: rows that are each moved on by one.
    skewed = pad(tiles.flip(-1), (0, side)).flatten(-2)[..., : side * (2 * side - 1)]
    sums = pad(skewed.unflatten(-1, (side, 2 * side - 1)).sum(-2), (0, 1))
    # The second half of a diagonal's differences is the first half of the next one's.
    low, high = (half.flatten(-2) for half in sums.unflatten(-1, (2, side)).unbind(-2))
    whole = pad(low, (0, side)) + pad(high, (side, 0))
    ahead = -(-keys // side) * side - keys
    assert whole.shape[-1] == (count + 1) * side
    return whole[..., ahead : ahead + queries + keys - 1]
