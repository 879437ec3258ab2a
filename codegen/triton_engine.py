"""The `triton` engine: a kernel generated for the region, in a file, compiled by Triton for the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from refocus.codegen import decode_call, flash, windows, windows_fit
from refocus.codegen.decode_fit import multiprocessors
from refocus.codegen.flash_fit import supports
from refocus.codegen.interpreter import interpreted
from refocus.codegen.launch import Kernel, device_of, launch, needs_wide, saved
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.ir import Region

__all__ = ["available", "emit", "fitted", "run", "run_saving", "supports"]
SCHEDULES = ("flash", "decode", "windows")
Result = TypeVar("Result")


def available(device: torch.device | str) -> str | None:
    """Why kernels cannot run on tensors of this device; None when they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    kind = torch.device(device).type
    if interpreted() or kind in ("cuda", "xpu"):  # ROCm calls itself cuda
        return None
    return f"Triton has no target for {kind} tensors"


@lru_cache(maxsize=512)
def emit(region: Region, plan: Plan, wide: bool = False, saving: bool = False) -> Kernel:
    """The kernel of a region (the first, where its schedule has two), its source saved. Needs neither a GPU nor Triton.
    Raises `EngineUnavailable`."""
    reason = supports(region)
    if plan.schedule not in SCHEDULES:
        reason = f"there is no schedule {plan.schedule!r}"
    if plan.schedule == "windows":
        reason = reason or windows_fit.supports(region, plan)
    if any(b < 16 or b & (b - 1) for b in (plan.block_q, plan.block_k)):
        reason = f"tiles of {plan.block_q} by {plan.block_k}, which must be powers of two from 16 on"
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run this region", got=reason, todo="use engine='tiled'")
    if plan.schedule == "decode":
        if saving:
            raise EngineUnavailable("the decode schedule has no backward", todo="plan with schedule='flash'")
        return decode_call.emit(region, plan, wide)[0]
    write = windows.write if plan.schedule == "windows" else flash.write
    return saved(write(region, plan, wide, saving), region, plan, wide, *(("saving",) if saving else ()))


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result; see `launch.launch`. A plan that wants more shared memory than the device has is replaced
    by a smaller one. Raises `EngineUnavailable`."""
    if plan.schedule == "decode":
        emit(region, plan)  # raises what is wrong with the plan
        return fitted(region, plan, device_of(operands), lambda p: decode_call.run(region, p, operands, sizes))
    return _run(region, plan, operands, sizes, False)[0]


def run_saving(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """As `run`, and the row sums that the backward needs: (2, *batch, query), float32, as in `tiled.run_saving`."""
    return _run(region, plan, operands, sizes, True)


def _run(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int], saving: bool
) -> tuple[Tensor, Tensor]:
    device = device_of(operands)
    wide = needs_wide(region, operands, sizes)

    def attempt(plan: Plan) -> tuple[Tensor, Tensor]:
        grid = None
        if plan.schedule == "windows":
            grid = windows_fit.grid(region, plan, sizes, multiprocessors(device))
        return launch(emit(region, plan, wide, saving), operands, sizes, grid)

    return fitted((region, saving), plan, device, attempt)


def fitted(what: Hashable, plan: Plan, device: torch.device, attempt: Callable[[Plan], Result]) -> Result:
    """`attempt` with `plan`, or with the first smaller one that the device has the memory for; which one, is
    remembered for `what`."""
    reason = available(device)
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run here", got=reason, todo="use engine='tiled'")
    from triton.runtime.errors import OutOfResources

    asked, plan = plan, _fitting.get((what, plan, device), plan)
    while True:
        try:
            out = attempt(plan)
        except OutOfResources as problem:
            fewer = smaller(plan)
            if fewer is None:
                raise EngineUnavailable(
                    "no tile of this region fits the device", got=problem, todo="use engine='tiled'"
                ) from problem
            plan = fewer
            continue
        if plan != asked:
            _fitting[what, asked, device] = plan
        return out


# (what is run, plan asked for, device) -> the plan that fits.
_fitting: dict[tuple[Hashable, Plan, torch.device], Plan] = {}


def smaller(plan: Plan) -> Plan | None:
    """The next plan to try on a device with less shared memory; None when there is none."""
    if plan.num_stages > 1:
        return replace(plan, num_stages=plan.num_stages - 1)
    splits_keys = plan.schedule != "windows"  # whose tile holds all of them
    if splits_keys and plan.block_k > 16 and plan.block_k >= plan.block_q:
        return replace(plan, block_k=plan.block_k // 2)
    return replace(plan, block_q=plan.block_q // 2) if plan.block_q > 16 else None
