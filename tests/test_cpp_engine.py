"""The cpp engine: Inductor's C++ flash template run on regions, against the dense oracle and FlexAttention itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from refocus import inductor, oracle, simplify
from refocus.codegen import cpp, heads, repair
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.ir import BOOL, INT, TRUE, Axis, Const, Dot, Expr, Load, Operand, Region
from refocus.masks import BlockLists
from refocus.tolerances import FACTOR, magnitude, tolerance
from tests import region_cases as cases

PLAN = Plan("cpp", block_q=32, block_k=16)

pytestmark = [
    pytest.mark.skipif(cpp.machine_reason() is not None, reason=str(cpp.machine_reason())),
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # the tiled engine standing in is a failure
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),  # torch of that Python
]


def assert_close(out: Tensor, region: Region, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    expected = oracle.run(region, tensors, sizes)
    dense = oracle.run(region, tensors, sizes, torch.float32)
    assert out.shape == expected.shape and out.is_contiguous()
    assert out.dtype == getattr(torch, region.out_dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    allowed = FACTOR * float((dense - expected).abs().nan_to_num().max())
    allowed += tolerance(out.dtype).floor * magnitude(expected)
    assert float((out - expected).abs().nan_to_num().max()) <= allowed


def check(case: cases.Case, plan: Plan = PLAN) -> None:
    """Compiled: a second or more each."""
    region, tensors, sizes = case
    assert cpp.supports(region) is None
    assert_close(cpp.run(region, plan, tensors, sizes), *case)


def check_graph(case: cases.Case) -> None:
    """What is given to Inductor, but run by PyTorch's dense form of the operator: milliseconds."""
    region, tensors, sizes = case
    assert cpp.supports(region) is None
    program = cpp._program(region, PLAN)
    out = program.compute([*program.inputs(tensors, sizes), *program.reads(tensors)], sizes, False)
    named = program.named(tensors)
    out = program.fitted.result(out, named, dict(zip(region.syms, sizes)))
    if program.repairs:
        repair.run(region, out, tensors, sizes)
    assert_close(out, *case)


@pytest.mark.parametrize("name", [name for name in cases.all_names() if name not in ("dropout", "pairwise")])
def test_graph(name: str) -> None:
    check_graph(cases.CASES[name]())


def test_a_gate_on_pairs_is_declined() -> None:
    for case in (cases.dropout, cases.pairwise):
        assert cpp.supports(case()[0]) == "a gate multiplies the weights pair by pair"


@pytest.mark.parametrize(
    "name",
    [
        "dense", "causal_bfloat16", "gqa", "alibi", "documents", "sinks", "empty_min", "empty_inf", "gated",
        "relative_table", "t5_buckets", "two_dots", "merged_heads", "windows_2d",
    ],
)  # fmt: skip
def test_compiled(name: str) -> None:
    check(cases.CASES[name]())


def test_float16() -> None:
    check(cases.sinks(torch.float16))


def test_tiles_longer_than_the_sequence() -> None:
    check(cases.window(), Plan("cpp", block_q=128, block_k=128))


def test_agrees_with_flex_attention() -> None:
    """The same kernel, called through PyTorch's own front end."""
    n = 200
    region, tensors, sizes = cases.softcap(n=n, d=32)
    q, k, v = tensors

    def softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 2.0 * torch.tanh(score / 2.0)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - 20)

    mask = create_block_mask(keep, None, None, n, n, device="cpu", BLOCK_SIZE=64)
    with torch.no_grad():
        expected = torch.compile(flex_attention)(q, k, v, softcap, mask, enable_gqa=True)
    out = cpp.run(region, Plan("cpp", block_q=64, block_k=64), tensors, sizes)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------ layouts


def test_views_of_one_projection() -> None:
    """q, k and v as models make them: chunks of one buffer, heads moved by a transpose."""
    s = cases.Setting(torch.float32, 40, 40, 16, 16)
    packed = torch.randn(cases.B, 40, 3, cases.H, 16)
    s.tensors.update(zip("qkv", packed.permute(2, 0, 3, 1, 4)))
    check(s.case(s.score, simplify.le(s.j, s.i)))


