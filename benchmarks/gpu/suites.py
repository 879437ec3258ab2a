"""The suites, in the order in which they are measured."""

from __future__ import annotations

from benchmarks.gpu import decode, dense, linear, masks, models, scores, windows
from benchmarks.gpu.case import Case, Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE for module in (dense, masks, scores, linear, decode, windows, models)
}


def cases(names: list[str], words: list[str]) -> list[Case]:
    """Those of the suites named whose key holds one of the words; what targets need comes first."""
    found = [c for name in names for c in SUITES[name].cases if not words or any(w in c.key for w in words)]
    return sorted(found, key=lambda case: case.rank)
