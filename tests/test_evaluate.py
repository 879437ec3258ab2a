"""The interpreter, against a scalar one in plain Python; views against gathers; tracing; FlexAttention's functions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus import oracle, simplify
from refocus.evaluate import Scope, arange_env, evaluate
from refocus.grid import Grid
from refocus.inductor import compiled
from refocus.ir import BOOL, INT, Axis, Call, Const, Dot, Expr, Load, Reduce, Sym
from tests import region_cases as cases

P, J, K = Axis("i", Const(6)), Axis("j", Const(5)), Axis("k", Const(4))
AXES = (P, J, K)
TENSORS = {
    "x": torch.arange(24 * 6, dtype=torch.float32).reshape(24, 6) * 0.25 - 7,
    "t": (torch.arange(30) * 7) % 11,
    "m": torch.arange(30) % 3 == 0,
}


def scalar(e: Expr, at: dict[Axis, int], tensors: dict[str, Tensor], sizes: dict[Sym, int]) -> Any:
    """The definition: one value at one position."""

    def go(x: Expr, more: dict[Axis, int] | None = None) -> Any:
        return scalar(x, {**at, **(more or {})}, tensors, sizes)

    if isinstance(e, Const):
        return e.value
    if isinstance(e, Sym):
        return sizes[e]
    if isinstance(e, Axis):
        return at[e]
    if isinstance(e, Load):
        return tensors[e.tensor][tuple(go(i) for i in e.index)].item()
    if isinstance(e, Dot):
        ranges = [range(go(a.size)) for a in e.over]
        places = [dict(zip(e.over, p)) for p in itertools.product(*ranges)]
        return sum(go(e.query, p) * go(e.key, p) for p in places)
    if isinstance(e, Reduce):
        body = [go(e.body, {e.axis: n}) for n in range(go(e.axis.size))]
        return {"sum": sum, "max": max, "min": min, "prod": math.prod, "any": any, "all": all}[e.op](body)
    assert isinstance(e, Call)
    if e.op == "where":
        return go(e.args[1] if go(e.args[0]) else e.args[2])
    args = [go(a) for a in e.args]
    return {
        "add": lambda *a: sum(a), "mul": lambda *a: math.prod(a), "floordiv": lambda a, b: a // b,
        "mod": lambda a, b: a % b, "min": min, "max": max, "abs": abs, "le": lambda a, b: a <= b,
        "eq": lambda a, b: a == b, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
        "xor": lambda a, b: a != b, "cast": lambda a: int(a), "exp": math.exp, "tanh": math.tanh,
        "div": lambda a, b: a / b, "sub": lambda a, b: a - b, "neg": lambda a: -a,
    }[e.op](*args)  # fmt: skip


def raw(op: str, *args: Expr, dtype: str = INT) -> Expr:
    """A node as written: the interpreter must not rely on the simplifier."""
    return Call(op, args, dtype)


@st.composite
def integers(draw: st.DrawFn, depth: int = 3) -> Expr:
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([*AXES, *(Const(c) for c in (-3, 0, 1, 2, 7))]))
    kind = draw(st.sampled_from(["add", "mul", "floordiv", "mod", "min", "max", "where", "load", "sum", "abs"]))
    a = draw(integers(depth - 1))
    if kind == "abs":
        return raw("abs", a)
    if kind in ("floordiv", "mod"):
        return raw(kind, a, Const(draw(st.integers(1, 7))))
    if kind == "load":
        return Load("t", (raw("mod", a, Const(30)),), INT)
    b = draw(integers(depth - 1))
    if kind == "sum":
        return raw("add", a, b, draw(integers(0)))
    if kind == "where":
        return raw("where", draw(predicates(depth - 1)), a, b)
    return raw(kind, a, b)


@st.composite
def predicates(draw: st.DrawFn, depth: int = 2) -> Expr:
    kind = draw(st.sampled_from(["le", "eq", "load", *(["and", "or", "not", "xor"] if depth else [])]))
    if kind == "load":
        return Load("m", (raw("mod", draw(integers(max(depth - 1, 0))), Const(30)),), BOOL)
    if kind in ("le", "eq"):
        return raw(kind, draw(integers(depth)), draw(integers(depth)), dtype=BOOL)
    args = [draw(predicates(depth - 1)) for _ in range(1 if kind == "not" else 2)]
    return raw(kind, *args, dtype=BOOL)


def everywhere(e: Expr, axes: tuple[Axis, ...] = AXES, sizes: dict[Sym, int] | None = None) -> Tensor:
    sizes = sizes or {}
    ranges = [range(scalar(a.size, {}, TENSORS, sizes)) for a in axes]
    flat = [scalar(e, dict(zip(axes, p)), TENSORS, sizes) for p in itertools.product(*ranges)]
    return torch.tensor(flat, dtype=torch.float64).reshape([len(r) for r in ranges])


def agree(e: Expr, axes: tuple[Axis, ...] = AXES) -> None:
    want = everywhere(e, axes)
    on_grids = evaluate(e, arange_env(axes, {}), TENSORS, {})
    as_tensors = {a: p.tensor(torch.device("cpu")) for a, p in arange_env(axes, {}).items() if isinstance(p, Grid)}
    on_tensors = evaluate(e, as_tensors, TENSORS, {})
    for got in (on_grids, on_tensors):
        assert got.dtype == (torch.float32 if e.is_float else torch.bool if e.dtype == BOOL else torch.int64)
        torch.testing.assert_close(got.expand(want.shape).double(), want, rtol=1e-6, atol=1e-6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(integers())
def test_integer_expressions(e: Expr) -> None:
    agree(e)


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(predicates())
def test_predicates(e: Expr) -> None:
    agree(e)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(integers(depth=2), integers(depth=2))
def test_loads_at_any_index(a: Expr, b: Expr) -> None:
    agree(Load("x", (raw("mod", a, Const(24)), raw("mod", b, Const(6))), "float32"))


def add(*args: Expr) -> Expr:
    return raw("add", *args)


@pytest.mark.parametrize(
    "row",
    [
        P, Const(3), add(P, Const(2)), raw("mul", Const(4), P), add(raw("mul", Const(4), P), K), add(P, J),
        raw("floordiv", P, Const(2)), raw("mod", P, Const(4)), add(Const(9), raw("mul", Const(-1), P)),
        add(raw("mul", Const(-1), P), J, Const(6)),
        raw("min", raw("max", add(P, raw("mul", Const(-1), J)), Const(0)), Const(4)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("column", [J, K, P, Const(2)], ids=lambda a: getattr(a, "name", "2"))
def test_load_forms(row: Expr, column: Expr) -> None:
    agree(Load("x", (row, column), "float32"))


def test_plain_loads_are_views() -> None:
    x = torch.randn(3, 8, 64)
    axes = [Axis("b", Const(3)), Axis("h", Const(4)), Axis("i", Const(8)), Axis("d", Const(16))]
    b, h, i, d = axes
    lane = simplify.add(simplify.mul(16, h), d)
    out = evaluate(Load("x", (b, i, lane), "float32"), arange_env(axes, {}), {"x": x}, {})
    assert out.shape == (3, 4, 8, 16)
    assert out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    split = arange_env(axes, {}, split={h: (2, 2)})
    grouped = evaluate(Load("x", (b, simplify.floordiv(h, 2), d), "float32"), split, {"x": x}, {})
    assert grouped.shape == (3, 2, 1, 1, 16)
    assert grouped.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def dot(query: Expr, key: Expr, *over: Axis) -> Expr:
    return Dot(over, query, key, "float32")


X = lambda a, b: Load("x", (a, b), "float32")  # noqa: E731
C, E = Axis("c", Const(3)), Axis("e", Const(2))


@pytest.mark.parametrize(
    "e",
    [
        dot(X(P, C), X(J, C), C),
        dot(X(P, C), X(add(J, C), C), C),
        dot(X(P, C), Const(2.0, "float32"), C),
        dot(Const(1.5, "float32"), Const(2.0, "float32"), C),
        dot(X(add(P, E), C), X(raw("mul", J, E), C), C, E),
        dot(X(P, K), X(J, K), K),  # K is free in the environment too: the Dot's own K shadows it
        Call("mul", (dot(X(P, K), X(J, K), K), X(K, Const(0))), "float32"),
        Reduce("sum", C, X(add(P, C), C), "float32"),
        Reduce("max", C, X(add(P, C), J), "float32"),
        Reduce("min", K, X(P, K), "float32"),
        Reduce("prod", C, Const(2), INT),
        Reduce("sum", C, X(P, J), "float32"),
        Reduce("any", C, raw("eq", add(P, C), J, dtype=BOOL), BOOL),
        Reduce("all", C, raw("le", raw("mul", P, C), J, dtype=BOOL), BOOL),
        dot(X(P, C), Reduce("sum", E, X(add(J, E), C), "float32"), C),
    ],
    ids=range(15),
)
def test_products_and_reductions(e: Expr) -> None:
    agree(e)


def test_where_does_not_poison() -> None:
    e = raw("where", raw("le", P, Const(0), dtype=BOOL), Const(0.0, "float32"),
            raw("log", raw("cast", P, dtype="float32"), dtype="float32"), dtype="float32")  # fmt: skip
    out = evaluate(e, arange_env((P,), {}), {}, {})
    assert out.tolist() == pytest.approx([0.0, *(math.log(n) for n in range(1, 6))])


@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan])
def test_constants_that_are_no_numbers(fill: float) -> None:
    e = raw("where", raw("le", P, J, dtype=BOOL), Const(fill, "float32"), X(P, J), dtype="float32")
    out = evaluate(e, arange_env((P, J), {}), TENSORS, {})
    assert out[0, 0].item() == pytest.approx(fill, nan_ok=True) and out[5, 0] == TENSORS["x"][5, 0]


def test_float_dtype() -> None:
    half = {"x": torch.randn(4, 4).to(torch.bfloat16)}
    axes = (Axis("i", Const(4)), Axis("j", Const(4)))
    e = Call("mul", (Load("x", axes, "bfloat16"), Const(0.1, "bfloat16")), "bfloat16")
    assert torch.equal(evaluate(e, arange_env(axes, {}), half, {}), half["x"].float() * 0.1)
    assert torch.equal(evaluate(e, arange_env(axes, {}), half, {}, torch.float64), half["x"].double() * 0.1)
    assert evaluate(e, arange_env(axes, {}), {"x": torch.ones(4, 4).double()}, {}).dtype == torch.float64


def test_casts_to_integers_keep_the_declared_precision() -> None:
    """In float64 some of these logarithms fall on the other side of a bucket's boundary."""
    n = Axis("n", Const(4000))
    position = simplify.add(n, 1)
    ratio = Call("div", (Call("log", (position,), "float32"), Const(math.log(3.0), "float32")), "float32")
    bucket = Call("cast", (Call("mul", (ratio, Const(5.0, "float32")), "float32"),), INT)
    eager = (torch.arange(1, 4001).float().log() / math.log(3.0) * 5.0).to(torch.int64)
    wide = (torch.arange(1, 4001).double().log() / math.log(3.0) * 5.0).to(torch.int64)
    assert not torch.equal(eager, wide)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(evaluate(bucket, arange_env((n,), {}), {}, {}, dtype), eager)


