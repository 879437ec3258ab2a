"""Mamba-2 as a structured state-space dual: C and B are queries and keys, shared by all heads; the step size gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


def segment_sum(x: Tensor) -> Tensor:
    """sum of x[t] over j < t <= i, stable; -inf above the diagonal."""
    length = x.size(-1)
    x = x[..., None].expand(*x.size(), length)
    mask = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(x.masked_fill(~mask, 0), dim=-2)
    mask = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~mask, -torch.inf)


class Dual(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, state: int = 8) -> None:
        super().__init__()
        self.heads, self.state = heads, state
        self.in_proj = nn.Linear(width, width + 2 * state + heads)
        self.A_log, self.D = nn.Parameter(torch.rand(heads)), nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.out_proj = nn.Linear(width, width)

    def forward(self, u: Tensor) -> Tensor:
        width = self.out_proj.in_features
        x, b, c, dt = torch.split(self.in_proj(u), [width, self.state, self.state, self.heads], dim=-1)
        dt = nn.functional.softplus(dt + self.dt_bias)
        x = x.unflatten(-1, (self.heads, -1))
        y = self.mix(x * dt.unsqueeze(-1), -torch.exp(self.A_log) * dt, b, c)
        return self.out_proj((y + x * self.D[:, None]).flatten(2))

    def mix(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        decay = torch.exp(segment_sum(a.transpose(1, 2)))
        return torch.einsum("bln,bsn,bhls,bshp->blhp", c, b, decay, x)


class Differences(Dual):
    """The decay as the difference of two running sums."""

    def mix(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        sums = a.cumsum(dim=1).transpose(1, 2)
        keep = torch.ones(a.shape[1], a.shape[1], device=a.device, dtype=torch.bool).tril()
        decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~keep, float("-inf")).exp()
        scores = (c @ b.transpose(1, 2)).unsqueeze(1) * decay
        return torch.einsum("bhls,bshp->blhp", scores, x)


class Chunked(Dual):
    """In chunks, as the reference implementation without kernels: pairs inside, states between, all at once."""

    def mix(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor, size: int = 16) -> Tensor:
        length = x.shape[1]
        rest = -length % size
        x, b, c = (nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, rest)).unflatten(1, (-1, size)) for t in (x, b, c))
        a = nn.functional.pad(a, (0, 0, 0, rest)).unflatten(1, (-1, size)).permute(0, 3, 1, 2)
        sums = torch.cumsum(a, dim=-1)
        inside = torch.einsum("bcln,bcsn,bhcls,bcshp->bclhp", c, b, torch.exp(segment_sum(a)), x)
        states = torch.einsum("bcln,bhcl,bclhp->bchpn", b, torch.exp(sums[..., -1:] - sums), x)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        carried = torch.exp(segment_sum(nn.functional.pad(sums[..., -1], (1, 0))))
        states = torch.einsum("bhzc,bchpn->bzhpn", carried, states)[:, :-1]
        between = torch.einsum("bcln,bchpn,bhcl->bclhp", c, states, torch.exp(sums))
        return (inside + between).flatten(1, 2)[:, :length]


def _maker(build: type[Dual]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 100, 64),)))


make = _maker(Dual).make
VARIANTS = {"differences": _maker(Differences), "chunked": _maker(Chunked)}


def reference(module: Dual, u: Tensor) -> Tensor:
    width = module.out_proj.in_features
    x, b, c, dt = torch.split(module.in_proj(u), [width, module.state, module.state, module.heads], dim=-1)
    dt, x = nn.functional.softplus(dt + module.dt_bias), x.unflatten(-1, (module.heads, -1))
    state, rows = x.new_zeros(*x.shape[:1], module.heads, x.shape[-1], module.state), []
    for t in range(u.shape[1]):
        state = state * torch.exp(-module.A_log.exp() * dt[:, t])[..., None, None]
        state = state + torch.einsum("bhp,bn->bhpn", x[:, t] * dt[:, t, :, None], b[:, t])
        rows.append(torch.einsum("bhpn,bn->bhp", state, c[:, t]) + x[:, t] * module.D[:, None])
    return module.out_proj(torch.stack(rows, 1).flatten(2))
