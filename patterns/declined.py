"""Why something was left alone: a sentence for the report, and the operation to blame where there is one."""

from __future__ import annotations

from dataclasses import dataclass

from refocus.ir import Expr


@dataclass(frozen=True)
class Declined:
    """A near miss. `reason` is a short English clause, `blame` the name of a graph node or operation; `equal`: two
    sizes that may be one in this call, with which it would be none; `several`: it may be a sum of several that are;
    `pairwise`: its weights are functions of pairs, and need not come apart where each pair is computed; `apart`: parts
    of it may be some by themselves."""

    reason: str
    blame: str | None = None
    equal: tuple[Expr, Expr] | None = None
    several: bool = False
    pairwise: bool = False
    apart: bool = False


class Stop(Exception):
    """Ends the reading of a candidate, from however deep; the reason is `declined`."""

    def __init__(self, declined: Declined) -> None:
        super().__init__(declined.reason)
        self.declined = declined


class Near(Stop):
    """Ends a reading that had all of a form but one thing: its reason goes before those of other readings."""
