"""The generated backward: its numbers under Triton's interpreter, and the text of its kernels.

As in tests/test_triton_flash.py, one child process (this file as a program) interprets all numeric cases and prints
how far each gradient is from autograd through the float64 oracle.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus.codegen import backward_fit, choose, flash_diagonals, flash_fit, operator, triton_backward
from refocus.codegen.backward_fit import supports_backward
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.ir import Region
from refocus.tolerances import difference, magnitude
from tests import region_cases as cases
from tests.backward_cases import BACKWARD
from tests.children import interpreted, settle
from tests.flash_cases import MORE
from tests.region_cases import Case
from tests.test_gradients import reference, wanted_of

SMALL = Plan("triton", block_q=16, block_k=16)
UNEVEN = Plan("triton", block_q=32, block_k=16)
# Those whose loops differ from tile to tile.
IN_SMALL_TILES = ("long_causal", "emptied_bias", "padded_pairs", "prefix", "temperatures", "cross")
# Masks of documents, of vectors, that differ by head; biases that are shared; rows without a key.
LISTED = ("documents", "padding", "padded_pairs", "emptied_bias", "temperatures", "emptied_table", "read_buckets")
IN_HALF = ("causal", "sinks", "additive_bias", "dropout", "t5_buckets", "grid_table")
RERUN = ("emptied_bias", "merged_heads", "temperatures", "gqa", "emptied_table", "grid_table")
# Values that are computed; no operand that could need a gradient.
DECLINED = {"scaled_keys", "integers"}
ALL = {n: make for n, make in (*cases.CASES.items(), *MORE.items(), *BACKWARD.items()) if n not in DECLINED}
# As floor in tests/test_gradients.py; in half precision probabilities and what flows back are rounded for the products.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def wanted_names(region: Region) -> list[str]:
    return [o.name for o, want in zip(region.operands, wanted_of(region)) if want]


# ------------------------------------------------------------------------------------------------ the child process


def _run(case: Case, plan: Plan | None, needs: list[bool] | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """The row sums, the gradients, and what flowed back."""
    from refocus.codegen import triton_engine

    region, tensors, sizes = case
    plan = plan or flash_fit.default_plan(region)
    out, sums = triton_engine.run_saving(region, plan, tensors, sizes)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    needs = wanted_of(region) if needs is None else needs
    return sums, triton_backward.run_backward(region, plan, grad, tensors, out, sums, sizes, needs), grad


def _errors(case: Case, plan: Plan | None) -> list[list[float]]:
    """[largest difference from the oracle, largest allowed] of every gradient, and of the row sums."""
    from refocus.codegen import tiled

    region, tensors, sizes = case
    sums, got, grad = _run(case, plan)
    _, expected = reference(region, tensors, sizes, grad)
    found = []
    wanted = [t for t in tensors if t.is_floating_point()]
    for like, mine, theirs in zip(wanted, got, expected, strict=True):
        assert mine.shape == like.shape and mine.dtype == like.dtype
        theirs = torch.zeros_like(mine).double() if theirs is None else theirs
        found.append([difference(mine, theirs), BOUND[mine.dtype] * max(magnitude(theirs), 1.0)])
    _, saved = tiled.run_saving(region, Plan("tiled"), tensors, sizes)
    finite = saved.isfinite().all(0)
    found.append([float((sums - saved).abs()[:, finite].max()), 1e-5 * max(magnitude(saved), 1.0)])
    return found


def _others() -> dict[str, Any]:
    """Frozen operands, reruns, sizes of zero, what is not finite, the operator."""
    from refocus.codegen import triton_engine

    out: dict[str, Any] = {}
    case = cases.empty_added(torch.bfloat16, n=40)
    region, tensors, sizes = case
    saving = triton_engine.run_saving(region, SMALL, tensors, sizes)[0]
    out["same result"] = torch.equal(saving, triton_engine.run(region, SMALL, tensors, sizes))
    whole = dict(zip(wanted_names(region), _run(case, SMALL)[1]))
    out["frozen"] = {
        name: [torch.equal(g, whole[name]) for g in _run(case, SMALL, [o.name == name for o in region.operands])[1]]
        for name in whole
    }
    out["none"] = len(_run(case, SMALL, [False] * len(tensors))[1])
    out["reruns"] = {}
    for name in RERUN:
        first, second = (_run(ALL[name](), SMALL) for _ in range(2))
        out["reruns"][name] = all(torch.equal(a, b) for a, b in zip((first[0], *first[1]), (second[0], *second[1])))
    region, (q, k, v), _ = cases.symbolic()
    for name, parts in (("queries", [q[:, :, :0], k, v]), ("keys", [q, k[:, :, :0], v[:, :, :0]])):
        got = _run((region, parts, [parts[0].shape[2], parts[1].shape[2]]), SMALL)[1]
        out[f"no_{name}"] = [[list(g.shape) == list(p.shape), float(g.abs().sum())] for g, p in zip(got, parts)]
    out["not finite"] = {f"{case} {what} {value}": _same_nans(case, what, value) for case, what, value in NOT_FINITE}
    region, leaves, sizes = cases.causal(n=20)
    leaves = [t.requires_grad_() for t in leaves]
    result = operator.call_saving(region, SMALL, leaves, sizes)
    result.sum().backward()  # an expanded tensor flows back
    expected = reference(region, leaves, sizes, torch.ones(result.shape))[1]
    found = [(t.grad, e) for t, e in zip(leaves, expected)]
    out["operator"] = max(difference(g, e) if g is not None and e is not None else 1.0 for g, e in found)
    out["model"] = _model()
    return out


def _model() -> list[float]:
    """[largest difference, largest gradient] of a model that trains on this engine, against eager code."""
    from refocus.testing import rewritten
    from tests.test_training import Attention, gradients

    torch.manual_seed(0)
    model, x = Attention(heads=2), torch.randn(2, 20, 32)
    got = gradients(rewritten(model, engine="triton", require=True), model, x)
    expected = gradients(model, model, x)
    return [max(difference(got[n], g) for n, g in expected.items()), max(map(magnitude, expected.values()))]


def _same_nans(name: str, what: str, value: float) -> bool:
    """Whether a NaN or an infinity spreads as in the portable engine: never through pairs that the mask drops."""
    from refocus.codegen import tiled, tiled_backward, triton_engine

    region, tensors, sizes = ALL[name](n=20)  # type: ignore[call-arg]
    grad = torch.randn(2, 4, 20, 16, generator=torch.Generator().manual_seed(9))
    named = {"grad": grad, **{o.name: t for o, t in zip(region.operands, tensors)}}
    named[what][..., 3, 2] = value
    found = []
    for forward, backward in ((triton_engine, triton_backward), (tiled, tiled_backward)):
        saved = forward.run_saving(region, SMALL, tensors, sizes)  # type: ignore[attr-defined]
        found.append(backward.run_backward(region, SMALL, grad, tensors, *saved, sizes, wanted_of(region)))  # type: ignore[attr-defined]
    assert any(not t.isfinite().all() for t in found[1])
    return all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(*found, strict=True))


NOT_FINITE = (
    ("causal", "grad", math.nan), ("causal", "q", math.nan), ("gated", "k", math.inf), ("padding", "v", math.inf),
    ("additive_bias", "bias", math.inf),
)  # fmt: skip


def _wide() -> list[list[float]]:
    """Addresses of more than 31 bits, which no tensor of a test needs."""
    import refocus.codegen.triton_backward as backward
    import refocus.codegen.triton_engine as engine

    for module in (backward, engine):
        module.needs_wide = lambda *_: True  # type: ignore[assignment]
    return [
        error
        for name in ("gqa", "emptied_bias", "padded_pairs", "cached_table")
        for error in _errors(ALL[name](), SMALL)
    ]


def _by_rows() -> list[list[float]]:
    """Pairs that are stored for 64 queries at a time: two times so many, and a few."""
    some = triton_backward._PAIRS_AT_ONCE
    triton_backward._PAIRS_AT_ONCE = 1
    found = [*_errors(BACKWARD["read_buckets"](n=130), UNEVEN), *_errors(BACKWARD["grid_table"](n=136), UNEVEN)]  # type: ignore[call-arg]
    triton_backward._PAIRS_AT_ONCE = some
    return found


def child() -> dict[str, Any]:
    settle()
    out: dict[str, Any] = {}
    for name, make in ALL.items():
        out[name] = _errors(make(), UNEVEN) + (_errors(make(), SMALL) if name in IN_SMALL_TILES else [])
    for name in IN_HALF:
        for dtype in (torch.float16, torch.bfloat16):
            out[f"{name}_{dtype}"] = _errors(ALL[name](dtype, n=40), None)
    listed = [_errors(ALL[n](), replace(plan, listed=True)) for n in LISTED for plan in (SMALL, UNEVEN)]
    out["listed"] = [error for errors in listed for error in errors]
    return out | _others() | {"by rows": _by_rows(), "wide": _wide()}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_triton_backward")
    return found


NAMES = [
    *ALL, "listed", "by rows", "wide",
    *(f"{n}_{d}" for n in IN_HALF for d in (torch.float16, torch.bfloat16)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(results: dict[str, Any], name: str) -> None:
    for error, allowed in results[name]:
        assert error <= allowed


@pytest.mark.slow
def test_a_frozen_operand_changes_nothing_for_the_others(results: dict[str, Any]) -> None:
    assert results["frozen"] == {name: [True] for name in ("q", "k", "v", "sink")}
    assert results["none"] == 0


@pytest.mark.slow
def test_saving_does_not_change_the_result(results: dict[str, Any]) -> None:
    assert results["same result"]


@pytest.mark.slow
def test_what_is_not_finite_spreads_as_in_the_portable_engine(results: dict[str, Any]) -> None:
    assert results["not finite"] == {f"{case} {what} {value}": True for case, what, value in NOT_FINITE}


@pytest.mark.slow
def test_two_runs_give_the_same_bits(results: dict[str, Any]) -> None:
    assert results["reruns"] == dict.fromkeys(RERUN, True)


@pytest.mark.slow
def test_sizes_of_zero(results: dict[str, Any]) -> None:
    assert results["no_queries"] == results["no_keys"] == [[True, 0.0]] * 3


@pytest.mark.slow
def test_the_operator_trains_with_it(results: dict[str, Any]) -> None:
    assert results["operator"] < 1e-5


@pytest.mark.slow
def test_a_model_trains_with_it(results: dict[str, Any]) -> None:
    error, largest = results["model"]
    assert error <= 1e-5 * largest


# ----------------------------------------------------------------------------------------------------- the source


def texts(name: str, *wanted: str, dtype: torch.dtype | None = None, plan: Plan = SMALL) -> dict[str, str]:
    """The kernels of a case, by name."""
    region = (ALL[name](dtype) if dtype else ALL[name]())[0]  # type: ignore[call-arg]
    names = frozenset(wanted or wanted_names(region))
    found = {}
    for task in triton_backward.tasks(region, names):
        kernel = triton_backward.emit(region, names, task, backward_fit.backward_plan(region, plan, task.loop))
        ast.parse(kernel.source)
        found[kernel.name] = kernel.source
    return found


CAUSAL = """\
    v_grad = tl.zeros([BLOCK_K, 16], tl.float32)
    k_grad = tl.zeros([BLOCK_K, 16], tl.float32)
    begin = first // BLOCK_Q * BLOCK_Q
    full_start = tl.cdiv(last, BLOCK_Q) * BLOCK_Q
    # Tiles that are cut.
    for start in range(begin, tl.minimum(full_start, 90), BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        row_max = tl.load(sums_ptr + 360 * b + 90 * h + i, mask=i < 90, other=0.0)
        log_sum = tl.load(sums_ptr + 720 + 360 * b + 90 * h + i, mask=i < 90, other=0.0)
        log_sum = log_sum * LOG2E
        shift = row_max * LOG2E + log_sum
        delta = tl.load(delta_ptr + 360 * b + 90 * h + i, mask=i < 90, other=0.0)
        query = tl.load(q_base + i[:, None] * q_stride_2 + d[None, :] * q_stride_3, mask=i[:, None] < 90, other=0)
        scores = tl.dot(key, tl.trans(query))
        weight = tl.exp2(scores * SCALE - shift[None, :])
        kept = (j[:, None] <= i[None, :]) & (i[None, :] < 90)
        weight = tl.where(kept, weight, 0.0)
        grad = tl.load(grad_ptr + 5760 * b + 1440 * h + 16 * i[:, None] + e[None, :], mask=i[:, None] < 90, other=0)
        back = tl.dot(value, tl.trans(grad))
        back = weight * (back - delta[None, :])
        back = tl.where(kept, back, 0.0)
        v_grad = tl.dot(weight.to(tl.bfloat16), grad, v_grad)
        k_grad = tl.dot(back.to(tl.bfloat16), query, k_grad)
    # Tiles of which every pair counts.
    for start in range(full_start, 90, BLOCK_Q):
"""


def test_golden_source() -> None:
    source = texts("long_causal", dtype=torch.bfloat16)["keys_backward"]
    assert CAUSAL in source
    assert "+ 16 * j[:, None] + d[None, :], (k_grad * 0.25).to(tl.bfloat16), mask=" in " ".join(source.split())


@pytest.mark.parametrize(
    ("name", "kernel", "line"),
    [
        ("window", "queries", "begin = tl.maximum(0, first - 8) // BLOCK_K * BLOCK_K"),
        ("window", "queries", "for start in range(begin, last + 1, BLOCK_K):"),
        ("window", "keys", "begin = first // BLOCK_Q * BLOCK_Q"),
        ("window", "keys", "for start in range(begin, tl.minimum(75, last + 9), BLOCK_Q):"),
        ("long_causal", "queries", "full_stop = (first + 1) // BLOCK_K * BLOCK_K"),
        ("symbolic", "queries", "full_stop = tl.maximum(0, first + s1 - s0 + 1) // BLOCK_K * BLOCK_K"),
        ("padded_pairs", "pairs", "(key_first < last + 1) & (key_first + BLOCK_K > tl.maximum(0, first - 8 * h - 3))"),
        ("padded_pairs", "pairs", "for member in range(0, 8):"),
        ("emptied_bias", "pairs", "for member in range(0, 2):"),
    ],
)
def test_loops_skip_what_the_mask_empties(name: str, kernel: str, line: str) -> None:
    assert line in texts(name)[f"{kernel}_backward"]


def test_lists_say_which_tiles_are_visited() -> None:
    found = texts("padded_pairs", plan=replace(SMALL, listed=True))
    for kernel in ("queries_backward", "keys_backward"):
        assert found[kernel].count("for tile in range(") == 2 and "for start in" not in found[kernel]
    assert "tl.load(tile_indices_ptr + tile_row * 3 + tile) * BLOCK_Q" in found["keys_backward"]
    assert "* 4 + tl.program_id(1)) != 0:" in found["pairs_backward"]


@pytest.mark.parametrize("name", ALL)
def test_source_is_short_and_fits_a_screen(name: str) -> None:
    for source in texts(name).values():
        lines = source.splitlines()
        assert len(lines) < 170
        assert all(len(line) <= 120 for line in lines if not line.startswith("#"))


def test_no_kernel_for_what_is_frozen() -> None:
    assert set(texts("sinks")) == {"queries_backward", "keys_backward"}
    assert set(texts("sinks", "q")) == {"queries_backward"}
    assert set(texts("sinks", "k", "v")) == {"keys_backward"}
    values = texts("sinks", "v")["keys_backward"]
    assert "v_grad" in values and "k_grad" not in values and "delta" not in values and "back =" not in values
    # An extra logit alone needs no pair.
    assert "tl.dot" not in texts("sinks", "sink")["queries_backward"]


def test_a_bias_of_every_head_is_stored_by_the_program_of_its_queries() -> None:
    assert set(texts("pair_gate", "bias", "q")) == {"queries_backward"}
    assert set(texts("additive_bias", "bias")) == {"pairs_backward"}


def test_tables_by_distance_are_summed_along_diagonals_and_others_by_pair() -> None:
    assert set(texts("t5_buckets", "table")) == {"diagonals_backward"}
    assert set(texts("read_buckets", "table")) == {"pairs_backward"}
    source = texts("cached_table", "table")["diagonals_backward"]
    assert "steps = tl.minimum(tl.cdiv(s0, BLOCK_Q), tl.cdiv(s1, BLOCK_K) + diagonal) - begin_row" in source
    assert "if (key_first < last + " in source  # tiles that the mask empties are skipped


@pytest.mark.parametrize(("queries", "keys", "side"), [(14, 11, 4), (8, 8, 4), (5, 30, 8), (30, 5, 8), (3, 2, 4)])
def test_diagonals_are_added_up(queries: int, keys: int, side: int) -> None:
    pairs = torch.randn(2, queries, keys, dtype=torch.float64)
    rows, columns = -(-queries // side), -(-keys // side)
    blocks = torch.nn.functional.pad(pairs, (0, columns * side - keys, 0, rows * side - queries))
    blocks = blocks.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3)
    tiles = torch.zeros(2, rows + columns - 1, side, side, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            tiles[:, row - column + columns - 1] += blocks[:, row, column]
    whole = torch.stack([pairs.diagonal(-k, 1, 2).sum(-1) for k in range(1 - keys, queries)], -1)
    torch.testing.assert_close(flash_diagonals.by_difference(tiles, queries, keys), whole)


def test_a_gradient_of_all_its_operand_is_stored_as_such() -> None:
    region = cases.gqa(torch.bfloat16)[0]
    found = {g.load.tensor: g for g in backward_fit.gradients(region, frozenset(("q", "k", "v")))}
    assert found["q"].direct and found["q"].dtype == "bfloat16"
    assert not found["k"].direct and found["k"].dtype == "float32"
    assert [a.name for a in found["k"].axes] == ["b", "h", "j", "d"]


def test_only_functions_that_are_called_are_written() -> None:
    assert "def counter_random" in texts("dropout")["keys_backward"]
    assert all(source.count("@triton.jit") == 1 for source in texts("causal").values())


# --------------------------------------------------------------------------------------------- what it declines


@pytest.mark.parametrize(
    ("region", "wanted", "reason"),
    [
        (MORE["scaled_keys"]()[0], "v", "the values are computed inside the region"),
        (cases.causal(torch.float64)[0], "q", "float64"),
    ],
)
def test_says_what_it_cannot_differentiate(region: Region, wanted: str, reason: str) -> None:
    found = supports_backward(region, [wanted])
    assert found is not None and reason in found


def test_a_table_that_is_frozen_is_no_obstacle() -> None:
    assert supports_backward(cases.t5_buckets()[0], ["q", "k", "v"]) is None


@pytest.mark.parametrize(("case", "plan"), [(cases.t5_buckets, "triton"), (MORE["scaled_keys"], None)])
def test_is_chosen_for_training_on_a_gpu(case: Any, plan: str | None) -> None:
    region = case()[0]
    device = torch.device("cuda")
    outcome = choose.plan_part(region, {}, device, None, False, wanted_names(region))
    if plan is None:
        assert isinstance(outcome, Leave) and "are computed inside the region" in outcome.reason
    else:
        assert isinstance(outcome, Chosen) and outcome.plan.engine == plan


if __name__ == "__main__":
    print(json.dumps(child()))
