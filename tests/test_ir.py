"""Nodes: equality, free axes, loads, and that `repr` is Python that rebuilds them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refocus import simplify as s
from refocus.ir import (
    BOOL,
    FALSE,
    INT,
    ONE,
    OPS,
    TRUE,
    ZERO,
    Axis,
    Call,
    Const,
    Dot,
    Expr,
    Load,
    Operand,
    Reduce,
    Region,
    Sym,
    parse,
    rewrite,
)  # fmt: skip

F32 = "float32"
N = Sym("n")
B, H, QI, KJ = Axis("b", N), Axis("h", Const(8)), Axis("i", s.add(N, 1)), Axis("j", s.mul(2, N))
D, E = Axis("d", Const(16)), Axis("e", Const(16))
Q, K = Load("q", (B, H, QI, D), F32), Load("k", (B, s.floordiv(H, 2), KJ, D), F32)
QK = Dot((D,), Q, K, F32)
MASK = s.and_(s.le(KJ, QI), s.lt(s.sub(QI, KJ), 16))

NODES: list[Expr] = [
    ZERO,
    ONE,
    TRUE,
    FALSE,
    Const(-3),
    Const(2**62),
    Const(0.0, F32),
    Const(-0.0, F32),
    Const(1e-45, F32),
    Const(0.1, "float64"),
    Const(-1.5, "bfloat16"),
    Const(math.inf, F32),
    Const(-math.inf, F32),
    Const(math.nan, "float16"),
    N,
    Sym("u_weird name", 0),
    B,
    QI,
    Q,
    K,
    QK,
    MASK,
    Load("doc", (s.minimum(QI, 7),), INT),
    Load("scalar", (), F32),
    Reduce("sum", KJ, Call("exp", (QK,), F32), F32),
    Reduce("any", KJ, MASK, BOOL),
    Call("where", (MASK, QK, Const(-math.inf, F32)), F32),
    Call("where", (MASK, Const(math.nan, F32), Const(-0.0, F32)), F32),
]
REGION = Region(
    batch=(B, H),
    query=QI,
    key=KJ,
    value=(E,),
    score=Call("mul", (QK, Const(0.25, F32)), F32),
    mask=MASK,
    logits=Call("where", (MASK, Call("mul", (QK, Const(0.25, F32)), F32), Const(-math.inf, F32)), F32),
    values=Load("v", (B, s.floordiv(H, 2), KJ, E), F32),
    operands=(
        Operand("q", F32, (N, Const(8), s.add(N, 1), Const(16))),
        Operand("k", F32, (N, Const(4), s.mul(2, N), Const(16))),
        Operand("v", F32, (N, Const(4), s.mul(2, N), Const(16))),
    ),
    out_dtype=F32,
    extra=(Load("sink", (H,), F32),),
)


@pytest.mark.parametrize("node", NODES, ids=range(len(NODES)))
def test_repr_rebuilds_the_node(node: Expr) -> None:
    again = parse(repr(node))
    assert again == node and hash(again) == hash(node)
    assert repr(again) == repr(node) and again.dtype == node.dtype
    assert again.axes == node.axes and again.loads == node.loads


@pytest.mark.parametrize("value", [-0.0, 0.0])
def test_zero_keeps_its_sign(value: float) -> None:
    again = parse(repr(Const(value, F32)))
    assert math.copysign(1.0, again.value) == math.copysign(1.0, value)


def test_bool_int_and_float_stay_apart() -> None:
    kinds = [Const(1), Const(1.0, F32), Const(1.0, "float64"), TRUE]
    assert len(set(kinds)) == 4
    assert [type(parse(repr(k)).value) for k in kinds] == [int, float, float, bool]


def test_repr_rebuilds_a_region() -> None:
    again = parse(repr(REGION))
    assert again == REGION and repr(again) == repr(REGION)
    assert again.syms == (N,) and again.dots == (QK,)
    assert again.operand("k").shape == (N, Const(4), s.mul(2, N), Const(16))


def test_repr_is_the_same_in_every_process() -> None:
    code = "import sys; sys.path[:0] = ['tests']; import test_ir; print(repr(test_ir.REGION))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(REGION)


def expressions() -> st.SearchStrategy[Expr]:
    numbers = st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(Const),
        st.floats(allow_nan=False, width=32).map(lambda v: Const(v, F32)),
        st.booleans().map(lambda v: Const(v, BOOL)),
    )
    leaves = st.one_of(numbers, st.sampled_from([N, B, H, QI, KJ, Q, K]))

    def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        def node(op: str, args: list[Expr]) -> Expr:
            return Call(op, tuple(args[: OPS[op] or len(args)]), F32)

        return st.one_of(
            st.builds(node, st.sampled_from(sorted(OPS)), st.lists(inner, min_size=3, max_size=3)),
            st.builds(lambda a, b: Load("t", (a, b), F32), inner, inner),
            st.builds(lambda a, b: Dot((D,), a, b, F32), inner, inner),
            st.builds(lambda a: Reduce("max", KJ, a, F32), inner),
        )

    return st.recursive(leaves, grow, max_leaves=8)


@settings(deadline=None, max_examples=100)
@given(expressions())
def test_any_expression_survives_repr(node: Expr) -> None:
    again = parse(repr(node))
    assert again == node and repr(again) == repr(node) and hash(again) == hash(node)


@settings(deadline=None, max_examples=100)
@given(expressions())
def test_what_a_node_knows_of_itself(node: Expr) -> None:
    def axes(e: Expr) -> frozenset[Axis]:
        if isinstance(e, Axis):
            return frozenset((e,))
        inner: frozenset[Axis] = frozenset().union(*(axes(c) for c in e.children))
        return inner - frozenset(e.over if isinstance(e, Dot) else (e.axis,) if isinstance(e, Reduce) else ())

    assert node.axes == axes(node)
    assert set(node.loads) == {x for x in node.walk() if isinstance(x, Load)}
    seen = list(node.walk())
    assert seen[0] == node and len(seen) == len(set(seen))
    assert all(c in seen for x in seen for c in x.children)


def test_axes_are_bound_by_dot_and_reduce() -> None:
    assert Q.axes == {B, H, QI, D} and QK.axes == {B, H, QI, KJ}
    assert Reduce("sum", KJ, QK, F32).axes == {B, H, QI}
    assert QK.loads == (Q, K)
    assert Axis("i", Const(4)) != Axis("i", Const(5)) and Axis("i", Const(4)) == Axis("i", Const(4))


def test_rewriting_shares_and_keeps_what_does_not_change() -> None:
    built = []

    def build(node: Expr, children: tuple[Expr, ...]) -> Expr:
        built.append(node)
        return s.rebuild(node, children)

    shared = s.floordiv(QI, 2)
    target = Load("t", (s.add(shared, 1), s.mod(shared, 3), KJ), F32)
    assert rewrite(target, lambda n: None, build) is target and not built
    moved = rewrite(target, lambda n: s.mul(2, H) if n == QI else None, build)
    assert moved == Load("t", (s.add(H, 1), s.mod(H, 3), KJ), F32)
    assert len(built) == len(set(built))  # each node once, however often it is used


def test_a_deep_chain_can_be_parsed() -> None:
    """Masks of many parts are the deepest expressions there are."""
    parts = [s.ne(Load("doc", (KJ,), INT), k) for k in range(40)]
    mask = s.and_(*parts)
    assert parse(repr(mask)) == mask
