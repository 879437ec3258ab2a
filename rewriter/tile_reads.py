"""A tensor that is read tile by tile: the least and the greatest element of each, by plain tensor operations.

    Reads(...)                     which elements of a dimension each tile of one side reads
    reduce_tiles(tensor, reads)    the two ends, with tiles in the place of those dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Reads:
    """Which elements of a dimension each tile of one side reads: `block` in a row from `start`, or `rows`."""

    side: int
    block: int
    size: int
    start: int = 0
    rows: Tensor | None = None  # [tiles, reads]


def runs(tensor: Tensor, reads: Mapping[int, Reads]) -> Tensor:
    for dim, how in reads.items():
        tensor = tensor.narrow(dim, how.start, how.size)
    return tensor


def reduce_tiles(tensor: Tensor, reads: Mapping[int, Reads]) -> tuple[Tensor, Tensor]:
    """The least and the greatest element that each tile reads, along all dimensions of `reads`: those become tiles."""
    truth = tensor.dtype == torch.bool
    # Measured on a 4096 x 4096 bool mask, one core: amin or amax of bytes along the outer dimension takes 1 ms, along
    # the inner one 8 ms, any() 10 ms. aminmax() starts threads even for tiny tensors.
    lo = hi = _bytes(tensor) if truth else tensor
    for dim in sorted(reads, key=lambda d: (reads[d].rows is not None, d)):  # runs first: less is left to gather
        lo, hi = _reduce_dim(lo, dim, reads[dim], torch.amin), _reduce_dim(hi, dim, reads[dim], torch.amax)
    return (lo.bool(), hi.bool()) if truth else (lo, hi)


def _bytes(tensor: Tensor) -> Tensor:
    """Truth values as numbers. The same memory, but in a graph for Inductor: that of torch 2.11 has no such view."""
    return tensor.to(torch.uint8) if isinstance(tensor, FakeTensor) else tensor.view(torch.uint8)


def _reduce_dim(tensor: Tensor, dim: int, how: Reads, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    if how.rows is not None:
        return reduce(tensor.index_select(dim, how.rows.reshape(-1)).unflatten(dim, how.rows.shape), dim + 1)
    run = tensor.narrow(dim, how.start, how.size)
    whole = how.size // how.block
    tiles = reduce(run.narrow(dim, 0, whole * how.block).unflatten(dim, (whole, how.block)), dim + 1)
    if isinstance(how.size, int) and how.size % how.block == 0:
        return tiles
    # The short last tile, with its last element repeated; where a traced size leaves none, it is cut off again.
    last = torch.clamp(torch.arange(how.block, device=run.device) + whole * how.block, max=how.size - 1)
    tail = reduce(run.index_select(dim, last), dim).unsqueeze(dim)
    return torch.cat((tiles, tail), dim).narrow(dim, 0, (how.size + how.block - 1) // how.block)
