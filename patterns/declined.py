"""Why something was left alone: a sentence for the report, and the operation to blame where there is one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Declined:
    """A near miss. `reason` is a short English clause, `blame` the name of a graph node or operation."""

    reason: str
    blame: str | None = None
