"""The chunked engine against the definition of its form, step by step in float64: every form, lengths, decays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from refocus.codegen import additive, chunked, delta, linear_form, linear_operator, spans
from refocus.codegen import lookup as lookups
from refocus.codegen.linear_form import GATES, LinearForm
from refocus.codegen.plan import Plan
from refocus.errors import BadRegion, EngineUnavailable, NeedsGradient
from refocus.tolerances import allowed_error

PLAN = Plan("tiled", schedule="chunked", block_q=16, block_k=16)
Tensors = list[Tensor | None]
KINDS = ("sums", "erase", "lookup")


def form_of(kind: str, **more: Any) -> LinearForm:
    """Running sums with a normaliser, the delta rule, or a lookup by other keys."""
    return LinearForm(**{"sums": kind == "sums", "erase": kind != "sums", "lookup": kind == "lookup", **more})


def forms() -> list[LinearForm]:
    """Every form that there is."""
    found = []
    for causal, strict, gate, erase, sums, initial, final, lookup in itertools.product(
        (True, False), (False, True), GATES, *((False, True),) * 5
    ):
        if (causal or not (strict or erase or gate != "none")) and not (erase and sums) and (erase or not lookup):
            found.append(LinearForm(causal, strict, gate, erase, sums, initial, final, lookup))
    return found


def tensors(
    form: LinearForm, length: int, share: int = 1, heads: int = 3, widths: tuple[int, int] = (6, 5),
    log_decay: float = -3.0, dtype: torch.dtype = torch.float64,
) -> Tensors:  # fmt: skip
    """Random operands; gates between 0 and `log_decay`."""
    drawn = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn, dtype=torch.float64).to(dtype)

    width, value_width = widths
    keys = length if form.causal else length + 3
    k = normal(heads, keys, width)
    k = torch.nn.functional.normalize(k, dim=-1) if form.erase else k
    erase, lookup = uniform(heads, keys), None
    if form.lookup:
        erase, lookup = 0.6 * torch.nn.functional.normalize(normal(2, heads, keys, width), dim=-1)
    gate = None
    if form.gate != "none":
        gate = log_decay * uniform(heads, keys, *((width,) if form.gate == "channel" else ()))
    return [
        normal(heads * share, length, width),
        k,
        normal(heads, keys, value_width),
        gate,
        erase if form.erase else None,
        normal(heads, width, value_width) if form.initial else None,
        lookup,
    ]


def asked(form: LinearForm, results: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The results that a form asks for."""
    return [x for x, wanted in zip(results, (True, form.sums, form.final)) if wanted and x is not None]


@pytest.mark.parametrize("form", forms(), ids=str)
def test_forward_and_backward_are_those_of_the_definition(form: LinearForm) -> None:
    least = 4 if form.gate == "channel" else 1  # the chunk of a single step
    for length, share, chunk in ((1, 1, 16), (1, 2, least), (3, 1, least), (5, 2, 16), (37, 1, 16), (48, 2, 16)):
        given = [x if x is None else x.requires_grad_() for x in tensors(form, length, share)]
        expected = asked(form, linear_form.forward(form, *given))
        grads = [torch.randn_like(x) for x in expected]
        leaves = [x for x in given if x is not None]
        wanted = torch.autograd.grad(expected, leaves, grads, allow_unused=True)
        with torch.no_grad():
            got = asked(form, chunked.forward(form, chunk, *given))
            flows = iter(grads)
            flow = [next(flows) if wants else None for wants in (True, form.sums, form.final)]
            found = chunked.backward(form, chunk, *given, flow)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
        mine_by_leaf = [g for g, x in zip(found, given) if x is not None]
        for mine, theirs, leaf in zip(mine_by_leaf, wanted, leaves, strict=True):
            theirs = torch.zeros_like(leaf) if theirs is None else theirs
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(gate: str, kind: str) -> None:
    form = form_of(kind, gate=gate, initial=True, final=True)
    given = [x if x is None else x.requires_grad_() for x in tensors(form, 9, heads=2, widths=(3, 2), log_decay=-1.0)]
    plan = replace(PLAN, block_q=4, block_k=4)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        return tuple(asked(form, linear_operator.call(form, plan, [x if x is None else next(rest) for x in given])))

    assert torch.autograd.gradcheck(run, [x for x in given if x is not None], fast_mode=True)


