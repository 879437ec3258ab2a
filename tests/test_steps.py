"""Masks kept as numbers, and predicates joined from parts, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate
from refocus.ir import BOOL, FALSE, INT, TRUE, Axis, Call, Const, Expr, Load
from refocus.patterns.masking import separate_mask
from refocus.steps import cases, line, whole_number
from refocus.testing import check

QUERY, KEY = Axis("i", Const(5)), Axis("j", Const(6))
POSITIONS = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
LITERALS: tuple[tuple[Expr, Callable[[Tensor, Tensor], Tensor]], ...] = (
    (s.le(KEY, QUERY), lambda i, j: j <= i),
    (s.lt(KEY, 3), lambda i, j: j < 3),
    (s.eq(QUERY, 2), lambda i, j: i == 2),
    (s.eq(s.mod(QUERY, 2), s.mod(KEY, 2)), lambda i, j: i % 2 == j % 2),
    (s.le(s.sub(QUERY, KEY), 1), lambda i, j: i - j <= 1),
)
Meant = tuple[Expr, Tensor]


def values(expr: Expr) -> Tensor:
    return evaluate(expr, arange_env((QUERY, KEY), {}), {}, {}).expand(5, 6)


@st.composite
def formulas(draw: st.DrawFn, depth: int = 4) -> Meant:
    """A boolean formula and its truth table, by plain logic."""
    kind = draw(st.sampled_from(["literal", "not", "and", "or", "where"] if depth else ["literal"]))
    if kind == "literal":
        expr, meaning = draw(st.sampled_from(LITERALS))
        return expr, meaning(*POSITIONS)
    parts = [draw(formulas(depth - 1)) for _ in range({"not": 1, "where": 3}.get(kind, 2))]
    (a, x), *rest = parts
    if kind == "not":
        return s.not_(a), ~x
    if kind == "where":
        (b, y), (c, z) = rest
        return s.where(a, b, c), torch.where(x, y, z)
    [(b, y)] = rest
    return (s.and_(a, b), x & y) if kind == "and" else (s.or_(a, b), x | y)


@st.composite
def numbers(draw: st.DrawFn, depth: int = 3) -> Meant:
    """A float made of masks, with its values in float64."""
    kinds = ["constant", "choice", "choice", "arithmetic", "arithmetic"]
    kind = draw(st.sampled_from(kinds)) if depth else "constant"
    if kind == "constant":
        value = draw(st.sampled_from([0.0, 1.0, -1.0, 2.0, -1e9, float("-inf")]))
        return Const(value, "float32"), torch.full((5, 6), value, dtype=torch.float64)
    if kind == "choice":
        (p, truth), (a, x), (b, y) = draw(formulas(1)), draw(numbers(depth - 1)), draw(numbers(depth - 1))
        return s.where(p, a, b), torch.where(truth, x, y)
    op = draw(st.sampled_from(["add", "sub", "mul", "min", "max"]))
    (a, x), (b, y) = draw(numbers(depth - 1)), draw(numbers(depth - 1))
    run = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "min": torch.minimum, "max": torch.maximum}[op]
    return s.call(op, a, b, dtype="float32"), run(x, y)


@given(formulas())
def test_formulas_keep_their_truth_table(formula: Meant) -> None:
    expr, truth = formula
    assert torch.equal(values(expr), truth)


@given(numbers(), st.sampled_from(["le", "lt", "eq"]), st.sampled_from([0.0, 1.0, -1e4, 0.5]))
def test_comparisons_of_numbers_keep_their_truth(number: Meant, op: str, limit: float) -> None:
    expr, value = number
    run = {"le": torch.le, "lt": torch.lt, "eq": torch.eq}[op]
    got = values(s.call(op, expr, Const(limit, "float32"), dtype=BOOL))
    assert torch.equal(got, run(value, limit)) or bool(value.isnan().any())


@given(numbers())
def test_cases_are_a_partition(number: Meant) -> None:
    expr, value = number
    found = cases(expr)
    if found is None:
        return
    tables = {v: values(where) for v, where in found.items()}
    assert torch.equal(sum(t.long() for t in tables.values()), torch.ones(5, 6, dtype=torch.long))
    for v, table in tables.items():
        assert bool((value[table] == v).all())


@given(numbers())
def test_separated_masks_and_scores_make_the_same_weights(number: Meant) -> None:
    expr, value = number
    x = Load("x", (QUERY, KEY), "float32")
    score, mask = separate_mask(s.call("add", x, expr, dtype="float32"))
    tensors = {"x": torch.randn(5, 6)}
    if value.isnan().any() or (value > 1e4).any() or (value <= -1e4).all():
        return
    logits = tensors["x"].double() + value
    kept = evaluate(mask, arange_env((QUERY, KEY), {}), tensors, {}).expand(5, 6)
    rows = kept.any(-1)
    got = evaluate(score, arange_env((QUERY, KEY), {}), tensors, {}).expand(5, 6).double()
    got = got.masked_fill(~kept, -torch.inf)
    assert torch.allclose(got[rows].softmax(-1), logits[rows].softmax(-1), atol=1e-5)


def test_what_masks_say_once_they_are_read() -> None:
    causal, prefix = s.le(KEY, QUERY), s.lt(KEY, 3)

    def number(p: Expr) -> Expr:
        return s.where(p, Const(1.0, "float32"), Const(0.0, "float32"))

    def call(op: str, a: Expr, b: Expr) -> Expr:
        return s.call(op, a, b, dtype="float32")

    zero, one = Const(0.0, "float32"), Const(1.0, "float32")
    either, both = call("add", number(causal), number(prefix)), call("mul", number(causal), number(prefix))
    assert s.lt(zero, either) == s.or_(causal, prefix)
    assert s.call("eq", call("min", either, one), one, dtype=BOOL) == s.or_(causal, prefix)
    assert s.ne(both, zero) == s.and_(causal, prefix)
    assert s.or_(causal, s.and_(s.not_(causal), prefix)) == s.or_(causal, prefix)
    assert s.and_(prefix, s.or_(s.not_(prefix), causal)) == s.and_(prefix, causal)
    assert s.or_(s.and_(causal, prefix), s.and_(s.not_(causal), prefix)) == prefix


def test_whole_numbers_stay_exact_in_their_dtype() -> None:
    far = Axis("far", Const(300))
    for dtype, read in (("float32", True), ("float16", True), ("bfloat16", False)):
        value = s.call("add", far, s.where(s.lt(far, 7), Const(1.0, dtype), Const(0.0, dtype)), dtype=dtype)
        assert (whole_number(value) is not None) == read
    quotient = Call("floor", (Call("div", (far, Const(32)), "float32"),), "float32")
    assert whole_number(quotient) == s.floordiv(far, 32)
    # 49 * (1 / 49) is below one: how a quotient rounds is the device's business
    assert whole_number(Call("floor", (Call("div", (far, Const(49)), "float32"),), "float32")) is None


def test_a_steep_line_is_a_mask_only_where_it_surely_is() -> None:
    token = Load("t", (KEY,), "float32")
    absent = s.call("sub", Const(1.0, "float32"), token, dtype="float32")
    steep = s.call("mul", absent, Const(-1e9, "float32"), dtype="float32")
    found = line(steep)
    assert found is not None and found.root == 1.0 and found.slope == 1e9
    below = found.below(-1e4)
    assert below is not None and below == s.le(token, Const(0.5, "float32"))
    gentle = line(s.call("mul", token, Const(-100.0, "float32"), dtype="float32"))
    assert gentle is not None and gentle.below(-1e4) is None


@pytest.mark.parametrize("mask", [TRUE, FALSE])
def test_constants_have_one_case(mask: Expr) -> None:
    assert cases(mask) == {mask.value: TRUE}  # type: ignore[attr-defined]
    assert cases(Const(3, INT)) == {3: TRUE}
    assert cases(Const(float("nan"), "float32")) is None


class PaddingOfNumbers(nn.Module):
    """Padding given as numbers that need be neither 0 nor 1: what is added where a key stays is added still."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2) + (1.0 - padding[:, None, :]) * -30000.0
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_padding_of_any_number_is_exact(dtype: torch.dtype) -> None:
    padding = torch.ones(2, 40, dtype=dtype)
    padding[0, 30:], padding[1, :9] = 0, 0
    if dtype == torch.float32:
        padding[1, 20], padding[1, 21] = 0.9999, 1.0001
    report = check(PaddingOfNumbers(), (torch.randn(2, 40, 8), padding), lower=False).report
    # Floats made of floats are a vector that the region reads: a bias like any other.
    assert bool(report.sites[0].mask) == (dtype == torch.int64)


class Booleans(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.how == "product":
            mask = causal * keep
        elif self.how == "sum":
            mask = causal + keep
        elif self.how == "least":
            mask = torch.minimum(causal, keep)
        elif self.how == "greatest":
            mask = torch.maximum(causal, keep)
        else:
            mask = nn.functional.pad(causal[:, 4:], (4, 0), value=True) & keep
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("how", ["product", "sum", "least", "greatest", "padded"])
def test_arithmetic_on_booleans_is_logic(how: str) -> None:
    keep = torch.rand(24, 24) < 0.6
    keep[:, 0] = True
    report = check(Booleans(how), (torch.randn(2, 24, 8), keep), lower=False).report
    assert report.sites[0].mask


def test_all_pairs_of_literals() -> None:
    for (a, f), (b, g) in itertools.product(LITERALS, repeat=2):
        assert torch.equal(values(s.and_(a, b)), f(*POSITIONS) & g(*POSITIONS))
        assert torch.equal(values(s.or_(a, s.not_(b))), f(*POSITIONS) | ~g(*POSITIONS))
