"""Linear attention is found by what it computes: near misses are left with their reason, plans follow the sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus import linear_ir
from refocus.assumptions import model_buffers
from refocus.capture import capture
from refocus.close_linear import LinearSite
from refocus.facts import gather_facts
from refocus.recognize import recognize
from refocus.recognize_linear import recognize_linear
from refocus.testing import CheckFailed, check
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

LENGTH = 48


def inputs(length: int = LENGTH, heads: int = 3, width: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, and log gates, one for each head and one for each channel; weights are positive."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v, gate = (torch.rand(2, heads, length, width, generator=drawn).to(dtype) for _ in range(4))
    return [q, k, v, -gate[..., 0], -gate]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def lower(n: int, diagonal: int = 0) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril(diagonal)


def index(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)[None]


# ---------------------------------------------------------------------------------------------------- near misses


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    return (weights * weights).tril() @ v


def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(scores(q, k)).tril() @ v


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) + 1).tril() @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = index(q.shape[2])
    return scores(q, k).masked_fill((distance < 0) | (distance > 5), 0) @ v


def quadratic_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * torch.exp(-0.01 * index(q.shape[2]) ** 2)).tril() @ v


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * torch.exp(-0.1 * index(q.shape[2]).abs())) @ v


def unmatched_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(-1)
    return (scores(q, k) * torch.exp(c[..., :, None] - 2 * c[..., None, :])).tril() @ v


def other_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    return weights.tril() / weights.sum(-1, keepdim=True) @ v


def column_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights / weights.sum(-2, keepdim=True) @ v


def pair_bias(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (scores(q, k) * torch.sigmoid(g[..., :, None] * g[..., None, :])).tril() @ v


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights @ v + weights.amax(-1, keepdim=True)


def fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k[:, :, :-4]).tril() @ v[:, :, :-4]


NEAR_MISSES = [
    (quadratic_decay, "not linear in the distance"),
    (both_ways, "without a causal mask"),
    (unmatched_gates, "no difference of gates"),
    (other_sum, "a sum of other weights"),
    (column_sum, "depends on the key"),
    (read_twice, "read elsewhere"),
    (fewer_keys, "not as many keys as queries"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    given = inputs()[: function.__code__.co_argcount]
    report = check(Module(function), given, fused=False, sites=1, lower=False).report
    assert reason in report.sites[0].reason


@pytest.mark.parametrize("function", [squared, relu, shifted, windowed, pair_bias])
def test_weights_that_do_not_come_apart_are_those_of_pairs(function: Function) -> None:
    given = inputs()[: function.__code__.co_argcount]
    check(Module(function), given, family="pairwise", sites=1, lower=False)


class Projections(nn.Module):
    """Products with parameters, one after the other: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        low_rank = x @ self.down @ self.up
        mixed = torch.einsum("bhnd,hde->bhne", torch.einsum("bhnd,hde->bhne", x, self.experts), self.experts)
        return low_rank + mixed


def test_projections_are_no_attention() -> None:
    check(Projections(), inputs()[:1], fused=False, sites=0, lower=False)


class Experts(Projections):
    """Weights of the experts that tokens chose."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.mean((1, 2, 3)).gt(0).long() + 1
        up, down = self.experts[chosen], self.experts[chosen - 1]
        return torch.relu(x.flatten(1, 2) @ up.transpose(1, 2)) @ down


def test_weights_of_a_choice_are_no_keys() -> None:
    check(Experts(), inputs()[:1], fused=False, sites=0, lower=False)


class Features(nn.Module):
    """Features that parameters name: a softmax over them for each query, and one over all positions for each of them.
    Each of the two might be an attention with parameters for keys, or for queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).softmax(-1), self.k(x).softmax(1)
        return q @ (k.mT @ self.v(x))


def test_softmaxes_of_features_are_those_of_linear_attention() -> None:
    check(Features(), (torch.randn(2, 40, 16),), family="linear", sites=1, lower=False, gradients=True)


