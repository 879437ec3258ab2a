"""DiTCtrl: the target asks the source twice, for its foreground and for its background, and blends by its own mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(sites=2)


class MaskGuidedSharing(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, text: int = 18) -> None:
        super().__init__()
        self.heads, self.text = heads, text
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def masks(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Additive masks of the foreground and the background pass; `source` (batch, video) marks the foreground."""
        batch, video = source.shape
        length, text = self.text + video, self.text
        lowest = torch.finfo(torch.float32).min
        out = []
        for part in (source, ~source):
            mask = torch.zeros(batch, 1, length, length, device=source.device)
            hidden = ~part[:, None, None, :].expand(batch, 1, video, video)
            mask[:, :, text:, text:] = torch.zeros_like(hidden, dtype=mask.dtype).masked_fill(hidden, lowest)
            out.append(mask)
        return out[0], out[1]

    def forward(self, target: Tensor, source: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q, target), (self.k, source), (self.v, source))
        )
        front, back = (
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m.to(q.dtype)).transpose(1, 2).flatten(2)
            for m in self.masks(source_mask)
        )
        blend = nn.functional.pad(target_mask.to(front.dtype), (self.text, 0))[..., None]
        return blend * front + (1 - blend) * back


class Booleans(MaskGuidedSharing):
    def masks(self, source: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.arange(self.text + source.shape[1], device=source.device)
        is_text = token < self.text
        both = is_text[:, None] | is_text[None, :]
        padded = nn.functional.pad(source, (self.text, 0))
        masks = [both[None, None] | part[:, None, None, :] for part in (padded, ~padded)]
        lowest = torch.finfo(torch.float32).min
        front, back = (torch.zeros(m.shape, device=m.device).masked_fill(~m, lowest) for m in masks)
        return front, back


def _inputs() -> tuple[Tensor, ...]:
    source = torch.zeros(2, 90, dtype=torch.bool)
    source[0, 20:55] = True
    source[1, 60:] = True
    target = torch.rand(2, 90) < 0.4
    return torch.randn(2, 108, 32), torch.randn(2, 108, 32), source, target


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MaskGuidedSharing(), _inputs()


VARIANTS = {"booleans": Variant(lambda: (Booleans(), _inputs()))}


def allowed(
    module: MaskGuidedSharing, target: Tensor, source: Tensor, source_mask: Tensor, target_mask: Tensor
) -> tuple[Tensor, ...]:
    out = []
    for part in (source_mask, ~source_mask):
        keep = torch.ones(2, 1, 108, 108, dtype=torch.bool)
        keep[:, 0, 18:, 18:] = part[:, None, :]
        out.append(keep)
    return tuple(out)
