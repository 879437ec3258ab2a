"""Packed documents, causal, and no further back than a window; documents from starts, lengths or position ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class DocumentWindow(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, window: int = 40) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def documents(self, given: Tensor, length: int) -> Tensor:
        """Numbers of documents (batch, length), from positions that start again at zero."""
        return (given == 0).cumsum(dim=-1)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        document = self.documents(given, length)
        position = torch.arange(length, device=x.device)
        keep = document[:, None, :, None] == document[:, None, None, :]
        keep = keep & (position[None, :] <= position[:, None])
        keep = keep & (position[:, None] - position[None, :] < self.window)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores + (~keep).to(scores.dtype) * torch.finfo(scores.dtype).min
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class FromOffsets(DocumentWindow):
    """From cumulated lengths (batch, documents + 1), as variable-length kernels take them."""

    def documents(self, given: Tensor, length: int) -> Tensor:
        position = torch.arange(length, device=given.device).expand(given.shape[0], length)
        return torch.searchsorted(given[:, 1:].contiguous(), position.contiguous(), right=True)


class FromJumps(DocumentWindow):
    """Where positions do not go up by one a document starts."""

    def documents(self, given: Tensor, length: int) -> Tensor:
        first = given[:, :1] - 1
        return (torch.diff(given, prepend=first, dim=-1) != 1).cumsum(-1)


LENGTHS = ((30, 60, 38), (100, 10, 18))


def _positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def _offsets() -> Tensor:
    return nn.functional.pad(torch.tensor(LENGTHS).cumsum(-1), (1, 0))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DocumentWindow(), (torch.randn(2, 128, 32), _positions())


VARIANTS = {
    "offsets": Variant(lambda: (FromOffsets(), (torch.randn(2, 128, 32), _offsets()))),
    "jumps": Variant(lambda: (FromJumps(), (torch.randn(2, 128, 32), _positions()))),
}


def allowed(module: DocumentWindow, x: Tensor, given: Tensor) -> Tensor:
    i = torch.arange(128)
    gap = i[:, None] - i[None, :]
    blocks = [torch.block_diag(*[torch.ones(n, n) for n in row]).bool() for row in LENGTHS]
    return (torch.stack(blocks) & (gap >= 0) & (gap < module.window))[:, None]
