"""AlphaFold's row attention: einsum letters with heads after the sequence, a pair bias, a row mask of -1e9, a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class MSARowAttentionWithPairBias(nn.Module):
    def __init__(self, msa: int = 32, pair: int = 16, heads: int = 4, size: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.query_w = nn.Parameter(torch.randn(msa, heads, size) * 0.2)
        self.key_w = nn.Parameter(torch.randn(msa, heads, size) * 0.2)
        self.value_w = nn.Parameter(torch.randn(msa, heads, size) * 0.2)
        self.gating_w = nn.Parameter(torch.randn(msa, heads, size) * 0.2)
        self.gating_b = nn.Parameter(torch.ones(heads, size))
        self.output_w = nn.Parameter(torch.randn(heads, size, msa) * 0.2)
        self.feat_2d_weights = nn.Parameter(torch.randn(pair, heads))

    def forward(self, msa_act: Tensor, pair_act: Tensor, msa_mask: Tensor) -> Tensor:
        bias = (1e9 * (msa_mask - 1.0))[:, None, None, :]
        nonbatched_bias = torch.einsum("qkc,ch->hqk", pair_act, self.feat_2d_weights)
        q = torch.einsum("bqa,ahc->bqhc", msa_act, self.query_w) * self.size**-0.5
        k = torch.einsum("bka,ahc->bkhc", msa_act, self.key_w)
        v = torch.einsum("bka,ahc->bkhc", msa_act, self.value_w)
        logits = torch.einsum("bqhc,bkhc->bhqk", q, k) + bias
        logits = logits + nonbatched_bias[None]
        weights = torch.softmax(logits, dim=-1)
        weighted_avg = torch.einsum("bhqk,bkhc->bqhc", weights, v)
        gate_values = torch.einsum("bqc,chv->bqhv", msa_act, self.gating_w) + self.gating_b
        weighted_avg = weighted_avg * torch.sigmoid(gate_values)
        return torch.einsum("bqhc,hco->bqo", weighted_avg, self.output_w)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    mask = torch.ones(3, 72)
    mask[1, 50:] = 0.0
    inputs = (torch.randn(3, 72, 32), torch.randn(72, 72, 16), mask)
    return MSARowAttentionWithPairBias(), inputs
