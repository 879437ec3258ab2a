"""DeBERTa v2: content-to-position and position-to-content scores gathered by a clamped log bucket of the distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=10 / 36)


def log_bucket(relative: Tensor, bucket_size: int, max_position: int) -> Tensor:
    sign = torch.sign(relative)
    mid = bucket_size // 2
    near = (relative < mid) & (relative > -mid)
    distance = torch.where(near, torch.tensor(mid - 1).type_as(relative), torch.abs(relative))
    far = torch.ceil(torch.log(distance / mid) / torch.log(torch.tensor((max_position - 1) / mid)) * (mid - 1)) + mid
    return torch.where(distance <= mid, relative.type_as(far), far * sign)


class DisentangledSelfAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, buckets: int = 32, max_position: int = 96) -> None:
        super().__init__()
        self.heads, self.size, self.buckets, self.max_position = heads, hidden // heads, buckets, max_position
        self.query_proj = nn.Linear(hidden, hidden)
        self.key_proj = nn.Linear(hidden, hidden)
        self.value_proj = nn.Linear(hidden, hidden)
        self.rel_embeddings = nn.Embedding(2 * buckets, hidden)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        x = x.view((*x.size()[:-1], self.heads, -1))
        return x.permute(0, 2, 1, 3).contiguous().view(-1, x.size(1), x.size(-1))

    def relative_position(self, rows: int, columns: int, device: torch.device) -> Tensor:
        relative = torch.arange(0, rows, device=device)[:, None] - torch.arange(0, columns, device=device)[None, :]
        return log_bucket(relative, self.buckets, self.max_position).to(torch.long)[:rows, :].unsqueeze(0)

    def disentangled_bias(self, query: Tensor, key: Tensor, relative: Tensor, scale_factor: int) -> Tensor:
        span, copies = self.buckets, query.size(0) // self.heads
        relative = relative.unsqueeze(1)
        table = self.rel_embeddings.weight[0 : span * 2, :].unsqueeze(0)
        pos_query = self.transpose_for_scores(self.query_proj(table)).repeat(copies, 1, 1)
        pos_key = self.transpose_for_scores(self.key_proj(table)).repeat(copies, 1, 1)
        scale = torch.sqrt(torch.tensor(pos_key.size(-1), dtype=torch.float) * scale_factor)
        c2p = torch.bmm(query, pos_key.transpose(-1, -2))
        c2p_pos = torch.clamp(relative + span, 0, span * 2 - 1)
        index = c2p_pos.squeeze(0).expand([query.size(0), query.size(1), key.size(1)])
        score = torch.gather(c2p, dim=-1, index=index) / scale.to(dtype=c2p.dtype)
        scale = torch.sqrt(torch.tensor(pos_query.size(-1), dtype=torch.float) * scale_factor)
        p2c = torch.bmm(key, pos_query.transpose(-1, -2))
        p2c_pos = torch.clamp(-relative + span, 0, span * 2 - 1)
        index = p2c_pos.squeeze(0).expand([query.size(0), key.size(1), key.size(1)])
        score += torch.gather(p2c, dim=-1, index=index).transpose(-1, -2) / scale.to(dtype=p2c.dtype)
        return score

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        query = self.transpose_for_scores(self.query_proj(x))
        key = self.transpose_for_scores(self.key_proj(x))
        value = self.transpose_for_scores(self.value_proj(x))
        extended = attention_mask.unsqueeze(1).unsqueeze(2)
        extended = extended * extended.squeeze(-2).unsqueeze(-1)
        scale = torch.sqrt(torch.tensor(query.size(-1), dtype=torch.float) * 3)
        scores = torch.bmm(query, key.transpose(-1, -2) / scale.to(dtype=query.dtype))
        relative = self.relative_position(x.size(1), x.size(1), x.device)
        scores = scores + self.disentangled_bias(query, key, relative, 3)
        scores = scores.view(-1, self.heads, scores.size(-2), scores.size(-1))
        scores = scores.masked_fill(~(extended.bool()), torch.finfo(query.dtype).min)
        probs = nn.functional.softmax(scores, dim=-1)
        context = torch.bmm(probs.view(-1, probs.size(-2), probs.size(-1)), value)
        context = context.view(-1, self.heads, context.size(-2), context.size(-1)).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], -1))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    mask = torch.ones(2, 96, dtype=torch.long)
    mask[1, 64:] = 0
    return DisentangledSelfAttention(), (torch.randn(2, 96, 64), mask)


def allowed(module: nn.Module, x: Tensor, attention_mask: Tensor) -> Tensor:
    keep = attention_mask.bool()
    return keep[:, None, None, :] & keep[:, None, :, None]


def reference(module: DisentangledSelfAttention, x: Tensor, attention_mask: Tensor) -> Tensor:
    """x_ij = (q_i.k_j + q_i.kr[i - j] + k_j.qr[i - j]) / sqrt(3 d), the distance bucketed and clamped."""
    batch, length, heads, span, mid = x.shape[0], x.shape[1], module.heads, module.buckets, module.buckets // 2
    buckets = torch.zeros(length, length, dtype=torch.long)
    for i in range(length):
        for j in range(length):
            gap = abs(i - j)
            far = gap
            if gap > mid:
                far = math.ceil(math.log(gap / mid) / math.log((module.max_position - 1) / mid) * (mid - 1)) + mid
            buckets[i, j] = min(max((far if i >= j else -far) + span, 0), 2 * span - 1)
    q, k, v = (p(x).view(batch, length, heads, -1) for p in (module.query_proj, module.key_proj, module.value_proj))
    qr, kr = (p(module.rel_embeddings.weight).view(2 * span, heads, -1) for p in (module.query_proj, module.key_proj))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores + torch.einsum("bihd,ijhd->bhij", q, kr[buckets]) + torch.einsum("bjhd,ijhd->bhij", k, qr[buckets])
    scores = scores / math.sqrt(3 * module.size)
    probs = scores.masked_fill(~allowed(module, x, attention_mask), torch.finfo(x.dtype).min).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probs, v).reshape(x.shape)
