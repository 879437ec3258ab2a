"""BiFormer: each region attends to the tokens of the few regions whose mean keys match its mean query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class BiLevelRouting(nn.Module):
    """The regions are chosen outside; the keys are gathered region by region, a copy for each region of queries."""

    def __init__(self, dim: int = 32, heads: int = 2, n_win: int = 4, topk: int = 3) -> None:
        super().__init__()
        self.heads, self.n_win, self.topk, self.scale = heads, n_win, topk, dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.Conv2d(dim, dim, kernel_size=5, stride=1, padding=2, groups=dim)
        self.wo = nn.Linear(dim, dim)

    def regions(self, x: Tensor) -> Tensor:
        """(batch, regions, tokens, channels)."""
        b, h, w, c = x.shape
        n = self.n_win
        return x.view(b, n, h // n, n, w // n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, n * n, -1, c)

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            logits = (q.mean(2) * self.scale) @ k.mean(2).transpose(-2, -1)
            return torch.topk(logits, k=self.topk, dim=-1).indices

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = self.route(q, k)
        b, p2, w2, c = k.shape
        kv = torch.cat((k, v), dim=-1)
        chosen = torch.gather(
            kv.view(b, 1, p2, w2, 2 * c).expand(-1, p2, -1, -1, -1),
            dim=2,
            index=index.view(b, p2, self.topk, 1, 1).expand(-1, -1, -1, w2, 2 * c),
        )
        k_sel, v_sel = chosen.split((c, c), dim=-1)
        head = c // self.heads
        k_sel = k_sel.reshape(b * p2, self.topk * w2, self.heads, head).permute(0, 2, 3, 1)
        v_sel = v_sel.reshape(b * p2, self.topk * w2, self.heads, head).permute(0, 2, 1, 3)
        q = q.reshape(b * p2, w2, self.heads, head).permute(0, 2, 1, 3)
        attn = ((q * self.scale) @ k_sel).softmax(dim=-1)
        return (attn @ v_sel).transpose(1, 2).reshape(b, p2, w2, c)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.n_win
        qkv = self.qkv(x)
        q, k, v = self.regions(qkv).chunk(3, -1)
        lepe = self.lepe(qkv[..., 2 * c :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = self.attend(q, k, v).view(b, n, n, h // n, w // n, c).permute(0, 1, 3, 2, 4, 5)
        return self.wo(out.reshape(b, h, w, c) + lepe)


class Indexed(BiLevelRouting):
    """Regions read by advanced indexing, heads kept as an axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = self.route(q, k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        batch = torch.arange(k.shape[0], device=k.device)[:, None, None]
        k, v = (t[batch, index].flatten(2, 3) for t in (k, v))  # b r (t u) h d
        attn = torch.einsum("brihd,brjhd->brhij", q, k) * self.scale
        return torch.einsum("brhij,brjhd->brihd", attn.softmax(-1), v).flatten(-2)


class BlockMask(BiLevelRouting):
    """The dense twin: a mask of whole regions, scattered from the choice."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = self.route(q, k)
        b, p2, w2, c = k.shape
        chosen = torch.zeros(b, p2, p2, dtype=torch.bool, device=q.device).scatter(2, index, True)
        mask = chosen.repeat_interleave(w2, 1).repeat_interleave(w2, 2)
        q, k, v = (t.reshape(b, p2 * w2, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        attn = (q @ k.transpose(-2, -1) * self.scale).masked_fill(~mask[:, None], float("-inf"))
        return (attn.softmax(-1) @ v).transpose(1, 2).reshape(b, p2, w2, c)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BiLevelRouting(), (torch.randn(2, 16, 16, 32),)


VARIANTS = {
    "indexed": Variant(lambda: (Indexed(), (torch.randn(2, 16, 16, 32),))),
    "mask": Variant(lambda: (BlockMask(), (torch.randn(2, 16, 16, 32),)), Expect()),
    "one": Variant(lambda: (BiLevelRouting(topk=1), (torch.randn(1, 12, 20, 32),))),
}


def reference(module: BiLevelRouting, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    n = module.n_win
    qkv = module.qkv(x)
    q, k, v = module.regions(qkv).chunk(3, -1)
    index = module.route(q, k)
    out = torch.zeros_like(q)
    for sample in range(b):
        for region in range(n * n):
            keys, values = (
                t[sample, index[sample, region]].reshape(-1, module.heads, c // module.heads) for t in (k, v)
            )
            mine = q[sample, region].unflatten(-1, (module.heads, -1))
            probs = (torch.einsum("ihd,jhd->hij", mine, keys) * module.scale).softmax(-1)
            out[sample, region] = torch.einsum("hij,jhd->ihd", probs, values).flatten(1)
    image = out.view(b, n, n, h // n, w // n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return module.wo(image + module.lepe(qkv[..., 2 * c :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
