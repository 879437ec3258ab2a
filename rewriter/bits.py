"""Boolean matrices as one Python integer for each row: bit j of row i is element (i, j).

A row of 4096 elements is 512 bytes, and `&`, `|`, `^` and shifts of it take a tenth of a microsecond: whole matrices
are compared, shifted and folded in a millisecond or two, where the same on tensors of bytes takes ten times that.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

# Multiplied with eight bytes that are 0 or 1, it has them side by side in its top byte, the first one lowest.
_GATHER = 0x0102040810204080

Rows = list[int]


def pack(block: Tensor) -> Rows:
    """The rows of a bool matrix."""
    count, width = block.shape
    padded = -(-width // 8) * 8
    if padded != width or not block.is_contiguous() or block.storage_offset() % 8:
        whole = torch.zeros(count, padded, dtype=torch.bool)
        whole[:, :width] = block
        block = whole
    if sys.byteorder != "little":
        block = block.unflatten(1, (-1, 8)).flip(-1).flatten(1)
    words = block.view(torch.int64)
    eights = ((words * _GATHER) >> 56).to(torch.uint8).contiguous()
    step = padded // 8
    data = ctypes.string_at(eights.data_ptr(), eights.numel())
    return [int.from_bytes(data[k * step : (k + 1) * step], "little") for k in range(count)]


def full(width: int) -> int:
    return (1 << width) - 1


def runs(bits: int, most: int = 1 << 30) -> Iterator[tuple[int, int]]:
    """The ranges (start, stop) of ones, in order; at most so many."""
    at = 0
    while bits and most > 0:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield at + zeros, at + zeros + ones
        bits >>= ones
        at += zeros + ones
        most -= 1


def union(rows: Sequence[int]) -> int:
    return reduce(or_, rows, 0)


def every(bits: int, start: int, step: int, count: int) -> int:
    """Bits start, start + step, ... as bits 0, 1, ... of a result."""
    if step == 1:
        return (bits >> start) & full(count)
    text = format(bits | 1 << (start + step * count), "b")[::-1]  # a last bit, so that the text is long enough
    return int(text[start : start + step * count : step][::-1] or "0", 2)


def smear(bits: int, by: int) -> int:
    """Bit k is set where any of the bits k .. k + by - 1 is."""
    have = 1
    while have < by:
        step = min(have, by - have)
        bits |= bits >> step
        have += step
    return bits


def repeated(period: int, width: int) -> int:
    """Ones at 0, period, 2 * period, ... below `width`."""
    count = -(-width // period)
    return (full(period * count) // full(period)) & full(width)
