"""How much of a compilation is ours: Refocus's own passes, from capture to splice, against the whole.

    python -m benchmarks.compile_time [--layers 12]

A model of equal layers is compiled from cold caches, once, end to end; the report carries the time of our passes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
from torch import nn


class Layer(nn.Module):
    """A decoder layer with grouped heads, rotary embedding, a causal window and a gated feed-forward part."""

    def __init__(self, hidden: int = 256, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, hidden // heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key, self.value = (nn.Linear(hidden, groups * self.width, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.gate, self.up = (nn.Linear(hidden, 2 * hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)

        def split(t: torch.Tensor, heads: int) -> torch.Tensor:
            return t.view(batch, length, heads, self.width).transpose(1, 2)

        position = torch.arange(length, device=x.device)
        angle = position[:, None] / 10000 ** (torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-b, a], dim=-1) * sin

        query, key = rotate(split(self.query(y), self.heads)), rotate(split(self.key(y), self.groups))
        value = split(self.value(y), self.groups)
        key, value = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (key, value))
        keep = (position[None, :] <= position[:, None]) & (position[:, None] - position[None, :] < 64)
        scores = query @ key.transpose(2, 3) / self.width**0.5
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        attended = scores.softmax(-1) @ value
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

    import refocus

    reports: list[refocus.Report] = []
    model = nn.Sequential(*(Layer() for _ in range(options.layers))).eval()
    with torch.no_grad():
        x = torch.randn(1, options.tokens, 256)
        torch.compile(nn.Linear(256, 256))(x)  # the compiler's own imports and worker processes
        torch._dynamo.reset()
        started = time.perf_counter()
        refocus.optimize(model, report=reports.append)(x)
        total = time.perf_counter() - started
    ours = sum(r.seconds for r in reports)
    sites = [s for r in reports for s in r.sites]
    kernels = {(s.notation, s.mask, s.engine) for s in sites}
    fused = sum(s.fused for s in sites)
    print(f"{options.layers} layers: {len(sites)} sites, {fused} fused, {len(kernels)} distinct kernel(s)")
    print(f"own passes {ours:.2f} s of {total:.2f} s: {ours / total:.1%}")


if __name__ == "__main__":
    main()
