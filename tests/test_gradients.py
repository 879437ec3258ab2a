"""Gradients of regions: our reverse mode and its engines against autograd through the dense float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from refocus import oracle
from refocus.codegen import operator, tiled, tiled_backward
from refocus.codegen.cotangents import why_not_trainable
from refocus.codegen.plan import Plan
from refocus.errors import NeedsGradient
from refocus.ir import Region
from refocus.testing import rewritten
from refocus.tolerances import difference, magnitude
from tests import region_cases as cases

PLAN = Plan("tiled", block_q=32, block_k=16)


def wanted_of(region: Region) -> list[bool]:
    return [o.dtype.startswith(("float", "bfloat")) for o in region.operands]


def reference(
    region: Region, tensors: Sequence[Tensor], sizes: Sequence[int], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The oracle's result and gradients in float64; None for what no gradient reaches."""
    leaves = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = oracle.run(region, leaves, sizes)
    floats = [t for t in leaves if t.requires_grad]
    found = dict(zip(map(id, floats), torch.autograd.grad(out, floats, grad.double(), allow_unused=True)))
    return out, [found.get(id(t)) for t in leaves if t.requires_grad]


def backward(region: Region, plan: Plan, tensors: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> list[Tensor]:
    out, lse = tiled.run_saving(region, plan, tensors, sizes)
    return tiled_backward.run_backward(region, plan, grad, tensors, out, lse, sizes, wanted_of(region))


@pytest.mark.parametrize("name", cases.all_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiled_gradients_are_those_of_the_oracle(name: str, dtype: torch.dtype) -> None:
    region, tensors, sizes = cases.CASES[name](dtype)
    names = [o.name for o, want in zip(region.operands, wanted_of(region)) if want]
    assert why_not_trainable(region, names) is None
    grad = torch.randn(tiled.run(region, PLAN, tensors, sizes).shape, generator=torch.Generator().manual_seed(9))
    grad = grad.to(dtype)
    _, expected = reference(region, tensors, sizes, grad)
    got = backward(region, PLAN, tensors, sizes, grad)
    assert len(got) == len(expected) == len(names)
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    for which, mine, theirs in zip(names, got, expected):
        if theirs is None:
            assert not mine.any(), which
        else:
            assert difference(mine, theirs) <= bound * max(magnitude(theirs), 1.0), which


# ---------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("name", ["alibi", "empty_added", "sinks", "softcap"])
def test_gradcheck_of_the_operator(name: str) -> None:
    region, tensors, sizes = cases.CASES[name](torch.float64, n=9, d=3)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    plan = Plan("tiled", block_q=4, block_k=4)
    assert torch.autograd.gradcheck(lambda *t: operator.call_saving(region, plan, t, sizes), leaves, fast_mode=True)


def test_a_second_derivative_is_an_error() -> None:
    region, tensors, sizes = cases.dense()
    leaves = [t.requires_grad_() for t in tensors]
    out = operator.call_saving(region, PLAN, leaves, sizes)
    with pytest.raises(NeedsGradient, match="second derivative"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_only_what_needs_a_gradient_gets_one() -> None:
    region, tensors, sizes = cases.dense()
    tensors[1].requires_grad_()
    operator.call_saving(region, PLAN, tensors, sizes).sum().backward()
    assert [t.grad is not None for t in tensors] == [False, True, False]


def test_the_operators_pass_pytorchs_own_checks() -> None:
    region, tensors, sizes = cases.additive_bias(n=20, d=4)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(operator.attend_saving, (leaves, sizes, repr(region), repr(PLAN)))


# ---------------------------------------------------------------------------------------------------- models


def trained(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return out, list(grads)


def detached_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.detach().mT).softmax(-1) @ v


def detached_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores + (2 * scores).detach().tanh()).softmax(-1) @ v


def scores_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        bias = (q @ k.mT * 0.5).relu()
    return (q @ k.mT + bias).softmax(-1) @ v


def detached_shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def switched_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v[.., 0] decides which keys count, through a comparison that passes no gradient."""
    return (q @ k.mT).masked_fill(v[:, None, :, 0] > 0.5, -1e9).softmax(-1) @ k


def temperature_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two exponentials on one path: a learned temperature's, before the scores, and the softmax's own."""
    scores = (k * v.mean((0, 2), keepdim=True).exp()) @ q.mT  # [h, j, i]
    weights = torch.exp2((scores - scores.amax(1, keepdim=True).detach()) * math.log2(math.e))
    return torch.einsum("hji,hjd->hid", weights / weights.sum(1, keepdim=True), v)


def one_tensor_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ k + 0 * v


@pytest.mark.parametrize(
    "attend",
    [
        detached_keys,
        detached_scores,
        scores_without_grad,
        detached_shift,
        switched_keys,
        temperature_by_hand,
        one_tensor_twice,
    ],
)
def test_gradients_stop_where_the_model_stops_them(
    attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = torch.randn(3, 2, 20, 8).unbind()
    expected, wanted = trained(attend, *inputs)
    ran: list[str] = []
    monkeypatch.setattr(
        operator, "call_saving", lambda *args, run=operator.call_saving: (ran.append("tiled"), run(*args))[1]
    )
    got, mine = trained(rewritten(attend, engine="tiled", require=True), *inputs)
    assert ran  # nothing would be shown by eager code
    assert difference(got, expected) <= 1e-5
    for a, b in zip(mine, wanted):
        assert a is None if b is None else difference(a, b) <= 1e-4 * magnitude(b)
