"""The clock of the GPU benchmark: CUDA events around one call, the cache flushed before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH = 256 << 20  # bytes: several times the last cache of any GPU
_HEAD_START = 1_000_000  # cycles, about half a millisecond: launches of most calls
_COPIED = 1 << 30


class Clock:
    """Seconds of one call. On a GPU by events, after a write of more than the cache holds.

    `head_start`: the GPU idles until the host has launched the call's kernels, so that only kernels are timed; without
    it, what the host takes is waited for, as a user waits for it. Without a GPU, the time that passes."""

    def __init__(self, device: torch.device, head_start: bool = True) -> None:
        self.device = device
        if device.type != "cpu":
            self.head_start = head_start and hasattr(torch.cuda, "_sleep")
            self.cache = torch.empty(_FLUSH, dtype=torch.int8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cpu":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        self.cache.zero_()
        if self.head_start:
            torch.cuda._sleep(_HEAD_START)
        else:
            torch.cuda.synchronize()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3


def launching(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds until the host has launched a call, the median."""
    found = []
    for _ in range(repeats):
        if device.type != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found)[repeats // 2]


def copy_bandwidth(device: torch.device, size: int = _COPIED) -> float:
    """Bytes a second, those read and those written, of a large copy: the ceiling for what only moves data."""
    clock = Clock(device)
    size = size if device.type != "cpu" else 1 << 20
    one = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    other = torch.empty_like(one)
    taken = sorted(clock(lambda: other.copy_(one)) for _ in range(11))
    return 2 * size / taken[5]
