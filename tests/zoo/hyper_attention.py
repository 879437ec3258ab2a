"""HyperAttention: blocks of the sorted order, and a sample of keys; both parts merged by their log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class HyperAttention(nn.Module):
    """The hashed order of queries and keys and the sampled keys are inputs."""

    def __init__(self, block: int = 16) -> None:
        super().__init__()
        self.block = block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Result and log-sum-exp of the rows."""
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores if hidden is None else scores.masked_fill(hidden, torch.finfo(q.dtype).min)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        return scores.softmax(dim=-1) @ v, lse

    def forward(self, q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, sample: Tensor) -> Tensor:
        b, h, n, d = q.shape
        size, count = self.block, n // self.block
        q_index = q_order[..., None].expand(-1, -1, -1, d)
        k_index = k_order[..., None].expand(-1, -1, -1, d)
        q, k, v = q.gather(2, q_index), k.gather(2, k_index), v.gather(2, k_index)
        blocks = [t.view(b * h * count, 1, size, d) for t in (q, k, v)]
        near, near_lse = self.attend(*blocks)
        near, near_lse = near.view(b, h, n, d), near_lse.view(b, h, n, 1)
        m = sample.shape[-1]
        spread = sample[..., None].expand(-1, -1, -1, d)
        rows = torch.arange(n, device=q.device) // size
        hidden = rows[None, None, :, None] == (sample // size)[:, :, None, :]
        far, far_lse = self.attend(q, k.gather(2, spread), v.gather(2, spread), hidden)
        far_lse = far_lse + math.log(n / m)
        share = torch.sigmoid(near_lse - far_lse)
        out = share * near + (1 - share) * far
        return out.gather(2, q_order.argsort(2)[..., None].expand(-1, -1, -1, d))


class Concatenated(HyperAttention):
    """One softmax over the block and the sample, whose scores carry the weight of a sample."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, sample: Tensor) -> Tensor:
        b, h, n, d = q.shape
        size, m = self.block, sample.shape[-1]
        batch, head = torch.arange(b, device=q.device)[:, None, None], torch.arange(h, device=q.device)[:, None]
        q, k, v = q[batch, head, q_order], k[batch, head, k_order], v[batch, head, k_order]
        far_k, far_v = k[batch, head, sample], v[batch, head, sample]
        q, k, v = (t.unflatten(2, (-1, size)) for t in (q, k, v))
        near = torch.einsum("bhrid,bhrjd->bhrij", q, k) * d**-0.5
        far = torch.einsum("bhrid,bhmd->bhrim", q, far_k) * d**-0.5 + math.log(n / m)
        same = torch.arange(n // size, device=q.device)[:, None] == (sample // size)[:, :, None]
        far = far.masked_fill(same[:, :, :, None], float("-inf"))
        probs = torch.cat((near, far), -1).softmax(-1)
        out = torch.einsum("bhrij,bhrjd->bhrid", probs[..., :size], v)
        out = out + torch.einsum("bhrim,bhmd->bhrid", probs[..., size:], far_v)
        return out.flatten(2, 3)[batch, head, q_order.argsort(2)]


def _inputs() -> tuple[Tensor, ...]:
    orders = [torch.stack([torch.randperm(96) for _ in range(4)]).view(2, 2, 96) for _ in range(2)]
    return (*(torch.randn(2, 2, 96, 16) for _ in range(3)), *orders, torch.randint(0, 96, (2, 2, 20)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HyperAttention(), _inputs()


VARIANTS = {"concatenated": Variant(lambda: (Concatenated(), _inputs()), Expect())}


def reference(
    module: HyperAttention, q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, k_order: Tensor, sample: Tensor
) -> Tensor:
    """Each pair's weight as a number: once in the block, and n / m for each time it is sampled outside."""
    b, h, n, d = q.shape
    place_q, place_k = q_order.argsort(-1), k_order.argsort(-1)
    same = place_q[..., :, None] // module.block == place_k[..., None, :] // module.block
    times = torch.zeros(b, h, n, dtype=q.dtype).scatter_add(2, k_order.gather(2, sample), torch.ones_like(sample).to(q))
    weight = torch.where(same, torch.ones((), dtype=q.dtype), times[:, :, None, :] * (n / sample.shape[-1]))
    scores = (q @ k.transpose(-1, -2)) * d**-0.5
    probs = weight * torch.exp(scores - scores.amax(-1, keepdim=True))
    return (probs / probs.sum(-1, keepdim=True)) @ v
