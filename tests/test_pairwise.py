"""Attention whose weights are functions of each pair and not normalised by a softmax: spellings, rows, near misses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check, rewritten
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

TOKENS = 32


def drawn(count: int = 3, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(count)]


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


# ------------------------------------------------------------------------------------------------ spellings of a mask


def filled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT).masked_fill(later(q.shape[2]), 0.0) @ v


def filled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((q @ k.mT).masked_fill(later(q.shape[2]), -math.inf)) @ v


def filled_low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.silu((q @ k.mT).masked_fill(later(q.shape[2]), -1e9)) @ v


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(later(q.shape[2]), -math.inf)
    return F.relu((q @ k.mT) * 0.3 + mask.to(q.dtype)) @ v


def added_low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1.0 - later(q.shape[2]).logical_not().to(q.dtype)) * -1e9
    return torch.einsum("bhij,bhjd->bhid", (q @ k.mT + mask - math.log(q.shape[2])).sigmoid(), v)


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.relu(q @ k.mT).square() * torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).tril()) @ v


def exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp((q @ k.mT * 0.3).masked_fill(later(q.shape[2]), -math.inf)) @ v


def gated_exponential(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is left out overflows by itself."""
    sums = (-20 * g[..., 0].abs()).cumsum(-1)
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(later(q.shape[2]), -math.inf).exp()
    return (F.relu(q @ k.mT) * decay) @ v


CAUSAL = (filled_after, filled_before, filled_low, added, added_low, multiplied, exponential, gated_exponential)


@pytest.mark.parametrize("function", CAUSAL)
def test_causal(function: Function) -> None:
    given = drawn(function.__code__.co_argcount)
    (site,) = check(Module(function), given, family="pairwise", sites=1, lower=False, gradients=True).report.sites
    assert site.mask == "j <= i"


def faint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is filled is small, and no zero: what is added to the fill is seen."""
    scores = (q @ k.mT).masked_fill(later(q.shape[2]), -1e4) + 400 * q[..., :1]
    return torch.sigmoid(scores * 1e-3) @ v


def bounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tanh of a fill is -1."""
    mask = torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype).masked_fill(later(q.shape[2]), -1e9)
    return torch.tanh(q @ k.mT + mask) @ v


@pytest.mark.parametrize("function", [faint, bounded])
def test_fills_that_are_no_zeros_are_no_mask(function: Function) -> None:
    (site,) = check(Module(function), drawn(), family="pairwise", sites=1, lower=False, gradients=True).report.sites
    assert not site.mask


# ------------------------------------------------------------------------------------------------ functions of pairs


def laplace(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * (1 + torch.erf((q @ k.mT / q.shape[2] - math.sqrt(0.5)) * math.sqrt(math.pi)))) @ v


def polynomial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (1 + scores + scores**2 / 2) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (F.relu(q @ k.mT) * torch.sigmoid(r @ k.mT)) @ v


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1].repeat_interleave(3, 1) for x in (k, v))
    return torch.einsum("bhij,bhjd->bihd", F.gelu(torch.einsum("bhid,bhjd->bhij", q, k)), v)


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ F.softplus(k @ q.mT)).mT


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.tanh(q @ k.mT), 0.3, training=False) @ v


def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear in the scores, but with a mask that no linear form has."""
    at = torch.arange(q.shape[2])
    return ((q @ k.mT) * ((at[:, None] - at).abs() <= 3)) @ v


@pytest.mark.parametrize(
    "function", [laplace, polynomial, two_products, shared_heads, turned, dropped, banded], ids=lambda f: f.__name__
)
def test_function(function: Function) -> None:
    given = drawn(function.__code__.co_argcount)
    (site,) = check(Module(function), given, family="pairwise", sites=1, lower=False, gradients=True).report.sites
    assert site.mask == ("abs(i - j) < 4" if function is banded else "")


def by_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.sigmoid(q @ k.mT).tril()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-8)) @ v


def by_large_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.relu(q @ k.mT).masked_fill(later(q.shape[2]), 0.0)
    return torch.einsum("bhij,bhje->bhie", weights / weights.sum(-1, keepdim=True).clamp(min=1.0).sqrt(), v)


def by_sum_of_exponentials(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT * 0.3) * torch.sigmoid(r @ k.mT)
    return (weights / (weights.sum(-1, keepdim=True) + 0.5)) @ v


def by_scaled_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row's own factor is in the sum, and not in the weights."""
    weights = F.relu(q @ k.mT).square()
    total = (weights * q[..., :1].abs()).sum(-1, keepdim=True)
    return (weights / (1 + total)) @ v


