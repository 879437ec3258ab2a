"""The windows schedule: many small attentions, whose keys all fit into one tile.

    what all windows share (a bias, a mask) is loaded once
    for each window of this program:
        scores = score(query, key)  where the mask keeps the pair, else -inf
        weight = exp(scores - maximum of the row)
        output = (weight * gate) @ value / sum(weight)

There is no loop over keys, and nothing to scale down. A window is a position along the batch axes that a program moves
along (`windows_fit.members`); the grid's second axis says how many programs share them.
"""

from __future__ import annotations

from refocus.codegen.forward import Forward
from refocus.codegen.kernel_file import Source
from refocus.codegen.key_tiles import COLUMN, ROW
from refocus.codegen.plan import Plan
from refocus.codegen.printer import Place
from refocus.codegen.windows_fit import members
from refocus.codegen.writer import Block
from refocus.ir import TRUE, Expr, Region
from refocus.simplify import add, mul

NAME = "windows_forward"


def write(region: Region, plan: Plan, wide: bool = False, saving: bool = False) -> Source:
    """As `flash.write`, for a region that `windows_fit.supports` with the plan's tile of keys."""
    return _Windows(region, plan, wide, saving, (NAME, "window", "step", "point"), members(region)).write()


class _Windows(Forward):
    def write(self) -> Source:
        region, positions = self.region, self.positions
        moving = members(region)
        positions.block.line(f"{positions.key} = tl.arange(0, BLOCK_K){positions.cast}")
        layout = {region.query: COLUMN, region.key: ROW}
        shared = Place(self.scope, self.prologue, layout, (self.columns,), unknown=frozenset(moving))
        body = self.body.nested()
        body.lines(("", "# Every window of this program."))
        windows = self.root.text(mul(1, *(a.size for a in moving)))
        flat = "batch" if moving == region.batch else "window"
        block = body.nested(
            f"for {'step' if positions.cast else flat} in range(tl.program_id(1), {windows}, tl.num_programs(1)):"
        )
        block.lines((f"{flat} = tl.full([], step, tl.int64)",) if positions.cast else ())
        places, number = block.nested(), block.nested()
        self._enter(block, shared)
        if flat != "batch" and (region.output is None or self.saving):
            number.line(f"batch = {self.root.text(self._batch())}")
        self._window(Place(self.scope, block, layout, (shared, self.columns), True, dots=self))
        self._finish(block.nested())
        positions.decode(places, flat, moving)
        return self._file(NAME, "attention in windows, forward")

    def _enter(self, block: Block, shared: Place) -> None:
        """From here on, places are those of the window at hand."""
        self.setup, self.in_loop, self.shared = block.nested(), True, shared
        rows = Place(self.scope, self.prologue, {self.region.key: COLUMN}, (self.root,), unknown=self.root.unknown)
        outer, columns = self.root, self.columns
        self.root = Place(self.scope, self.setup, {}, (outer,), True)
        self.columns = Place(self.scope, self.setup, {self.region.query: COLUMN}, (columns, self.root), True)
        self.rows = Place(self.scope, block, {self.region.key: COLUMN}, (rows, self.root), True)
        self.unmasked = frozenset()

    def _batch(self) -> Expr:
        """The position among all of the region's batch axes."""
        batch = self.region.batch
        return add(*(mul(axis, *(a.size for a in batch[n + 1 :])) for n, axis in enumerate(batch)))

    def _window(self, place: Place) -> None:
        block, region = place.block, self.region
        place.expect(self.score, region.mask, region.gate)
        kept = self._masked_scores(place, region.mask)
        block.line(f"row_max = tl.max(scores, 1){' * SCALE' if self.tame else ''}")
        self._weigh(block, "row_max", region.mask != TRUE)
        block.line("row_sum = tl.sum(weight, 1)")
        self._accumulate(place, "acc", afresh=True, kept=kept)

    def _fill(self, block: Block) -> None:
        # Tiles of keys are loaded again: these rows are rare.
        self.keys = {}
        self.rows = Place(self.scope, block, {self.region.key: COLUMN}, (self.root,), True)
        layout = {self.region.query: COLUMN, self.region.key: ROW}
        place = Place(self.scope, block, layout, (self.shared, self.columns), True, dots=self)
        self._fills(place)
        block.line("logits_max = tl.max(logits, 1)")
        block.line('shift = tl.where(logits_max == float("-inf"), 0.0, logits_max)')
        block.line("weight = tl.exp2((logits - shift[:, None]) * LOG2E)")
        block.line("logits_sum = tl.sum(weight, 1)")
        self._accumulate(place, "logits_acc", afresh=True)