class Pooled(Features):
    """Nothing is multiplied with it: an attention whose queries are parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).softmax(1).mT @ self.v(x)


def test_queries_may_be_parameters() -> None:
    check(Pooled(), (torch.randn(2, 40, 16),), family="softmax", sites=1, lower=False, gradients=True)


def test_matrices_that_are_handed_in_may_be_weights() -> None:
    """The middle of a feed-forward, where the graph broke before and after it."""
    matrices = [torch.randn(n, 8) for n in (48, 32, 32)]
    check(Module(lambda x, up, down: (x @ up.mT) @ down), matrices, fused=False, sites=0, lower=False)
    check(Module(lambda x, up, down: torch.relu(x @ up.mT) @ down), matrices, fused=False, sites=0, lower=False)
    # What is computed from tokens is none.
    projected = Module(lambda x, w: (torch.relu(x @ w) @ torch.relu(x @ w.mT).mT) @ (x @ w))
    check(projected, [torch.randn(48, 8), torch.randn(8, 8)], sites=1, lower=False)


def test_an_inverse_by_iteration_is_no_attention() -> None:
    """Its products are links of one chain: what they are multiplied with, they are made of."""

    def inverse(x: Tensor) -> Tensor:
        matrix = torch.softmax(x @ x.mT, -1)
        found, identity = matrix.mT / matrix.sum(-2).max(), torch.eye(48)
        for _ in range(3):
            step = matrix @ found
            found = 0.25 * found @ (13 * identity - step @ (15 * identity - step @ (7 * identity - step)))
        return found

    check(Module(inverse), inputs()[:1], fused=False, sites=1, lower=False)  # the softmax, whose weights are no values'


def test_a_softmax_in_parts_is_one_site() -> None:
    """It is reported where it is left alone, and not as a weight that is not linear for each of its parts."""

    def parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(scores(q, k), -1)
        return weights[..., :16] @ v[..., :16, :] + weights[..., 16:] @ v[..., 16:, :], weights

    report = check(Module(parts), inputs()[:3], fused=False, sites=1, lower=False).report
    assert "read elsewhere" in report.sites[0].reason


# ---------------------------------------------------------------------------------------------------- decays


def test_a_difference_that_the_mask_decides() -> None:
    """Differences of sums are cut to a triangle before they are exponentiated, and after."""

    def cut(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        c = g.cumsum(-1)
        return scores(q, k) * (c[..., :, None] - c[..., None, :]).tril().exp().tril() @ v

    (site,) = check(Module(cut), inputs()[:4], family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "gate[b,h,t]" in site.notation


# ---------------------------------------------------------------------------------------------------- spellings


def strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).tril(-1) @ v


def by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(lower(q.shape[2]), scores(q, k), torch.zeros(())) @ v


def by_multiplication(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * scores(q, k) * lower(q.shape[2]).float()) @ v


def by_additive_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    bias = torch.zeros(n, n).masked_fill(~lower(n), float("-inf"))
    return (scores(q, k) * torch.exp(bias - 0.1 * index(n))) @ v


def two_decays(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    c = g.cumsum(-1)
    between = c[..., :, None] - c[..., None, :] - 0.05 * index(q.shape[2])
    decay = between.masked_fill(~lower(q.shape[2]), float("-inf")).exp()
    return (scores(q, k) * decay).to(v.dtype) @ v


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * torch.exp2(-0.25 * index(q.shape[2]))).tril() @ v


def signed_powers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    base = g.mean((0, 2)) + 0.4  # of both signs, and one exactly zero
    base = (base - base[0])[:, None, None]
    return (scores(q, k) * base ** index(q.shape[2]).clamp(min=0)).tril() @ v


def by_sums_beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    total = weights.sum(-1)
    return (weights @ v) / torch.maximum(total.abs(), torch.ones(())).unsqueeze(-1)


def twice_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return torch.einsum("bhij,bhje,bhi->bhie", weights, v, q.sum(-1))


def padded(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    keep = (g > -0.8)[..., None, :]
    weights = (scores(q, k) * keep).tril()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1].repeat_interleave(3, dim=1) for x in (k, v))
    return scores(q, k).tril() @ v


def channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gd: Tensor) -> Tensor:
    c = gd.cumsum(2)
    between = (c[:, :, :, None] - c[:, :, None]).masked_fill(~lower(q.shape[2], -1)[..., None], float("-inf"))
    return torch.einsum("bhid,bhjd,bhijd->bhij", q, k, between.exp()) @ v


def pushed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The state before a position is that after the one before it, pushed on by zeros in front."""
    states = torch.einsum("bhjd,bhje->bhjde", k, v).cumsum(2)
    sums = torch.nn.functional.pad(k.cumsum(2), (0, 0, 1, 0))[:, :, :-1]
    before = torch.nn.functional.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.einsum("bhid,bhide->bhie", q, before) / (torch.einsum("bhid,bhid->bhi", q, sums)[..., None] + 1e-6)


