"""OverLoCK's ContMix: kernels of pixels are linear maps of their affinities to pooled tokens, not products with their
neighbours' keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

# The weights of a neighbour come from a linear map over all pooled tokens: no key of its own meets the query.
EXPECT = Expect(declined="")


class ContMix(nn.Module):
    def __init__(
        self, dim: int = 32, side: int = 8, kernel: int = 5, small: int = 3, pool: int = 4, heads: int = 2
    ) -> None:
        super().__init__()
        self.side, self.kernels, self.pool, self.heads = side, (small, kernel), pool, heads
        self.scale = (dim // heads) ** -0.5
        self.to_q, self.to_k = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.mix = nn.Conv2d(pool**2, small**2 + kernel**2, 1)
        self.biases = nn.ParameterList(torch.randn(heads // 2 or 1, 2 * k - 1, 2 * k - 1) for k in self.kernels)
        self.proj = nn.Conv2d(dim, dim, 1)

    def window(self, x: Tensor, kernel: int) -> Tensor:
        """(.., side, side, kernel * kernel, d) of the neighbourhoods, slid inward at the borders."""
        start = (torch.arange(self.side, device=x.device) - kernel // 2).clamp(0, self.side - kernel)
        near = start[:, None] + torch.arange(kernel, device=x.device)
        return x[:, :, :, near][..., near].permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.to_q(x).view(b, self.heads, -1, h * w) * self.scale
        k = nn.functional.adaptive_avg_pool2d(self.to_k(context), self.pool).view(b, self.heads, -1, self.pool**2)
        weight = torch.einsum("b g c n, b g c l -> b g l n", q, k).reshape(b * self.heads, -1, h, w)
        weight = self.mix(weight).view(b, self.heads, -1, h, w).permute(0, 1, 3, 4, 2)
        outs = []
        values = x.view(b, 2, self.heads, -1, h, w)
        small = self.kernels[0] ** 2
        for part, kernel, v in zip(weight.split((small, self.kernels[1] ** 2), -1), self.kernels, values.unbind(1)):
            outs.append(torch.einsum("bhyxj,bhyxjd->bhdyx", part.softmax(-1), self.window(v, kernel)))
        return self.proj(torch.cat(outs, 1).reshape(b, c, h, w))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ContMix(), (torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8))
