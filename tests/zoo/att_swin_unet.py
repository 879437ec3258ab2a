"""Attention Swin U-Net: a window attention hands its map on to the decoder's, which adds it to its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(declined="the probabilities are read elsewhere")


class WindowAttention(nn.Module):
    def __init__(self, dim: int = 32, window: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        along = torch.arange(window)
        coords = torch.flatten(torch.stack(torch.meshgrid([along, along], indexing="ij")), 1)
        relative = coords[:, :, None] - coords[:, None, :] + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        folded, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(folded, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        index: Tensor = self.index  # type: ignore[assignment]
        bias = self.table[index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        attn = ((q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(folded, length, channels)), attn


class SkippedMaps(nn.Module):
    """One encoder and one decoder block of equal resolution. The sum of the maps is made after both results."""

    def __init__(self, keep_maps: bool = True, side: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = WindowAttention(), WindowAttention()
        self.side, self.keep_maps = side, keep_maps

    def partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.encoder.window
        return x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)

    def reverse(self, x: Tensor, b: int) -> Tensor:
        s, count = self.encoder.window, self.side // self.encoder.window
        return x.view(b, count, count, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, self.side, self.side, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        b = x.shape[0]
        skip, encoder_map = self.encoder(self.partition(x))
        skip = x + self.reverse(skip, b)
        out, decoder_map = self.decoder(self.partition(skip))
        decoder_map = decoder_map + encoder_map
        out = skip + self.reverse(out, b)
        return (out, decoder_map) if self.keep_maps else out


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SkippedMaps(), (torch.randn(2, 8, 8, 32),)


# Maps that nobody reads are dead code: both attentions are fused.
VARIANTS = {"dropped": Variant(lambda: (SkippedMaps(False), (torch.randn(2, 8, 8, 32),)), Expect(mask="", sites=2))}
