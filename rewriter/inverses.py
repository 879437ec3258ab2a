"""Inverses of triangular matrices with ones on the diagonal, whatever they are computed by.

    torch.linalg.inv(1 + L);  solve_triangular(1 + L, eye, upper=False)            one call
    x = -L;  x[i, :i] += x[i] @ x[:, :i]  for i = 1, 2, ..;  x + eye               rows, one after another, in place

Each row is proved to be what forward substitution makes of it: x = (1 + L)^-1 - 1 has x = -L - L x, which is row by row
x[i] = -L[i] + sum over m < i of -L[i,m] x[m], and what a row reads of itself is still -L when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load
from refocus.lift import Index, Lifter, arguments, is_tensor, op_name
from refocus.lift_tables import MOVES
from refocus.loop_steps import ApartStep, _OfStep
from refocus.patterns.linear import product_of, terms_of
from refocus.progressions import one_function
from refocus.sizes import shape_of

_MATRIX = "matrix"
_INVERSES = ("inverse", "linalg_inv")


@dataclass(frozen=True)
class System:
    """1 + L, lower triangular, as `matrix` holds it: "whole"; "lower", where what is above the diagonal is not read;
    "below", where the diagonal is not, either; "minus", -L before it is inverted in place."""

    matrix: fx.Node
    held: str

    def among(self, facts: Facts) -> tuple[fx.Node, str]:
        """What systems of equal values have in common."""
        return facts.same.get(self.matrix, self.matrix), self.held

    def below(self, lifter: ApartStep, index: Index) -> Expr | None:
        """L at a row and a column before it; None where that is not the matrix."""
        row, column = index[-2:]
        if not isinstance(row, Axis) or not isinstance(column, Axis):
            return None
        known = replace(lifter.known, opaque=lifter.known.opaque - {self.matrix})  # type: ignore[type-var]
        interior = lifter.interior | _added_up(self.matrix)
        value = replace(lifter, known=known, interior=interior, _memo={}, _inner=[]).at(self.matrix, index)
        if self.held == "below":
            return s.under(value, s.assume(s.lt(column, row)))
        diagonal = s.substitute(value, {column: row})
        ones = Const(0.0 if self.held == "minus" else 1.0, value.dtype)
        above = Const(0.0, value.dtype) if self.held == "lower" else s.under(value, s.assume(s.lt(row, column)))
        if diagonal != ones or above != Const(0.0, value.dtype):
            return None
        found = s.under(value, s.assume(s.lt(column, row)))
        return s.call("neg", found, dtype=value.dtype) if self.held == "minus" else found


@dataclass(frozen=True)
class Systems:
    """One system for each step of a loop."""

    each: tuple[System, ...]
    step: Axis

    @property
    def matrix(self) -> fx.Node:
        return self.each[-1].matrix

    def among(self, facts: Facts) -> tuple[tuple[fx.Node, str], ...]:
        """As `System.among`."""
        return tuple(x.among(facts) for x in self.each)

    def below(self, lifter: ApartStep, index: Index) -> Expr | None:
        """As `System.below`, as a function of the step; None where that is none, too."""
        found = [x.below(lifter, index) for x in self.each]
        known = [x for x in found if x is not None]
        return one_function(known, self.step) if len(known) == len(found) else None


_SUMS = frozenset(("add", "sub", "rsub", "neg"))


def _added_up(matrix: fx.Node) -> set[fx.Node]:
    """A matrix, and the sums that it is made of."""
    found, stack = {matrix}, [matrix]
    while stack:
        for node in stack.pop().all_input_nodes:
            if op_name(node) in _SUMS and node not in found:
                found.add(node)
                stack.append(node)
    return found


def solved_system(node: fx.Node) -> tuple[System, fx.Node] | None:
    """The system that a node solves, and its right side."""
    if len(arguments(node)) != 2 or not all(map(is_tensor, arguments(node))):
        return None
    matrix, right = arguments(node)
    if not shape_of(matrix)[:-2] == shape_of(right)[:-2] == shape_of(node)[:-2]:
        return None
    options = dict(node.kwargs)
    if op_name(node) == "linalg_solve_triangular" and options.pop("upper", True) is False:
        below = options.pop("unitriangular", False)
        return None if options else (System(matrix, "below" if below else "lower"), right)
    if op_name(node) == "linalg_solve" and not options:
        return System(matrix, "whole"), right
    return None


def inverted_system(node: fx.Node, facts: Facts) -> System | None:
    """The system that a node is the inverse of."""
    name = op_name(node)
    if name == "getitem" and arguments(node)[1] == 0 and op_name(arguments(node)[0]) == "linalg_inv_ex":
        return System(arguments(arguments(node)[0])[0], "whole")
    if name in _INVERSES:
        return System(arguments(node)[0], "whole")
    solved = solved_system(node) if name.startswith("linalg_solve") else None
    if solved is not None:
        return solved[0] if _is_identity(solved[1], facts) else None
    if name == "add" and is_tensor(node) and not node.kwargs:
        for inner, other in (arguments(node)[:2], arguments(node)[1::-1]):
            if is_tensor(inner) and is_tensor(other) and _is_identity(other, facts):
                if _inverts_in_place(inner, node, facts):
                    return System(inner, "minus")
    return None


def _is_identity(node: fx.Node, facts: Facts) -> bool:
    shape = shape_of(node)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return False
    axes = tuple(Axis(f"e{k}", d) for k, d in enumerate(shape))
    value = Lifter(facts, expands=True).at(node, axes)
    one, zero = Const(1.0, value.dtype), Const(0.0, value.dtype)
    row, column = axes[-2:]
    sides = (s.under(value, s.assume(s.lt(column, row))), s.under(value, s.assume(s.lt(row, column))))
    return s.substitute(value, {column: row}) == one and sides == (zero, zero)


# ---------------------------------------------------------------------------------------------------- row by row


def _inverts_in_place(base: fx.Node, reader: fx.Node, facts: Facts) -> bool:
    """Whether all that is written to a matrix, before it is read, are the rows of forward substitution."""
    storage = facts.storage[base]
    writes = sorted(facts.writers.get(storage, ()), key=facts.order.__getitem__)
    shape = shape_of(base)
    # What it was before must not be in the same memory.
    shared = op_name(base) in MOVES or any(facts.storage[n] == storage for n in base.all_input_nodes)
    if shared or not writes or not isinstance(shape[-1], Const) or shape[-1] != shape[-2]:
        return False
    if facts.order[writes[-1]] > facts.order[reader]:
        return False
    views = {n for n in facts.opaque if facts.storage[n] == storage}
    known = replace(facts, opaque=facts.opaque - views, lifted={})
    rows: list[int] = []
    before = -1
    for write in writes:
        row = _row_of(base, write, before, known)
        if row is None:
            return False
        rows.append(row)
        before = facts.order[write]
    first = rows[0] if rows else 0
    return first <= 1 and rows == list(range(first, int(shape[-1].value)))


def _row_of(base: fx.Node, write: fx.Node, before: int, known: Facts) -> int | None:
    """The row that a write makes by forward substitution; None where it does anything else. `before`: where the write
    before it is."""
    if op_name(write) != "copy_" or len(arguments(write)) != 2 or not all(map(is_tensor, arguments(write))):
        return None
    target, source = arguments(write)
    between: set[fx.Node] = set()
    stack: list[Any] = [target, source]
    while stack:
        node = stack.pop()
        if node is base or node in between:
            continue
        if known.order[node] < max(known.order[base], before):
            return None  # it was read, or may have been, before the rows above were there
        between.add(node)
        stack.extend(node.all_input_nodes)
    axes = tuple(Const(0) if d == Const(1) else Axis(f"x{k}", d) for k, d in enumerate(shape_of(target)))
    if shape_of(source) != shape_of(target):
        return None
    lifter = _OfStep(known, interior=frozenset(between), held={base: (_MATRIX, ())})
    at, made = lifter.at(target, axes), lifter.at(source, axes)
    if not isinstance(at, Load) or at.tensor != _MATRIX or not isinstance(at.index[-2], Const):
        return None
    *batch, row, column = at.index
    assert isinstance(row, Const)
    number = int(row.value)
    widths = [d for d in shape_of(base)[:-2] if d != Const(1)]
    whole = [a.size for a in batch if isinstance(a, Axis)] == widths and len(set(batch) - {Const(0)}) == len(widths)
    wide = isinstance(column, Axis) and _at_least(column.size, number)
    if not whole or not (wide or (column == Const(0) and number == 1)):
        return None
    return number if _is_substituted(made, tuple(batch), row, column) else None


def _at_least(size: Expr, number: int) -> bool:
    return isinstance(size, Const) and size.value >= number


def _is_substituted(made: Expr, batch: Index, row: Const, column: Expr) -> bool:
    """Whether a value is x[row, column] + sum over m of x[row, m] x[m, column], over all m < row at least (x is zero
    at the others)."""
    terms = [(sign, product_of(term), more) for sign, term, more in terms_of(made, 1)]
    if len(terms) != 2 or any(sign != 1 or more for sign, _, more in terms):
        return False
    plain, summed = sorted((p for _, p, _ in terms), key=lambda p: len(p.factors))
    if any(p.divisors or p.exponents or p.conditions for p in (plain, summed)) or plain.summed:
        return False
    if plain.factors != (Load(_MATRIX, (*batch, row, column), plain.factors[0].dtype),):
        return False
    inner: Expr = summed.summed[0] if summed.summed else Const(0)
    if len(summed.summed) > 1 or not _at_least(inner.size if isinstance(inner, Axis) else Const(1), int(row.value)):
        return False
    wanted = [Load(_MATRIX, (*batch, a, b), plain.factors[0].dtype) for a, b in ((row, inner), (inner, column))]
    return list(summed.factors) in (wanted, wanted[::-1])