def test_what_does_not_change_is_computed_once() -> None:
    x = Load("x", (P, C), "float32")
    product = dot(Call("exp", (x,), "float32"), X(J, C), C)
    env = arange_env((P, J), {})
    rows = Scope({P: env[P]}, TENSORS, {}, depth=2)
    tile = rows.child({J: env[J]})
    tile.tensor(product)
    assert any(key[0] == product.query for key in rows.memo)  # type: ignore[attr-defined]
    assert all(key[0] != product.query for key in tile.memo)  # type: ignore[attr-defined]


def test_traces_with_symbolic_sizes() -> None:
    region, tensors, _ = cases.symbolic()

    def score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = dict(zip(region.syms, (q.shape[2], k.shape[2])))
        env = arange_env((*region.batch, region.query, region.key), sizes)
        return evaluate(region.logits, env, {"q": q, "k": k, "v": v}, sizes)

    graph = make_fx(score, tracing_mode="symbolic")(*tensors)
    _, other, _ = cases.symbolic(n=19)
    assert torch.equal(graph(*other), score(*other))


@pytest.mark.parametrize(
    "name", ["gqa", "window", "alibi", "softcap", "relative_table", "t5_buckets", "documents", "padding"]
)
def test_runs_inside_flex_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All axes as tensors without dimensions, under vmap: what FlexAttention does with its functions."""
    from torch.nn.attention import flex_attention as flex

    # The functions are traced by make_fx where they are used, never by Dynamo.
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    region, tensors, sizes = cases.CASES[name]()
    named = {o.name: t for o, t in zip(region.operands, tensors)}
    marker = Load("flex score", (), "float32")
    [product] = region.dots
    rest = simplify.substitute(region.score, {product: marker})
    b, h = region.batch

    axes = (b, h, region.query, region.key)

    def score_mod(score: Tensor, at_b: Tensor, at_h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
        env = dict(zip(axes, (at_b, at_h, at_q, at_k)))
        return evaluate(rest, env, {**named, "flex score": score}, {})

    def mask_mod(at_b: Tensor, at_h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
        return evaluate(region.mask, dict(zip(axes, (at_b, at_h, at_q, at_k))), named, {})

    q, k, v = tensors[:3]
    mask = flex.create_block_mask(mask_mod, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device="cpu")
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=1.0)
    want = oracle.run(region, tensors, sizes)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)


def test_an_index_without_dimensions_is_not_asked_for_its_number() -> None:
    """A row that the data choose, one for all: while a graph is traced, nobody knows which."""
    e = Load("x", (Load("t", (Const(1),), INT), P), "float32")

    def run(x: Tensor, t: Tensor) -> Tensor:
        return evaluate(e, arange_env((P,), {}), {"x": x, "t": t}, {})

    graph = make_fx(run, tracing_mode="fake")(TENSORS["x"], TENSORS["t"])
    for t in (TENSORS["t"], TENSORS["t"] + 1):
        assert torch.equal(graph(TENSORS["x"], t), TENSORS["x"][int(t[1])])


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_bounded_positions_are_divided_in_compiled_code(op: str) -> None:
    """Inductor fails (torch 2.13) on an index that it sees to divide Max(0, position)."""
    bounded = simplify.add(simplify.maximum(0, simplify.sub(P, 3)), simplify.maximum(1, simplify.sub(J, 2)))
    row = Call(op, (bounded, Const(3)), INT)
    e = Load("x", (row, K), "float32")

    def run(x: Tensor) -> Tensor:
        return evaluate(e, arange_env((P, J, K), {}), {"x": x}, {}) * 2

    assert torch.equal(compiled(run, [TENSORS["x"]])(TENSORS["x"]), run(TENSORS["x"]))
