"""Rows whose keys are all taken away by -inf in a tensor that is added: zeros where the model makes zeros of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check, rewritten
from tests.linear_cases import Function, Module

TOKENS = 20


def inputs() -> tuple[Tensor, ...]:
    drawn = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 1, TOKENS, TOKENS, generator=drawn)
    bias[0, 0, 3], bias[1, 0, 2, 5] = -math.inf, -math.inf
    return (*(torch.randn(2, 3, TOKENS, 8, generator=drawn) for _ in range(3)), bias)


def called(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def called_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(later, -math.inf))


def mended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.nan_to_num((q @ k.mT + bias).softmax(-1)) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (q @ k.mT + bias).softmax(-1)
    return torch.where(weights.isnan(), 0.0, weights) @ v


@pytest.mark.parametrize("engine", ["tiled", "cpp", "sdpa"])
@pytest.mark.parametrize("function", [called, called_causal, mended, chosen])
def test_rows_are_zeros(function: Function, engine: str) -> None:
    given = inputs()
    assert not function(*given)[0, :, 3].any()
    check(Module(function), given, engines=(engine,), sites=1, lower=False)


@pytest.mark.parametrize("function", [called, called_causal])
def test_gradients(function: Function) -> None:
    *given, bias = inputs()
    run = rewritten(Module(function), engine="tiled", require=True)
    leaves, again = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    for attend, tensors in ((run, leaves), (function, again)):
        attend(*tensors, bias).square().sum().backward()
    for mine, theirs in zip(leaves, again):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_without_such_a_softmax_they_are_no_numbers() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    given = inputs()
    run = rewritten(Module(plain), engine="tiled", require=True)
    torch.testing.assert_close(run(*given), plain(*given), equal_nan=True)
