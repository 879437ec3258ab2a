"""Sums over keys on their way to a division: what they are multiplied with, added to, and moved through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from refocus.facts import Facts
from refocus.ir import Const, Expr
from refocus.joint import moved
from refocus.lift import Index, Lifter, arguments, is_tensor, op_name
from refocus.lift_views import SPLITS, VIEWS, arguments_of, dimension
from refocus.patterns.declined import Declined, Stop
from refocus.sizes import shape_of


@dataclass(frozen=True)
class Row:
    """A factor of a row, or with sign -1 a divisor; a number is one of all rows."""

    sign: int
    node: fx.Node | float
    index: Index = ()

    def at(self, lifter: Lifter) -> Expr:
        return _value(lifter, self.node, self.index)


@dataclass(frozen=True)
class Addend:
    """One summand of a numerator or denominator: a sum over keys at a position, or a `value` without keys."""

    node: fx.Node
    index: Index
    rows: tuple[Row, ...]
    value: Expr | None = None


PRODUCTS = ("mul", "multiply")
_DIVISIONS = ("div", "true_divide", "divide")
_SUMS = ("add", "sub", "neg", "lerp", "sum", "addcmul")
_CARRIES = frozenset((*_SUMS, *_DIVISIONS, *PRODUCTS, *VIEWS, *SPLITS, "stack", "cat", "concat"))


def _value(lifter: Lifter, value: fx.Node | float, index: Index) -> Expr:
    """A tensor at a position; a number, known now or when it arrives."""
    if is_tensor(value):
        return lifter.at(value, index)  # type: ignore[arg-type]
    return lifter.factor(value, "float32")


def divides(node: fx.Node) -> bool:
    """Whether an operation divides, and does not round what it gets."""
    return op_name(node) in _DIVISIONS and node.kwargs.get("rounding_mode") is None


def carried(starts: list[fx.Node], facts: Facts) -> set[fx.Node]:
    """What sums over keys flow through as sums: added up, multiplied by rows, moved."""
    found, stack = set[fx.Node](), list(starts)
    while stack:
        for user in facts.flow.successors(stack.pop()):
            if user not in found and op_name(user) in _CARRIES and (divides(user) or op_name(user) not in _DIVISIONS):
                found.add(user)
                stack.append(user)
    return found


@dataclass
class Walk:
    """Takes sums of sums over keys apart, from a division up."""

    lifter: Lifter
    facts: Facts
    sums: set[fx.Node]  # over keys
    carriers: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.carriers = carried(list(self.sums), self.facts)

    def addends(self, node: fx.Node, index: Index, rows: tuple[Row, ...] = ()) -> Iterator[Addend]:
        if node in self.sums:
            yield Addend(node, index, rows)
            return
        if node not in self.carriers:
            if not self._is_zero(node, index):
                yield Addend(node, index, rows, self.lifter.at(node, index))
            return
        self.lifter.visited.add(node)
        name = op_name(node)
        if name == "add" and node.kwargs.get("alpha", 1) in (1, 1.0):
            for operand in arguments(node)[:2]:
                if is_tensor(operand):
                    yield from self.addends(operand, aligned(operand, index), rows)
                elif isinstance(operand, fx.Node) or operand != 0:
                    yield Addend(node, index, rows, _value(self.lifter, operand, ()))
        elif name in ("sub", "neg", "lerp"):
            yield from self._subtracted(node, index, rows)
        elif name in (*_DIVISIONS, *PRODUCTS):
            yield from self._scaled(node, arguments(node)[:2], index, rows)
        elif name == "addcmul" and node.kwargs.get("value", 1) in (1, 1.0):
            yield from self.addends(arguments(node)[0], aligned(arguments(node)[0], index), rows)
            yield from self._scaled(node, arguments(node)[1:3], index, rows)
        elif name == "sum":
            for position in _positions(node, index):
                yield from self.addends(arguments(node)[0], position, rows)
        else:
            below = _part_of_join(node, index) or moved(self.lifter, node, index)
            if below is None:
                raise Stop(Declined(f"a sum over keys is changed by `{name}` before it is divided", node.name))
            yield from self.addends(*below, rows)

    def _subtracted(self, node: fx.Node, index: Index, rows: tuple[Row, ...]) -> Iterator[Addend]:
        """a - b, -a, and a + w * (b - a)."""
        operands = [a for a in arguments(node) if is_tensor(a)]
        name = op_name(node)
        if (len(operands) != len(arguments(node)) and name != "lerp") or node.kwargs.get("alpha", 1) not in (1, 1.0):
            raise Stop(Declined(f"a sum over keys is changed by `{name}` before it is divided", node.name))
        minus = (*rows, Row(1, -1.0))
        terms = [(operands[0], minus)] if name == "neg" else [(operands[0], rows), (operands[-1], minus)]
        if name == "lerp":
            weight = arguments(node)[2]
            if weight in self.carriers | self.sums:
                raise Stop(Declined("two sums over keys are multiplied before they are divided", node.name))
            share = Row(1, weight, aligned(weight, index) if is_tensor(weight) else ())
            terms = [(operands[0], rows), (operands[0], (*minus, share)), (operands[1], (*rows, share))]
        for operand, more in terms:
            yield from self.addends(operand, aligned(operand, index), more)

    def _is_zero(self, node: fx.Node, index: Index) -> bool:
        """Whether nothing has been summed yet: zeros, whatever they are rescaled with."""
        if op_name(node) in PRODUCTS:
            operands = arguments(node)[:2]
            return any(self._is_zero(a, aligned(a, index)) for a in operands if is_tensor(a)) or 0 in operands
        value = self.lifter.at(node, index)
        return isinstance(value, Const) and value.value == 0

    def _scaled(
        self, node: fx.Node, operands: Sequence[Any], index: Index, rows: tuple[Row, ...]
    ) -> Iterator[Addend]:
        left, right = operands
        sums = self.carriers | self.sums
        if left not in sums and right not in sums:
            raise Stop(Declined(f"a sum over keys is changed by `{op_name(node)}` before it is divided", node.name))
        kept, row = (left, right) if left in sums else (right, left)
        if row in sums:
            raise Stop(Declined("two sums over keys are multiplied before they are divided", node.name))
        if divides(node) and kept is right:
            raise Stop(Declined("something is divided by a sum over keys before it is added", node.name))
        more = Row(-1 if divides(node) else 1, row, aligned(row, index) if is_tensor(row) else ())
        yield from self.addends(kept, aligned(kept, index), (*rows, more))


def aligned(node: fx.Node, index: Index) -> Index:
    """Where an operand is read for a position of the result."""
    shape = shape_of(node)
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(Const(0) if d == Const(1) else x for d, x in zip(shape, tail))


def summed_dims(node: fx.Node) -> tuple[list[int], bool]:
    """The dimensions that a sum runs over, and whether they stay."""
    source, dims, keep = arguments_of(node, "self", "dim", "keepdim", keepdim=False)
    rank = len(shape_of(source))
    found = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    return sorted(dimension(d, rank) for d in found), bool(keep)


def opened(node: fx.Node, index: Index, at: dict[int, Expr]) -> Index:
    """A position of a sum's argument: `at` in the dimensions that are summed."""
    _, keep = summed_dims(node)
    rest = iter([x for k, x in enumerate(index) if not keep or k not in at])
    return tuple(at[d] if d in at else next(rest) for d in range(len(shape_of(arguments(node)[0]))))


