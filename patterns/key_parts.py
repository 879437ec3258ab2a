"""Weights of which only those of some keys are used: a softmax over more keys than there are values.

    softmax(cat(s, t))[.., :n] @ v      ->      softmax(cat(s, t)) @ (v where j < n else 0)

The keys outside of the part count in the normaliser as ever, and have zeros for values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from refocus import simplify as s
from refocus.ir import BOOL, TRUE, Axis, Call, Const, Expr
from refocus.lift_joins import clamped
from refocus.polynomial import to_poly


@dataclass(frozen=True)
class Part:
    """Every `step`-th position of the axis `whole`, from `start` on: as many as `key` has."""

    whole: Axis
    key: Axis
    start: Expr
    step: int = 1

    @property
    def inside(self) -> Expr:
        """Whether a position of `whole` is one of the part."""
        ahead = s.sub(self.whole, self.start)
        return s.and_(s.ge(ahead, 0), s.lt(ahead, s.mul(self.step, self.key.size)), s.eq(s.mod(ahead, self.step), 0))

    @property
    def place(self) -> Expr:
        """The position at `key`."""
        return s.add(s.mul(self.step, self.key), self.start)

    def spread(self, value: Expr, other: float | bool = 0.0) -> Expr:
        """What depends on `key` as a function of `whole`: `other` outside of the part."""
        return self.only(value, other) if self.key in value.axes else value

    def only(self, value: Expr, other: float | bool = 0.0) -> Expr:
        """A value at the part, as a function of `whole`: `other` outside of it."""
        facts = s.assume(self.inside)
        place = clamped(s.under(s.floordiv(s.sub(self.whole, self.start), self.step), facts), self.key.size)
        there = s.substitute(value, {self.key: place})
        if value.dtype == BOOL:
            return s.and_(self.inside, there) if not other else s.or_(s.not_(self.inside), there)
        return s.where(self.inside, there, Const(float(other), value.dtype))

    @property
    def fits(self) -> bool:
        """Whether all of its positions are proved to be positions of `whole`."""
        last = s.add(self.start, s.mul(self.step, s.sub(self.key.size, 1)))
        return s.ge(self.start, 0) == TRUE and s.lt(last, self.whole.size) == TRUE


def parts_like(all_keys: Expr, whole: Axis, weights: Sequence[Expr], key: Axis) -> Iterator[Part]:
    """Parts of `whole` that `weights` may be at, by the positions that they and `all_keys` (a value for each key) read.
    Whether they are, is for the caller to compare."""
    there = [place for step, place in _places((all_keys,), whole) if step == 1]
    parts = [Part(whole, key, s.sub(here, place), step) for step, here in _places(weights, key) for place in there]
    if key.size == Const(1):  # of which no axis may be left where it is read
        ends = [Const(0), *ends_of_pieces(all_keys, whole), whole.size]
        parts += [Part(whole, key, s.add(end, k)) for end in ends for k in (0, -1)]
        known = dict.fromkeys(e for w in weights for x in w.loads for e in x.index if isinstance(e, Const))
        parts += [Part(whole, key, s.sub(e, place)) for e in known for place in there]
    yield from islice((part for part in dict.fromkeys(parts) if part.fits), _TRIED)


_TRIED = 32


def _places(values: Iterable[Expr], axis: Axis) -> list[tuple[int, Expr]]:
    """(step, place) of every position step * axis + place that is read, or compared with something."""
    found: dict[tuple[int, Expr], None] = {(1, Const(0)): None}
    for node in (n for value in values for n in value.walk() if n.is_int and axis in n.axes):
        step = to_poly(node).get((axis,), 0)
        place = s.sub(node, s.mul(step, axis))
        if step > 0 and axis not in place.axes and not place.loads:
            found[step, place] = None
    return list(found)


def ends_of_pieces(value: Expr, axis: Axis) -> list[Expr]:
    """Where a value of all keys passes from one of its pieces to the next."""
    found: dict[Expr, None] = {}
    for node in value.walk():
        if isinstance(node, Call) and node.op == "le" and all(a.is_int for a in node.args):
            less = s.sub(*node.args)  # it is <= 0
            step = to_poly(less).get((axis,), 0)
            end = s.sub(s.add(axis, 1), less) if step == 1 else s.add(axis, less)
            if abs(step) == 1 and axis not in end.axes:
                found[end] = None
    return list(found)
