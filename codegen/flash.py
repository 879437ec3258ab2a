"""The flash schedule, forward: online softmax over tiles of keys, one program for each tile of queries.

    row_max, row_sum, acc = -inf, 0, 0
    for each tile of keys that the mask does not empty:
        update them (`refocus.codegen.key_tiles`)
    output = acc / row_sum

`write` returns the text of one Python file; nothing in it comes from a user's graph but numbers, and names that have
been checked to be plain identifiers.
"""

from __future__ import annotations

from refocus.codegen.forward import Forward
from refocus.codegen.kernel_file import Source
from refocus.codegen.plan import Plan
from refocus.ir import Region

NAME = "flash_forward"


def write(region: Region, plan: Plan, wide: bool = False, saving: bool = False) -> Source:
    """The kernel of a region that `flash_fit.supports`. `wide`: addresses need more than 31 bits. `saving`: it stores
    the row sums that the backward needs, too."""
    return _Flash(region, plan, wide, saving, (NAME,)).write()


class _Flash(Forward):
    def write(self) -> Source:
        self._main(self.body.nested())
        self._finish(self.body.nested())
        return self._file(NAME, "flash attention, forward")