def _positions(node: fx.Node, index: Index) -> Iterator[Index]:
    """The positions that a sum over one short dimension adds up: chunks that were stacked."""
    dims, _ = summed_dims(node)
    size = shape_of(arguments(node)[0])[dims[0]]
    if len(dims) != 1 or not isinstance(size, Const) or size.value > _STACKED:
        raise Stop(Declined("a sum over keys is summed again before it is divided", node.name))
    for k in range(int(size.value)):
        yield opened(node, index, {dims[0]: Const(k)})


_STACKED = 256


def _part_of_join(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """Which of several tensors that are put together is read at a position that is known."""
    if op_name(node) not in ("stack", "cat", "concat"):
        return None
    tensors, dim = arguments_of(node, "tensors", "dim", dim=0)
    dim = dimension(dim, len(index))
    at = index[dim]
    if not isinstance(at, Const):
        return None
    if op_name(node) == "stack":
        return tensors[int(at.value)], index[:dim] + index[dim + 1 :]
    begin = 0
    for tensor in tensors:
        size = shape_of(tensor)[dim]
        if not isinstance(size, Const):
            return None
        if at.value < begin + size.value:
            return tensor, (*index[:dim], Const(int(at.value) - begin), *index[dim + 1 :])
        begin += int(size.value)
    return None
