"""Scores that were put together piece by piece: one expression, where all pieces are the same at their own positions.

    where(c < C, q[w*c + i] . k[w*c + i + o], where(c == C, q[w*C + i] . k[w*C + i + o], 0.0))
        ->   q[w*c + i] . k[w*c + i + o]
    where(h == 0, q[0, i] . k[0, j], where(h == 1, q[1, i] . k[1, j], q[2, i] . k[2, j]))
        ->   q[h, i] . k[h, j]

A piece is looked at under the conditions that lead to it. Those that exclude each other lead nowhere (a buffer of zeros
that is overwritten all over), and a fill stays. Blocks on a diagonal, written into a buffer and masked at both ends of
the sequence, come out as one product under a mask.

Where something is added to a part of the scores (a bias that the class token has no share in), the product is taken
out of the choice:  where(c, q . k + bias, q . k)  ->  q . k + where(c, bias, 0.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.lift_joins import clamped
from refocus.polynomial import poly_scale, poly_shift
from refocus.proofs import NO_FACTS, Facts, poly_nonneg

ShapeOf = Callable[[str], tuple[Expr, ...]]
_Literal = tuple[Expr, bool]

_MOST_PIECES, _MOST_CASES = 64, 512
_ROUNDS = 3


@dataclass(frozen=True)
class _Piece:
    """What stands at one place of a choice, in one case of the conditions that lead there."""

    value: Expr
    facts: Facts


def whole(value: Expr, key: Axis, shape_of: ShapeOf) -> Expr:
    """`value` with every choice between the same thing at different positions written as that thing."""
    merge = _Merge(key, shape_of)

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Dot | Load):
            return node
        return merge.merged(node) if _is_choice(node) and len(set(_ends(node))) > 1 else None

    return rewrite(rewrite(value, visit, s.rebuild), _no_product, s.rebuild)


def without_choice_of_products(value: Expr, key: Axis, shape_of: ShapeOf) -> Expr:
    """`value` with a product that both branches of a choice add to something taken out of it."""
    merge = _Merge(key, shape_of)

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Dot | Load):
            return node
        if not _is_choice(node) or sum(_holds_product(branch) for branch in node.children[1:]) < 2:
            return None
        condition, *branches = node.children
        yes, no = (rewrite(branch, visit, s.rebuild) for branch in branches)
        return merge.apart(condition, yes, no, node.dtype)

    return rewrite(value, visit, s.rebuild)


@lru_cache(maxsize=1 << 12)
def _holds_product(value: Expr) -> bool:
    return any(isinstance(n, Dot) for n in value.walk())


def _addends(value: Expr) -> list[Expr]:
    if isinstance(value, Call) and value.op == "add":
        return [x for a in value.args for x in _addends(a)]
    if isinstance(value, Call) and value.op == "sub" and not _holds_product(value.args[1]):
        return [*_addends(value.args[0]), s.call("neg", value.args[1], dtype=value.dtype)]
    return [value]


def _added(values: list[Expr], dtype: str) -> Expr:
    out: Expr = Const(0.0, dtype)
    for value in values:
        out = value if out == Const(0.0, dtype) else s.call("add", out, value, dtype=dtype)
    return out


def _no_product(node: Expr) -> Expr | None:
    """A mask that went the way of the keys, multiplied with ones of one channel."""
    if not (isinstance(node, Dot) and isinstance(node.query, Const) and all(a.size == Const(1) for a in node.over)):
        return None
    return s.call("mul", s.substitute(node.key, dict.fromkeys(node.over, Const(0))), node.query, dtype=node.dtype)


def holds_pieces(value: Expr) -> bool:
    """Whether products stand in several places of one choice."""
    return any(_is_choice(n) and sum(_holds_product(e) for e in set(_ends(n))) > 1 for n in value.walk())


def _is_choice(value: Expr) -> bool:
    return isinstance(value, Call) and value.op == "where" and value.is_float


def _ends(value: Expr) -> Iterator[Expr]:
    """What a choice chooses from, but for numbers."""
    if _is_choice(value):
        for branch in value.children[1:]:
            yield from _ends(branch)
    elif not isinstance(value, Const):
        yield value


def _paths(value: Expr, path: tuple[_Literal, ...]) -> Iterator[tuple[tuple[_Literal, ...], Expr]]:
    """What a choice chooses from, and the conditions that lead there."""
    if not _is_choice(value):
        yield path, value
        return
    condition, yes, no = value.children
    yield from _paths(yes, (*path, (condition, True)))
    yield from _paths(no, (*path, (condition, False)))


@dataclass
class _Merge:
    key: Axis
    shape_of: ShapeOf
    cases: int = 0
    over: dict[tuple[Expr, ...], tuple[Axis, ...]] = field(default_factory=dict)  # sizes -> what is summed over

    def merged(self, value: Expr) -> Expr | None:
        """The choice with one expression in the place of all its pieces; None where they differ."""
        if sum(1 for _ in _ends(value)) > _MOST_PIECES:
            return None
        self.cases = 0
        pieces = [p for p in self._pieces(value) if not isinstance(p.value, Const)]
        if self.cases > _MOST_CASES:
            return None
        for general in _generals(pieces):
            if all(self._normal(s.under(general, p.facts)) == p.value for p in pieces):
                return self._rebuilt(value, self._guarded(general))
        return None

    def apart(self, condition: Expr, yes: Expr, no: Expr, dtype: str) -> Expr:
        """A choice between two sums, with the products that are the same in both outside of it."""
        ours, theirs, shared = _addends(yes), _addends(no), list[Expr]()
        for a in [x for x in ours if _holds_product(x)]:
            for b in [x for x in theirs if _holds_product(x)]:
                one = a if a == b else self.merged(s.where(condition, a, b))
                if one is not None and not _is_choice(one):
                    shared.append(one)
                    ours.remove(a)
                    theirs.remove(b)
                    break
        if not shared:
            return s.where(condition, yes, no)
        rest = s.where(condition, _added(ours, dtype), _added(theirs, dtype))
        return _added([*shared, rest] if rest != Const(0.0, dtype) else shared, dtype)

    def _pieces(self, value: Expr) -> Iterator[_Piece]:
        for path, end in _paths(value, ()):
            for facts in self._cases(path, NO_FACTS):
                yield _Piece(end if isinstance(end, Const) else self._normal(s.under(end, facts)), facts)

    def _cases(self, path: tuple[_Literal, ...], facts: Facts) -> Iterator[Facts]:
        """What is known at the end of a path: one case for each way in which its conditions may hold."""
        self.cases += 1
        if self.cases > _MOST_CASES:
            return
        rest: list[_Literal] = []
        for condition, holds in path:  # first those that are ranges
            told = s.under(condition, facts)
            if isinstance(told, Const):
                if bool(told.value) != holds:
                    return
            elif len(s.conjuncts(told, "or" if holds else "and")) == 1:
                facts = s.assume(told, facts, holds)  # type: ignore[assignment]
            else:
                rest.append((told, holds))
        if len(rest) < len(path):
            if rest:
                yield from self._cases(tuple(rest), facts)
            elif not _is_impossible(facts):
                yield facts
            return
        condition, holds = rest[0]
        before: tuple[_Literal, ...] = ()
        for part in s.conjuncts(condition, "or" if holds else "and"):
            yield from self._cases((*before, (part, holds), *rest[1:]), facts)
            before = (*before, (part, not holds))

    def _normal(self, value: Expr) -> Expr:
        """Products with their sides told apart again, as what a side depends on is known here, and summed over axes of
        the same names."""

        def visit(node: Expr) -> Expr | None:
            if not isinstance(node, Dot):
                return None
            factors = [*_factors(node.query), *_factors(node.key)]
            sides = [[f for f in factors if (self.key in f.axes) == late] for late in (False, True)]
            query, late = (_product(side, node.dtype) for side in sides)
            if any(isinstance(n, Dot | Reduce) for side in (query, late) for n in side.walk()):
                return Dot(node.over, query, late, node.dtype)
            over = self.over.setdefault(tuple(a.size for a in node.over), node.over)
            query, late = (s.substitute(side, dict(zip(node.over, over))) for side in (query, late))
            return Dot(over, query, late, node.dtype)

        return rewrite(value, visit, s.rebuild)

    def _rebuilt(self, value: Expr, piece: Expr) -> Expr:
        """One choice between a piece and each number that stands in the place of pieces somewhere."""
        fills: dict[Expr, list[Expr]] = {}
        for path, end in _paths(value, ()):
            if isinstance(end, Const) and next(self._cases(path, NO_FACTS), None) is not None:
                there = s.and_(*(condition if holds else s.not_(condition) for condition, holds in path))
                fills.setdefault(end, []).append(tidy(there))
        out = piece
        for fill, places in fills.items():
            out = s.where(s.and_(*map(s.not_, places)), out, fill)
        return out

    def _guarded(self, value: Expr) -> Expr:
        """A piece that is read everywhere: where its own position is out of range, some of a tensor is read."""

        def visit(node: Expr) -> Expr | None:
            if isinstance(node, Dot):
                return replace(node, query=self._guarded(node.query), key=rewrite(node.key, padded, s.rebuild))
            return self._in_range(node)[0] if isinstance(node, Load) else None

        def padded(node: Expr) -> Expr | None:
            if not isinstance(node, Load):
                return None
            load, inside = self._in_range(node)
            return s.where(inside, load, Const(0.0, node.dtype))

        return rewrite(value, visit, s.rebuild)

    def _in_range(self, load: Load) -> tuple[Load, Expr]:
        index: list[Expr] = []
        inside: Expr = TRUE
        for entry, size in zip(load.index, self.shape_of(load.tensor)):
            fits = s.and_(s.ge(entry, 0), s.lt(entry, size))
            index.append(entry if fits == TRUE else clamped(entry, size))
            inside = s.and_(inside, fits)
        return Load(load.tensor, tuple(index), load.dtype), inside


def _generals(pieces: Sequence[_Piece]) -> Iterator[Expr]:
    """What all pieces may be at their own positions: one of them, or what they have in common, with an axis in place of
    the numbers that it is known to be."""
    yield from dict.fromkeys(p.value for p in pieces)
    pinned: dict[Axis, list[int]] = {}
    for axis in pieces[0].facts.axes if pieces else ():
        numbers = [n for p in pieces if (n := p.facts.only(axis)) is not None]
        if len(numbers) == len(pieces):
            pinned[axis] = numbers
    common = _common([p.value for p in pieces], pinned) if pinned else None
    if common is not None:
        yield common


def _common(values: Sequence[Expr], pinned: Mapping[Axis, Sequence[int]]) -> Expr | None:
    first = values[0]
    if all(v == first for v in values):
        return first
    if all(v.is_int for v in values):
        steps = [s.sub(v, first) for v in values]
        if all(isinstance(step, Const) for step in steps):
            return _on_a_line(first, [int(step.value) for step in steps if isinstance(step, Const)], pinned)
    if not first.children or any(_head(v) != _head(first) for v in values):
        return None
    children = [_common(same, pinned) for same in zip(*(v.children for v in values))]
    found = tuple(c for c in children if c is not None)
    return s.rebuild(first, found) if found and len(found) == len(children) else None


def _head(value: Expr) -> tuple[object, ...]:
    """What an expression is, but for what it is computed from."""
    match value:
        case Call(op=op):
            kind: tuple[object, ...] = (op,)
        case Load(tensor=tensor):
            kind = (tensor,)
        case Dot(over=over):
            kind = over
        case Reduce(op=op, axis=axis):
            kind = (op, axis)
        case _:
            kind = (value,)
    return type(value), value.dtype, len(value.children), *kind


def _on_a_line(first: Expr, steps: Sequence[int], pinned: Mapping[Axis, Sequence[int]]) -> Expr | None:
    """`first` and a multiple of an axis, where that is how far each value is from the first."""
    for axis, numbers in pinned.items():
        apart = next(((step, n - numbers[0]) for step, n in zip(steps, numbers) if n != numbers[0]), None)
        if apart is None or apart[0] % apart[1]:
            continue
        slope = apart[0] // apart[1]
        if all(step == slope * (n - numbers[0]) for step, n in zip(steps, numbers)):
            return s.add(first, s.mul(s.sub(axis, numbers[0]), slope))
    return None


def tidy(condition: Expr) -> Expr:
    """A conjunction without what the rest of it makes superfluous: b >= 28 and a + b >= 36 is the latter, if a < 9."""
    for _ in range(_ROUNDS):
        parts = s.conjuncts(condition)
        for k in range(len(parts)):
            known = NO_FACTS
            for other in (*parts[:k], *parts[k + 1 :]):
                known = s.assume(other, known)  # type: ignore[assignment]
            parts[k] = s.under(parts[k], known)
        before, condition = condition, s.and_(*parts)
        if condition == before:
            break
    return condition


def _is_impossible(facts: Facts) -> bool:
    """Whether one of several facts is the opposite of what follows from the others."""
    return any(poly_nonneg(poly_shift(poly_scale(fact, -1), -1), facts) for fact in facts.polys)


def _factors(value: Expr) -> list[Expr]:
    if isinstance(value, Call) and value.op == "mul":
        return [f for a in value.args for f in _factors(a)]
    return [] if value == Const(1.0, value.dtype) else [value]


def _product(factors: list[Expr], dtype: str) -> Expr:
    out: Expr = Const(1.0, dtype)
    for factor in factors:
        out = s.call("mul", out, factor, dtype=dtype)
    return out
