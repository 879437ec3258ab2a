"""The decode schedule: its numbers under Triton's interpreter, packing, the choice of it, and the text of its kernels.

One child process (this file as a program) interprets all numeric cases, as in tests/test_triton_flash.py.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus import oracle
from refocus import simplify as s
from refocus.codegen import choose, decode, decode_fit, schedules, triton_engine
from refocus.codegen.decode_fit import decode_plan, parts_of, rows_of
from refocus.codegen.packing import packed
from refocus.codegen.plan import Chosen, Plan
from refocus.errors import EngineUnavailable
from refocus.ir import BOOL, TRUE, Axis, Const, Dot, Expr, Load, Operand, Region, Sym
from refocus.tolerances import allowed_error, difference, magnitude
from tests import region_cases as cases
from tests.children import interpreted, settle
from tests.flash_cases import MORE, block_table
from tests.region_cases import Case, Setting, randn

SMALL = Plan("triton", "decode", 16, 16)
H = cases.H


# ------------------------------------------------------------------------------------- few queries, and many keys


class Few(Setting):
    """The last queries of a sequence, and a cache of all its keys, which two heads share."""

    def __init__(self, dtype: torch.dtype = torch.float32, n: int = 3, m: int = 70, kv_heads: int = 2) -> None:
        super().__init__(dtype, n, m, 16, 16, kv_heads)
        self.at = s.add(self.i, Const(m - n))  # where a query is among the keys
        self.causal = s.le(self.j, self.at)
        self.m = m

    def bound(self, low: Expr | int) -> Expr:
        return s.and_(self.causal, s.le(low, self.j))


def causal(dtype: torch.dtype = torch.float32) -> Case:
    few = Few(dtype)
    return few.case(few.score, few.causal)


def dense() -> Case:
    return Few(n=1).case(Few(n=1).score)


def window() -> Case:
    """Most of the keys are out of reach."""
    few = Few()
    return few.case(few.score, few.bound(s.sub(few.at, 20)))


def head_windows() -> Case:
    """Each head has a window of its own: rows of one tile have different ones."""
    few = Few()
    return few.case(few.score, few.bound(s.sub(few.at, s.add(s.mul(few.h, 8), 4))))


def softcap() -> Case:
    few = Few(kv_heads=1)
    capped = cases.mul(cases.call("tanh", cases.call("div", few.score, few.const(2.0))), few.const(2.0))
    return few.case(capped, few.causal)


def alibi() -> Case:
    few = Few()
    few.tensors["slopes"] = torch.tensor([2.0 ** -(x + 1) for x in range(H)])
    bias = cases.call("mul", Load("slopes", (few.h,), few.f), s.sub(few.j, few.at))
    return few.case(cases.add(few.score, bias), few.causal)


def bias() -> Case:
    """A bias by head, query and key, in which a query keeps nothing but finite minima, and another nothing at all."""
    few = Few()
    few.tensors["bias"] = randn(4, torch.float32, H, 3, 70)
    few.tensors["bias"][1, 2] = few.lowest
    few.tensors["bias"][2, 0] = -math.inf
    return few.case(cases.add(few.score, Load("bias", (few.h, few.i, few.j), few.f)), few.causal)


def sinks(dtype: torch.dtype = torch.float32) -> Case:
    few = Few(dtype)
    few.tensors["sink"] = randn(5, dtype, H)
    return few.case(few.score, few.causal, extra=(Load("sink", (few.h,), few.f),))


def gated() -> Case:
    few = Few()
    few.tensors["gate"] = randn(6, torch.float32, H, 3, 70)
    return few.case(few.score, few.causal, gate=cases.call("sigmoid", Load("gate", (few.h, few.i, few.j), few.f)))


def _padded(few: Few) -> Expr:
    """The second sequence has no key at all."""
    few.tensors["keep"] = torch.arange(few.m)[None] >= torch.tensor([13, few.m])[:, None]
    return s.and_(few.causal, Load("keep", (few.b, few.j), BOOL))


def emptied_mean() -> Case:
    few = Few()
    return few.case(few.score, _padded(few), empty_row="logits")


def emptied_nan() -> Case:
    few = Few()
    mask = _padded(few)
    return few.case(few.score, mask, few.masked(few.score, mask, -math.inf), empty_row="logits")


def emptied_zero() -> Case:
    few = Few()
    mask = _padded(few)
    return few.case(few.score, mask, few.masked(few.score, mask, -math.inf), empty_row="zero")


def emptied_added() -> Case:
    """The fills keep the pattern of the scores, and a sink takes its share."""
    few = Few()
    mask = _padded(few)
    fill = cases.call("where", mask, few.const(0.0), few.const(-100.0), dtype=few.f)
    few.tensors["sink"] = randn(5, torch.float32, H)
    sink = cases.add(Load("sink", (few.h,), few.f), few.const(-100.0))
    return few.case(few.score, mask, cases.add(few.score, fill), extra=(sink,), empty_row="logits")


def lengths() -> Case:
    """Loop bounds are read: one sequence has a single key."""
    few = Few()
    few.tensors["length"] = torch.tensor([53, 1])
    return few.case(few.score, s.lt(few.j, Load("length", (few.b,), "int64")))


def dilated() -> Case:
    """No interval of keys: what lists are for."""
    few = Few(n=1, m=150)
    return few.case(few.score, s.eq(s.mod(s.floordiv(few.j, 16), 3), 1))


def one_key() -> Case:
    few = Few(n=2, m=1)
    return few.case(few.score)


def other_groups() -> Case:
    """Heads that share keys do not stand side by side: they are not packed."""
    few = Few(kv_heads=2)
    hk = s.mod(few.h, 2)
    dot = Dot((few.d,), Load("q", (few.b, few.h, few.i, few.d), few.f), Load("k", (few.b, hk, few.j, few.d), few.f),
              few.f)  # fmt: skip
    few.values = Load("v", (few.b, hk, few.j, few.e), few.f)
    return few.case(cases.mul(dot, few.const(0.25)), few.causal)


def symbolic() -> Case:
    """Any number of queries and of keys."""
    return cases.symbolic(n=3)


def symbolic_many() -> Case:
    """The same region, but more queries than the plan was made for."""
    return cases.symbolic(n=40)


FEW: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        causal, dense, window, head_windows, softcap, alibi, bias, sinks, gated, emptied_mean, emptied_nan,
        emptied_zero, emptied_added, lengths, dilated, one_key, other_groups, symbolic, symbolic_many, block_table,
    )
}  # fmt: skip
SLOW = ("two_dots", "merged_heads", "windows_2d", "unbatched", "dropout", "t5_buckets", "documents")
SLOW_MORE = ("two_axes", "no_value_axis", "several_batches", "integers", "mixed_dtypes", "scaled_keys", "odd_width")


# ------------------------------------------------------------------------------------------------ the child process


def _errors(case: Case, parts: tuple[int, ...] = (1, 2, 5), plan: Plan = SMALL) -> list[list[float]]:
    """[largest difference from the oracle, largest allowed] for so many parts, and for the plan's own number."""
    from refocus.codegen import decode_call

    region, tensors, sizes = case
    exact = oracle.run(region, tensors, sizes)
    got = [decode_call.run(region, plan, tensors, sizes, count) for count in parts]
    got.append(triton_engine.run(region, decode_plan(region), tensors, sizes))
    plain = oracle.run(region, tensors, sizes, torch.float32).to(got[0].dtype)
    allowed = allowed_error(got[0].dtype, difference(plain, exact), magnitude(exact))
    assert all(x.is_contiguous() and x.shape == exact.shape for x in got)
    return [[difference(x, exact), allowed] for x in got]


