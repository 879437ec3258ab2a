"""Frozen in Time: divided space-time attention whose class token is a key of every group; as one mask each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class DividedAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, frames: int = 4, patches: int = 36, time: bool = False) -> None:
        super().__init__()
        self.heads, self.frames, self.patches, self.time = heads, frames, patches, time
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def mask(self, device: torch.device) -> Tensor:
        """Groups of the tokens behind the class token; it sees and is seen by all."""
        count = self.frames * self.patches
        token = torch.arange(count, device=device)
        group = token % self.patches if self.time else token // self.patches
        mask = torch.ones(count + 1, count + 1, dtype=torch.bool, device=device)
        mask[1:, 1:] = group[:, None] == group[None, :]
        return mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        sim = torch.einsum("bhid,bhjd->bhij", q * self.scale, k)
        sim = sim.masked_fill(~self.mask(x.device), float("-inf"))
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Padded(DividedAttention):
    def mask(self, device: torch.device) -> Tensor:
        frames, patches = self.frames, self.patches
        inner, outer = (frames, patches) if self.time else (patches, frames)
        if self.time:
            body = torch.ones(inner, inner, device=device)[:, None, :, None] * torch.eye(outer, device=device)[:, None]
            body = body.reshape(frames * patches, frames * patches)
        else:
            body = torch.block_diag(*[torch.ones(inner, inner, device=device)] * outer)
        return nn.functional.pad(body, (1, 0, 1, 0), value=1.0).bool()


class Published(DividedAttention):
    """As published: the groups in the batch, the class token's key and value repeated for each, its own row apart."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        h, f, n = self.heads, self.frames, self.patches
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, dim=-1))
        q = q * self.scale
        cls_q, cls_k, cls_v = (t[:, :1] for t in (q, k, v))
        cls_out = torch.bmm((cls_q @ k.transpose(-2, -1)).softmax(dim=-1), v)
        q_, k_, v_ = (t[:, 1:].unflatten(1, (f, n)) for t in (q, k, v))
        if self.time:
            q_, k_, v_ = (t.transpose(1, 2) for t in (q_, k_, v_))
        groups = q_.shape[1]
        q_, k_, v_ = (t.flatten(0, 1) for t in (q_, k_, v_))
        cls_k, cls_v = (t.repeat_interleave(groups, dim=0) for t in (cls_k, cls_v))
        k_, v_ = torch.cat((cls_k, k_), dim=1), torch.cat((cls_v, v_), dim=1)
        out = torch.bmm(torch.bmm(q_, k_.transpose(-2, -1)).softmax(dim=-1), v_)
        out = out.unflatten(0, (b * h, groups))
        out = (out.transpose(1, 2) if self.time else out).flatten(1, 2)
        out = torch.cat((cls_out, out), dim=1).unflatten(0, (b, h))
        return self.proj(out.transpose(1, 2).flatten(2))


def _maker(kind: type[DividedAttention], time: bool = False, expect: Expect | None = None) -> Variant:
    return Variant(lambda: (kind(time=time), (torch.randn(2, 145, 32),)), expect)


make = _maker(DividedAttention).make
VARIANTS = {
    "time": _maker(DividedAttention, True),
    "padded": _maker(Padded),
    "padded_time": _maker(Padded, True),
    "published": _maker(Published, expect=Expect(mask="", sites=2, regrouped=True)),
    "published_time": _maker(Published, True, expect=Expect(mask="", sites=2, regrouped=True)),
}


def allowed(module: DividedAttention, x: Tensor) -> Tensor:
    frames, patches = module.frames, module.patches
    keep = torch.ones(1 + frames * patches, 1 + frames * patches, dtype=torch.bool)
    for i in range(frames * patches):
        for j in range(frames * patches):
            same = i % patches == j % patches if module.time else i // patches == j // patches
            keep[1 + i, 1 + j] = same
    return keep


def reference(module: DividedAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale
    probs = scores.masked_fill(~allowed(module, x), float("-inf")).softmax(-1)
    return module.proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
