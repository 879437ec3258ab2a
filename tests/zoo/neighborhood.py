"""Neighbourhood attention in one, two and three dimensions, with dilation, stride and causal axes, as one mask.

The rule is written along each axis on its own: tokens of one dilation group, the window around the centre of the
query's stride group, slid inward at the borders, or the tokens before the query on a causal axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class NeighborhoodAttention(nn.Module):
    def __init__(
        self,
        shape: tuple[int, ...],
        kernel: tuple[int, ...],
        dilation: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
        causal: tuple[bool, ...] | None = None,
        width: int = 32,
        heads: int = 2,
    ) -> None:
        super().__init__()
        rank = len(shape)
        self.shape, self.kernel, self.heads = shape, kernel, heads
        self.dilation, self.stride = dilation or (1,) * rank, stride or (1,) * rank
        self.causal = causal or (False,) * rank
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def coordinates(self, index: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for size in reversed(self.shape):
            out.insert(0, index % size)
            index = index // size
        return out

    def mask(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = torch.ones_like(q_idx * kv_idx, dtype=torch.bool)
        queries, keys = self.coordinates(q_idx), self.coordinates(kv_idx)
        for axis, (q, k) in enumerate(zip(queries, keys)):
            length, kernel = self.shape[axis], self.kernel[axis]
            dilation, stride = self.dilation[axis], self.stride[axis]
            group_q, group_k = q % dilation, k % dilation
            q, k = q // dilation, k // dilation
            size = (length - group_q + dilation - 1) // dilation
            if self.causal[axis]:
                leader = torch.minimum((q // stride) * stride + stride - 1, size - 1)
                inside = (k <= q) & (leader - k < kernel)
            else:
                left, right = kernel // 2, kernel // 2 + (kernel % 2 - 1)
                center = torch.minimum((q // stride) * stride + stride // 2, size - 1)
                center = torch.minimum(center.clamp(min=left), size - 1 - right)
                inside = (center - k <= left) & (k - center <= right)
            result = result & inside & (group_q == group_k)
        return result

    def forward(self, x: Tensor) -> Tensor:
        batch, *_, channels = x.shape
        length = math.prod(self.shape)
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        index = torch.arange(length, device=x.device)
        keep = self.mask(index[:, None], index[None, :])
        attn = (qkv[0] * self.scale) @ qkv[1].transpose(-2, -1)
        attn = attn.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        return (attn @ qkv[2]).transpose(1, 2).reshape(batch, *self.shape, channels)


def _maker(shape: tuple[int, ...], kernel: tuple[int, ...], **options: tuple[int, ...]) -> Variant:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return NeighborhoodAttention(shape, kernel, **options), (torch.randn(2, *shape, 32),)  # type: ignore[arg-type]

    return Variant(build)


make = _maker((96,), (7,)).make

VARIANTS = {
    "even": _maker((96,), (8,)),
    "dilated": _maker((96,), (7,), dilation=(5,)),
    "strided": _maker((96,), (8,), stride=(4,)),
    "causal": _maker((96,), (7,), causal=(True,), dilation=(3,)),
    "strided_causal": _maker((96,), (9,), causal=(True,), stride=(4,)),
    "plane_dilated": _maker((12, 12), (3, 5), dilation=(3, 2)),
    "plane_strided": _maker((12, 12), (5, 4), stride=(2, 4)),
    "plane_causal": _maker((12, 12), (5, 5), causal=(True, False)),
    "space": _maker((6, 5, 6), (3, 3, 5)),
    "space_mixed": _maker((6, 4, 8), (3, 3, 4), causal=(True, False, False), dilation=(1, 1, 2), stride=(2, 1, 1)),
}


def allowed(module: NeighborhoodAttention, x: Tensor) -> Tensor:
    """One loop over the queries of each axis, then every combination of axes."""
    keep = torch.ones(1, 1, dtype=torch.bool)
    for axis, length in enumerate(module.shape):
        kernel, dilation, stride = module.kernel[axis], module.dilation[axis], module.stride[axis]
        line = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            group = list(range(q % dilation, length, dilation))
            at = group.index(q)
            leader = at - at % stride
            if module.causal[axis]:
                last = min(leader + stride - 1, len(group) - 1)
                chosen = [k for k in range(len(group)) if last - kernel < k <= at]
            else:
                center = min(leader + stride // 2, len(group) - 1)
                first = min(max(center - kernel // 2, 0), len(group) - kernel)
                chosen = list(range(first, first + kernel))
            line[q, [group[k] for k in chosen]] = True
        keep = torch.kron(keep, line)
    return keep