def pushed_by_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.einsum("bhjd,bhje->bhjde", k, v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    return torch.einsum("bhid,bhide->bhie", q, before)


SPELLINGS: list[tuple[Function, str, str]] = [
    (strict, "none", "j < i"), (by_where, "none", "j <= i"), (by_multiplication, "none", "j <= i"),
    (by_additive_infinity, "head", "j <= i"), (two_decays, "head", "j <= i"), (base_two, "head", "j <= i"),
    (signed_powers, "head", "j <= i"), (by_sums_beside, "none", "j <= i"), (twice_normalised, "none", "j <= i"),
    (padded, "none", "j <= i"), (grouped, "none", "j <= i"), (channels, "channel", "j < i"),
    (pushed, "none", "j < i"), (pushed_by_zeros, "none", "j < i"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "gate", "mask"), SPELLINGS, ids=[f.__name__ for f, _, _ in SPELLINGS])
def test_spelling(function: Function, gate: str, mask: str) -> None:
    given = inputs()[: function.__code__.co_argcount]
    found = check(
        Module(function), given, family="linear", sites=1, lower=False, gradients=function is not signed_powers
    )
    assert found.report.sites[0].mask == mask
    assert region_of(function, given).gate == gate


def region_of(function: Function, given: list[Tensor]) -> linear_ir.LinearRegion:
    regions = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Function:
        traced = capture(gm)
        facts = gather_facts(traced, model_buffers(traced.graph.find_nodes(op="placeholder"), example_inputs))
        regions.extend(x.region for x in recognize_linear(facts, recognize(facts)) if isinstance(x, LinearSite))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*given)
    (region,) = regions
    return region


def test_a_region_is_its_text() -> None:
    region = region_of(two_decays, inputs()[:4])
    assert linear_ir.parse(repr(region)) == region
    assert linear_ir.notation(region).splitlines() == [
        "W[b,h,i,j] = (sum_d q[b,h,i,d] * k[b,h,j,d]) * exp(sum_{j<t<=i} gate[b,h,t])",
        "mask       = j <= i",
        "O[b,h,i,e] = W . v[b,h,j,e]",
    ]


def test_equal_spellings_have_equal_regions() -> None:
    given = inputs()[:3]
    assert region_of(by_where, given) == region_of(by_multiplication, given)
    assert region_of(base_two, given) == region_of(by_additive_infinity, given)


# ---------------------------------------------------------------------------------------------------- plans


def test_short_sequences_stay_as_they_are() -> None:
    (site,) = refocus.explain(Module(by_where), *inputs()[:3]).sites
    assert site.recognized and not site.fused
    assert "no slower" in site.reason


def test_long_sequences_run_in_chunks() -> None:
    (site,) = refocus.explain(Module(by_where), *inputs(2048)[:3]).sites
    assert site.fused and "times faster" in site.reason
    assert site.before is not None and site.after is not None
    assert site.after.bytes < site.before.bytes / 50


def test_what_is_linear_already_stays() -> None:
    def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-1, -2) @ v)

    (site,) = refocus.explain(Module(keys_first), *inputs(2048)[:3]).sites
    assert site.recognized and not site.fused
    assert "linear in the length already" in site.reason


