"""Transformer-XL: sequence first, heads last, keys from a memory, relative shift by cat and view, softmax on dim 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j - i < 113", empty_share=21 / 98)


class RelPartialLearnableMultiHeadAttn(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.n_head, self.d_head, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv_net = nn.Linear(width, 3 * width, bias=False)
        self.r_net = nn.Linear(width, width, bias=False)
        self.o_net = nn.Linear(width, width, bias=False)
        self.r_w_bias = nn.Parameter(torch.randn(heads, self.d_head))
        self.r_r_bias = nn.Parameter(torch.randn(heads, self.d_head))

    def _rel_shift(self, x: Tensor) -> Tensor:
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=1)
        x_padded = x_padded.view((x.size(1) + 1, x.size(0), *x.size()[2:]))
        return x_padded[1:].view_as(x)

    def position(self, klen: int, width: int, like: Tensor) -> Tensor:
        pos_seq = torch.arange(klen - 1, -1, -1.0, device=like.device, dtype=torch.float32)
        inv_freq = 1 / (10000 ** (torch.arange(0.0, width, 2.0, device=like.device) / width))
        sinusoid = torch.outer(pos_seq, inv_freq)
        return torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1)[:, None, :].to(like.dtype)

    def forward(self, w: Tensor, mems: Tensor) -> Tensor:
        qlen, bsz = w.size(0), w.size(1)
        cat = torch.cat([mems, w], 0)
        klen = cat.size(0)
        w_head_q, w_head_k, w_head_v = torch.chunk(self.qkv_net(cat), 3, dim=-1)
        r_head_k = self.r_net(self.position(klen, w.size(2), w)).view(klen, self.n_head, self.d_head)
        w_head_q = w_head_q[-qlen:].view(qlen, bsz, self.n_head, self.d_head)
        w_head_k = w_head_k.view(klen, bsz, self.n_head, self.d_head)
        w_head_v = w_head_v.view(klen, bsz, self.n_head, self.d_head)
        AC = torch.einsum("ibnd,jbnd->ijbn", (w_head_q + self.r_w_bias, w_head_k))
        BD = self._rel_shift(torch.einsum("ibnd,jnd->ijbn", (w_head_q + self.r_r_bias, r_head_k)))
        attn_score = AC + BD
        attn_score.mul_(self.scale)
        attn_mask = torch.triu(torch.ones(qlen, klen, device=w.device, dtype=torch.uint8), 1 + klen - qlen)[:, :, None]
        attn_score = attn_score.float().masked_fill(attn_mask[:, :, :, None].bool(), -1e30).type_as(attn_score)
        attn_prob = nn.functional.softmax(attn_score, dim=1)
        attn_vec = torch.einsum("ijbn,jbnd->ibnd", (attn_prob, w_head_v))
        return self.o_net(attn_vec.contiguous().view(qlen, bsz, self.n_head * self.d_head))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = RelPartialLearnableMultiHeadAttn()
    return module, (torch.randn(112, 2, 64), torch.randn(112, 2, 64))


def allowed(module: nn.Module, w: Tensor, mems: Tensor) -> Tensor:
    i, j = torch.arange(w.shape[0]), torch.arange(w.shape[0] + mems.shape[0])
    return j[None, :] <= i[:, None] + mems.shape[0]


def reference(module: RelPartialLearnableMultiHeadAttn, w: Tensor, mems: Tensor) -> Tensor:
    """The position score is that of the distance i + memory - j, no shift involved."""
    both = torch.cat([mems, w])
    rows, columns, heads = w.shape[0], both.shape[0], module.n_head
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in module.qkv_net(both).chunk(3, -1))
    q = q[-rows:]
    r = module.r_net(module.position(columns, w.shape[2], w)).view(columns, heads, -1)
    gap = (torch.arange(rows)[:, None] + mems.shape[0] - torch.arange(columns)[None, :]).clamp(0)
    scores = torch.einsum("ibnd,jbnd->bnij", q + module.r_w_bias, k)
    scores = scores + torch.einsum("ibnd,ijnd->bnij", q + module.r_r_bias, r[columns - 1 - gap])
    probs = (scores * module.scale).masked_fill(~allowed(module, w, mems), float("-inf")).softmax(-1)
    return module.o_net(torch.einsum("bnij,jbnd->ibnd", probs, v).flatten(2))