def test_layouts_have_kernels_of_their_own() -> None:
    region, (q, *rest), sizes = cases.dense(n=30)
    check((region, [q.transpose(1, 2).contiguous().transpose(1, 2), *rest], sizes))
    check((region, [q, *rest], sizes))


def batched(batch: Sequence[Axis], key_axes: Sequence[Axis], mask: Expr = TRUE, n: int = 33, d: int = 8) -> cases.Case:
    """q over all batch axes, k and v over some of them."""
    f = "float32"
    i, j, c, e = Axis("i", Const(n)), Axis("j", Const(n)), Axis("d", Const(d)), Axis("e", Const(d))
    shape = [int(a.size.value) for a in batch]  # type: ignore[attr-defined]
    key_shape = [int(a.size.value) for a in key_axes]  # type: ignore[attr-defined]
    tensors = [torch.randn(*shape, n, d), torch.randn(*key_shape, n, d), torch.randn(*key_shape, n, d)]
    dot = Dot((c,), Load("q", (*batch, i, c), f), Load("k", (*key_axes, j, c), f), f)
    score = simplify.call("mul", dot, Const(0.3, f), dtype=f)
    operands = tuple(Operand(x, f, tuple(Const(n) for n in t.shape)) for x, t in zip("qkv", tensors))
    logits = simplify.where(mask, score, Const(-math.inf, f))
    region = Region(
        tuple(batch), i, j, (e,), score, mask, logits, Load("v", (*key_axes, j, e), f), operands, f, empty_row="never"
    )
    return region, tensors, []


X, Y, Z, W = Axis("x", Const(2)), Axis("y", Const(3)), Axis("z", Const(4)), Axis("w", Const(1))


@pytest.mark.parametrize(
    "batch, key_axes, kept",
    [
        ((), (), ()),
        ((X,), (X,), (X,)),
        ((X, Y, Z), (X, Y, Z), (Z,)),
        ((X, Y, Z), (X, Y), (Y,)),  # groups as an axis: the heads are (y, z), shared in fours
        ((X, Y), (X,), ()),  # one key head for all
        ((X, Y), (), ()),  # and for all sequences
        ((X, Y, Z), (Y, Z), (Z,)),
        ((X, Y), (Y,), (Y,)),
        ((W, Y), (W, Y), (Y,)),
    ],
    ids=str,
)
def test_batch_axes(batch: tuple[Axis, ...], key_axes: tuple[Axis, ...], kept: tuple[Axis, ...]) -> None:
    case = batched(batch, key_axes)
    fitted = heads.fit(case[0])
    assert isinstance(fitted, heads.Fitted)
    assert fitted.keys == kept
    check_graph(case)


def test_mask_over_some_batch_axes() -> None:
    i, j = Axis("i", Const(33)), Axis("j", Const(33))
    by_x = simplify.le(simplify.add(j, X), simplify.add(i, 1))
    by_y = simplify.le(j, simplify.add(i, simplify.mul(3, Y)))
    for mask in (by_x, by_y):
        check_graph(batched((X, Y, Z), (X, Y, Z), mask))


def test_groups_are_not_repeated() -> None:
    region, tensors, _ = cases.gqa()
    fitted = heads.fit(region)
    assert isinstance(fitted, heads.Fitted)
    named = dict(zip("qkv", tensors))
    assert fitted.key(named, {}).shape[1] == 2 and fitted.key(named, {}).data_ptr() == tensors[1].data_ptr()


def test_scale_varies_with_query_and_key() -> None:
    """A temperature for each head goes into the query, a weight for each key into the key: no score_mod is left."""
    s = cases.Setting(torch.float32, 30, 30, 8, 8)
    s.tensors["t"], s.tensors["w"] = torch.rand(cases.H), torch.rand(cases.B, 30)
    score = cases.call("div", s.score, Load("t", (s.h,), s.f))
    score = cases.mul(Load("w", (s.b, s.j), s.f), score)
    case = s.case(score)
    fitted = heads.fit(case[0])
    assert isinstance(fitted, heads.Fitted) and fitted.score is None
    check_graph(case)


