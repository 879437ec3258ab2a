"""The decode schedule: few queries, many keys. These are split over programs, and a second kernel joins the parts.

    decode_parts    one program a tile of queries and a part of the keys: row_max, row_sum and acc of that part
    decode_merge    one program a tile of queries:
        for each part:
            row_max, row_sum, acc = both, with the smaller maximum's sums scaled down
        output = acc / row_sum

Parts are kept in float32. A part is one of `parts` equal shares of the tiles between the loop bounds, or of those in a
list; it may have none. What concerns whole rows (logits without a value, rows without a key) is left to the merge.
"""

from __future__ import annotations

from refocus.codegen import listed
from refocus.codegen.flash_fit import width
from refocus.codegen.forward import Forward
from refocus.codegen.kernel_file import Source
from refocus.codegen.key_tiles import COLUMN, ROW
from refocus.codegen.plan import Plan
from refocus.codegen.printer import MUL, Place, where_kept
from refocus.codegen.writer import Block
from refocus.ir import Region
from refocus.simplify import mul

_AT_ONCE = 4
PARTS, MERGE = "decode_parts", "decode_merge"
_OWN = (
    PARTS, MERGE, "parts", "part", "each", "part_start", "part_stop", "at", "part_max", "part_sum", "part_acc", "beta",
    "part_acc_ptr", "part_sums_ptr",
)  # fmt: skip


def write_parts(region: Region, plan: Plan, wide: bool = False) -> Source:
    """The first kernel of a region that `flash_fit.supports`. Its outputs are acc, (parts, rows, values), and the
    maxima and sums, (2, parts, rows), of as many rows as (*batch, query) has; `parts` is a count that it is given."""
    return _Parts(region, plan, wide, False, _OWN).write()


def write_merge(region: Region, plan: Plan, wide: bool = False) -> Source:
    """The second: what the first put out is saved for it."""
    return _Merge(region, plan, wide, False, _OWN).write()


class _Decode(Forward):
    def _part(self, block: Block, kind: str) -> tuple[str, str, str]:
        """The maxima, the sums and acc of a part's rows, as texts of pointers to arguments of that kind."""
        region = self.region
        rows = self.root.text(mul(region.query.size, *(a.size for a in region.batch)), MUL)
        row = self.positions.query
        if region.batch:
            row = f"batch * {self.root.text(region.query.size, MUL)} + {row}"
        acc = self.scope.argument("part_acc_ptr", kind, 0, dtype="float32")
        sums = self.scope.argument("part_sums_ptr", kind, 1, dtype="float32")
        parts = self.scope.argument("parts", "count")
        block.line(f"at = part * {rows} + {row}")
        lanes = f"at{COLUMN} * {width(region.value) or 1} + {self.value_lane}{ROW}"
        return f"{sums} + at", f"{sums} + {parts} * {rows} + at", f"{acc} + {lanes}"

    def _guards(self, block: Block, layout: str) -> list[str]:
        return Place(self.scope, block, {self.region.query: layout}).guards((self.region.query,))

    def _lane_guards(self, block: Block) -> list[str]:
        total = width(self.region.value) or 1
        lanes = [f"{self.value_lane}{ROW} < {total}"] if total != self.value_lanes else []
        return [*self._guards(block, COLUMN), *lanes]


class _Parts(_Decode):
    def write(self) -> Source:
        main, tail = self.body.nested(), self.body.nested()
        main.line("# ... and a part of the keys, one of so many.")
        main.line(f"part = tl.program_id(1){self.positions.cast}")
        self._main(main)
        self._store_part(tail)
        return self._file(PARTS, "attention of few queries, the sums of each part of the keys")

    def _share(self, body: Block, ranges: list[listed.Ends], tile: str) -> list[listed.Ends]:
        """An equal share of the tiles of all ranges."""
        parts = self.scope.argument("parts", "count")
        start, stop = ranges[0][0], ranges[-1][1]
        length = stop if start == "0" else f"{stop} - {start}"
        body.line("# This program's share of the tiles.")
        if tile == "1":
            body.line(f"each = tl.cdiv({length}, {parts})")
        else:
            body.line(f"each = tl.cdiv(tl.cdiv({length}, {tile}), {parts}) * {tile}")
        body.line(f"part_start = {'' if start == '0' else f'{start} + '}part * each")
        body.line(f"part_stop = tl.minimum(part_start + each, {stop})")
        if len(ranges) == 1:
            return [("part_start", "part_stop")]
        (_, between), _ = ranges
        return [
            ("part_start", f"tl.minimum({between}, part_stop)"),
            (f"tl.maximum({between}, part_start)", "part_stop"),
        ]

    def _store_part(self, tail: Block) -> None:
        tail.line()
        top, total, acc = self._part(tail, "output")
        masked = where_kept(self._guards(tail, ""))
        tail.line(f"tl.store({top}, row_max{masked})")
        tail.line(f"tl.store({total}, row_sum{masked})")
        tail.line(f"tl.store({acc}, acc{where_kept(self._lane_guards(tail))})")


class _Merge(_Decode):
    def write(self) -> Source:
        self._merge(self.body.nested())
        self._finish(self.body.nested())
        return self._file(MERGE, "attention of few queries, the parts of the keys put together")

    def _merge(self, body: Block) -> None:
        self._start(body)
        # Several parts are loaded at a time: nothing else hides how long that takes.
        parts = self.scope.argument("parts", "count")
        block = body.nested(f"for part in tl.range(0, {parts}, loop_unroll_factor={_AT_ONCE}):")
        top, total, acc = self._part(block, "saved")
        masked = where_kept(self._guards(block, ""), "0.0")
        block.line(f"part_max = tl.load({top}{masked})")
        block.line(f"part_sum = tl.load({total}{masked})")
        block.line(f"part_acc = tl.load({acc}{where_kept(self._lane_guards(block), '0.0')})")
        block.line("new_max = tl.maximum(row_max, part_max)")
        block.line('shift = tl.where(new_max == float("-inf"), 0.0, new_max)')
        block.line(f"alpha = {self._power('row_max', 'shift')}")
        block.line(f"beta = {self._power('part_max', 'shift')}")
        block.line("row_sum = row_sum * alpha + part_sum * beta")
        block.line("acc = acc * alpha[:, None] + part_acc * beta[:, None]")
        block.line("row_max = new_max")
