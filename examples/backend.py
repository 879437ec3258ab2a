"""Refocus as a `torch.compile` backend: no import of refocus, and training works as it did.

    python examples/backend.py

The backend is found through its entry point. A transformer encoder layer with ALiBi, the bias that grows with
distance, is compiled, compared with its eager self, and then trained for a few steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AlibiAttention(nn.Module):
    """Causal self-attention on x [batch, tokens, width]; head h sees key j from query i at a cost of m_h (i - j)
    (Press et al., "Train Short, Test Long", arXiv 2108.12409)."""

    slopes: Tensor

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        position = torch.arange(tokens, device=x.device)
        distance = position[:, None] - position[None, :]
        scores = scores - self.slopes[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


def make() -> tuple[nn.Module, tuple[Tensor], dict[str, object]]:
    """For `python -m refocus explain examples/backend.py:make`."""
    torch.manual_seed(0)
    return AlibiAttention().eval(), (torch.randn(2, 512, 128),), {}


def main() -> None:
    model, (x,), _ = make()
    compiled = torch.compile(model, backend="refocus")
    with torch.no_grad():
        difference = (compiled(x) - model(x)).abs().max().item()
    print(f"inference: largest difference from eager {difference:.1e}")

    compiled.train()
    target = torch.randn_like(x)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), target)
        loss.backward()
        optimizer.step()
        print(f"training: step {step}, loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
