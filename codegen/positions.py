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

    A program has a tile of the axis `own` (queries, unless it is said to be the keys) at one position of the axes
    `batch` (all of the region's, unless fewer are given), which flatten to the variable `flat`. `query`, `key`: the
    variables of the positions along these axes. `cast`: what makes an integer wide enough for addresses of more than 31
    bits (nothing, where they have no more). `tiled`: whether there is more than one tile, so that they begin at
    `first`, not at 0; `tiles` is their number, as text.
    """

    def __init__(
        self, scope: Scope, block: Block, root: Place, block_q: int, block_k: int, wide: bool,
        own: Axis | None = None, batch: tuple[Axis, ...] | None = None, flat: str = "batch",
        whose: str = "of one batch position",
    ) -> None:  # fmt: skip
        self.scope, self.block, self.root = scope, block, root
        self.region = scope.region
        self.own = self.region.query if own is None else own
        self.batch, self.flat = self.region.batch if batch is None else batch, flat
        self.whose, self.cast = whose, ".to(tl.int64)" if wide else ""
        self.query = scope.declare(self.region.query, "query_index")
        self.key = scope.declare(self.region.key, "key_index")
        for n, axis in enumerate(self.region.batch):
            scope.declare(axis, f"batch_{n}")
        self._lanes: dict[tuple[Axis, ...], str] = {}
        lanes = block_q if self.own == self.region.query else block_k
        self.tiled = not (isinstance(self.own.size, Const) and self.own.size.value <= lanes)
        self._program(self.own.size, lanes)
        for axis, variable, tile in ((self.region.query, self.query, block_q), (self.region.key, self.key, block_k)):
            if not (isinstance(axis.size, Const) and axis.size.value % tile == 0):
                scope.limit(axis, variable, root.text(axis.size, ADD))

    def _program(self, size: Expr, lanes: int) -> None:
        at, variable = self.block, self.scope.axes[self.own]
        self._tile, what = ("BLOCK_Q", "queries") if self.own == self.region.query else ("BLOCK_K", "keys")
        at.line(f"# One program: {self._tile} {what} {self.whose}.")
        program = f"tl.program_id(0){self.cast}"
        if not self.tiled:
            at.lines((f"{self.flat} = {program}",) if self.batch else ())
            self.tiles = "1"
            self._batch = at.nested()
            at.line(f"{variable} = tl.arange(0, {self._tile}){self.cast}")
            return
        if isinstance(size, Const):
            tiles = str(-(-int(size.value) // lanes))
        else:
            tiles = "tiles"
            at.line(f"tiles = tl.cdiv({self.root.text(size)}, {self._tile})")
        self.tiles = tiles
        if self.batch:
            at.line(f"program = {program}")
            at.line(f"{self.flat} = program // {tiles}")
            at.line(f"first = program % {tiles} * {self._tile}")
        else:
            at.line(f"first = {program} * {self._tile}")
        self.last = at.nested()
        self._batch = at.nested()
        at.line(f"{variable} = first + tl.arange(0, {self._tile})")

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
        """A bound for any run of positions of `own` (`refocus.key_bounds`), for those of this program."""
        first, last = first_query(self.own), last_query(self.own)
        if not self.tiled:
            return substitute(bound, {first: Const(0), last: sub(self.own.size, 1)})
        self.scope.axes[first], self.scope.axes[last] = "first", "last"
        if last in bound.axes and self.last.empty:
            self.last.line(f"last = tl.minimum(first + {self._tile}, {self.root.text(self.own.size)}) - 1")
        return bound

    def finish(self) -> None:
        """Decode the batch position, the last axis fastest: those axes that the kernel came to mention."""
        self.decode(self._batch, self.flat, self.batch)

    def decode(self, block: Block, flat: str, axes: tuple[Axis, ...]) -> None:
        """The positions along those of `axes` that the kernel came to mention, from the variable they flatten to."""
        moving = [a for a in axes if a.size != Const(1)]
        for axis in axes:
            if axis in self.scope.used_axes and axis not in moving:
                block.line(f"{self.scope.axes[axis]} = 0")
        sizes = [self.root.text(a.size, UNARY) for a in moving]
        inner = [self.root.text(mul(1, *(a.size for a in moving[n + 1 :])), UNARY) for n in range(len(moving))]
        lines = _split(flat, [self.scope.axes[a] for a in moving], sizes, inner)
        block.lines(line for axis, line in zip(moving, lines) if axis in self.scope.used_axes)


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
