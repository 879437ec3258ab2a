"""FIT: tokens attend inside their groups, latents read from their group, latents attend to all, tokens read back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=4)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Any leading axes."""
        q, k, v = (p(t).unflatten(-1, (self.heads, -1)) for p, t in ((self.q, x), (self.k, context), (self.v, context)))
        scores = torch.einsum("...ihd,...jhd->...hij", q * self.scale, k)
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return self.out(torch.einsum("...hij,...jhd->...ihd", scores.softmax(-1), v).flatten(-2))


class FitBlock(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, groups: int = 6, latents: int = 4) -> None:
        super().__init__()
        self.groups, self.latents = groups, latents
        self.local, self.read, self.across, self.write = (Attention(dim, heads) for _ in range(4))
        self.start = nn.Parameter(torch.randn(groups, latents, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.view(b, self.groups, n // self.groups, c)
        z = self.start.expand(b, -1, -1, -1)
        x = x + self.local(x, x)
        z = z + self.read(z, x)
        flat = z.reshape(b, -1, c)
        z = (flat + self.across(flat, flat)).view(z.shape)
        return (x + self.write(x, z)).reshape(b, n, c)


class Masked(FitBlock):
    """The same without groups: masks of equal group numbers."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        mine = torch.arange(n, device=x.device) // (n // self.groups)
        theirs = torch.arange(self.groups * self.latents, device=x.device) // self.latents
        z = self.start.reshape(1, -1, c).expand(b, -1, -1)
        x = x + self.local(x, x, mine[:, None] == mine[None])
        z = z + self.read(z, x, theirs[:, None] == mine[None])
        z = z + self.across(z, z)
        return x + self.write(x, z, mine[:, None] == theirs[None])


class Autoregressive(FitBlock):
    """Causal inside the groups, latents causal over groups, tokens read the latents of the group before theirs."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.view(b, self.groups, n // self.groups, c)
        z = self.start.expand(b, -1, -1, -1)
        x = x + self.local(x, x, torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril())
        z = z + self.read(z, x)
        flat = z.reshape(b, -1, c)
        group = torch.arange(flat.shape[1], device=x.device) // self.latents
        z = (flat + self.across(flat, flat, group[:, None] >= group[None])).view(z.shape)
        shifted = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), 1)
        return (x + self.write(x, shifted)).reshape(b, n, c)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return FitBlock(), (torch.randn(2, 96, 32),)


VARIANTS = {
    "masked": Variant(lambda: (Masked(), (torch.randn(2, 96, 32),)), Expect(sites=4)),
    "autoregressive": Variant(lambda: (Autoregressive(), (torch.randn(2, 96, 32),)), Expect(sites=4)),
}


def reference(module: FitBlock, x: Tensor) -> Tensor:
    """Group by group."""
    groups, latents = module.groups, module.latents
    causal = isinstance(module, Autoregressive)
    parts = list(x.chunk(groups, 1))
    z = [module.start[g].expand(x.shape[0], -1, -1) for g in range(groups)]

    def attend(attn: Attention, query: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        return attn(query, context, keep)

    size = parts[0].shape[1]
    keep = torch.ones(size, size, dtype=torch.bool).tril() if causal else None
    parts = [p + attend(module.local, p, p, keep) for p in parts]
    z = [z[g] + attend(module.read, z[g], parts[g]) for g in range(groups)]
    z = [z[g] + attend(module.across, z[g], torch.cat(z[: g + 1] if causal else z, 1)) for g in range(groups)]
    if causal:
        z = [torch.zeros_like(z[0]), *z[:-1]]
    assert latents == z[0].shape[1]
    return torch.cat([p + attend(module.write, p, z[g]) for g, p in enumerate(parts)], 1)
