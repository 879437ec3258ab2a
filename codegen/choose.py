"""Choose an engine for a region: the one that was named, or the one the policy finds fastest, or none."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from refocus import debug
from refocus.codegen.cotangents import why_not_trainable
from refocus.codegen.operator import TRAINERS
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.errors import EngineUnavailable
from refocus.ir import Region, Sym

_SUPPORTS = {
    "triton": "refocus.codegen.flash_fit",
    "cpp": "refocus.codegen.cpp",
    "sdpa": "refocus.codegen.sdpa",
}


def unsupported(engine: str, region: Region) -> str | None:
    """Why an engine cannot run a region; None where it can. `tiled` runs every region."""
    if debug.disabled(engine):
        return debug.off(engine)
    if engine == "tiled":
        return None
    reason: str | None = importlib.import_module(_SUPPORTS[engine]).supports(region)
    return reason


def plan_part(
    region: Region,
    numbers: Mapping[Sym, int],
    device: Any,
    engine: str | None,
    was_sdpa: bool,
    trained: Collection[str] | None = None,
    written: Region | None = None,
) -> Chosen | Leave:
    """A plan for one region. `numbers`: representative values of its symbolic sizes, for cost alone; `was_sdpa`: the
    model itself calls PyTorch's fused attention here; `trained`: the operands that need gradients, if a backward will
    be asked for; `written`: the region as the model spells it, where this one is over other axes.

    Raises EngineUnavailable when the named engine cannot run on this machine at all.
    """
    if trained is not None:
        return _plan_training(region, numbers, device, engine, was_sdpa, trained, written)
    if engine is not None:
        return _forced(region, numbers, device, engine)
    if device.type == "cpu" and region.row_sums:
        from refocus.codegen.training_policy import choose_with_sums

        return choose_with_sums(region, numbers, written) if not debug.disabled("tiled") else Leave(debug.off("tiled"))
    if device.type == "cpu":
        from refocus.codegen.policy import choose_cpu  # what it weighs up, FlexAttention among it, is slow to import

        return choose_cpu(region, numbers, was_sdpa, written)
    reason = unsupported("triton", region)
    if reason is not None:
        return Leave(f"the triton engine does not take it: {reason}")
    return Chosen(default_plan("triton", region, numbers), "the generated kernel")


def _plan_training(
    region: Region,
    numbers: Mapping[Sym, int],
    device: Any,
    engine: str | None,
    was_sdpa: bool,
    trained: Collection[str],
    written: Region | None,
) -> Chosen | Leave:
    from refocus.codegen.backward_fit import supports_backward
    from refocus.codegen.training_policy import choose_training, training_plan

    if debug.disabled("training"):
        return Leave(f"needs gradients, and {debug.off('training')}")
    reason = why_not_trainable(region, trained)
    if reason is not None:
        return Leave(f"its gradient cannot be generated: {reason}")
    if engine is None and device.type == "cpu" and debug.disabled("tiled"):
        return Leave(f"needs gradients, and {debug.off('tiled')}")
    if engine is None and device.type == "cpu":
        return choose_training(region, numbers, was_sdpa, written)
    if engine is not None and engine not in TRAINERS:
        return Leave(f"needs gradients, and the {engine} engine has no backward")
    if engine in (None, "triton"):
        reason = supports_backward(region, trained)
        if reason is not None:
            return Leave(f"the triton engine does not train it: {reason}; engine='tiled' does")
    if engine is None:
        plan = default_plan("triton", region, numbers, trained=True)
        return Chosen(plan, "the generated kernels, forward and backward")
    forced = _forced(region, numbers, device, engine, trained=True)
    if isinstance(forced, Chosen) and engine == "tiled":
        return replace(forced, plan=training_plan(region, numbers, written))
    return forced


def must_run(engine: str, device: Any) -> None:
    """Raises EngineUnavailable when a named engine cannot run on this machine at all."""
    if engine == "triton":
        from refocus.codegen.triton_engine import available

        problem = available(device)
        if problem is not None:
            raise EngineUnavailable(
                "the triton engine cannot run here", got=problem, todo="use engine='tiled', or a GPU"
            )
    elif engine == "cpp" and device.type != "cpu":
        raise EngineUnavailable(
            "the cpp engine runs on CPU only", got=f"tensors on {device}", todo="use engine='triton'"
        )


def _forced(
    region: Region, numbers: Mapping[Sym, int], device: Any, engine: str, trained: bool = False
) -> Chosen | Leave:
    must_run(engine, device)
    reason = unsupported(engine, region)
    if reason is not None:
        return Leave(f"the {engine} engine does not take it: {reason}")
    return Chosen(default_plan(engine, region, numbers, trained), f"engine={engine!r} was asked for")


def default_plan(engine: str, region: Region, numbers: Mapping[Sym, int], trained: bool = False) -> Plan:
    """The plan of an engine without tuning. `numbers`: as for `plan_part`; `trained`: a backward will be asked for."""
    if engine == "triton":
        from refocus.codegen import schedules

        return schedules.default_plan(region, numbers, trained)
    return replace(Plan(engine), block_q=128, block_k=128) if engine == "cpp" else Plan(engine)