def test_several_extra_logits() -> None:
    s = cases.Setting(torch.float32, 50, 50, 16, 16)
    s.tensors["sink"] = torch.randn(cases.H)
    own = cases.mul(Load("q", (s.b, s.h, s.i, Const(0)), s.f), s.const(2.0))
    extra = (Load("sink", (s.h,), s.f), s.const(0.5), own)
    check_graph(s.case(s.score, simplify.le(s.j, s.i), extra=extra))


# ------------------------------------------------------------------------------------------------ tiles


def crossed(n: int = 80) -> cases.Case:
    """Causal, and of another part of the sequence: no tile can be told to be empty by its ends alone."""
    s = cases.Setting(torch.float32, n, n, 16, 16)
    s.tensors["of"] = torch.arange(n) // 16 % 2 * 10 + torch.arange(n) % 2
    apart = simplify.ne(Load("of", (s.i,), INT), Load("of", (s.j,), INT))
    return s.case(s.score, simplify.and_(simplify.le(s.j, s.i), apart), empty_row="zero")


def test_pairs_are_looked_at_where_ends_do_not_tell() -> None:
    region, tensors, sizes = crossed()
    plan = Plan("cpp", block_q=16, block_k=16)
    program = cpp._program(region, plan)
    kernel = program.kernel(tensors, sizes)
    assert isinstance(kernel, cpp._Fixed) and kernel.anew
    rough, lists = (BlockLists(*program.lists(tensors, sizes, traced)) for traced in (True, False))
    assert int(rough.partial_count.sum() + rough.full_count.sum()) >= int(
        lists.partial_count.sum() + lists.full_count.sum()
    )
    check((region, tensors, sizes), plan)
    other = [t.clone() for t in tensors]
    other[-1] = torch.arange(80) % 7
    check((region, other, sizes), plan)  # not those of the first call


def test_pairs_are_looked_at_for_all_sizes() -> None:
    for n in (80, 96, 130):
        check(buckets_of_a_cache(n), Plan("cpp", block_q=16, block_k=16))
    [several] = cpp._program(buckets_of_a_cache(80)[0], Plan("cpp", block_q=16, block_k=16)).open.values()
    assert len(several) == 1 and several[0].listed


def buckets_of_a_cache(n: int) -> cases.Case:
    """Lengths that are symbols, causal and every third key."""
    region, tensors, sizes = cases.symbolic(n=n)
    i, j = region.query, region.key
    third = simplify.eq(simplify.mod(simplify.sub(j, i), 3), 0)
    mask = simplify.and_(region.mask, third)
    return replace(region, mask=mask, logits=region.score, empty_row="zero"), tensors, sizes


# ------------------------------------------------------------------------------------------------ sizes


def test_sizes_share_a_kernel() -> None:
    region, *_ = cases.symbolic()
    program = cpp._program(region, PLAN)
    program.fixed.clear()
    program.open.clear()
    for n in (53, 60, 97, 33):
        check(cases.symbolic(n=n))
    assert len(program.fixed) == 1 and sum(map(len, program.open.values())) == 1
    for n in (1, 1):  # decoding: another kernel, and then no more
        check(cases.symbolic(n=n))
    for n, keys in ((1, 70), (1, 71)):
        _, (q, k, v), _ = cases.symbolic(n=keys - 20)
        check((region, [q[:, :, :n].contiguous(), k, v], [n, keys]))
    assert sum(map(len, program.open.values())) == 2


def test_decoding_keeps_rows_far_below_zero() -> None:
    """PyTorch's decoding variant counts a fully masked partition as a maximum of zero; it must stay out."""
    s = cases.Setting(torch.float32, 1, 1024, 16, 16)
    region, tensors, sizes = s.case(cases.add(s.score, s.const(-300.0)), simplify.le(s.j, Const(300)))
    check((region, tensors, sizes), Plan("cpp", block_q=16, block_k=64))


