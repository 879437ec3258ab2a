"""Core Context Aware attention: core tokens of the far groups and all near tokens, in one softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

# Pooling a group to its core token is an attention of its own.
EXPECT = Expect(sites=2)


class CoreContext(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, group: int = 8, window: int = 24) -> None:
        super().__init__()
        self.heads, self.group, self.window, self.scale = heads, group, window, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def cores(self, x: Tensor) -> Tensor:
        """(batch, groups, dim): the group's hidden states weighted by what its last token asks for."""
        g = self.group
        grouped = x.unflatten(1, (-1, g))
        last = self.q(grouped[:, :, -1:])
        scores = last @ self.k(grouped).transpose(-1, -2) * self.k.out_features**-0.5
        return (scores.softmax(-1) @ grouped).squeeze(2)

    def limits(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each token: how many groups are far, and the first of its near tokens."""
        i = torch.arange(1, n + 1, device=device)
        far = ((i - self.window).clamp(min=0)) // self.group
        return far, far * self.group

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        core = self.cores(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        core_k, core_v = self.split(self.k(core)), self.split(self.v(core))
        far, first = self.limits(n, x.device)
        token, groups = torch.arange(n, device=x.device), torch.arange(core.shape[1], device=x.device)
        lowest = torch.finfo(x.dtype).min
        distant = (q @ core_k.transpose(-1, -2)) * self.scale
        distant = distant.masked_fill(groups[None, :] >= far[:, None], lowest)
        near = (q @ k.transpose(-1, -2)) * self.scale
        near = near.masked_fill((token[None, :] > token[:, None]) | (token[None, :] < first[:, None]), lowest)
        probs = torch.cat((distant, near), dim=-1).softmax(dim=-1)
        out = probs[..., : groups.numel()] @ core_v + probs[..., groups.numel() :] @ v
        return self.out(out.transpose(1, 2).flatten(2))


class OneList(CoreContext):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        core = self.cores(x)
        q, k, v = self.q(x), torch.cat((self.k(core), self.k(x)), 1), torch.cat((self.v(core), self.v(x)), 1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        far, first = self.limits(n, x.device)
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(k.shape[1], device=x.device)[None, :]
        place = j - core.shape[1]
        keep = ((place < 0) & (j < far[:, None])) | ((place >= first[:, None]) & (place <= i))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        probs = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CoreContext(), (torch.randn(2, 96, 32),)


VARIANTS = {"one_list": Variant(lambda: (OneList(), (torch.randn(2, 96, 32),)))}


def reference(module: CoreContext, x: Tensor) -> Tensor:
    """Token by token."""
    n, g, s = x.shape[1], module.group, module.window
    core = module.cores(x)
    q = module.split(module.q(x))
    out = torch.zeros_like(q)
    for i in range(1, n + 1):
        far = max(0, (i - s) // g)
        start = max(1, i - s - (i - s) % g + 1) if i > s else 1
        sources = torch.cat((core[:, :far], x[:, start - 1 : i]), 1)
        k, v = module.split(module.k(sources)), module.split(module.v(sources))
        probs = (torch.einsum("bhd,bhjd->bhj", q[:, :, i - 1], k) * module.scale).softmax(-1)
        out[:, :, i - 1] = torch.einsum("bhj,bhjd->bhd", probs, v)
    return module.out(out.transpose(1, 2).flatten(2))
