"""Zoology's BaseConv: a causal convolution times a projection. It mixes tokens, and is no attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(declined="")


class BaseConv(nn.Module):
    def __init__(self, width: int = 64, kernel: int = 3) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel - 1, groups=width)

    def mix(self, u: Tensor) -> Tensor:
        return self.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)

    def forward(self, u: Tensor) -> Tensor:
        return self.mix(u) * self.projection(u) + u


class Long(BaseConv):
    """A filter as long as the sequence, by FFT."""

    def __init__(self, width: int = 64, length: int = 48) -> None:
        super().__init__(width)
        self.filter = nn.Parameter(torch.randn(width, length) / length)

    def mix(self, u: Tensor) -> Tensor:
        n = u.shape[1]
        spectrum = torch.fft.rfft(u.transpose(1, 2), n=2 * n) * torch.fft.rfft(self.filter, n=2 * n)
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n].transpose(1, 2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BaseConv(), (torch.randn(2, 48, 64),)


VARIANTS = {"long": Variant(lambda: (Long(), (torch.randn(2, 48, 64),)))}
