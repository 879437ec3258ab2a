"""Time and peak memory of a call, and the distance between two outputs.

Peers are timed in turns within one run, so that a machine that slows down slows all of them down. Memory is what one
call needs beyond what is alive before it (the model's own weights and the inputs are alive before it), with every
compilation already done.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from malloc.h
_MMAP_MAX = 1 << 16  # blocks mapped one by one, unless told otherwise


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the fastest, and how many calls were timed."""

    median: float
    fastest: float
    calls: int


def time_peers(
    peers: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device,
    repeats: int = 7,
    warmup: int = 2,
    at_least: float = 0.0,
    budget: float = 60.0,
    on_call: Callable[[str], None] = lambda name: None,
    stopwatch: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Median time of each peer, called in turns: a b c, b c a, c a b, ...

    `warmup` calls of each come first (the first one compiles). Rounds are timed until there are `repeats` of them and
    they have taken `at_least` so many seconds; after three rounds, `budget` seconds end it early. `on_call` is told the
    name before each call. `stopwatch` runs a call and says what it took, in seconds: by default the time that passed.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def wall(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - begin

    taken = stopwatch or wall
    names = list(peers)
    for name in names:
        for _ in range(warmup):
            on_call(name)
            peers[name]()
    synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in itertools.count():
        elapsed = time.perf_counter() - started
        if (turn >= repeats and elapsed >= at_least) or (turn >= 3 and elapsed > budget):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            on_call(name)
            seconds[name].append(taken(peers[name]))
    return {name: Timing(statistics.median(s), min(s), len(s)) for name, s in seconds.items()}


def peak_memory(call: Callable[[], Any], *, device: torch.device) -> int | None:
    """Bytes that one call needs at its worst moment, beyond what is alive before it. None where it cannot be told.

    On a GPU from the caching allocator. On Linux CPUs from the kernel's own high-water mark of the process's resident
    memory, which sees what every library allocates; where that cannot be reset, by sampling every half millisecond.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _STATUS.exists():
        return None
    return_free_memory()
    if _reset_high_water():
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    with _sampled() as peak:
        before = _resident("VmRSS")
        call()
    return max(peak[0] - before, 0)


def return_free_memory() -> None:
    """Have the C allocator give free memory back to the system and map large blocks one by one from now on.

    Otherwise a call would be served from memory that an earlier call left in the allocator, and would seem to need
    none. Does nothing where the C library has no such functions.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)


def keep_free_memory() -> None:
    """Have the C allocator serve calls, after a few of them, from memory that earlier ones gave back, of any size.

    glibc maps each block of more than 32 MiB anew, and the system clears its pages one by one (1 to 2 us for 4 KiB on a
    virtual machine, more than it takes to compute what they hold): time then jumps where a buffer crosses that size.
    Allocators that PyTorch's guide for CPUs advises (jemalloc, tcmalloc) keep such blocks. Does nothing where the C
    library has no such function.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _reset_high_water() -> bool:
    """Set the process's VmHWM back to what it uses now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") <= _resident("VmRSS") + (1 << 20)


@contextlib.contextmanager
def _sampled(interval: float = 0.0005) -> Iterator[list[int]]:
    """A list of one number: the largest resident size seen while the context is open."""
    peak, done = [_resident("VmRSS")], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident("VmRSS"))
            time.sleep(interval)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def largest_difference(one: Any, other: Any) -> float:
    """Largest absolute difference between two outputs of the same shape; NaN equals NaN, infinity equals infinity.

    Infinite where the two do not have the same tensors, or where one has NaN and the other has not.
    """
    left, right = floats(one), floats(other)
    if [t.shape for t in left] != [t.shape for t in right]:
        return math.inf
    worst = 0.0
    for a, b in zip(left, right):
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs())
        if difference.numel():
            worst = max(worst, difference.nan_to_num(nan=math.inf).max().item())
    return worst


def geometric_mean(values: list[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else math.nan


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    processor = "unknown"
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found.group(1) if found else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
    }
