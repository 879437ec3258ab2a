"""The flash kernels' numbers, under Triton's interpreter, and the text of their source.

Triton decides when it is imported whether it interprets, and for good. So one child process runs all numeric cases
(this file as a program: `python -m tests.test_triton_flash`) and prints how far each is from the oracle.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus import oracle
from refocus.codegen import flash, flash_fit
from refocus.codegen.plan import Plan
from refocus.ir import FALSE, TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, Region, Sym
from refocus.tolerances import allowed_error, difference, magnitude
from tests import region_cases as cases
from tests.children import interpreted, settle
from tests.flash_cases import BINARY, MORE, UNARY, F, block_table, pointwise
from tests.region_cases import Case

SMALL = Plan("triton", block_q=16, block_k=16)


# ------------------------------------------------------------------------------------------------ the child process


def _error(case: Case, plan: Plan | None, wide: bool = False) -> list[float]:
    """[largest difference from the oracle, largest allowed]"""
    from refocus.codegen import launch, triton_engine

    region, tensors, sizes = case
    plan = plan or flash_fit.default_plan(region)
    if wide:
        got, _ = launch.launch(triton_engine.emit(region, plan, wide=True), tensors, sizes)
    else:
        got = triton_engine.run(region, plan, tensors, sizes)
    assert got.is_contiguous() and str(got.dtype) == f"torch.{region.out_dtype}"
    exact = oracle.run(region, tensors, sizes)
    plain = oracle.run(region, tensors, sizes, torch.float32).to(got.dtype)
    return [difference(got, exact), allowed_error(got.dtype, difference(plain, exact), magnitude(exact))]


def _pointwise_error(op: str) -> list[float]:
    """Relative to the value at each point, since these are single operations; NaN and infinities in the same places."""
    from refocus.codegen import triton_engine

    region, tensors, sizes = pointwise(op)
    got = triton_engine.run(region, flash_fit.default_plan(region), tensors, sizes).flatten().double()
    exact = _reference(op, *tensors[:2]).double()
    same = torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
    finite = exact.isfinite()
    # Triton's sums of exponentials lose what lies below one unit of their largest term.
    error = ((got - exact).abs() / exact.abs().clamp_min(1.0))[finite].max()
    return [float(error) if same else math.inf, 4e-6 if op in ("pow", "sin", "cos") else 5e-7]


def _reference(op: str, x: Tensor, y: Tensor) -> Tensor:
    functions: dict[str, Callable[..., Tensor]] = {
        "min": torch.minimum, "max": torch.maximum, "floordiv": lambda a, b: torch.floor(a / b), "mod": torch.remainder,
        "softplus": torch.nn.functional.softplus, "pow": lambda a, b: torch.pow(a.double(), b.double()).float(),
    }  # fmt: skip
    function = functions.get(op) or getattr(torch, op)
    out: Tensor = function(x, y) if op in BINARY else function(x)
    return torch.where(out, 2.0, 3.0) if out.dtype == torch.bool else out


def _others() -> dict[str, Any]:
    """Sizes of zero."""
    from refocus.codegen import triton_engine

    region, (q, k, v), _ = cases.symbolic()
    plan = flash_fit.default_plan(region)
    no_queries = triton_engine.run(region, plan, [q[:, :, :0], k, v], [0, k.shape[2]])
    no_keys = triton_engine.run(region, plan, [q, k[:, :, :0], v[:, :, :0]], [q.shape[2], 0])
    return {"no_queries": list(no_queries.shape), "no_keys": [list(no_keys.shape), float(no_keys.abs().max())]}


def child() -> dict[str, Any]:
    settle()
    out: dict[str, Any] = {}
    for name, case in (*cases.CASES.items(), *MORE.items()):
        out[name] = [_error(case(), None), _error(case(), SMALL)]
    for name in ("causal", "sinks", "padding"):
        for dtype in (torch.float16, torch.bfloat16):
            out[f"{name}_{dtype}"] = [_error(cases.CASES[name](dtype, n=40), None)]
    out["wide"] = [_error(case(), SMALL, wide=True) for case in (cases.gqa, block_table, cases.empty_added)]
    masked = [case() for case in (*cases.CASES.values(), *MORE.values()) if case()[0].mask != TRUE]
    out["listed"] = [_error(case, replace(SMALL, listed=True), case is masked[0]) for case in masked]
    for op in (*UNARY, *BINARY):
        out[f"op_{op}"] = [_pointwise_error(op)]
    return out | _others()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_triton_flash")
    return found


NAMES = [
    *cases.CASES, *MORE, "wide", "listed",
    *(f"{n}_{d}" for n in ("causal", "sinks", "padding") for d in (torch.float16, torch.bfloat16)),
    *(f"op_{op}" for op in (*UNARY, *BINARY)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(results: dict[str, Any], name: str) -> None:
    for error, allowed in results[name]:
        assert error <= allowed


@pytest.mark.slow
def test_sizes_of_zero(results: dict[str, Any]) -> None:
    assert results["no_queries"] == [2, 4, 0, 16]
    assert results["no_keys"] == [[2, 4, 53, 16], 0.0]


# ----------------------------------------------------------------------------------------------------- the source


def text(case: Case, plan: Plan = SMALL, **more: bool) -> str:
    source = flash.write(case[0], plan, **more).text
    ast.parse(source)
    return source


GQA = '''\
# Generated by refocus: flash attention, forward.
#     S[b,h,i,j] = 0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d]
#     mask       = j <= i
#     O[b,h,i,e] = softmax_j(S | mask) . v[b,h//2,j,e]

import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(32)
BLOCK_K = tl.constexpr(32)
SCALE = tl.constexpr(0.36067376022224085)  # 0.25 * log2(e)


@triton.jit
def flash_forward(
    q_ptr, k_ptr, v_ptr,
    out_ptr,
    q_stride_0, q_stride_1, q_stride_2, q_stride_3, k_stride_0, k_stride_1,
    k_stride_2, k_stride_3, v_stride_0, v_stride_1, v_stride_2, v_stride_3,
):
    # One program: BLOCK_Q queries of one batch position.
    program = tl.program_id(0)
    batch = program // 8
    first = program % 8 * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, 250) - 1
    b = batch // 4
    h = batch % 4
    i = first + tl.arange(0, BLOCK_Q)
    e = tl.arange(0, 16)
    d = tl.arange(0, 16)
    q_base = q_ptr + b * q_stride_0 + h * q_stride_1
    query = tl.load(q_base + i[:, None] * q_stride_2 + d[None, :] * q_stride_3, mask=i[:, None] < 250, other=0)
    k_base = k_ptr + b * k_stride_0 + h // 2 * k_stride_1
    v_base = v_ptr + b * v_stride_0 + h // 2 * v_stride_1

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, 16], tl.float32)
    full_stop = (first + 1) // BLOCK_K * BLOCK_K
    # Tiles of which every key counts.
    for start in range(0, full_stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key = tl.load(k_base + j[:, None] * k_stride_2 + d[None, :] * k_stride_3)
        scores = tl.dot(query, tl.trans(key))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
        weight = tl.exp2(scores * SCALE - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(weight, 1)
        value = tl.load(v_base + j[:, None] * v_stride_2 + e[None, :] * v_stride_3)
        acc = tl.dot(weight.to(tl.bfloat16), value, acc * alpha[:, None])
        row_max = new_max
    # Tiles that are cut.
    for start in range(full_stop, last + 1, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key = tl.load(k_base + j[:, None] * k_stride_2 + d[None, :] * k_stride_3, mask=j[:, None] < 250, other=0)
        scores = tl.dot(query, tl.trans(key))
        scores = tl.where((j[None, :] <= i[:, None]) & (j[None, :] < 250), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(scores * SCALE - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(weight, 1)
        value = tl.load(v_base + j[:, None] * v_stride_2 + e[None, :] * v_stride_3, mask=j[:, None] < 250, other=0)
        acc = tl.dot(weight.to(tl.bfloat16), value, acc * alpha[:, None])
        row_max = new_max

    acc = acc / row_sum[:, None]
    tl.store(out_ptr + (batch * 250 + i[:, None]) * 16 + e[None, :], acc.to(tl.bfloat16), mask=i[:, None] < 250)
'''


def test_golden_source() -> None:
    assert text(cases.gqa(torch.bfloat16, n=250), Plan("triton", block_q=32, block_k=32)) == GQA


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("window", "for start in range(key_start, last + 1, BLOCK_K):"),
        ("window", "key_start = tl.maximum(0, first - 8) // BLOCK_K * BLOCK_K"),
        ("head_windows", "key_start = tl.maximum(0, first - 8 * h - 3) // BLOCK_K * BLOCK_K"),
        ("block_table", "for start in range(0, tl.minimum(40, lengths), BLOCK_K):"),
        ("symbolic", "full_stop = tl.maximum(0, first + s1 - s0 + 1) // BLOCK_K * BLOCK_K"),
    ],
)
def test_loops_skip_what_the_mask_empties(name: str, line: str) -> None:
    case = cases.CASES.get(name) or MORE[name]
    assert line in text(case())


@pytest.mark.parametrize("name", [*cases.CASES, *MORE])
def test_source_is_short_and_fits_a_screen(name: str) -> None:
    case = cases.CASES.get(name) or MORE[name]
    lines = text(case()).splitlines()
    assert len(lines) < 130
    assert all(len(line) <= 120 for line in lines if not line.startswith("#"))


def test_only_functions_that_are_called_are_written() -> None:
    assert text(cases.softcap()).count("@triton.jit") == 2
    assert text(cases.dense()).count("@triton.jit") == 1


def test_fills_are_computed_only_where_rows_can_be_empty() -> None:
    assert "logits" not in text(cases.causal())
    assert "logits" not in text(cases.empty_zero())
    assert "if tl.max(empty.to(tl.int32), 0) == 1:" in text(cases.empty_min())


def test_wide_addresses() -> None:
    source = text(cases.gqa(n=200), wide=True)
    assert "tl.program_id(0).to(tl.int64)" in source
    # The program, two widths, and the keys of two loops.
    assert source.count(".to(tl.int64)") == 5
    # The only tile of queries has positions whose strides may be as wide.
    assert "i = tl.arange(0, BLOCK_Q).to(tl.int64)" in text(cases.gqa(n=16), wide=True)


def test_names_of_strangers_do_not_reach_the_source() -> None:
    region, _, _ = cases.gqa()
    evil = '"""\nimport os\nos.system("x")#'
    names = {"q": evil, "k": "lambda", "v": "acc"}
    axes = {region.query: Axis("i\nimport os", region.query.size), region.key: Axis("BLOCK_K", region.key.size)}

    def rename(node: Expr) -> Expr:
        if isinstance(node, Load):
            return Load(names[node.tensor], tuple(map(rename, node.index)), node.dtype)
        if isinstance(node, Dot):
            return Dot(node.over, rename(node.query), rename(node.key), node.dtype)
        if isinstance(node, Call):
            return Call(node.op, tuple(map(rename, node.args)), node.dtype)
        return axes.get(node, node)  # type: ignore[call-overload, no-any-return]

    region = replace(
        region, query=axes[region.query], key=axes[region.key], score=rename(region.score), mask=rename(region.mask),
        logits=rename(region.logits), values=rename(region.values),
        operands=tuple(replace(o, name=names[o.name]) for o in region.operands),
    )  # fmt: skip
    tree = ast.parse(flash.write(region, SMALL).text)
    assert [ast.unparse(n) for n in tree.body[:2]] == ["import triton", "import triton.language as tl"]
    assert not any(isinstance(n, ast.Import) for n in tree.body[2:])
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert "os" not in used and {"operand_0_ptr", "operand_1_ptr", "acc_ptr"} <= used


