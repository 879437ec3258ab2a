"""CATANet: tokens sorted by cluster, groups of them attend to their own and the next group, and all to the centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class TokenAggregation(nn.Module):
    """Queries and keys 9 wide, values 10. The tail is padded with mirrored tokens, which count twice."""

    def __init__(self, heads: int = 4, qk: int = 36, dim: int = 40, centres: int = 6, group: int = 16) -> None:
        super().__init__()
        self.heads, self.group, self.scale = heads, group, (qk // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, n, bias=False) for n in (qk, qk, dim))
        self.centre_k, self.centre_v = nn.Linear(dim, qk, bias=False), nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.register_buffer("means", torch.randn(centres, dim))

    @torch.no_grad()
    def order(self, x: Tensor) -> Tensor:
        means: Tensor = self.means  # type: ignore[assignment]
        similar = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(means, dim=-1).t()
        return torch.argsort(similar.argmax(-1), dim=-1, stable=True)

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        g = self.group
        order = self.order(x)
        spread = order.unsqueeze(-1)
        q, k, v = (
            torch.gather(p(x), dim=-2, index=spread.expand(-1, -1, p.out_features))
            for p in (self.to_q, self.to_k, self.to_v)
        )
        count = -(-n // g)
        pad_q = count * g - n
        pad_k = (count + 1) * g - n
        q = torch.cat((q, torch.flip(q[:, n - pad_q : n], dims=[-2])), dim=-2) if pad_q else q
        k, v = (torch.cat((t, torch.flip(t[:, n - pad_k : n], dims=[-2])), dim=-2) for t in (k, v))
        q = self.split(q).unflatten(2, (count, g)).transpose(1, 2)  # b t h g d
        k, v = (t.unfold(-2, 2 * g, g).transpose(-1, -2) for t in (k, v))  # b t 2g c
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in (k, v))
        near = ((q * self.scale) @ k.transpose(-1, -2)).softmax(-1) @ v
        means: Tensor = self.means  # type: ignore[assignment]
        k_far, v_far = (self.split(p(means)[None]).unsqueeze(1) for p in (self.centre_k, self.centre_v))
        far = ((q * self.scale) @ k_far.transpose(-1, -2)).softmax(-1) @ v_far
        out = (near + far).transpose(2, 3).reshape(b, count * g, -1)[:, :n]
        out = out.scatter(dim=-2, index=spread.expand(out.shape), src=out)
        return self.proj(out)


class Chunked(TokenAggregation):
    """The own and the next group concatenated, PyTorch's attention function, the order undone by an inverse gather."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        g, count = self.group, -(-n // self.group)
        order = self.order(x)
        place = torch.arange((count + 1) * g, device=x.device)
        place = torch.where(place < n, place, 2 * n - 1 - place)
        rows = torch.arange(b, device=x.device)[:, None]
        q, k, v = (p(x)[rows, order][:, place].unflatten(1, (count + 1, g)) for p in (self.to_q, self.to_k, self.to_v))
        k, v = (torch.cat((t[:, :-1], t[:, 1:]), 2).unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in (k, v))
        q = q[:, :-1].unflatten(-1, (self.heads, -1)).transpose(2, 3)
        near = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        means: Tensor = self.means  # type: ignore[assignment]
        k_far, v_far = (p(means).unflatten(-1, (self.heads, -1)) for p in (self.centre_k, self.centre_v))
        probs = (torch.einsum("bthid,jhd->bthij", q, k_far) * self.scale).softmax(-1)
        out = near + torch.einsum("bthij,jhe->bthie", probs, v_far)
        out = out.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.proj(out[rows, order.argsort(-1)])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return TokenAggregation(), (torch.randn(2, 72, 40),)


VARIANTS = {
    "chunked": Variant(lambda: (Chunked(), (torch.randn(2, 72, 40),))),
    "even": Variant(lambda: (TokenAggregation(), (torch.randn(1, 96, 40),))),
}


def reference(module: TokenAggregation, x: Tensor) -> Tensor:
    """Token by token of the sorted sequence."""
    b, n, c = x.shape
    g, order, heads = module.group, module.order(x), module.heads
    means: Tensor = module.means  # type: ignore[assignment]
    k_far, v_far = (p(means).unflatten(-1, (heads, -1)) for p in (module.centre_k, module.centre_v))
    out = torch.zeros(b, n, heads, c // heads, dtype=x.dtype)
    for s in range(b):
        q, k, v = (p(x[s, order[s]]).unflatten(-1, (heads, -1)) for p in (module.to_q, module.to_k, module.to_v))
        for p in range(n):
            places = [r if r < n else 2 * n - 1 - r for r in range(p // g * g, p // g * g + 2 * g)]
            near = (torch.einsum("hd,jhd->hj", q[p], k[places]) * module.scale).softmax(-1)
            far = (torch.einsum("hd,jhd->hj", q[p], k_far) * module.scale).softmax(-1)
            here = torch.einsum("hj,jhe->he", near, v[places]) + torch.einsum("hj,jhe->he", far, v_far)
            out[s, order[s, p]] = here
    if type(module) is TokenAggregation:  # its scatter reads the sorted rows: out[order[p]] = sorted[p]
        return module.proj(out.flatten(2))
    return module.proj(out.flatten(2))
