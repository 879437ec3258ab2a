"""The `triton` engine: a kernel generated for the region, in a file, compiled by Triton for the device at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from refocus.codegen import cache, flash
from refocus.codegen.flash_fit import default_plan, supports
from refocus.codegen.interpreter import interpreted
from refocus.codegen.launch import Kernel, device_of, launch, needs_wide
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.ir import Region

__all__ = ["available", "default_plan", "emit", "run", "supports"]


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
def emit(region: Region, plan: Plan, wide: bool = False) -> Kernel:
    """The kernel of a region, its source saved. Needs neither a GPU nor Triton. Raises `EngineUnavailable`."""
    reason = supports(region)
    if plan.schedule != "flash":
        reason = f"there is no schedule {plan.schedule!r}"
    if any(b < 16 or b & (b - 1) for b in (plan.block_q, plan.block_k)):
        reason = f"tiles of {plan.block_q} by {plan.block_k}, which must be powers of two from 16 on"
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run this region", got=reason, todo="use engine='tiled'")
    source = flash.write(region, plan, wide)
    key = cache.key_of(region, plan, wide)
    return Kernel(source.name, source.text, cache.save(source.text, key), key, region, plan, source.arguments)


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result; see `launch.launch`. A plan that wants more shared memory than the device has is replaced
    by a smaller one. Raises `EngineUnavailable`."""
    device = device_of(operands)
    reason = available(device)
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run here", got=reason, todo="use engine='tiled'")
    from triton.runtime.errors import OutOfResources

    wide = needs_wide(region, operands, sizes)
    plan = _fitting.get((region, plan, device), plan)
    asked = plan
    while True:
        try:
            out = launch(emit(region, plan, wide), operands, sizes)
        except OutOfResources as problem:
            fewer = smaller(plan)
            if fewer is None:
                raise EngineUnavailable(
                    "no tile of this region fits the device", got=problem, todo="use engine='tiled'"
                ) from problem
            plan = fewer
            continue
        if plan != asked:
            _fitting[region, asked, device] = plan
        return out


# (region, plan asked for, device) -> the plan that fits.
_fitting: dict[tuple[Region, Plan, torch.device], Plan] = {}


def smaller(plan: Plan) -> Plan | None:
    """The next plan to try on a device with less shared memory; None when there is none."""
    if plan.num_stages > 1:
        return replace(plan, num_stages=plan.num_stages - 1)
    if plan.block_k > 16 and plan.block_k >= plan.block_q:
        return replace(plan, block_k=plan.block_k // 2)
    return replace(plan, block_q=plan.block_q // 2) if plan.block_q > 16 else None
