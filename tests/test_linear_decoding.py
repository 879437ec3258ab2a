"""Single steps of a recurrence, as in decoding: the state comes from a cache, and is there afterwards as eager code
leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.linear_policy import LinearWork, Passes, Sample, choose_linear
from refocus.codegen.plan import Chosen, Leave
from refocus.testing import check, rewritten
from tests.children import output
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

BATCH, HEADS, WIDTH, VALUES = 2, 3, 8, 6


def given(function: Function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What a function asks for by name. Keys are not of unit length, decays of a channel may be of any sign."""
    drawn = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn)

    every = {
        "q": rand(BATCH, HEADS, WIDTH), "k": rand(BATCH, HEADS, WIDTH), "v": rand(BATCH, HEADS, VALUES),
        "state": rand(BATCH, HEADS, WIDTH, VALUES), "total": rand(BATCH, HEADS, WIDTH), "slope": rand(HEADS) + 0.1,
        "gate": -rand(BATCH, HEADS), "gates": -rand(BATCH, HEADS, WIDTH), "factor": rand(BATCH, HEADS) - 0.5,
        "share": rand(BATCH, HEADS), "values": -rand(BATCH, HEADS, VALUES), "groups": rand(BATCH, 2 * HEADS, WIDTH),
        "cache": rand(BATCH * HEADS, VALUES, WIDTH), "rank": rand(BATCH, 1, WIDTH), "rank_k": rand(BATCH, 1, WIDTH),
    }  # fmt: skip
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return [every[name].to(dtype) for name in names]


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, state)


# ---------------------------------------------------------------------------------------------------- spellings


