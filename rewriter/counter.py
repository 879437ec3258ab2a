"""Random numbers as a function of a seed and a position: what forward and backward, on any engine, agree on.

    random(seed, row, column) = mix(mix(column + a) ^ b) / 2**32       a = mix(row ^ low), b = mix(a + high)

with the two halves of a 64-bit seed and `mix`, a bijection of 32-bit words in which every bit of the argument changes
every bit of the result with a probability close to one half (the finaliser "lowbias32" of C. Wellons' hash
prospector). The upper 24 bits become a float32 in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


def mix(x: Tensor) -> Tensor:
    """The finaliser, on 32-bit words kept in int64 (products wrap, and only their low half is kept)."""
    x = x ^ (x >> 16)
    x = (x * FIRST) & WORD
    x = x ^ (x >> 15)
    x = (x * SECOND) & WORD
    return x ^ (x >> 16)


def random(seed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Uniform float32 in [0, 1) at each (row, column): int64 tensors that broadcast together."""
    first = mix((row ^ seed) & WORD)
    second = mix((first + (seed >> 32)) & WORD)
    word = mix(mix((column + first) & WORD) ^ second)
    return (word >> 8).to(torch.float32) * 2.0**-24
