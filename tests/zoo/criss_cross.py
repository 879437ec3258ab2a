"""CCNet: one softmax over a pixel's column and row together, the two score blocks concatenated and split again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect()


class CrissCrossAttention(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(dim, dim // 4, 1)
        self.key_conv = nn.Conv2d(dim, dim // 4, 1)
        self.value_conv = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.size()
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        q_h = q.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h).permute(0, 2, 1)
        q_w = q.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w).permute(0, 2, 1)
        k_h, k_w = (
            k.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h),
            k.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w),
        )
        v_h, v_w = (
            v.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h),
            v.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w),
        )
        infinity = torch.tensor(float("inf"), device=x.device, dtype=x.dtype)
        diagonal = -torch.diag(infinity.repeat(h), 0).unsqueeze(0).repeat(b * w, 1, 1)
        energy_h = (torch.bmm(q_h, k_h) + diagonal).view(b, w, h, h).permute(0, 2, 1, 3)
        energy_w = torch.bmm(q_w, k_w).view(b, h, w, w)
        concat = nn.functional.softmax(torch.cat([energy_h, energy_w], 3), dim=3)
        att_h = concat[:, :, :, 0:h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        att_w = concat[:, :, :, h : h + w].contiguous().view(b * h, w, w)
        out_h = torch.bmm(v_h, att_h.permute(0, 2, 1)).view(b, w, -1, h).permute(0, 2, 3, 1)
        out_w = torch.bmm(v_w, att_w.permute(0, 2, 1)).view(b, h, -1, w).permute(0, 2, 1, 3)
        return self.gamma * (out_h + out_w) + x


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CrissCrossAttention(), (torch.randn(2, 32, 10, 12),)
