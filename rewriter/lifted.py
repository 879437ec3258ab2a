"""A candidate in index notation, and which axes of its result are two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from refocus.ir import Axis, Expr, Load
from refocus.joint import NOTHING
from refocus.lift import Index, Lifter, complexity
from refocus.patterns.log_sums import LogSum
from refocus.patterns.softmax import Softmax
from refocus.pieces import holds_pieces
from refocus.roles import Axes


@dataclass
class Lifted:
    """A candidate in index notation, before its axes have roles."""

    key: Axis
    values: Expr
    terms: list[tuple[tuple[Axis, ...], Expr, Softmax]]  # (mixed, factor, softmax)
    rest: Expr
    lifter: Lifter
    zero_rows: bool
    added: Expr = NOTHING  # to the result, beside what the weights make
    heads: tuple[Axis, ...] = ()  # over which all of it is summed
    in_place: bool | None = None  # whether keys are not copied together; None: as the lifter reads
    log_sum: Callable[[fx.Node, Index], LogSum | None] | None = None  # reads values of rows, where that takes more

    @property
    def uncopied(self) -> bool:
        return self.lifter.far if self.in_place is None else self.in_place


def stands_in_pieces(lifted: Lifted) -> bool:
    return any(holds_pieces(soft.logits) for _, _, soft in lifted.terms)


def _expressions(lifted: Lifted) -> list[Expr]:
    out = [lifted.values, lifted.rest]
    for _, factor, soft in lifted.terms:
        out += [factor, soft.logits, soft.gate, *soft.extra]
    return out


def all_loads(lifted: Lifted) -> list[Load]:
    return [load for e in _expressions(lifted) for load in e.loads]


def untidy(lifted: Lifted) -> int:
    """How many index entries of loads are neither an axis, a constant, nor an axis over a constant."""
    return sum(complexity(load.index) for load in all_loads(lifted))


def split_axis(lifted: Lifted, axes: Axes) -> Axes | None:
    """An axis a that is used as a % c becomes (a // c, a % c).

    A query axis (one that neither values nor keys have) stays whole: halves of it would only make for fewer rows."""
    shared = lifted.values.axes.union(
        *(dot.key.axes for _, _, soft in lifted.terms for dot in soft.dots)
    )
    return axes.split(_expressions(lifted), shared)
