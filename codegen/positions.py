"""The positions of one program: its place in the batch, its queries, and the lanes of products and values."""

from __future__ import annotations

from refocus.codegen.flash_fit import padded, width
from refocus.codegen.printer import ADD, UNARY, Place, Scope
from refocus.codegen.writer import Block
from refocus.ir import Axis, Const, Expr
from refocus.key_bounds import first_query, last_query
from refocus.simplify import mul, sub, substitute


class Positions:
    """Writes the lines that compute them into `block`; `finish` when all else is written.

    `query`, `key`: the variables of the positions along these axes. `cast`: what makes an integer wide enough for
    addresses of more than 31 bits (nothing, where they have no more). `tiled`: whether there is more than one tile of
    queries, so that they begin at `first`, not at 0; `tiles` is their number, as text.
    """

    def __init__(self, scope: Scope, block: Block, root: Place, block_q: int, block_k: int, wide: bool) -> None:
        self.scope, self.block, self.root = scope, block, root
        self.region = scope.region
        self.cast = ".to(tl.int64)" if wide else ""
        self.query = scope.declare(self.region.query, "query_index")
        self.key = scope.declare(self.region.key, "key_index")
        for n, axis in enumerate(self.region.batch):
            scope.declare(axis, f"batch_{n}")
        self._lanes: dict[tuple[Axis, ...], str] = {}
        size = self.region.query.size
        self.tiled = not (isinstance(size, Const) and size.value <= block_q)
        self._program(size, block_q)
        for axis, variable, tile in ((self.region.query, self.query, block_q), (self.region.key, self.key, block_k)):
            if not (isinstance(axis.size, Const) and axis.size.value % tile == 0):
                scope.limit(axis, variable, root.text(axis.size, ADD))

    def _program(self, size: Expr, block_q: int) -> None:
        at = self.block
        at.line("# One program: BLOCK_Q queries of one batch position.")
        program = f"tl.program_id(0){self.cast}"
        if not self.tiled:
            at.line(f"batch = {program}")
            self.tiles = "1"
            self._batch = at.nested()
            at.line(f"{self.query} = tl.arange(0, BLOCK_Q)")
            return
        if isinstance(size, Const):
            tiles = str(-(-int(size.value) // block_q))
        else:
            tiles = "tiles"
            at.line(f"tiles = tl.cdiv({self.root.text(size)}, BLOCK_Q)")
        self.tiles = tiles
        at.line(f"program = {program}")
        at.line(f"batch = program // {tiles}")
        at.line(f"first = program % {tiles} * BLOCK_Q")
        self._last = at.nested()
        self._batch = at.nested()
        at.line(f"{self.query} = first + tl.arange(0, BLOCK_Q)")

    def lane(self, axes: tuple[Axis, ...], otherwise: str) -> str:
        """The variable of the flattened positions along `axes`, padded to a power of two. Axes whose names are no
        identifiers are called `otherwise`."""
        if axes in self._lanes:
            return self._lanes[axes]
        sizes = [int(a.size.value) for a in axes if isinstance(a.size, Const)]
        total = width(axes)
        assert total is not None and len(sizes) == len(axes), "flash_fit.supports"
        names = [self.scope.declare(axis, f"{otherwise}_{n}") for n, axis in enumerate(axes)]
        lane = names[0] if len(axes) == 1 else self.scope.names.take("lane")
        self.block.line(f"{lane} = tl.arange(0, {padded(total)}){self.cast}")
        if len(axes) > 1:
            for line in _split(lane, names, [str(n) for n in sizes], [str(total // n) for n in _running(sizes)]):
                self.block.line(line)
        if padded(total) != total:
            for axis in axes:
                self.scope.limit(axis, lane, str(total))
        self._lanes[axes] = lane
        return lane

    def here(self, bound: Expr) -> Expr:
        """A bound for any run of queries (`refocus.key_bounds`), for those of this program."""
        query = self.region.query
        first, last = first_query(query), last_query(query)
        if not self.tiled:
            return substitute(bound, {first: Const(0), last: sub(query.size, 1)})
        self.scope.axes[first], self.scope.axes[last] = "first", "last"
        if last in bound.axes and self._last.empty:
            self._last.line(f"last = tl.minimum(first + BLOCK_Q, {self.root.text(query.size)}) - 1")
        return bound

    def finish(self) -> None:
        """Decode the batch position, the last axis fastest: those axes that the kernel came to mention."""
        moving = [a for a in self.region.batch if a.size != Const(1)]
        for axis in self.region.batch:
            if axis in self.scope.used_axes and axis not in moving:
                self._batch.line(f"{self.scope.axes[axis]} = 0")
        sizes = [self.root.text(a.size, UNARY) for a in moving]
        inner = [self.root.text(mul(1, *(a.size for a in moving[n + 1 :])), UNARY) for n in range(len(moving))]
        lines = _split("batch", [self.scope.axes[a] for a in moving], sizes, inner)
        self._batch.lines(line for axis, line in zip(moving, lines) if axis in self.scope.used_axes)


def _split(flat: str, names: list[str], sizes: list[str], inner: list[str]) -> list[str]:
    """Each of several positions from the one they flatten to; `inner`: how many positions one step of each spans."""
    lines = []
    for n, (name, size, step) in enumerate(zip(names, sizes, inner)):
        quotient = flat if step == "1" else f"{flat} // {step}"
        lines.append(f"{name} = {quotient} % {size}" if n else f"{name} = {quotient}")
    return lines


def _running(sizes: list[int]) -> list[int]:
    products = []
    total = 1
    for size in sizes:
        total *= size
        products.append(total)
    return products