def test_threads_have_kernels_of_their_own() -> None:
    region, tensors, sizes = cases.dense(n=300, d=8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check((region, tensors, sizes))
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ empty rows


def test_repair_of_scattered_rows() -> None:
    """Any rows of any head: only those are touched, zero rows that the mask keeps are not."""
    s = cases.Setting(torch.float32, 40, 40, 8, 8)
    keep = torch.rand(cases.B, cases.H, 40, 40) < 0.5
    keep[0, 1, 7], keep[1, 3, 30:] = False, False
    s.tensors["keep"] = keep
    s.tensors["v"][0, 0] = 0.0
    check_graph(s.case(s.score, Load("keep", (s.b, s.h, s.i, s.j), BOOL), empty_row="logits"))


def test_repair_leaves_other_rows() -> None:
    region, tensors, sizes = cases.empty_min()
    out = torch.full((cases.B, cases.H, 50, 16), 7.0)
    out[1, :, 3] = 0.0
    repair.run(region, out, tensors, sizes)
    expected = oracle.run(region, tensors, sizes).to(torch.float32)
    torch.testing.assert_close(out[1, :, 3], expected[1, :, 3])
    out[1, :, 3] = 7.0
    assert bool((out == 7.0).all())


# ------------------------------------------------------------------------------------------------ limits and graphs


def test_reasons() -> None:
    s = cases.Setting(torch.float32, 20, 20, 8, 8)
    square = cases.mul(s.score, s.score)
    other = Dot((s.d,), Load("q", (s.b, s.h, s.i, s.d), s.f), Load("v", (s.b, s.hk, s.j, s.d), s.f), s.f)
    pairwise = cases.call("sigmoid", s.score)
    region = s.region(s.score)
    assert cpp.supports(region) is None
    assert "not linear" in str(cpp.supports(s.region(cases.mul(s.score, other))))
    assert cpp.supports(s.region(square)) is None
    assert "gate" in str(cpp.supports(s.region(s.score, gate=pairwise)))
    assert "softmax" in str(cpp.supports(replace(region, normalizer="sigmoid")))
    assert "float64" in str(cpp.supports(cases.dense(torch.float64)[0]))
    with pytest.raises(EngineUnavailable, match="float64"):
        cpp.run(*_call(cases.dense(torch.float64)))


def _call(case: cases.Case) -> tuple[Region, Plan, list[Tensor], list[int]]:
    return case[0], PLAN, case[1], case[2]


def test_inductor_failing_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise inductor.InductorFailed("no compiler")

    monkeypatch.setattr(cpp, "compiled", fail)
    case = cases.dense(n=21)
    with pytest.warns(RuntimeWarning, match="tiled"):
        out = cpp.run(*_call(case))
    assert_close(out, *case)
    assert_close(cpp.run(*_call(case)), *case)  # and is not tried again
    with pytest.raises(EngineUnavailable, match="no compiler"):
        cpp.warm(cases.dense(n=22)[0], PLAN, cases.dense(n=22)[1], [])


def test_in_a_compiled_graph() -> None:
    """Between a projection and pointwise work, with the query asked for in the kernel's order."""
    region, *_ = cases.window(n=64)

    def heads_of(x: Tensor, projection: Tensor) -> list[Tensor]:
        return list((x * projection).permute(1, 2, 0, 3)[:, None].expand(3, cases.B, -1, -1, -1))

    def model(x: Tensor, projection: Tensor) -> list[Tensor]:
        return [cpp.attend(region, PLAN, heads_of(x, projection), []).transpose(1, 2).flatten(2) * 2.0 + 1.0]

    inputs = [torch.randn(64, 1, 1, 16), torch.randn(64, 3, cases.H, 16)]
    [out] = inductor.compiled(model, inputs)(*inputs)
    expected = oracle.run(region, heads_of(*inputs)).transpose(1, 2).flatten(2) * 2.0 + 1.0
    torch.testing.assert_close(out, expected.to(torch.float32), rtol=0, atol=1e-5)


def test_integer_loads_in_the_score() -> None:
    """A bias looked up by an integer table of the operands: an index that is itself loaded."""
    s = cases.Setting(torch.float32, 30, 30, 8, 8)
    s.tensors["at"] = torch.randint(0, 5, (30, 30))
    s.tensors["table"] = torch.randn(5, cases.H)
    check_graph(s.case(cases.add(s.score, Load("table", (Load("at", (s.i, s.j), INT), s.h), s.f))))
