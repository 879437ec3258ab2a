"""The simplifier against brute force: random expressions agree at every position with what they were made from."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from refocus import simplify as s
from refocus.ir import INT, Axis, Call, Const, Expr
from tests.index_trees import (
    I6,
    J6,
    K4,
    STATIC_AXES,
    SYMBOLIC_AXES,
    M,
    N,
    Tree,
    axes_for,
    build,
    check_canonical,
    flatten,
    integers,
    points,
    predicates,
    run,
    unflatten,
    value,
)  # fmt: skip

common = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


def agree(tree: Tree, axes: tuple[Axis, ...], symbolic: bool) -> Expr:
    expr = build(tree)
    check_canonical(expr)
    for at in points(axes, symbolic):
        assert run(tree, at) == value(expr, at), (tree, expr, at)
    return expr


@common
@given(integers(False))
def test_integers_agree_everywhere(tree: Tree) -> None:
    expr = agree(tree, STATIC_AXES, False)
    low, high = s.bounds(expr)
    values = [value(expr, at) for at in points(STATIC_AXES, False)]
    assert low is None or low <= min(values)
    assert high is None or max(values) <= high
    assert not s.is_nonneg(expr) or min(values) >= 0


@common
@given(integers(True))
def test_integers_with_symbolic_sizes_agree_for_every_size(tree: Tree) -> None:
    expr = agree(tree, SYMBOLIC_AXES, True)
    low, high = s.bounds(expr)
    values = [value(expr, at) for at in points(SYMBOLIC_AXES, True)]
    assert low is None or low <= min(values)
    assert high is None or max(values) <= high
    assert not s.is_nonneg(expr) or min(values) >= 0


@common
@given(predicates(False))
def test_predicates_agree_everywhere(tree: Tree) -> None:
    agree(tree, STATIC_AXES, False)


@common
@given(predicates(True))
def test_predicates_with_symbolic_sizes_agree_for_every_size(tree: Tree) -> None:
    agree(tree, SYMBOLIC_AXES, True)


@pytest.mark.parametrize("symbolic", [False, True])
@common
@given(st.data())
def test_under_agrees_wherever_the_condition_holds(symbolic: bool, data: st.DataObject) -> None:
    axes = SYMBOLIC_AXES if symbolic else STATIC_AXES
    tree, cond = data.draw(integers(symbolic)), data.draw(predicates(symbolic))
    facts = s.assume(build(cond))
    again = s.under(build(tree), facts)
    low, high = s.bounds(build(tree), facts)
    for at in points(axes, symbolic):
        if run(cond, at):
            expected = run(tree, at)
            assert expected == value(again, at), (tree, cond, at)
            assert low is None or low <= expected
            assert high is None or expected <= high


@common
@given(st.data())
def test_under_simplifies_predicates_and_branches_soundly(data: st.DataObject) -> None:
    tree, cond = data.draw(predicates(False)), data.draw(predicates(False))
    again = s.under(build(tree), s.assume(build(cond)))
    free = s.under(build(tree))
    for at in points(STATIC_AXES, False):
        assert bool(run(tree, at)) == value(free, at)
        if run(cond, at):
            assert bool(run(tree, at)) == value(again, at), (tree, cond, at)


@common
@given(integers(False), st.sampled_from([I6, J6, K4]), integers(False, 3))
def test_substitution_agrees(tree: Tree, axis: Axis, by: Tree) -> None:
    expr = s.substitute(build(tree), {axis: build(by)})
    for at in points(STATIC_AXES, False):
        if 0 <= run(by, at) < value(axis.size, at):
            assert value(expr, at) == run(tree, {**at, axis: run(by, at)})


# ------------------------------------------------------------------------------------------------------- canonical form


@common
@given(st.lists(integers(False, 5), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_order_does_not_matter(parts: list[Tree], random: Any) -> None:
    exprs = [build(p) for p in parts]
    shuffled = list(exprs)
    random.shuffle(shuffled)
    assert s.add(*exprs) == s.add(*shuffled)
    assert s.mul(*exprs[:3]) == s.mul(*reversed(exprs[:3]))
    assert s.minimum(exprs[0], exprs[1]) == s.minimum(exprs[1], exprs[0])
    assert s.eq(exprs[0], exprs[1]) == s.eq(exprs[1], exprs[0])
    predicates = [s.le(e, 3) for e in exprs]
    random.shuffle(predicates)
    assert s.and_(*predicates) == s.and_(*reversed(predicates))


@common
@given(integers(False))
def test_rebuilding_changes_nothing(tree: Tree) -> None:
    expr = build(tree)
    again = s.substitute(expr, {Axis("unused", Const(2)): Const(0)})
    assert again == expr
    if isinstance(expr, Call):
        assert s.rebuild(expr, expr.args) == expr


def test_terms_are_ordered_the_same_in_every_process() -> None:
    code = """
