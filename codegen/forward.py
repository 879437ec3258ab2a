"""A forward kernel: its file, and what becomes of a row once its sums are known.

    rows without a key       softmax over the fills of all keys, as eager code does
    logits without a value   they take their share of the sum
    output                   acc / row_sum, and the sums themselves where the backward needs them

All schedules end their rows alike.
"""

from __future__ import annotations

from refocus.codegen.flash_fit import width
from refocus.codegen.kernel_file import LOG2E, Source, kernel_file
from refocus.codegen.key_tiles import COLUMN, ROW, KeyTiles, marks_empty, placed_row
from refocus.codegen.printer import MUL, UNARY, Place, conjunction, where_kept
from refocus.codegen.writer import Block
from refocus.simplify import mul


class Forward(KeyTiles):
    """Tiles of keys, and the end of a row."""

    def _file(self, name: str, what: str) -> Source:
        self.positions.finish()
        plan = self.plan
        text = kernel_file(self.scope, self.body, name, what, plan.block_q, plan.block_k, self.scale, True)
        return Source(name, text, self.scope.arguments)

    def _finish(self, tail: Block) -> None:
        """From a row's sums to its result."""
        if self.saving:
            tail.line()
            unit = 1 / LOG2E if self.tame else self.scale
            tail.line("row_top = row_max" if unit == 1.0 else f"row_top = row_max * {unit!r}")
        if marks_empty(self.region):
            self._empty_rows(tail)
        self._extra(tail)
        self._store(tail)

    def _empty_rows(self, tail: Block) -> None:
        """Rows without a key: softmax over the fills of all keys, as eager code does."""
        region = self.region
        guards = Place(self.scope, tail, {region.query: ""}).guards((region.query,))
        tail.line()
        tail.line("# Rows that the mask leaves without a key: eager code takes the softmax of its fill values.")
        tail.line(f"empty = {conjunction(['row_sum == 0.0', *guards])}")
        block = tail.nested("if tl.max(empty.to(tl.int32), 0) == 1:")
        self._fill(block)
        if region.extra:
            # In the units of row_max: of base two, or those of the score without its factor.
            unit = "logits_max * LOG2E" if self.tame else f"logits_max * {1 / self.scale!r}"
            block.line(f"row_max = tl.where(empty, {unit}, row_max)")
        if self.saving:
            block.line("row_top = tl.where(empty, logits_max, row_top)")
        block.line("row_sum = tl.where(empty, logits_sum, row_sum)")
        block.line("acc = tl.where(empty[:, None], logits_acc, acc)")

    def _fill(self, block: Block) -> None:
        """The sums of all rows over the fills of all keys."""
        block.line('logits_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
        block.line("logits_sum = tl.zeros([BLOCK_Q], tl.float32)")
        block.line(f"logits_acc = tl.zeros([BLOCK_Q, {self.value_lanes}], tl.float32)")
        # A variable that a branch changes must keep its type; the other loop's may be wider.
        place = self._open(block, "logits_start", "0", self.root.text(self.region.key.size))
        inner = place.block
        self._fills(place)
        inner.line("new_max = tl.maximum(logits_max, tl.max(logits, 1))")
        inner.line('shift = tl.where(new_max == float("-inf"), 0.0, new_max)')
        inner.line("weight = tl.exp2((logits - shift[:, None]) * LOG2E)")
        inner.line("alpha = tl.exp2((logits_max - shift) * LOG2E)")
        inner.line("logits_sum = logits_sum * alpha + tl.sum(weight, 1)")
        self._accumulate(place, "logits_acc")
        inner.line("logits_max = new_max")

    def _fills(self, place: Place) -> None:
        region = self.region
        place.expect(region.logits, region.gate)
        self._scores(place, "logits", region.logits)
        kept = place.guards((region.key,))
        if kept:
            place.block.line(f'logits = tl.where({conjunction(kept)}, logits, float("-inf"))')

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
        if self.saving and region.output is not None:
            self._store_sums(tail)  # first: registers that it frees hold the addresses of the result
            tail.line()
        out = self.scope.argument("out_ptr", "output", dtype=region.out_dtype)
        row = f"{self.positions.query}{COLUMN}"
        if region.output is not None:
            tail.line("# Where the model wants them: the number of each row of values.")
            row = placed_row(Place(self.scope, tail, {region.query: COLUMN}, (self.root,)), region)
        elif region.batch:
            row = f"(batch * {self.root.text(region.query.size, UNARY)} + {row})"
        guards = Place(self.scope, tail, {region.query: COLUMN}).guards((region.query,))
        if total != self.value_lanes:
            guards.append(f"{self.value_lane}{ROW} < {total}")
        masked = where_kept(guards)
        narrow = "" if region.out_dtype == "float32" else f".to(tl.{region.out_dtype})"
        tail.line(f"tl.store({out} + {row} * {total} + {self.value_lane}{ROW}, acc{narrow}{masked})")
        if self.saving and region.output is None:
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
        masked = where_kept(guards)
        tail.line(f"tl.store({sums} + {row}, row_top{masked})")
        tail.line(f"tl.store({sums} + {rows} + {row}, row_log{masked})")
