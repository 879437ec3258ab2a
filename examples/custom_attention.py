"""An attention that no library has a kernel for, and what Refocus makes of it.

    python examples/custom_attention.py
    python -m refocus explain examples/custom_attention.py:make

Grouped queries, a sliding window, a tanh softcap on the scores and a learned sink for each head: written down with
einsum, in the order of the formula. `refocus.optimize` gives back a model with the same parameters and signature;
`verify="first"` runs both versions on the first call of each shape and raises if they disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import refocus


class SinkAttention(nn.Module):
    """Self-attention on x [batch, tokens, width]. The sink is one more logit for every row: it takes probability and
    gives no value, so a query may attend to nothing."""

    def __init__(self, width: int = 256, heads: int = 8, groups: int = 2, window: int = 64, cap: float = 30.0) -> None:
        super().__init__()
        self.heads, self.groups, self.window, self.cap = heads, groups, window, cap
        self.head = width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * groups * self.head)
        self.out = nn.Linear(width, width)
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.groups, self.heads // self.groups, self.head)
        k, v = self.kv(x).view(batch, tokens, 2, self.groups, self.head).unbind(2)

        scores = torch.einsum("bighd,bjgd->bghij", q, k) * self.head**-0.5
        scores = self.cap * torch.tanh(scores / self.cap)
        i = torch.arange(tokens, device=x.device)[:, None]
        j = torch.arange(tokens, device=x.device)[None, :]
        scores = torch.where((j <= i) & (i - j < self.window), scores, float("-inf"))
        sinks = self.sinks.view(1, self.groups, -1, 1, 1).expand(batch, -1, -1, tokens, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]

        return self.out(torch.einsum("bghij,bjgd->bighd", weights, v).reshape(batch, tokens, width))


def make(tokens: int = 1024) -> tuple[nn.Module, tuple[Tensor], dict[str, object]]:
    """What `python -m refocus explain FILE.py:make` wants: (model, args, kwargs)."""
    torch.manual_seed(0)
    return SinkAttention().eval(), (torch.randn(1, tokens, 256),), {}


def main() -> None:
    model, args, _ = make()
    optimized = refocus.optimize(model, verify="first")
    with torch.no_grad():
        difference = (optimized(*args) - model(*args)).abs().max().item()
    print(f"largest difference from eager: {difference:.1e}\n")
    print(refocus.explain(model, *args))


if __name__ == "__main__":
    main()