@pytest.mark.parametrize("form", [form_of(kind, gate=g) for g in GATES for kind in KINDS], ids=str)
def test_operator_is_well_formed(form: LinearForm) -> None:
    given = tensors(form, 20, 2)
    torch.library.opcheck(linear_operator.linear, (*given, repr(form), repr(PLAN)))


def weights_by_pairs(form: LinearForm, q: Tensor, k: Tensor, gate: Tensor | None) -> Tensor:
    """What eager code makes: all pairs, decays as differences of running sums."""
    weights = torch.einsum("bid,bjd->bij", q, k)
    if gate is not None and gate.dim() == 3:
        c = gate.cumsum(1)
        decay = (c[:, :, None] - c[:, None]).masked_fill(c.new_ones(c.shape[1], c.shape[1]).triu(1)[..., None] > 0, 0)
        weights = torch.einsum("bid,bjd,bijd->bij", q, k, decay.exp())
    elif gate is not None:
        c = gate.cumsum(1)
        weights = weights * (c[:, :, None] - c[:, None]).tril().exp()
    return weights.tril()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 1 - 1e-5])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_no_worse_than_all_pairs(gate: str, decay: float) -> None:
    """In float32, with decays from strong to hardly any: against float64, no error above that of the eager spelling."""
    form = LinearForm(gate=gate)
    length = 1024 if gate == "head" else 300
    given = tensors(form, length, widths=(8, 8), heads=2, log_decay=0.0, dtype=torch.float32)
    assert given[3] is not None
    given[3] = torch.full_like(given[3], torch.tensor(decay).log().item())
    exact = linear_form.forward(form, *given)[0]
    q, k, v, steps = (x for x in given[:4] if x is not None)
    eager = (weights_by_pairs(form, q, k, steps) @ v - exact).abs().max()
    mine = (chunked.forward(form, 64, *given)[0] - exact).abs().max()
    assert mine <= 1.5 * eager + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("log_decay", [0.0, -0.6, -20.0])
def test_no_worse_than_step_by_step(log_decay: float) -> None:
    """A state that is looked up by other keys, in float32, as its recurrence has it."""
    form, length = LinearForm(gate="channel", erase=True, lookup=True), 300
    given = tensors(form, length, widths=(16, 16), heads=2, log_decay=log_decay, dtype=torch.float32)
    q, k, v, gate, erase, _, lookup = given
    assert q is not None and k is not None and v is not None
    assert gate is not None and erase is not None and lookup is not None
    state, rows = v.new_zeros(2, 16, 16), []
    for t in range(length):
        found = lookup[:, t, None] @ state
        state = state * gate[:, t, :, None].exp() - erase[:, t, :, None] * found + k[:, t, :, None] * v[:, t, None]
        rows.append((q[:, t, None] @ state).squeeze(1))
    exact = linear_form.forward(form, *given)[0]
    eager = (torch.stack(rows, 1) - exact).abs().max()
    mine = (chunked.forward(form, 64, *given)[0] - exact).abs().max()
    assert mine <= allowed_error(torch.float32, float(eager), float(exact.abs().max()))


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("kind", ["plain", "lookup"])
def test_gates_that_forget_at_once(gate: str, kind: str) -> None:
    """exp(-60) a step: products of decays vanish within two steps, and nothing may be divided by them."""
    form = form_of(kind, gate=gate, erase=kind == "lookup", initial=True, final=True)
    given = tensors(form, 70, log_decay=-60.0, dtype=torch.float32)
    for mine, theirs in zip(chunked.forward(form, 16, *given), linear_form.forward(form, *given)):
        if theirs is not None:
            torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)
    found = chunked.backward(form, 16, *given, (torch.ones(3, 70, 5), None, torch.ones(3, 6, 5)))
    assert all(bool(g.isfinite().all()) for g in found if g is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_steps(kind: str) -> None:
    form = form_of(kind, gate="head")
    given = tensors(form, 3000, heads=2, widths=(8, 8), log_decay=-0.02, dtype=torch.float32)
    for mine, theirs in zip(chunked.forward(form, 64, *given)[:2], linear_form.forward(form, *given)[:2]):
        if theirs is not None:
            assert (mine - theirs).abs().max() <= 3e-6 * theirs.abs().max()


def test_a_decay_that_never_changes_may_have_stride_zero() -> None:
    form = LinearForm(gate="head", final=True)
    given = tensors(form, 50)
    slope = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)
    for steady in (slope[:, None].expand(3, 50), slope[:, None].repeat(1, 50)):
        given[3] = steady
        for mine, theirs in zip(chunked.forward(form, 16, *given), linear_form.forward(form, *given)):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(dtype: torch.dtype) -> None:
    form = LinearForm(gate="head", sums=True, final=True)
    given = tensors(form, 200, widths=(8, 8), log_decay=-0.1, dtype=dtype)
    out, sums, final = chunked.forward(form, 64, *given)
    exact = linear_form.forward(form, *given)
    assert sums is not None and final is not None and exact[1] is not None and exact[2] is not None
    assert (out.dtype, sums.dtype, final.dtype) == (dtype, torch.float32, torch.float32)
    assert (out - exact[0]).abs().max() <= torch.finfo(dtype).eps * exact[0].abs().max()
    assert (final - exact[2]).abs().max() <= 1e-5 * exact[2].abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
