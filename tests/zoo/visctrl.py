"""Keys and values shared between branches and frames: VisCtrl's reference branch, and the first and previous frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=8)


class Projections(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention pair for pair, for the reference."""
        scores = torch.einsum("...id,...jd->...ij", q, k) * self.scale
        return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v).transpose(-3, -2).flatten(-2)


class MutualBranches(Projections):
    """Four branches, without and with condition: the last of each half takes the keys of the first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(branches * heads, tokens, head_dim); branches folded into tokens."""
        b = q.shape[0] // self.heads
        q, k, v = (t.view(b, self.heads, *t.shape[1:]).transpose(0, 1).flatten(1, 2) for t in (q, k, v))
        sim = torch.einsum("h i d, h j d -> h i j", q, k) * self.scale
        out = torch.einsum("h i j, h j d -> h i d", sim.softmax(-1), v)
        return out.view(self.heads, b, -1, out.shape[-1]).permute(1, 2, 0, 3).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.project(x))
        heads, outs = self.heads, []
        for qu, ku, vu in zip(q.chunk(2), k.chunk(2), v.chunk(2)):
            own = torch.cat([self.attend(*(t[m * heads : (m + 1) * heads] for t in (qu, ku, vu))) for m in range(3)])
            target = self.attend(qu[-heads:], ku[:heads], vu[:heads])
            outs += [own, target]
        return self.to_out(torch.cat(outs))


class BranchIndex(Projections):
    """One attention, the branches' keys by index."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        branch = torch.tensor([0, 1, 2, 0, 4, 5, 6, 4], device=x.device)
        out = nn.functional.scaled_dot_product_attention(q, k[branch], v[branch])
        return self.to_out(out.transpose(1, 2).flatten(2))


class CrossFrame(Projections):
    """Each frame sees the first frame and the one before."""

    def __init__(self, frames: int = 4) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        f = self.frames
        query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        former = torch.arange(f, device=x.device) - 1
        former[0] = 0

        def shared(t: Tensor) -> Tensor:
            t = t.view(-1, f, *t.shape[1:])
            return torch.cat((t[:, [0] * f], t[:, former]), dim=2).flatten(0, 1)

        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, shared(key), shared(value)))
        probs = ((q @ k.transpose(-1, -2)) * self.scale).softmax(-1)
        return self.to_out((probs @ v).transpose(1, 2).flatten(2))


class Rolled(CrossFrame):
    """The same with the clip's first frame repeated, the frames before concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        f = self.frames
        q, k, v = (t.unflatten(0, (-1, f)) for t in self.project(x))
        before_k, before_v = (torch.cat((t[:, :1], t[:, :-1]), 1) for t in (k, v))
        k, v = (torch.cat((t[:, :1].expand_as(t), u), -2) for t, u in ((k, before_k), (v, before_v)))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.flatten(0, 1).transpose(1, 2).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MutualBranches(), (torch.randn(8, 36, 32),)


VARIANTS = {
    "index": Variant(lambda: (BranchIndex(), (torch.randn(8, 36, 32),)), Expect(mask="")),
    "frames": Variant(lambda: (CrossFrame(), (torch.randn(8, 36, 32),)), Expect(mask="")),
    "rolled": Variant(lambda: (Rolled(), (torch.randn(8, 36, 32),)), Expect(mask="")),
}


def reference(module: Projections, x: Tensor) -> Tensor:
    q, k, v = module.project(x)
    outs = []
    for m in range(x.shape[0]):
        if isinstance(module, CrossFrame):
            first = m // module.frames * module.frames
            sources = (first, max(m - 1, first))
        else:
            sources = (m // 4 * 4 if m % 4 == 3 else m,)
        outs.append(module.full(q[m], torch.cat([k[s] for s in sources], 1), torch.cat([v[s] for s in sources], 1)))
    return module.to_out(torch.stack(outs))