@pytest.mark.parametrize("function", [by_sum, by_large_sum, by_sum_of_exponentials, by_scaled_sum])
def test_normaliser(function: Function) -> None:
    given = drawn(function.__code__.co_argcount)
    check(Module(function), given, family="pairwise", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("function", [filled_after, exponential, by_sum, multiplied])
def test_dtypes(function: Function, dtype: torch.dtype) -> None:
    check(Module(function), drawn(dtype=dtype), family="pairwise", sites=1, lower=False)


def test_a_mean_may_be_smaller_than_half_precision_holds() -> None:
    def small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.mT - 9.0).tril() @ v

    given = [x[:1, :1].abs() * scale for x, scale in zip(drawn(tokens=2048, dtype=torch.float16), (0.3, 0.3, 1e-2))]
    check(Module(small), given, family="pairwise", sites=1, lower=False)


# ------------------------------------------------------------------------------------------------ rows


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT).masked_fill(~keep[:, None, None, :], 0.0) @ v


def padded_exponentials(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, -math.inf)
    return torch.exp(q @ k.mT * 0.2 + bias[:, None, None]) @ v


@pytest.mark.parametrize("function", [padded, padded_exponentials])
def test_rows_without_keys_are_zeros(function: Function) -> None:
    keep = torch.arange(TOKENS) < torch.tensor([[0], [20]])
    check(Module(function), (*drawn(), keep), family="pairwise", sites=1, lower=False, gradients=True)


def test_rows_that_a_tensor_empties_are_zeros() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.exp(q @ k.mT * 0.2 + bias) @ v

    bias = torch.randn(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
    bias[0, 0, 3], bias[1, 0, 2, 5] = -math.inf, -math.inf
    report = check(Module(biased), (*drawn(), bias), family="pairwise", sites=1, lower=False).report
    assert report.sites[0].fused
    run = rewritten(Module(biased), engine="tiled")
    leaves, again = ([t.requires_grad_() for t in drawn()] for _ in range(2))
    run(*leaves, bias).square().sum().backward()
    biased(*again, bias).square().sum().backward()
    for mine, theirs in zip(leaves, again):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-4)


def test_what_is_left_out_may_be_no_number() -> None:
    """Memory that nobody has written to, behind the end of a cache."""

    def cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.mT).masked_fill(torch.arange(TOKENS) >= TOKENS - 4, 0.0) @ v

    q, k, v = drawn()
    k[:, :, -4:] = math.nan
    check(Module(cached), (q, k, v), family="pairwise", sites=1, lower=False)


# ------------------------------------------------------------------------------------------------ what is left


class Perceptron(nn.Module):
    """Two layers: weights that are parameters are no keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Receptance(nn.Module):
    """A gate on what exponentials made, and a projection: a product of sigmoids of products, and of exponentials."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(8, 32), nn.Linear(32, 8)
        self.key, self.value = nn.Linear(8, 32), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.exp(self.key(x))
        mixed = (weights * self.value(x)).cumsum(2) / weights.cumsum(2)
        return self.out(torch.sigmoid(self.gate(x)) * mixed + torch.exp(self.gate(x)))


@pytest.mark.parametrize("build", [Perceptron, Receptance])
def test_layers_of_weights_are_no_attention(build: type[nn.Module]) -> None:
    assert not any(site.recognized for site in refocus.explain(build(), drawn(1)[0], engine="tiled").sites)


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.relu(q @ k.mT)
    return weights @ v, weights


def other_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.tanh(q @ k.mT)
    return (weights / weights.abs().sum(-1, keepdim=True).clamp(min=1)) @ v


def sum_of_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.sigmoid(q @ k.mT)
    return (weights / (1 + weights[..., :5].sum(-1, keepdim=True))) @ v


def sum_of_another_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.sigmoid(q @ k.mT)
    return (weights / (1 + weights.sum(-1, keepdim=True).roll(1, 2))) @ v


def sum_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.sigmoid(q @ k.mT)
    return (weights.tril() / (1 + weights.sum(-1, keepdim=True))) @ v


def other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.relu(q @ k.mT)
    return (weights - weights.cumsum(-1)) @ v


NEAR_MISSES = (weights_returned, other_sum, sum_of_some, sum_of_another_row, sum_before_the_mask, other_keys)


@pytest.mark.parametrize("function", NEAR_MISSES)
def test_near_miss(function: Function) -> None:
    sites = check(Module(function), drawn(), fused=False, lower=False).report.sites
    assert sites and not any(site.recognized for site in sites) and all(site.reason for site in sites)


def test_reports_tell_what_is_computed() -> None:
    (site,) = refocus.explain(Module(filled_after), *drawn(), engine="tiled").sites
    assert "W[b,h,i,j] = sigmoid(" in site.notation and "mean_j(W | mask) . v[b,h,j,e]" in site.notation
    assert "n[b,h,i]   = number_j(mask)" in site.notation
