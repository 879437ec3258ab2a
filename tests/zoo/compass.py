"""Compass Control: the tokens of an object (its compass and its noun) are seen from inside its box only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class BoxConstrained(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, side: int = 8, tokens: int = 2) -> None:
        super().__init__()
        self.heads, self.side, self.tokens, self.scale = heads, side, tokens, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def mask(self, boxes: Tensor, places: Tensor, words: int) -> Tensor:
        """`boxes` (batch, objects, 4) as y0, x0, y1, x1; `places` (batch, objects): where their tokens start."""
        pixel = torch.arange(self.side**2, device=boxes.device)
        y, x = pixel // self.side, pixel % self.side
        word = torch.arange(words, device=boxes.device)
        keep = torch.ones(boxes.shape[0], self.side**2, words, dtype=torch.bool, device=boxes.device)
        for k in range(boxes.shape[1]):
            y0, x0, y1, x1 = (boxes[:, k, c, None] for c in range(4))
            inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
            start = places[:, k, None]
            own = (word >= start) & (word < start + self.tokens)
            keep = keep & (inside[:, :, None] | ~own[:, None, :])
        return keep[:, None]

    def forward(self, x: Tensor, context: Tensor, boxes: Tensor, places: Tensor) -> Tensor:
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        scores = (q @ k.transpose(-1, -2)) * self.scale
        scores = scores.masked_fill(~self.mask(boxes, places, context.shape[1]), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Painted(BoxConstrained):
    """Every word and every pixel carries the number of its object first: 0 words belong to none."""

    def mask(self, boxes: Tensor, places: Tensor, words: int) -> Tensor:
        device, batch = boxes.device, boxes.shape[0]
        pixel = torch.arange(self.side**2, device=device)
        y, x = pixel // self.side, pixel % self.side
        word = torch.arange(words, device=device)
        of_word = torch.zeros(batch, words, dtype=torch.long, device=device)
        of_pixel = torch.zeros(batch, self.side**2, dtype=torch.long, device=device)
        for k in range(boxes.shape[1]):
            y0, x0, y1, x1 = (boxes[:, k, c, None] for c in range(4))
            inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
            start = places[:, k, None]
            of_word = of_word.masked_fill((word >= start) & (word < start + self.tokens), k + 1)
            of_pixel = of_pixel.masked_fill(inside, k + 1)
        keep = (of_word[:, None, :] == 0) | (of_word[:, None, :] == of_pixel[:, :, None])
        return keep[:, None]


def _inputs() -> tuple[Tensor, ...]:
    boxes = torch.tensor([[[0, 0, 4, 4], [4, 3, 8, 8]], [[1, 1, 3, 8], [5, 0, 8, 5]]])
    places = torch.tensor([[3, 9], [14, 6]])
    return torch.randn(2, 64, 32), torch.randn(2, 20, 32), boxes, places


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BoxConstrained(), _inputs()


VARIANTS = {"painted": Variant(lambda: (Painted(), _inputs()))}


def allowed(module: BoxConstrained, x: Tensor, context: Tensor, boxes: Tensor, places: Tensor) -> Tensor:
    keep = torch.ones(2, 1, 8, 8, 20, dtype=torch.bool)
    for b in range(2):
        for (y0, x0, y1, x1), start in zip(boxes[b].tolist(), places[b].tolist()):
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[y0:y1, x0:x1] = True
            keep[b, 0, :, :, start : start + module.tokens] = inside[:, :, None]
    return keep.reshape(2, 1, 64, 20)