from refocus import simplify as s
from refocus.ir import *
a = [Axis(c, Const(k + 3)) for k, c in enumerate("bhijkde")] + [Axis("i", Const(9)), Sym("n"), Sym("n", 3)]
for x in a:
    for y in a:
        print(s.add(x, s.mul(3, y), s.floordiv(s.add(x, s.mul(5, y), 1), 7), s.mod(s.mul(x, y), 11)))
        print(s.and_(s.le(x, 3), s.le(y, s.add(x, 1)), s.eq(s.mod(x, 3), y)))
        print(s.under(s.minimum(s.maximum(x, y), 4), s.assume(s.and_(s.le(x, y), s.le(y, 5)))))
"""
    seen = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1 and seen != {""}


def test_axes_that_differ_only_in_size_are_ordered() -> None:
    small, large = Axis("i", Const(4)), Axis("i", Const(5))
    assert s.add(small, large) == s.add(large, small)
    assert s.add(s.cast(s.le(small, 2), INT), s.cast(s.le(large, 2), INT)) == s.add(
        s.cast(s.le(large, 2), INT), s.cast(s.le(small, 2), INT)
    )


# ------------------------------------------------------------------------------------------------------- views


@st.composite
def shapes_of_one_size(draw: st.DrawFn) -> list[list[int]]:
    """Several shapes with the same number of elements."""
    primes = draw(st.lists(st.sampled_from([2, 2, 2, 3, 3, 5]), min_size=2, max_size=5))
    out = []
    for _ in range(3):
        order = draw(st.permutations(primes))
        cuts = sorted(draw(st.sets(st.integers(1, len(primes) - 1), max_size=3)))
        groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(primes)])]
        shape = []
        for group in groups:
            total = 1
            for p in group:
                total *= p
            shape.append(total)
        out.append(shape)
    return out


@common
@given(shapes_of_one_size())
@example([[4, 6], [3, 8], [3, 2, 4]])
@example([[5, 2, 3], [6, 5], [2, 15]])
def test_views_of_views_return_to_the_plain_axes(shapes: list[list[int]]) -> None:
    first, *others = ([Const(d) for d in shape] for shape in shapes)
    index = start = axes_for(first)
    shape = first
    for other in (*others, first):
        index, shape = unflatten(flatten(index, shape), other), other
    assert index == start


@common
@given(shapes_of_one_size(), st.data())
def test_views_with_permutations_agree(shapes: list[list[int]], data: st.DataObject) -> None:
    shape = [Const(d) for d in shapes[0]]
    axes = axes_for(shape)
    index = list(axes)
    moves: list[tuple[list[int], list[int]]] = []
    for other in shapes[1:]:
        order = data.draw(st.permutations(range(len(shape))))
        moves.append((list(order), other))
        index, shape = [index[k] for k in order], [shape[k] for k in order]
        index, shape = unflatten(flatten(index, shape), [Const(d) for d in other]), [Const(d) for d in other]
    for position in itertools.product(*(range(d) for d in shapes[0])):
        where, sizes = list(position), list(shapes[0])
        for order, other in moves:
            where, sizes = [where[k] for k in order], [sizes[k] for k in order]
            flat = 0
            for x, size in zip(where, sizes):
                flat = flat * size + x
            where = []
            for size in reversed(other):
                where.append(flat % size)
                flat //= size
            where, sizes = where[::-1], other
        assert [value(x, dict(zip(axes, position))) for x in index] == where


SYMBOLIC_SHAPES: list[list[Expr]] = [
    [M, N, Const(4)],
    [N, N],
    [Const(2), N, M, Const(8)],
    [M, s.add(N, 1), N],
    [N, s.add(s.mul(2, N), -1), Const(3)],
    [s.mul(4, N), M],
    [s.floordiv(N, 16), Const(16), M],
]


@pytest.mark.parametrize("shape", SYMBOLIC_SHAPES, ids=range(len(SYMBOLIC_SHAPES)))
def test_symbolic_flatten_unflatten_returns_to_the_plain_axes(shape: list[Expr]) -> None:
    axes = axes_for(shape)
    assert unflatten(flatten(axes, shape), shape) == axes
    # through a view that merges all but the last dimension
    merged = [s.mul(*shape[:-1]), shape[-1]]
    assert unflatten(flatten(unflatten(flatten(axes, shape), merged), merged), shape) == axes
    for keep in range(1, len(shape)):
        front, back = shape[:keep], shape[keep:]
        middle = [s.mul(1, *front), s.mul(1, *back)]
        once = unflatten(flatten(axes, shape), middle)
        assert once == [flatten(axes[:keep], front), flatten(axes[keep:], back)]


def test_a_remainder_that_is_zero_in_one_round_only() -> None:
    """It is the same whoever asks: what is compared with zero holds no zero of its own."""
    found = s.lt(s.mod(s.sub(J6, I6), 6), 1)
    check_canonical(found)
    assert found == s.and_(s.le(I6, J6), s.le(J6, I6))
