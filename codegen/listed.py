"""Loops over the tiles that lists name (`refocus.codegen.tile_lists`), as source text: forward and backward alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from refocus.codegen.plan import Plan
from refocus.codegen.positions import Positions
from refocus.codegen.printer import MUL, Place
from refocus.codegen.writer import Block
from refocus.ir import TRUE, Axis, Const, Expr
from refocus.simplify import add, mul

# Variables of a kernel that reads lists.
NAMES = ("tile", "tile_row", "tile_whole", "tile_stop", "tile_counts_ptr", "tile_indices_ptr", "tile_states_ptr")


Ends = tuple[str, str]  # of a range: where it starts and where it stops, as texts
# Adjacent ranges and how far apart their elements are, to the part of each that a program goes through.
Share = Callable[[Block, list[Ends], str], list[Ends]]


def loops(
    body: Block, root: Place, positions: Positions, plan: Plan, share: Share | None = None
) -> Iterator[tuple[Block, Expr]]:
    """The body of each loop over tiles of the axis that a program has no tile of, which begin at `start` there; and
    what the mask is in them. `share`: which of them are this program's, if not all."""
    region, scope = positions.region, positions.scope
    queries = positions.own == region.query
    other, tile = (region.key, "BLOCK_K") if queries else (region.query, "BLOCK_Q")
    counts, indices = (scope.argument(f"tile_{n}_ptr", "list", k) for k, n in enumerate(("counts", "indices")))
    body.line(f"tile_row = {_row(root, positions)}")
    body.line(f"tile_whole = tl.load({counts} + tile_row * 2)")
    body.line(f"tile_stop = tl.load({counts} + tile_row * 2 + 1)")
    per_row = _tiles(root, other, tile, plan.block_k if queries else plan.block_q)
    ends = [("0", "tile_whole"), ("tile_whole", "tile_stop")]
    notes = (("# Tiles of which every pair counts.", TRUE), ("# Tiles that are cut.", region.mask))
    for (note, mask), (start, stop) in zip(notes, share(body, ends, "1") if share else ends):
        body.line(note)
        block = body.nested(f"for tile in range({start}, {stop}):")
        block.line(f"start = tl.load({indices} + tile_row * {per_row} + tile) * {tile}")
        yield block, mask


def is_used(root: Place, positions: Positions, plan: Plan, column: str) -> str:
    """Whether the mask keeps a pair of the tile in this row and in the column of that number."""
    states = positions.scope.argument("tile_states_ptr", "list", 0)
    per_row = _tiles(root, positions.region.key, "BLOCK_K", plan.block_k)
    return f"tl.load({states} + ({_row(root, positions)}) * {per_row} + {column}) != 0"


def _row(root: Place, positions: Positions) -> str:
    """The number of this program's row of tiles, counted through the batch axes that the mask depends on."""
    region = positions.region
    row: Expr = Const(0)
    for axis in region.batch:
        if axis in region.mask.axes:
            row = add(mul(row, axis.size), axis)
    at = f"{root.text(row, MUL)} * {positions.tiles}"
    tile = "BLOCK_Q" if positions.own == region.query else "BLOCK_K"
    return f"{at} + first // {tile}" if positions.tiled else at


def _tiles(root: Place, axis: Axis, tile: str, lanes: int) -> str:
    if isinstance(axis.size, Const):
        return str(-(-int(axis.size.value) // lanes))
    return f"tl.cdiv({root.text(axis.size)}, {tile})"
