"""TransNeXt: one softmax over nine neighbours and all pooled tokens, and a learned weight added after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class AggregatedAttention(nn.Module):
    def __init__(self, dim: int = 48, side: int = 8, heads: int = 2, window: int = 3, pool: int = 4) -> None:
        super().__init__()
        self.heads, self.head, self.window, self.local_len, self.pool = heads, dim // heads, window, window**2, pool
        self.side = side
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 3.0))
        self.query_embedding = nn.Parameter(torch.randn(heads, 1, self.head) * 0.02)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj, self.sr, self.norm = nn.Linear(dim, dim), nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.randn(heads, self.local_len) * 0.5)
        self.cpb = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads))
        self.learnable_tokens = nn.Parameter(torch.randn(heads, self.head, self.local_len) * 0.1)
        self.learnable_bias = nn.Parameter(torch.randn(heads, 1, self.local_len) * 0.1)
        along, coarse = torch.arange(side), torch.arange(pool) * (side // pool) + (side // pool - 1) / 2
        dy, dx = along[:, None] - coarse, along[:, None] - coarse
        offsets = torch.stack(
            (dy[:, None, :, None].expand(side, side, pool, pool), dx[None, :, None, :].expand(side, side, pool, pool)),
            -1,
        )
        offsets = offsets.sign() * (offsets.abs() + 1).log2()
        table, index = torch.unique(offsets.view(-1, 2), return_inverse=True, dim=0)
        self.register_buffer("relative_coords_table", table)
        self.register_buffer("relative_pos_index", index)
        ones = torch.ones(1, 1, side, side)
        inside = nn.functional.unfold(ones, window, padding=window // 2).view(self.local_len, side * side).t() > 0
        self.register_buffer("padding_mask", ~inside)
        self.register_buffer("seq_length_scale", torch.log(inside.sum(-1, keepdim=True) + float(pool**2)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        heads, head, side = self.heads, self.head, self.side
        q_norm = nn.functional.normalize(self.q(x).reshape(b, n, heads, head).permute(0, 2, 1, 3), dim=-1)
        scale: Tensor = self.seq_length_scale  # type: ignore[assignment]
        q_scaled = (q_norm + self.query_embedding) * nn.functional.softplus(self.temperature) * scale
        k_local, v_local = self.kv(x).chunk(2, dim=-1)
        k_local = nn.functional.normalize(k_local.reshape(b, n, heads, head), dim=-1).reshape(b, n, -1)
        kv_local = torch.cat([k_local, v_local], dim=-1).permute(0, 2, 1).reshape(b, -1, side, side)
        kv_local = nn.functional.unfold(kv_local, kernel_size=self.window, padding=self.window // 2, stride=1)
        k_local, v_local = (
            kv_local.reshape(b, 2 * heads, head, self.local_len, n).permute(0, 1, 4, 2, 3).chunk(2, dim=1)
        )
        attn_local = (q_scaled.unsqueeze(-2) @ k_local).squeeze(-2) + self.relative_pos_bias_local.unsqueeze(1)
        attn_local = attn_local.masked_fill(self.padding_mask, float("-inf"))
        x_ = nn.functional.gelu(self.sr(x.permute(0, 2, 1).reshape(b, -1, side, side)))
        x_ = nn.functional.adaptive_avg_pool2d(x_, self.pool).reshape(b, c, -1).permute(0, 2, 1)
        kv_pool = self.kv(self.norm(x_)).reshape(b, -1, 2 * heads, head).permute(0, 2, 1, 3)
        k_pool, v_pool = kv_pool.chunk(2, dim=1)
        index: Tensor = self.relative_pos_index  # type: ignore[assignment]
        bias = self.cpb(self.relative_coords_table.to(x.dtype)).transpose(0, 1)[:, index]  # type: ignore[operator]
        bias = bias.view(-1, n, self.pool**2)
        attn_pool = q_scaled @ nn.functional.normalize(k_pool, dim=-1).transpose(-2, -1) + bias
        attn = torch.cat([attn_local, attn_pool], dim=-1).softmax(dim=-1)
        attn_local, attn_pool = torch.split(attn, [self.local_len, self.pool**2], dim=-1)
        attn_local = (q_norm @ self.learnable_tokens) + self.learnable_bias + attn_local
        x_local = (attn_local.unsqueeze(-2) @ v_local.transpose(-2, -1)).squeeze(-2)
        out = (x_local + attn_pool @ v_pool).transpose(1, 2).reshape(b, n, c)
        return self.proj(out)


class Joined(AggregatedAttention):
    """One list of keys and one of values for each query; the learned weight has a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        heads, side, w = self.heads, self.side, self.window
        q_norm = nn.functional.normalize(self.q(x).unflatten(-1, (heads, -1)), dim=-1)
        scale: Tensor = self.seq_length_scale  # type: ignore[assignment]
        gain = nn.functional.softplus(self.temperature[:, 0, 0])[:, None]
        q = (q_norm + self.query_embedding[:, 0]) * gain * scale[:, :, None]
        k, v = self.kv(x).view(b, side, side, 2, heads, -1).unbind(3)
        k = nn.functional.normalize(k, dim=-1)
        near = []
        for t in (k, v):
            padded = nn.functional.pad(t, (0, 0, 0, 0, w // 2, w // 2, w // 2, w // 2))
            near.append(padded.unfold(1, w, 1).unfold(2, w, 1).flatten(-2).flatten(1, 2))  # b n h d 9
        x_ = nn.functional.gelu(self.sr(x.transpose(1, 2).unflatten(2, (side, side))))
        x_ = self.norm(nn.functional.adaptive_avg_pool2d(x_, self.pool).flatten(2).transpose(1, 2))
        k_pool, v_pool = self.kv(x_).unflatten(-1, (2, heads, -1)).unbind(2)  # b p h d
        index: Tensor = self.relative_pos_index  # type: ignore[assignment]
        bias = self.cpb(self.relative_coords_table.to(x.dtype))[index].view(n, -1, heads)  # type: ignore[operator]
        scores = torch.einsum("bnhd,bnhdj->bnhj", q, near[0]) + self.relative_pos_bias_local
        scores = scores.masked_fill(self.padding_mask[:, None], float("-inf"))  # type: ignore[index]
        pooled = torch.einsum("bnhd,bphd->bnhp", q, nn.functional.normalize(k_pool, dim=-1)) + bias.transpose(1, 2)
        probs = torch.cat([scores, pooled], -1).softmax(-1)
        values = torch.cat([near[1], v_pool.permute(0, 2, 3, 1)[:, None].expand(-1, n, -1, -1, -1)], -1)
        out = torch.einsum("bnhj,bnhdj->bnhd", probs, values)
        extra = torch.einsum("bnhd,hdj->bnhj", q_norm, self.learnable_tokens) + self.learnable_bias[:, 0]
        out = out + torch.einsum("bnhj,bnhdj->bnhd", extra, near[1])
        return self.proj(out.flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return AggregatedAttention(), (torch.randn(2, 64, 48),)


VARIANTS = {"joined": Variant(lambda: (Joined(), (torch.randn(2, 64, 48),)))}