# --------------------------------------------------------------------------------------------- what it declines


def _with(**changes: Any) -> Region:
    region, _, _ = cases.causal()
    return replace(region, **changes)


def _declined() -> dict[str, Region]:
    region, _, _ = cases.causal()
    i, j, d = region.query, region.key, Axis("d", Const(16))
    n = Axis("n", Const(4))
    bias = Load("bias", (i, n), F)
    wide = Axis("w", Const(1024))
    unknown = Axis("d", Sym("s0"))
    q, k = (Load(x, (region.batch[0], region.batch[1], row, unknown), F) for x, row in (("q", i), ("k", j)))
    row, column = Load("q", (i, d), F), Load("k", (j, d), F)
    return {
        "normalises with a softmax": _with(normalizer="sigmoid"),
        "float64": cases.causal(torch.float64)[0],
        "the mask keeps nothing": _with(mask=FALSE),
        "a reduction (sum) over axis 'n'": _with(score=Reduce("sum", n, bias, F)),
        "the score must not depend on axis 'n'": _with(score=bias),
        "the values must not depend on axis 'i'": _with(values=Load("v", (i, j), F)),
        "the value is 1024 wide": _with(value=(wide,), values=Load("v", (j, wide), F)),
        "the width of a product": _with(score=Dot((unknown,), q, k, F)),
        "an axis that neither of its sides has": _with(score=Dot((n,), Load("q", (i,), F), Load("k", (j,), F), F)),
        "a product stands inside another": _with(score=Dot((d,), Dot((d,), row, column, F), column, F)),
    }


@pytest.mark.parametrize("reason", _declined())
def test_says_what_it_cannot_do(reason: str) -> None:
    found = flash_fit.supports(_declined()[reason])
    assert found is not None and reason in found


if __name__ == "__main__":
    print(json.dumps(child()))
