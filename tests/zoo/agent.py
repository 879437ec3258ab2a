"""Agent attention: pooled queries attend to the keys, then the queries to the agents: two softmaxes in a chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="", sites=2)


class AgentAttention(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 2, agents: int = 16, tokens: int = 144) -> None:
        super().__init__()
        self.num_heads, self.agents, self.scale = heads, agents, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.pool = nn.AdaptiveAvgPool2d(int(agents**0.5))
        self.position_bias = nn.Parameter(torch.randn(heads, agents, tokens))
        self.agent_bias = nn.Parameter(torch.randn(heads, tokens, agents))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side, size = int(n**0.5), c // self.num_heads
        q, k, v = self.qkv(x).reshape(b, n, 3, c).permute(2, 0, 1, 3).unbind(0)
        agent = self.pool(q.reshape(b, side, side, c).permute(0, 3, 1, 2)).reshape(b, c, -1).permute(0, 2, 1)
        q, k, v = (t.reshape(b, n, self.num_heads, size).permute(0, 2, 1, 3) for t in (q, k, v))
        agent = agent.reshape(b, self.agents, self.num_heads, size).permute(0, 2, 1, 3)
        agent_attn = self.softmax((agent * self.scale) @ k.transpose(-2, -1) + self.position_bias)
        agent_v = agent_attn @ v
        q_attn = self.softmax((q * self.scale) @ agent.transpose(-2, -1) + self.agent_bias)
        x = (q_attn @ agent_v).transpose(1, 2).reshape(b, n, c)
        v = v.transpose(1, 2).reshape(b, side, side, c).permute(0, 3, 1, 2)
        return self.proj(x + self.dwc(v).permute(0, 2, 3, 1).reshape(b, n, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return AgentAttention(), (torch.randn(2, 144, 64),)
