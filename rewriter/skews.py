"""Weights that were skewed before their product: columns that count offsets moved to where their keys stand.

    p[c, i, o], 2w + 1 offsets; padded to 3w + 2 columns, and seen with rows one shorter:
        a[c, i, y] = p[c, i, y - i] where 0 <= y - i <= 2w, else 0;      sum_y a[c, i, y] * v[c, y]
    ->  sum_o p[c, i, o] * v[c, i + o]

Padding and another width are a position that moves and a condition. Where the condition holds for as many keys as there
are columns, and each is read once, the sum over keys is one over columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Expr, Load
from refocus.joint import moved
from refocus.lift import Index, Lifter, op_name
from refocus.lift_joins import JOINS
from refocus.sizes import shape_of


@dataclass(frozen=True)
class Unskewed:
    """Weights at a position along `key`, their own column; `place`: the key that the product reads there."""

    node: fx.Node
    index: Index
    key: Axis
    place: Expr


@dataclass(frozen=True)
class _Read:
    """Where a value comes from, if `condition` holds; elsewhere it is zero."""

    node: fx.Node
    index: Index
    condition: Expr


@dataclass
class _Marks(Lifter):
    """Notes where an operation reads, and marks each read in what it makes of them."""

    reads: list[tuple[fx.Node, Index]] = field(default_factory=list)

    def at(self, node: fx.Node, index: object) -> Expr:
        form = self.known.closed_form(node)
        if isinstance(form, Const):
            return form
        self.reads.append((node, tuple(index)))  # type: ignore[arg-type]
        return Load(f"read{len(self.reads) - 1}", (), "float32")


def unskewed(lifter: Lifter, node: fx.Node, index: Index, key: Axis) -> Unskewed | None:
    """The weights before they were padded and seen in another width; None where they were not, or where their columns
    are not keys moved by what each row decides."""
    read: _Read | None = _Read(node, index, TRUE)
    last = read
    while read is not None:
        last, read = read, _before(lifter, read)
    assert last is not None
    if last.condition == TRUE:
        return None
    columns = [d for d, e in enumerate(last.index) if key in e.axes]
    if len(columns) != 1:
        return None
    (dim,) = columns
    ahead = s.sub(last.index[dim], key)
    if key in ahead.axes:
        return None
    column = Axis(f"{key.name}.column", shape_of(last.node)[dim])
    place = s.sub(column, ahead)
    inside = s.and_(last.condition, s.ge(key, 0), s.lt(key, key.size))
    if s.substitute(inside, {key: place}) != TRUE or s.lt(place, key.size) != TRUE or s.ge(place, 0) != TRUE:
        return None
    return Unskewed(last.node, (*last.index[:dim], column, *last.index[dim + 1 :]), column, place)


def _before(lifter: Lifter, read: _Read) -> _Read | None:
    """What an operation that only moves elements, or puts zeros beside them, reads."""
    known = s.assume(read.condition)
    below = moved(lifter, read.node, read.index)
    if below is not None:
        node, index = below
        return _Read(node, tuple(s.under(e, known) for e in index), read.condition)
    handler = JOINS.get(op_name(read.node))
    if handler is None or read.node in lifter.known.opaque:
        return None
    marks = _Marks(lifter.known)
    value = handler(marks, read.node, read.index)
    found = None if value is None else _only_read(value)
    if found is None:
        return None
    which, condition = found
    node, index = marks.reads[which]
    lifter.visited.add(read.node)
    condition = s.and_(read.condition, s.under(condition, known))
    known = s.assume(condition)
    return _Read(node, tuple(s.under(e, known) for e in index), condition)


def _only_read(value: Expr) -> tuple[int, Expr] | None:
    """The number of the one read in a choice between it and zeros, and where it is chosen."""
    if isinstance(value, Load):
        return int(value.tensor.removeprefix("read")), TRUE
    if not (isinstance(value, Call) and value.op == "where"):
        return None
    condition, yes, no = value.args
    for here, read, other in ((condition, yes, no), (s.not_(condition), no, yes)):
        if isinstance(other, Const) and other.value == 0:
            found = _only_read(read)
            return None if found is None else (found[0], s.and_(here, found[1]))
    return None