def test_spans_follow_one_another(gate: str, kind: str, initial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two query heads to a key head, the last span shorter and no whole number of chunks: as in one span."""
    form = form_of(kind, gate=gate, initial=initial, final=initial)
    given = tensors(form, 77, share=2, heads=5)
    whole = chunked.forward(form, 16, *given)
    grads = [torch.randn_like(x) if x is not None and asks else None for x, asks in zip(whole, (True, True, initial))]
    flows = chunked.backward(form, 16, *given, grads)
    monkeypatch.setattr(spans, "_MOST", 2 * 16 * 16 * 10)
    began = []
    module = {"sums": additive, "erase": delta, "lookup": lookups}[kind]
    run = module.forward
    monkeypatch.setattr(module, "forward", lambda *of: began.append(of[2].initial is not None) or run(*of))
    for mine, theirs in zip(chunked.forward(form, 16, *given), whole, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert began == [initial, True, True]
    for mine, theirs in zip(chunked.backward(form, 16, *given, grads), flows, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: str) -> None:
    form = form_of(kind, gate="head", final=True)
    given = [x if x is None else x[:0] for x in tensors(form, 20)]
    out, _, final = chunked.forward(form, 16, *given)
    assert final is not None and (out.shape, final.shape) == ((0, 20, 5), (0, 6, 5))
    found = chunked.backward(form, 16, *given, (torch.zeros_like(out), None, torch.zeros_like(final)))
    assert [x.shape for x in found if x is not None] == [x.shape for x in given if x is not None]


@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind: str, initial: bool) -> None:
    """As of a chunk before the first position: the state is what it was."""
    form = form_of(kind, gate="head", final=True, initial=initial)
    given = [x if x is None or x.shape[1:] == (6, 5) else x[:, :0] for x in tensors(form, 20)]
    out, sums, final = chunked.forward(form, 16, *given)
    assert final is not None and out.shape == (3, 0, 5) and (sums is None or sums.shape == (3, 0))
    torch.testing.assert_close(final, given[5] if initial else torch.zeros_like(final))
    flow = torch.randn_like(final)
    found = chunked.backward(form, 16, *given, (torch.zeros_like(out), sums, flow))
    assert [x.shape for x in found if x is not None] == [x.shape for x in given if x is not None]
    assert not initial or (found[5] is not None and torch.equal(found[5], flow))


@pytest.mark.parametrize(("heads", "queries"), [(0, 20), (3, 0)])
def test_nothing_to_do_without_a_mask(heads: int, queries: int) -> None:
    form = LinearForm(causal=False, sums=True)
    given = [x if x is None else x[:heads] for x in tensors(form, 20)]
    given[0] = torch.zeros(heads, queries, 6, dtype=torch.float64)
    out, sums, _ = chunked.forward(form, 16, *given)
    assert sums is not None and (out.shape, sums.shape) == ((heads, queries, 5), (heads, queries))
    found = chunked.backward(form, 16, *given, (torch.zeros_like(out), torch.zeros_like(sums), None))
    assert [x.shape for x in found if x is not None] == [x.shape for x in given if x is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_needs_the_memory_of_one_span(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor but results is as long as the sequence, in the forward and in the backward."""
    monkeypatch.setattr(spans, "_MOST", 1 << 14)
    form, length = form_of(kind, gate="head"), 4096
    given = tensors(form, length, heads=2, widths=(32, 32), dtype=torch.float32)
    whole = length * 2 * 32 * 4
    forward = allocations(lambda: chunked.forward(form, 64, *given))
    backward = allocations(lambda: chunked.backward(form, 64, *given, (torch.ones_like(given[2]), None, None)))
    results = {"sums": 3, "erase": 3, "lookup": 5}[kind]  # q, k, v, erase, lookup; gates are narrower
    for made, count in ((forward, 1), (backward, results + 1)):  # and what flows back, made above
        assert [size for size in made if size > whole // 4] == [whole] * count


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that is made meanwhile."""
    return max(allocations(run))


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of the tensors that are made meanwhile; negative where one is freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    return [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_all_pairs(gate: str, kind: str) -> None:
    """Forward and backward: at 4096 steps, nothing is larger than a few times the operands."""
    form = form_of(kind, gate=gate, sums=False)
    length, width = 4096, 16
    given = [x if x is None else x.requires_grad_() for x in tensors(
        form, length, heads=1, widths=(width, width), log_decay=-0.1, dtype=torch.float32
    )]  # fmt: skip

    def run() -> None:
        linear_operator.call(form, replace(PLAN, block_k=128), given)[0].sum().backward()

    assert largest_allocation(run) <= 5 * length * 128 * 4 < length * length * 4 / 6


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_it_changes_nothing(kind: str) -> None:
    form = form_of(kind, gate="head", final=True)
    given = [x if x is None else x.requires_grad_() for x in tensors(form, 40, dtype=torch.float32)]
    leaves = [x for x in given if x is not None]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _, final = linear_operator.call(form, PLAN, given)
            found.append((out, final, *torch.autograd.grad(out.sum() + final.sum(), leaves, allow_unused=True)))
    assert all(torch.equal(a, b) for a, b in zip(*found) if a is not None)


def test_no_second_derivative() -> None:
    form = LinearForm()
    q, k, v, *rest = tensors(form, 8)
    assert q is not None
    q.requires_grad_()
    out = linear_operator.call(form, PLAN, (q, k, v, *rest))[0]
    with pytest.raises(NeedsGradient, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_operands_must_fit() -> None:
    q, k, v, *rest = tensors(LinearForm(), 8)
    with pytest.raises(BadRegion, match="'gate'"):
        linear_operator.call(LinearForm(gate="head"), PLAN, (q, k, v, *rest))
    with pytest.raises(EngineUnavailable, match="no linear attention"):
        linear_operator.call(LinearForm(), Plan("cpp"), (q, k, v, *rest))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 1 - 1e-5])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_no_worse_than_all_pairs_at_65536_steps(gate: str, decay: float) -> None:
    """The last 32 queries, of which eager code sums all keys, with differences of sums over the whole length."""
    length, rows = 65536, 32
    form = LinearForm(gate=gate)
    given = tensors(form, length, widths=(4, 4), heads=1, dtype=torch.float32)
    q, k, v, steps = (x for x in given if x is not None)
    steps = decay ** (0.5 + torch.rand(steps.shape)) if decay < 0.99 else decay * torch.ones_like(steps)
    steps = steps.log()

    def pairs(dtype: torch.dtype) -> Tensor:
        c = (steps if gate == "channel" else steps[..., None]).to(dtype).cumsum(1)
        decays = (c[:, -rows:, None] - c[:, None]).exp()
        weights = torch.einsum("bid,bjd,bijd->bij", q[:, -rows:].to(dtype), k.to(dtype), decays.expand(-1, -1, -1, 4))
        return weights.tril(length - rows) @ v.to(dtype)

    exact = pairs(torch.float64)
    eager = (pairs(torch.float32) - exact).abs().max()
    mine = (chunked.forward(form, 64, q, k, v, steps)[0][:, -rows:] - exact).abs().max()
    assert mine <= allowed_error(torch.float32, float(eager), float(exact.abs().max()))


@pytest.mark.parametrize("erase", [False, True], ids=["", "erase"])
def test_infinite_keys_are_seen_from_their_position_on(erase: bool) -> None:
    """As of exp(-c) once c is very negative: what comes before is not concerned."""
    form = LinearForm(erase=erase)
    given = tensors(form, 20, dtype=torch.float32)
    expected = linear_form.forward(form, *given)[0]
    q, k, *_ = given
    assert q is not None and k is not None
    k[:, 11:] = torch.inf
    found = chunked.forward(form, 16, *given)[0]
    if not erase:  # a system of equations is solved for a whole chunk
        torch.testing.assert_close(found[:, :11].double(), expected[:, :11], atol=1e-5, rtol=1e-5)
    assert not found[:, 11:].isfinite().any()
