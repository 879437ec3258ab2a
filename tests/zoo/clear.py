"""CLEAR: text tokens see and are seen by everything, image tokens see a circle of image tokens; one joint sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class CircularAttention(nn.Module):
    def __init__(
        self, width: int = 32, text: int = 20, rows: int = 12, columns: int = 12, radius: int = 4, heads: int = 2
    ) -> None:
        super().__init__()
        self.text, self.rows, self.columns, self.radius, self.heads = text, rows, columns, radius, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def mask(self, device: torch.device) -> Tensor:
        length = self.text + self.rows * self.columns
        q_idx, kv_idx = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None, :]
        q_y, q_x = (q_idx - self.text) // self.columns, (q_idx - self.text) % self.columns
        kv_y, kv_x = (kv_idx - self.text) // self.columns, (kv_idx - self.text) % self.columns
        near = (q_y - kv_y) ** 2 + (q_x - kv_x) ** 2 < self.radius**2
        return (q_idx < self.text) | (kv_idx < self.text) | near

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.device))
        return out.transpose(1, 2).flatten(2)


class Distances(CircularAttention):
    """The mask from a table of distances of the image alone, in floats, with the text put in front of it."""

    def mask(self, device: torch.device) -> Tensor:
        y = torch.arange(self.rows, device=device, dtype=torch.float32)
        x = torch.arange(self.columns, device=device, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)
        gap = grid[:, None, :] - grid[None, :, :]
        near = (gap**2).sum(-1) < self.radius**2
        image = self.rows * self.columns
        keep = torch.cat([torch.ones(image, self.text, dtype=torch.bool, device=device), near], dim=1)
        full = torch.ones(self.text, self.text + image, dtype=torch.bool, device=device)
        return torch.cat([full, keep], dim=0)


class Pooled(CircularAttention):
    """With pooled image tokens behind the keys, which image tokens see and text tokens do not."""

    factor = 4

    def mask(self, device: torch.device) -> Tensor:
        image = self.rows * self.columns
        length, total = self.text + image, self.text + image + image // self.factor**2
        q_idx, kv_idx = torch.arange(length, device=device)[:, None], torch.arange(total, device=device)[None, :]
        q_y, q_x = (q_idx - self.text) // self.columns, (q_idx - self.text) % self.columns
        kv_y, kv_x = (kv_idx - self.text) // self.columns, (kv_idx - self.text) % self.columns
        near = (q_y - kv_y) ** 2 + (q_x - kv_x) ** 2 < self.radius**2
        text_sees = (q_idx < self.text) & (kv_idx < length)
        image_sees = (q_idx >= self.text) & ((kv_idx < self.text) | (kv_idx >= length) | near)
        return text_sees | image_sees

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, self.text :].transpose(1, 2).unflatten(-1, (self.rows, self.columns))
        pooled = nn.functional.avg_pool2d(image, self.factor).flatten(2).transpose(1, 2)
        keys = torch.cat([x, pooled], dim=1)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.to_q, x), (self.to_k, keys), (self.to_v, keys))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.device))
        return out.transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CircularAttention(), (torch.randn(2, 164, 32),)


VARIANTS = {
    "distances": Variant(lambda: (Distances(), (torch.randn(2, 164, 32),))),
    "pooled": Variant(lambda: (Pooled(), (torch.randn(2, 164, 32),))),
}


def allowed(module: CircularAttention, x: Tensor) -> Tensor:
    text, columns, image = module.text, module.columns, module.rows * module.columns
    pooled = image // module.factor**2 if isinstance(module, Pooled) else 0
    keep = torch.zeros(text + image, text + image + pooled, dtype=torch.bool)
    for q in range(text + image):
        for k in range(text + image + pooled):
            if k >= text + image:
                keep[q, k] = q >= text
            elif q < text or k < text:
                keep[q, k] = True
            else:
                dy, dx = (q - text) // columns - (k - text) // columns, (q - text) % columns - (k - text) % columns
                keep[q, k] = dy * dy + dx * dx < module.radius**2
    return keep
