"""Which schedule of the `triton` engine runs a region."""

from __future__ import annotations

from collections.abc import Mapping

from refocus.codegen import decode_fit, flash_fit, windows_fit
from refocus.codegen.plan import Plan
from refocus.ir import Region, Sym


def default_plan(region: Region, numbers: Mapping[Sym, int], trained: bool = False) -> Plan:
    """The schedule that fits these sizes, with its tiles; each is right at any size. `trained`: a backward will be
    asked for."""
    if not trained and not region.row_sums and decode_fit.suits(region, numbers):
        return decode_fit.decode_plan(region)
    if windows_fit.suits(region, numbers):
        return windows_fit.windows_plan(region)
    return flash_fit.default_plan(region)
