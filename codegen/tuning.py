"""Tile sizes by measurement: a small space, pruned without running anything, then timed on the device, kept on disk.

`REFOCUS_TUNE=1` asks for it, on GPUs: the first call of a region with sizes of some order of magnitude then compiles
some thirty plans and times a few, which takes the better part of a minute, and later calls, in later processes too,
take the fastest. Without it the plan is what it is by default, which is meant to be good. The space is

    block_q, block_k    the default's, half and twice that, 16 to 128; a tile of half to twice as many pairs
    num_warps           4 and 8
    num_stages          2 and 3

and what is pruned from it, by what each kernel takes when compiled ahead of time: plans that spill registers, want more
shared memory than there is, or fall off the matrix units that the default runs on. Of the others, those are timed that
keep the most pairs of queries and keys in flight on a multiprocessor; the default is always among them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refocus.codegen import cache
from refocus.codegen.aot import Resources
from refocus.codegen.interpreter import interpreted
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.ir import Region

VARIABLE = "REFOCUS_TUNE"
TIMED = 6  # plans that are run
_GAIN = 0.97  # of the default's time: less than that is noise
_RUNS = 9


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs of one multiprocessor share: registers, bytes of shared memory (of which one program may take
    `each`), and threads."""

    registers: int
    shared: int
    each: int
    threads: int
    lanes: int = 32

    def programs(self, plan: Plan, taken: Resources) -> int:
        """How many programs it holds at a time; 0 where it cannot hold one."""
        threads = plan.num_warps * self.lanes
        if taken.shared_bytes > self.each:
            return 0
        by_registers = self.registers // (max(taken.registers, 1) * threads)
        by_shared = self.shared // max(taken.shared_bytes, 1)
        return min(by_registers, by_shared, self.threads // threads)


# By target of `refocus.codegen.aot`; from the vendors' tables of each architecture.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 167936, 166912, 2048),
    "sm_90": Multiprocessor(65536, 233472, 232448, 2048),
    "gfx942": Multiprocessor(131072, 65536, 65536, 2048, 64),
}


def asked(device: torch.device) -> bool:
    """Whether plans are to be timed on this device."""
    return os.environ.get(VARIABLE, "") not in ("", "0") and device.type == "cuda" and not interpreted()


def space(plan: Plan) -> tuple[Plan, ...]:
    """The plans that are weighed up, the default first."""

    def near(block: int) -> list[int]:
        return sorted({b for b in (block // 2, block, 2 * block) if 16 <= b <= max(128, block)})

    pairs = plan.block_q * plan.block_k
    found = [
        replace(plan, block_q=q, block_k=k, num_warps=warps, num_stages=stages)
        for q, k, warps, stages in product(near(plan.block_q), near(plan.block_k), (4, 8), (2, 3))
        # A warp multiplies 16 rows at a time.
        if warps * 16 <= max(q, 64) and pairs // 2 <= q * k <= pairs * 2
    ]
    return (plan, *(p for p in found if p != plan))


def pruned(
    plans: Sequence[Plan], take: Callable[[Plan], Resources | None], where: Multiprocessor, most: int = TIMED
) -> list[Plan]:
    """The default, and the `most` - 1 others that are worth timing. `take`: what a plan takes of a program, None where
    it does not compile."""
    default, *others = plans
    usual = take(default)
    scored: list[tuple[int, Plan]] = []
    for plan in others:
        taken = take(plan)
        if taken is None or taken.spills or (usual is not None and _weaker(taken, usual)):
            continue
        programs = where.programs(plan, taken)
        if programs:
            scored.append((programs * plan.block_q * plan.block_k, plan))
    scored.sort(key=lambda pair: -pair[0])  # stable: in the order of the space where they are equal
    return [default, *(plan for _, plan in scored[: most - 1])]


def _weaker(taken: Resources, usual: Resources) -> bool:
    power = {"": 0, "mma": 1, "mfma": 1, "wgmma": 2}
    return power[taken.matrix_unit] < power[usual.matrix_unit]


def fastest(plans: Sequence[Plan], measure: Callable[[Plan], float | None]) -> Plan:
    """The plan that takes least, the first of them if no other is clearly better. `measure`: None where it fails."""
    times = {plan: taken for plan in plans if (taken := measure(plan)) is not None}
    if not times:
        return plans[0]
    best = min(times, key=times.__getitem__)
    usual = times.get(plans[0])
    return best if usual is None or times[best] < _GAIN * usual else plans[0]


def tuned(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int], run: Callable[[Plan], Any]
) -> Plan:
    """The fastest plan for this region on the operands' device, from disk where it is known. `run` runs a plan."""
    from refocus.codegen.launch import device_of

    device = device_of(operands)
    if plan.schedule != "flash" or not asked(device):  # the other schedules have their own sizes
        return plan
    key = _key(region, plan, tuple(sizes), torch.cuda.get_device_name(device))
    known = recall(key)
    if known is None and torch.cuda.is_current_stream_capturing():
        return plan  # nothing can be timed now
    if known is None:
        known = fastest(_worth_timing(region, plan, device), lambda one: _time(lambda: run(one), device))
        remember(key, known)
    return known


@lru_cache(maxsize=512)
def _key(region: Region, plan: Plan, sizes: tuple[int, ...], name: str) -> str:
    # Symbolic sizes by their order of magnitude: what is fastest for 1000 tokens is for 1100.
    return cache.key_of("tuned", region, plan, tuple(size.bit_length() for size in sizes), name)


def _worth_timing(region: Region, plan: Plan, device: torch.device) -> list[Plan]:
    from refocus.codegen import aot, triton_engine

    target = target_of(device)
    if target is None:
        return [plan]  # nothing is known of what it holds

    def take(one: Plan) -> Resources | None:
        try:
            return aot.compile_for(triton_engine.emit(region, one), target)
        except Exception:  # whatever a compiler does not manage is no candidate
            return None

    return pruned(space(plan), take, MULTIPROCESSORS[target])


def target_of(device: torch.device) -> str | None:
    """The target of `refocus.codegen.aot` that stands for this device."""
    properties = torch.cuda.get_device_properties(device)
    name = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    name = name if name.startswith("gfx") else f"sm_{properties.major}0"
    return name if name in MULTIPROCESSORS else None


def _time(call: Callable[[], Any], device: torch.device) -> float | None:
    try:
        call()
    except EngineUnavailable:  # no memory for it
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(_RUNS):
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


# ------------------------------------------------------------------------------------------------------------- on disk

_known: dict[tuple[Path, str], Plan] = {}


def recall(key: str) -> Plan | None:
    """The plan that was kept under this key; None where there is none, or none that can be read."""
    path = cache.directory() / f"{key}.plan.json"
    if (path, key) not in _known:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            _known[path, key] = Plan(**fields)
        except (OSError, ValueError, TypeError):
            return None
    return _known[path, key]


def remember(key: str, plan: Plan) -> None:
    """Keep a plan. Where the directory cannot be written, for this process alone."""
    path = cache.directory() / f"{key}.plan.json"
    _known[path, key] = plan
    try:
        handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(plan), file)
        os.replace(name, path)
    except OSError:
        pass
