"""What an operation computes depends on all of its arguments, those with defaults, too; and so does its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refocus.testing import check

LENGTH = 30


class Attention(nn.Module):
    """Scores above the diagonal are zero, and what is added to them, too: there an activation meets its kink."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.bias = nn.Parameter(torch.zeros(2, 1, LENGTH))
        self.bound = nn.Parameter(torch.zeros(2, 1, LENGTH))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).tril() + self.bias
        return self.change(scores, self.bound).softmax(-1) @ v


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 2, LENGTH, 8, generator=torch.Generator().manual_seed(0)).unbind()
    return q * 1.3, k * 1.3, v


DISTANCE = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)

CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softplus, steeper": lambda s, b: F.softplus(s, beta=3.0),
    "softplus, linear early": lambda s, b: F.softplus(s, threshold=0.5),
    "softplus, both": lambda s, b: F.softplus(s, beta=0.5, threshold=1.0),
    "round to decimals": lambda s, b: s + torch.round(s, decimals=1),
    "round to tens": lambda s, b: s + torch.round(20 * s, decimals=-1),
    "relu6": lambda s, b: F.relu6(s),
    "hardtanh": lambda s, b: F.hardtanh(s, 0.0, 1.0),
    "hardsigmoid": lambda s, b: 3 * F.hardsigmoid(2 * s - 3),
    "hardswish": lambda s, b: F.hardswish(s - 3),
    "clamp at a number": lambda s, b: s.clamp(min=0),
    "clamp at a tensor": lambda s, b: s.clamp(min=b),
    "clamp below a tensor": lambda s, b: torch.clamp_max(s, b),
    "maximum with zeros": lambda s, b: torch.maximum(s, torch.zeros_like(s)),
    "minimum with a number": lambda s, b: torch.minimum(s, torch.zeros((), dtype=s.dtype)),
    "maximum with a tensor": lambda s, b: torch.maximum(s, b),
    "threshold": lambda s, b: F.threshold(s, 0.0, -2.0),
    "hardshrink": lambda s, b: F.hardshrink(s, 0.2) + F.hardshrink(s + 0.3, 0.3),
    "softshrink": lambda s, b: F.softshrink(s, 0.2) + F.softshrink(s - 0.3, 0.3),
    "celu": lambda s, b: F.celu(s, 0.7),
    "a slope for each head": lambda s, b: F.prelu(s, b[:, 0, 3] - 0.5),
    "one slope": lambda s, b: F.prelu(s, b[0, 0, :1] + 0.3),
    "expit": lambda s, b: torch.special.expit(s),
    "logit": lambda s, b: torch.logit(s.sigmoid()),
    "logit of bounded numbers": lambda s, b: torch.logit(s, eps=0.1),
    "remainder of scores": lambda s, b: s.fmod(0.4),
    "float_power": lambda s, b: torch.float_power(s, 2).to(s.dtype),
    "copysign": lambda s, b: torch.copysign(s, b - 0.5) + torch.copysign(torch.ones(()), s),
    "hypot": lambda s, b: torch.hypot(s, b + 0.5),
    "logaddexp": lambda s, b: torch.logaddexp(s, b),
    "logaddexp2": lambda s, b: torch.logaddexp2(s, b),
    "the sign of a zero": lambda s, b: s + torch.copysign(b + 1, -DISTANCE.clamp(0).to(s)),
    "a rounded parameter": lambda s, b: s + torch.round(b - DISTANCE / 3),
    "a rounded parameter of keys": lambda s, b: s + torch.floor(b),
    "the sign of a parameter": lambda s, b: s * torch.sign(b + 1),
    "a step of a parameter": lambda s, b: s + (b > 0).to(s),
    "a detached parameter": lambda s, b: s + (b + DISTANCE).detach(),
    "clamp between equal bounds": lambda s, b: s.clamp(b, b + 0.5 * (DISTANCE > 3)),
    "distances below a tensor": lambda s, b: s + torch.clamp_max(DISTANCE.to(s), b),
    "the smaller of distances and a tensor": lambda s, b: s + torch.minimum(DISTANCE.to(s), b),
    "distances modulo a tensor": lambda s, b: s + torch.remainder(DISTANCE, b + 3.5),
    "the remainder of distances": lambda s, b: s + torch.fmod(DISTANCE, b + 3.5),
    "powers of distances": lambda s, b: s + 0.1 * torch.pow(DISTANCE.clamp(0, 4), b),
    "entries counted from the end": lambda s, b: s + torch.take_along_dim(b, -1 - DISTANCE.abs()[None], -1),
    "bits as numbers": lambda s, b: s + DISTANCE.clamp(0).int().view(torch.float32).to(s),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_results_and_gradients_at_kinks(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    check(Attention(change), tensors(), sites=1, lower=False, gradients=True)


class Buckets(nn.Module):
    """A learned bias for each distance, from an embedding with a row that does not learn."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options
        self.table = nn.Parameter(torch.randn(12, 2, generator=torch.Generator().manual_seed(1)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor | None = None) -> Tensor:
        if bucket is None:
            distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
            bucket = distance.clamp(-1, 10) + 1
        bias = F.embedding(bucket, self.table, padding_idx=0, **self.options)
        return (q @ k.mT * 0.3 + bias.movedim(-1, -3)).softmax(-1) @ v


def test_no_gradient_for_a_padding_row() -> None:
    check(Buckets(), tensors(), sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}], ids=["plain", "scaled"])
def test_gradients_of_rows_that_are_given(options: dict[str, bool]) -> None:
    bucket = torch.randint(0, 12, (2, LENGTH, LENGTH), generator=torch.Generator().manual_seed(2))
    check(Buckets(**options), (*tensors(), bucket), sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_is_normalised_in_a_wider_dtype(dtype: torch.dtype) -> None:
    class Biased(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = (self.bias - DISTANCE.abs()).softmax(-1, dtype=torch.float32)
            return (q @ k.mT * 0.3 + bias.to(q.dtype)).softmax(-1) @ v

    module = Biased(lambda s, b: s).to(dtype)
    check(module, [x.to(dtype) for x in tensors()], sites=1, lower=False, gradients=True)
