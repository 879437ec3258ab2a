"""DCAL: queries of the tokens that matter ask all tokens; in training, one image's queries ask the keys of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class GlobalLocal(nn.Module):
    """Which tokens matter (attention roll-out of all layers) is computed elsewhere; `chosen` holds their numbers."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        index = chosen[:, None, :, None].expand(-1, self.heads, -1, c // self.heads)
        q = torch.gather(q, 2, index)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, chosen.shape[1], c))


class RowsLater(GlobalLocal):
    """All scores, of which the rows are picked; the rest is never needed."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        b, _, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q * self.scale, k)
        rows = torch.arange(b, device=x.device)[:, None]
        scores = scores.transpose(1, 2)[rows, chosen].transpose(1, 2)
        return self.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


class PairWise(GlobalLocal):
    """The training branch: keys and values of a second image behind those of the first."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        other = chosen[:, 0] % b
        k, v = torch.cat((k, k[other]), dim=2), torch.cat((v, v[other]), dim=2)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 50, 32), torch.stack([torch.randperm(50)[:7] for _ in range(2)])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GlobalLocal(), _inputs()


VARIANTS = {
    "rows": Variant(lambda: (RowsLater(), _inputs())),
    "pairs": Variant(lambda: (PairWise(), _inputs())),
}


def reference(module: GlobalLocal, x: Tensor, chosen: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    if isinstance(module, PairWise):
        other = chosen[:, 0] % x.shape[0]
        k, v = torch.cat((k, k[other]), 1), torch.cat((v, v[other]), 1)
    out = torch.einsum("bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1), v)
    if not isinstance(module, PairWise):
        out = torch.stack([out[s, chosen[s]] for s in range(x.shape[0])])
    return module.proj(out.flatten(2))
