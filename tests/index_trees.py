"""Random index expressions as trees, and interpreters of trees and of expressions in plain Python.

A tree is a number, an axis, a size or `(op, tree, ...)`. `run` evaluates it; `build` makes an expression of it with the
smart constructors, which `value` evaluates. The two must agree at every position.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from refocus import simplify as s
from refocus.ir import INT, Axis, Call, Const, Expr, Sym

Tree = Any  # an int, an Axis, a Sym, or (op, Tree, ...)
Point = dict[Expr, int]

N, M = Sym("n"), Sym("m", 1)
I6, J6, K4 = Axis("i", Const(6)), Axis("j", Const(6)), Axis("k", Const(4))
XN, YN, ZM = Axis("x", N), Axis("y", s.add(N, 1)), Axis("z", s.mul(2, M))
SIZES = [(2, 1), (3, 2), (5, 1), (4, 3)]  # values of (n, m)

# --------------------------------------------------------------------------------------------- two plain interpreters

PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda *a: sum(a), "sub": lambda a, b: a - b, "neg": lambda a: -a, "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "min": min, "max": max, "abs": abs,
    "where": lambda c, a, b: a if c else b, "le": lambda a, b: a <= b, "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b, "gt": lambda a, b: a > b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a, "xor": lambda a, b: a != b,
}  # fmt: skip
SMART: dict[str, Callable[..., Expr]] = {
    "add": s.add, "sub": s.sub, "neg": s.neg, "mul": s.mul, "floordiv": s.floordiv, "mod": s.mod, "min": s.minimum,
    "max": s.maximum, "abs": lambda a: s.call("abs", a, dtype=INT), "where": s.where,
    "le": s.le, "lt": s.lt, "ge": s.ge, "gt": s.gt, "eq": s.eq, "ne": s.ne, "and": s.and_, "or": s.or_, "not": s.not_,
    "xor": s.xor,
}  # fmt: skip


def run(tree: Tree, at: Point) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, Expr):
        return at[tree]
    return PLAIN[tree[0]](*(run(t, at) for t in tree[1:]))


def build(tree: Tree) -> Expr:
    if isinstance(tree, int | Expr):
        return s.expr(tree)
    return SMART[tree[0]](*(build(t) for t in tree[1:]))


def value(expr: Expr, at: Point) -> Any:
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Axis | Sym):
        return at[expr]
    assert isinstance(expr, Call), expr
    args = [value(a, at) for a in expr.args]
    if expr.op == "mul":
        out = 1
        for a in args:
            out *= a
        return out
    return PLAIN[expr.op](*args)


def points(axes: tuple[Axis, ...], symbolic: bool) -> Iterator[Point]:
    for n, m in SIZES if symbolic else [(2, 1)]:
        sizes: Point = {N: n, M: m}
        for position in itertools.product(*(range(value(a.size, sizes)) for a in axes)):
            yield {**sizes, **dict(zip(axes, position))}


def check_canonical(expr: Expr) -> None:
    """What the rest of the project relies on."""
    for node in expr.walk():
        if isinstance(node, Call):
            assert node.op not in ("sub", "neg", "ne", "ge", "gt")
            assert node.op != "lt" or node.args[0].is_float or node.args[1].is_float
            if node.op == "mul":
                assert all(not isinstance(a, Const) for a in node.args[1:]) and node.args[0] not in (Const(0), Const(1))
            if node.op == "add":
                assert len(node.args) > 1 and Const(0) not in node.args
                assert all(not (isinstance(a, Call) and a.op == "add") for a in node.args)


# ------------------------------------------------------------------------------------------------------- random trees


@st.composite
def integers(draw: st.DrawFn, symbolic: bool, leaves: int = 8) -> Tree:
    """An integer tree with at most so many leaves."""
    axes = SYMBOLIC_AXES if symbolic else STATIC_AXES
    if leaves <= 1 or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([*axes, *axes, *((N, M) if symbolic else ()), *range(-6, 25, 5)]))
    kind = draw(st.sampled_from(["sum", "sum", "scale", "divide", "divide", "unary", "where", "product"]))
    left = draw(st.integers(1, leaves - 1))
    inner = draw(integers(symbolic, left))
    if kind == "scale":
        return ("mul", draw(st.sampled_from(FACTORS + (SYMBOLIC_FACTORS if symbolic else []))), inner)
    if kind == "divide":
        op = draw(st.sampled_from(["floordiv", "mod"]))
        return (op, inner, draw(st.sampled_from(DIVISORS + (SYMBOLIC_DIVISORS if symbolic else []))))
    if kind == "unary":
        return (draw(st.sampled_from(["neg", "abs"])), inner)
    other = draw(integers(symbolic, leaves - left))
    if kind == "where":
        return ("where", draw(predicates(symbolic, 3)), inner, other)
    return ("mul" if kind == "product" else draw(st.sampled_from(["add", "sub", "min", "max"])), inner, other)


@st.composite
def predicates(draw: st.DrawFn, symbolic: bool, leaves: int = 6) -> Tree:
    kind = draw(st.sampled_from(["compare", "compare", "connect", "not"]))
    if leaves <= 2 or kind == "compare":
        op = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]))
        return (op, draw(integers(symbolic, max(1, leaves // 2))), draw(integers(symbolic, max(1, leaves // 2))))
    if kind == "not":
        return ("not", draw(predicates(symbolic, leaves - 1)))
    op = draw(st.sampled_from(["and", "or", "xor"]))
    return (op, draw(predicates(symbolic, leaves // 2)), draw(predicates(symbolic, leaves // 2)))


STATIC_AXES, SYMBOLIC_AXES = (I6, J6, K4), (XN, YN, ZM)
FACTORS: list[Tree] = list(range(-6, 13))
SYMBOLIC_FACTORS: list[Tree] = [N, M, ("add", N, 1), ("mul", 2, N)]
DIVISORS: list[Tree] = [1, 2, 3, 4, 6, 8, 12, 24]
SYMBOLIC_DIVISORS: list[Tree] = [
    N, M, ("mul", 2, N), ("mul", N, M), ("add", N, 1), ("mul", M, ("add", N, 1)), ("mul", 4, M),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- views


def flatten(index: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    flat: Expr = Const(0)
    for x, size in zip(index, shape):
        flat = s.add(s.mul(flat, size), x)
    return flat


def unflatten(flat: Expr, shape: Sequence[Expr]) -> list[Expr]:
    out: list[Expr] = []
    stride: Expr = Const(1)
    for size in reversed(shape):
        out.append(s.mod(s.floordiv(flat, stride), size))
        stride = s.mul(stride, size)
    return out[::-1]


def axes_for(shape: Sequence[Expr], names: str = "abcdefgh") -> list[Expr]:
    return [Axis(n, size) for n, size in zip(names, shape)]