def test_three_matrices_are_left_in_their_order() -> None:
    """A bilinear transform: nothing is a key axis more than any other, and no order is cheaper."""
    given = [torch.rand(2, 3, 16, 16) for _ in range(3)]
    (site,) = refocus.explain(Module(lambda p, x, q: p @ x @ q), *given).sites
    assert not site.fused and "a product of three matrices" in site.reason


@pytest.mark.parametrize("engine", ["cpp", "sdpa"])
def test_engines_without_linear_attention_say_so(engine: str) -> None:
    (site,) = refocus.explain(Module(by_where), *inputs()[:3], engine=engine).sites
    assert not site.fused and "no linear attention" in site.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("function", [by_where, two_decays, by_sums_beside, twice_normalised])
def test_half_precision(function: Function, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype)[: function.__code__.co_argcount]
    check(Module(function), given, family="linear", lower=False, gradients=True)


@pytest.mark.parametrize("function", [by_where, by_sums_beside, base_two, two_decays, channels])
def test_symbolic_lengths(function: Function) -> None:
    run = refocus.optimize(Module(function), engine="tiled", dynamic=True, require=True)
    with torch.no_grad():
        for length in (48, 131):
            given = inputs(length)[: function.__code__.co_argcount]
            torch.testing.assert_close(run(*given), function(*given), atol=1e-4, rtol=1e-5)


def test_what_is_quadratic_is_known_for_symbolic_lengths() -> None:
    (site,) = refocus.explain(Module(base_two), *inputs(2048)[:3]).sites
    run = refocus.optimize(Module(base_two), dynamic=True, require=True)  # an error, unless it is planned in chunks
    with torch.no_grad():
        run(*inputs(2048)[:3])
    assert site.fused


def test_all_pairs_are_never_stored() -> None:
    """At 1024 positions and 3 heads of 8, the weights are 128 times as large as any operand."""
    check(Module(two_decays), inputs(1024)[:4], memory_share=0.15, lower=False)


def test_an_in_place_write_to_what_is_read() -> None:
    def writes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v + 1
        weights = scores(q, k).tril()
        k.mul_(2.0)
        return weights @ v

    try:
        check(Module(writes), inputs()[:3], lower=False)
    except CheckFailed as problem:
        assert "written in place" in str(problem)


@pytest.mark.slow
@pytest.mark.parametrize("function", [two_decays, twice_normalised, channels])
def test_through_inductor(function: Function) -> None:
    given = inputs()[: function.__code__.co_argcount]
    check(Module(function), given, family="linear", gradients=True)


@pytest.mark.parametrize("tokens", [37, 4], ids=["told apart", "as many as heads"])
def test_sums_in_another_order_than_the_result(tokens: int) -> None:
    """Heads last in the result and first in the sums: which dimension is which, sizes need not tell."""

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.einsum("bjdh,bidh->bhji", k, q).triu()
            return torch.einsum("bhji,bjdh->bidh", weights, v) / weights.sum(2).transpose(1, 2)[:, :, None]

    inputs = torch.rand(3, 2, tokens, 6, 4).add(0.1).unbind()
    (site,) = check(Attention(), inputs, lower=False, gradients=True).report.sites
    assert site.family == "linear" and site.fused


def test_second_length_is_fused() -> None:
    """Dynamo gives queries and keys a length each from the second call on. A graph is for equal ones where they are."""
    reports: list[refocus.Report] = []
    run = refocus.optimize(positive_weights, engine="tiled", report=reports.append)
    for lengths in ((48, 48), (80, 80), (67, 67), (80, 48), (48, 80)):
        q, k, v = (inputs(n)[x] for x, n in enumerate((lengths[0], lengths[1], lengths[1])))
        torch.testing.assert_close(run(q, k, v), positive_weights(q, k, v))
    assert [r.sites[0].fused for r in reports] == [True, True, False]
    assert "not as many keys as queries" in reports[2].sites[0].reason


def positive_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v