def _any_sizes() -> list[list[float]]:
    """Sizes, groups, windows and parts at random: the worst case that was found."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from refocus.codegen import decode_call

    worst = [[0.0, 1.0]]

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, 5), st.integers(0, 60), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(0, 60),
        st.sampled_from([1, 3]),
    )  # fmt: skip
    def run(n: int, more: int, kv_heads: int, parts: int, width: int, seed: int) -> None:
        few = Few(n=n, m=n + more, kv_heads=kv_heads)
        region, tensors, _ = few.case(few.score, few.bound(s.sub(few.at, width)))
        got = decode_call.run(region, SMALL, tensors, [], parts)
        error = difference(got, oracle.run(region, tensors, []))
        worst[0] = max(worst[0], [error, 5e-6])

    run()
    return worst


def _no_sizes() -> list[list[float]]:
    """No query, and no key."""
    region, (q, k, v), _ = cases.symbolic()
    plan = decode_plan(region)
    none = triton_engine.run(region, plan, [q[:, :, :0], k, v], [0, k.shape[2]])
    zeros = triton_engine.run(region, plan, [q, k[:, :, :0], v[:, :, :0]], [q.shape[2], 0])
    return [[float(none.numel()), 0.0], [float(zeros.abs().max()), 0.0]]


def _step(name: str) -> dict[str, Any]:
    """A step of decoding of a model, with a cache of 200 keys, through torch.compile and Inductor."""
    from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

    import refocus

    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50,
        "num_key_value_heads": 2, "head_dim": 16, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        kinds = {"layer_types": ["full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
        model = GptOssForCausalLM(GptOssConfig(**sizes, **kinds))
    model.eval()
    tokens = torch.randint(0, 50, (2, 201))
    reports: list[Any] = []
    fast = refocus.optimize(model, engine="triton", require=True, report=reports.append)

    def step(call: Any) -> Tensor:
        cache = DynamicCache()
        model(tokens[:, :200], past_key_values=cache, use_cache=True)
        logits: Tensor = call(tokens[:, 200:], past_key_values=cache, use_cache=True).logits
        return logits

    with torch.no_grad():
        want, got = step(model), step(fast)
    kernels = [Path(site.kernel_path).read_text() for report in reports for site in report.sites]
    return {"error": float((got - want).abs().max() / want.abs().max()), "kernels": kernels}


def child(slow: bool) -> dict[str, Any]:
    settle()
    if slow:
        some = [(n, cases.CASES[n]) for n in SLOW] + [(n, MORE[n]) for n in SLOW_MORE]
        out: dict[str, Any] = {name: _errors(case(), (3,)) for name, case in some}
        return out | {name: _step(name) for name in ("llama", "gpt_oss")}
    out = {name: _errors(case()) for name, case in FEW.items()}
    for name in ("causal", "sinks"):
        out[f"{name}_half"] = _errors(FEW[name](torch.bfloat16), (3,))  # type: ignore[call-arg]
    listed = [case() for case in FEW.values() if case()[0].mask != TRUE]
    out["listed"] = [e for case in listed for e in _errors(case, (1, 3), replace(SMALL, listed=True))]
    return out | {"any_sizes": _any_sizes(), "no_sizes": _no_sizes()}


def _results(which: str) -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_triton_decode", which)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return _results("few")


@pytest.fixture(scope="module")
def slow_results() -> dict[str, Any]:
    return _results("slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEW, "causal_half", "sinks_half", "listed", "any_sizes", "no_sizes"])
def test_against_the_oracle(results: dict[str, Any], name: str) -> None:
    for error, allowed in results[name]:
        assert error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW, *SLOW_MORE])
def test_any_region_against_the_oracle(slow_results: dict[str, Any], name: str) -> None:
    for error, allowed in slow_results[name]:
        assert error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_step_of_a_model(slow_results: dict[str, Any], name: str) -> None:
    found = slow_results[name]
    assert found["error"] < 1e-5
    [kernel] = found["kernels"]
    assert "def decode_parts(" in kernel and "q_ptr" in kernel
    # Both heads that share keys are in one tile of rows.
    assert "k[b,h,j,d]" in kernel and "2*h + row" in kernel


# ------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("name", [*FEW, *cases.CASES, *MORE])
def test_packed_is_the_same_function(name: str) -> None:
    case = FEW.get(name) or cases.CASES.get(name) or MORE[name]
    region, tensors, sizes = case()
    rows = packed(region)
    want, got = oracle.run(region, tensors, sizes), oracle.run(rows, tensors, sizes)
    torch.testing.assert_close(got.reshape(want.shape), want, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rows", "heads"),
    [("causal", 6, 2), ("softcap", 12, 1), ("sinks", 6, 2), ("other_groups", 3, 4), ("block_table", 20, 3)],
)
def test_heads_that_share_keys_are_packed(name: str, rows: int, heads: int) -> None:
    region = packed(FEW[name]()[0])
    assert region.query.size == Const(rows)
    assert math.prod(int(a.size.value) for a in region.batch) in (heads, 2 * heads)  # type: ignore[attr-defined]


def test_unknown_numbers_of_queries_are_packed() -> None:
    region, _, _ = symbolic()
    rows = packed(region)
    assert rows.query.size == s.mul(region.query.size, 2)
    assert all(rows.query not in side.axes for side in (rows.values, rows.dots[0].key))


# ----------------------------------------------------------------------------------------------------- the choice


def cached(n: int, m: int) -> tuple[Region, dict[Sym, int]]:
    region, _, _ = cases.symbolic()
    return region, {Sym("s0"): n, Sym("s1"): m}


@pytest.mark.parametrize(
    ("n", "m", "schedule"), [(1, 4096, "decode"), (16, 128, "decode"), (17, 4096, "flash"), (1, 127, "flash")]
)
def test_few_queries_and_many_keys_are_decoded(n: int, m: int, schedule: str) -> None:
    region, numbers = cached(n, m)
    assert schedules.default_plan(region, numbers).schedule == schedule
    assert schedules.default_plan(region, numbers, trained=True).schedule == "flash"


def test_the_plan_is_the_pipelines() -> None:
    region, numbers = cached(1, 4096)
    chosen = choose.plan_part(region, numbers, torch.device("cuda"), None, False)
    assert isinstance(chosen, Chosen) and chosen.plan == decode_plan(region)
    trained = choose.plan_part(region, numbers, torch.device("cuda"), None, False, {"q"})
    assert isinstance(trained, Chosen) and trained.plan.schedule == "flash"


@pytest.mark.parametrize(
    ("batch", "m", "multiprocessors", "parts"),
    [
        (1, 65536, 132, 128),  # 2 programs: more parts would cost more to merge
        (8, 65536, 132, 16),  # 16 programs, 16 parts: two each
        (64, 65536, 132, 2),
        (1024, 65536, 132, 1),
        (1, 16 * 12, 132, 6),  # two tiles each
        (1, 16, 132, 1),
    ],
)
def test_parts_fit_the_device(batch: int, m: int, multiprocessors: int, parts: int) -> None:
    b, h = Axis("b", Const(batch)), Axis("h", Const(4))
    i, j, d, e = (Axis(name, Const(size)) for name, size in (("i", 1), ("j", m), ("d", 16), ("e", 16)))
    f = "bfloat16"
    hk = s.floordiv(h, 2)
    dot = Dot((d,), Load("q", (b, h, i, d), f), Load("k", (b, hk, j, d), f), f)
    operands = tuple(
        Operand(name, f, (Const(batch), Const(heads), Const(rows), Const(16)))
        for name, heads, rows in (("q", 4, 1), ("k", 2, m))
    )
    values = Load("k", (b, hk, j, e), f)
    region = Region((b, h), i, j, (e,), dot, TRUE, dot, values, operands, f, empty_row="never")
    rows = rows_of(
        replace(region, value=(Axis("e", Const(16)),), values=s.substitute(values, {d: Axis("e", Const(16))}))
    )
    assert parts_of(rows, SMALL, [], multiprocessors) == parts


def test_parts_are_counted_between_the_loop_bounds() -> None:
    few = Few(n=1, m=4096)
    region, _, _ = few.case(few.score, few.bound(s.sub(few.at, 127)))
    assert parts_of(rows_of(region), SMALL, [], 132) == 4  # 128 keys, of 4096


def test_multiprocessors_without_a_device() -> None:
    assert decode_fit.multiprocessors(torch.device("cpu")) > 1


# ----------------------------------------------------------------------------------------------------- the source


@pytest.mark.parametrize("name", FEW)
def test_source_is_short(name: str) -> None:
    rows = rows_of(FEW[name]()[0])
    for source in (decode.write_parts(rows, SMALL), decode.write_merge(rows, SMALL)):
        ast.parse(source.text)
        assert len(source.text.splitlines()) < 130


def test_a_part_is_a_share_of_the_tiles_within_bounds() -> None:
    text = decode.write_parts(rows_of(FEW["window"]()[0]), SMALL).text
    assert "each = tl.cdiv(tl.cdiv(70 - key_start, BLOCK_K), parts) * BLOCK_K" in text
    assert "part_start = key_start + part * each" in text
    assert "for start in range(part_start, part_stop, BLOCK_K):" in text


def test_the_merge_reads_no_keys_unless_rows_can_be_empty() -> None:
    assert " k_ptr" not in decode.write_merge(rows_of(FEW["sinks"]()[0]), SMALL).text
    assert " k_ptr" in decode.write_merge(rows_of(FEW["emptied_mean"]()[0]), SMALL).text


def test_it_does_not_train() -> None:
    with pytest.raises(EngineUnavailable, match="no backward"):
        triton_engine.emit(causal()[0], SMALL, saving=True)


if __name__ == "__main__":
    if sys.argv[1] == "slow":
        from benchmarks.torchvision_ops import import_torchvision

        import_torchvision()  # before transformers is imported
    print(json.dumps(child(sys.argv[1] == "slow")))