def plain(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = state + outer(k, v)
    return read(q, state), state


def added_product(q: Tensor, k: Tensor, v: Tensor, state: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.addcmul(share[..., None, None] * state, k[..., :, None], v[..., None, :])
    return read(q, state), state


def retained(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(-slope)[:, None, None] * state + outer(k, v)
    return (q[..., None] * state).sum(-2), state


def by_matrices(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    state = gate.exp()[..., None, None] * state + k[..., None] @ v[..., None, :]
    return q[:, :, None] @ state, state


def by_channels(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.einsum("bhd,bhe->bhde", k, v) + torch.sigmoid(gates)[..., None] * state
    return read(q, state), state


def any_factor(q: Tensor, k: Tensor, v: Tensor, state: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """It may be negative, and has no logarithm."""
    state = factor[..., None, None] * state + outer(k, v)
    return read(q, state), state


def by_values(q: Tensor, k: Tensor, v: Tensor, state: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    state = values.exp()[..., None, :] * state + outer(k, v)
    return read(q, state), state


def normalised(q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    state, total = state + outer(k, v), total + k
    return read(q, state) / ((q * total).sum(-1, keepdim=True) + 1e-6), state, total


def delta(q: Tensor, k: Tensor, v: Tensor, state: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    k = F.normalize(k, dim=-1)
    found = (state * k[..., None]).sum(-2)
    state = state + outer(k, (v - found) * share[..., None])
    return (state * q[..., None]).sum(-2), state


def gated_delta(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gate: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    state = state * gate.exp()[..., None, None]
    k = F.normalize(k, dim=-1)
    state = state + outer(k, (v - read(k, state)) * share[..., None])
    return read(q, state), state


def channel_delta(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    state = state * gates.exp()[..., None]
    k = F.normalize(k, dim=-1)
    state = state + outer(k, (v - read(k, state)) * share[..., None])
    return read(q, state), state


def looks_up_another(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    state = state + outer(k, (v - read(total, state)) * share[..., None])
    return read(q, state), state


def decays_after(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule looks up what has not decayed yet, of channels that decay each in its own way."""
    found = read(k, state)
    state = state * gates.exp()[..., None] + outer(k, (v - found) * share[..., None])
    return read(q, state), state


def in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> Tensor:
    state.mul_(torch.exp(-slope)[:, None, None]).add_(outer(k, v))
    return read(q, state)


def copied(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> Tensor:
    state.copy_(state * torch.exp(-slope)[:, None, None] + outer(k, v))
    return read(q, state)


def grouped(groups: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = state + outer(k, v)
    return torch.einsum("bhgd,bhde->bhge", groups.unflatten(1, (HEADS, 2)), state), state


def heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Values first; heads are one axis with the batch where the state is read."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cache = torch.baddbmm(cache * gate.exp().flatten()[:, None, None], v[..., None], k[:, None, :])
    return torch.bmm(cache, q[..., None]).view(BATCH, HEADS, VALUES), cache


def one_key_for_all_heads(
    rank: Tensor, rank_k: Tensor, v: Tensor, state: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    step = F.softplus(share)[..., None, None].expand(-1, -1, WIDTH, VALUES)
    state = torch.exp(-step) * state + step * outer(rank_k, v)
    return (state * rank[..., None]).sum(-2), state


SPELLINGS: list[tuple[Function, str, bool]] = [
    (plain, "none", False), (retained, "head", False), (added_product, "none", True),
    (by_matrices, "head", False), (by_channels, "channel", False),
    (any_factor, "none", True), (by_values, "none", True), (normalised, "none", False), (delta, "none", False),
    (gated_delta, "head", False), (channel_delta, "none", True), (in_place, "head", False), (copied, "head", False),
    (looks_up_another, "none", False), (decays_after, "channel", False),
    (grouped, "none", False), (heads_in_the_batch, "head", False), (one_key_for_all_heads, "head", False),
]  # fmt: skip


@pytest.mark.parametrize(("function", "gate", "made"), SPELLINGS, ids=[f.__name__ for f, _, _ in SPELLINGS])
def test_spelling(function: Function, gate: str, made: bool) -> None:
    """`made`: what the step starts from is the state times something, which is computed before."""
    tensors = given(function)
    writes = function in (in_place, copied)
    report = check(Module(function), tensors, family="linear", sites=1, lower=False, gradients=not writes).report
    (site,) = report.sites
    assert "S[b" in site.notation
    assert ("exp(" in site.notation) == (gate != "none")
    assert site.reason == "engine='tiled' was asked for"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [retained, gated_delta, normalised])
def test_half_precision(function: Function, dtype: torch.dtype) -> None:
    check(Module(function), given(function, dtype), family="linear", sites=1, lower=False)


@pytest.mark.parametrize("function", [in_place, copied])
def test_a_cache_is_as_eager_code_leaves_it(function: Function) -> None:
    """After several steps, which all write to the same memory."""
    tensors, mine = given(function), given(function)
    run = rewritten(Module(function), engine="tiled", require=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(*mine), function(*tensors))
            torch.testing.assert_close(mine[3], tensors[3])


def read_before_and_after(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """Views of the cache are read between writes and after them."""
    seen = state.transpose(2, 3)
    before = seen.sum(2)
    state.mul_(slope[:, None, None])
    between = seen.sum(2)
    state.add_(outer(k, v))
    out = read(q, state)
    state[:, 0] = 1
    return out, before, between, seen.sum(2), read(k, state), state


def shared(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The value that is written is itself changed afterwards."""
    new = state * slope[:, None, None] + outer(k, v)
    state.copy_(new)
    new.mul_(2)
    return read(q, state), new


@pytest.mark.parametrize("function", [read_before_and_after, shared])
def test_what_is_written_between_is_seen(function: Function) -> None:
    tensors, mine = given(function), given(function)
    run = rewritten(Module(function), engine="tiled")
    with torch.no_grad():
        torch.testing.assert_close(run(*mine), function(*tensors))
        torch.testing.assert_close(mine, tensors)


# ---------------------------------------------------------------------------------------------------- near misses


def not_kept(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    return read(q, state + outer(k, v))


def full_rank(q: Tensor, state: Tensor, gates: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    state = state + torch.sin(gates[..., :, None] * values[..., None, :])
    return read(q, state), state


def squashed(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.tanh(state + outer(k, v))
    return read(q, state), state


def asks_the_state(k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What reads the new state is made of it."""
    state = state + outer(k, v)
    return read(torch.tanh(state.sum(-1)), state), state


def looks_up_before_any_factor(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, factor: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """What a factor without a logarithm changes cannot be put into the state before: it is looked up as it was."""
    found = read(total, state)
    state = state * factor[..., None, None] + outer(k, v - found)
    return read(q, state), state


NEAR_MISSES = [not_kept, full_rank, squashed, asks_the_state, looks_up_before_any_factor]


@pytest.mark.parametrize("function", NEAR_MISSES)
def test_near_miss(function: Function) -> None:
    report = check(Module(function), given(function), fused=False, lower=False).report
    assert not any(site.fused for site in report.sites)


# ---------------------------------------------------------------------------------------------------- plans


def planned(device: str, passes: Passes) -> Chosen | Leave:
    form = LinearForm(gate="head", initial=True, final=True)
    q, k, v = (torch.empty(6, 1, 64, device="meta") for _ in range(3))
    sample = Sample(form, q, k, v, torch.empty(6, 1, device="meta"))
    work = LinearWork(6, 6, 1, 1, 64, 64, "head", "step", passes=passes)
    return choose_linear(work, sample, torch.device(device), None, False)


def test_a_step_is_fused_where_its_state_is_read_less_often() -> None:
    fused = planned("cuda", Passes(3, 2))
    assert isinstance(fused, Chosen) and fused.plan.engine == "triton" and fused.plan.schedule == "step"
    assert isinstance(planned("cuda", Passes(3, 4)), Leave)
    assert isinstance(planned("cpu", Passes(3, 2)), Leave)


def sites_of(function: Function) -> list[Passes | None]:
    """What the plan is told of the sites of a function."""
    from unittest.mock import patch

    from refocus import linear_sites

    seen: list[Passes | None] = []

    def choose(work: LinearWork, *rest: object) -> Leave:
        seen.append(work.passes)
        return Leave("seen")

    with patch.object(linear_sites, "choose_linear", choose):
        refocus.explain(Module(function), *given(function))
    return seen


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (retained, Passes(2, 2)),  # a sum, in the kernel that makes the state
        (plain, Passes(3, 2)),  # a product of matrices
        (gated_delta, Passes(4, 2)),
        (any_factor, Passes(3, 4)),  # what it starts from is made first
        (in_place, Passes(3, 4)),  # what it ends with is copied
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_how_often_a_state_goes_through_memory(function: Function, passes: Passes) -> None:
    assert sites_of(function) == [passes]


# ------------------------------------------------------------------------------------------------ generated kernels


def _interpreted() -> None:
    for function, _, _ in SPELLINGS:
        try:
            check(Module(function), given(function), engines=("triton",), family="linear", sites=1, lower=False)
            print(function.__name__, "ok")
        except Exception as problem:
            print(function.__name__, type(problem).__name__, str(problem).replace("\n", " ")[:300])


def test_generated_kernels_under_the_interpreter() -> None:
    """Each spelling through the kernel of a single step; in another process, for the interpreter is switched on when
    Triton is imported."""
    lines = output("tests.test_linear_decoding", interpreted=True).splitlines()
    assert [line.split() for line in lines] == [[f.__name__, "ok"] for f, _, _ in SPELLINGS]


if __name__ == "__main__":
    _interpreted()
