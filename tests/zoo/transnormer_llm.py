"""TransNormerLLM: decayed linear attention between a gate and a norm; LRPE doubles the width of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant
from tests.zoo.lightning import slopes

EXPECT = Expect(family="linear", mask="j <= i")


class NormLinearAttention(nn.Module):
    """As in the language model: SiLU on queries and keys, LRPE, SimpleRMSNorm, a plain gate."""

    slope: Tensor

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkvu_proj, self.out_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, width, bias=False)
        theta = 10000 ** (-2 / width * torch.arange(width)).reshape(heads, 1, -1)
        self.theta = nn.Parameter(theta)
        self.register_buffer("slope", torch.tensor(slopes(heads)).view(heads, 1, 1), persistent=False)

    def lrpe(self, x: Tensor) -> Tensor:
        theta = self.theta * torch.arange(x.shape[2], device=x.device).reshape(1, -1, 1)
        return torch.cat([x * theta.cos(), x * theta.sin()], dim=-1)

    def norm(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        u, q, k, v = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.lrpe(nn.functional.silu(q)), self.lrpe(nn.functional.silu(k))
        n = x.shape[1]
        index = torch.arange(n, device=x.device)
        mask = index[None, :] - index[:, None]
        decay = torch.exp((self.slope * mask).masked_fill(mask > 0, float("-inf")))
        output = torch.einsum("bhij,bhje->bhie", torch.einsum("bhid,bhjd->bhij", q, k) * decay, v)
        return self.out_proj(u * self.norm(output.transpose(1, 2).flatten(2)))


class Library(nn.Module):
    """As in its kernels' repository: SiLU on values too, LayerNorm, a low-rank sigmoid gate."""

    slope: Tensor

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Sequential(nn.Linear(width, width // heads), nn.Linear(width // heads, width))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("slope", torch.tensor(slopes(heads)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.silu(self.qkv_proj(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        index = torch.arange(x.shape[1], device=x.device)
        decay = torch.exp(-self.slope[:, None, None] * (index[:, None] - index)).tril()
        weights = torch.einsum("bihd,bjhd->bhij", q, k) * decay
        y = torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2)
        return self.out_proj(torch.sigmoid(self.gate(x)) * self.norm(y))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return NormLinearAttention(), (torch.randn(2, 100, 64),)


VARIANTS = {"library": Variant(lambda: (Library(), (torch.randn(2, 100, 64),)))}


def reference(module: NormLinearAttention | Library, x: Tensor) -> Tensor:
    n, decay = x.shape[1], torch.exp(-module.slope.reshape(-1, 1, 1))
    powers = torch.stack([torch.stack([decay[:, 0, 0] ** max(i - j, 0) for j in range(n)]) for i in range(n)])
    powers = powers.permute(2, 0, 1).tril()
    if isinstance(module, Library):
        q, k, v = nn.functional.silu(module.qkv_proj(x)).unflatten(-1, (3, module.heads, -1)).unbind(2)
        y = torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, powers, v).flatten(2)
        return module.out_proj(torch.sigmoid(module.gate(x)) * module.norm(y))
    u, q, k, v = module.qkvu_proj(x).chunk(4, dim=-1)
    q, k, v = (t.unflatten(-1, (module.heads, -1)) for t in (q, k, v))
    angle = torch.arange(n)[:, None, None] * module.theta[:, 0]  # (n, h, d)
    between = torch.cos(angle[:, None] - angle[None])
    q, k = nn.functional.silu(q), nn.functional.silu(k)
    y = torch.einsum("bihd,bjhd,ijhd,hij,bjhe->bihe", q, k, between, powers, v).flatten(2)
    return module.out_proj(u * module.norm(y))
