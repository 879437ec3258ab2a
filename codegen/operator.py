"""The operators that stand in a graph for one fused region.

    refocus::attend(Tensor[] operands, SymInt[] sizes, str region, str plan) -> Tensor
    refocus::attend_saving(the same) -> (Tensor, Tensor)              with the row sums that its backward needs
    refocus::attend_backward(Tensor grad, Tensor[] operands, Tensor out, Tensor sums, SymInt[] sizes,
                             str region, str plan, bool[] needs, Tensor? grad_sums) -> Tensor[]

`operands` are in the order of `region.operands`, `sizes` in that of `region.syms`. `region` and `plan` are the
`repr` of a `Region` and a `Plan`: a graph that holds the call can be printed, hashed, saved and loaded. The result is
contiguous, (*batch, query, *value) or what `region.output` says, of dtype `region.out_dtype`, and shares no memory with
the operands; the row sums are (2, *batch, query), float32 or float64: the largest logit, and the logarithm of the sum
of the exponentials beyond it. Gradients come for operands that require one, and only for those. Of `region.row_sums`,
the sum of the two is a result like the other, and `grad_sums` what flows back into each of them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refocus import ir
from refocus.codegen import placing
from refocus.codegen import plan as plans
from refocus.codegen.plan import Plan
from refocus.codegen.second_order import refuse_second_order
from refocus.errors import BadRegion, EngineUnavailable, NeedsGradient
from refocus.evaluate import size_of
from refocus.ir import Region, Sym

# engine -> module with `run(region, plan, operands, sizes) -> Tensor`
ENGINES: dict[str, str] = {
    "tiled": "refocus.codegen.tiled",
    "triton": "refocus.codegen.triton_engine",
    "cpp": "refocus.codegen.cpp",
    "sdpa": "refocus.codegen.sdpa",
}
# engine -> modules with `run_saving` (as `run`, and the row sums) and `run_backward`
TRAINERS: dict[str, tuple[str, str]] = {
    "tiled": ("refocus.codegen.tiled", "refocus.codegen.tiled_backward"),
    "triton": ("refocus.codegen.triton_engine", "refocus.codegen.triton_backward"),
}
# engine -> whether it puts a region's result where `region.output` says, and reads what flows back into it there.
PLACERS: dict[str, Callable[[Region], bool]] = {
    "tiled": lambda region: True,
    "triton": lambda region: placing.row_of(region) is not None,
}
Engine = Callable[[Region, Plan, Sequence[Tensor], Sequence[int]], Tensor]


@lru_cache(maxsize=512)
def parse_region(text: str) -> tuple[Region, tuple[Sym, ...]]:
    """The region of a call and its symbols, found once for each text."""
    region = ir.parse(text)
    assert isinstance(region, Region)
    return region, region.syms


@lru_cache(maxsize=16)
def engine_named(name: str) -> Engine:
    """The engine's entry point. Raises `EngineUnavailable` where it does not exist or cannot be imported."""
    if name not in ENGINES:
        raise EngineUnavailable(
            f"there is no engine {name!r}", expected=", ".join(ENGINES), got=name, todo="name one of these engines"
        )
    try:
        run: Engine = importlib.import_module(ENGINES[name]).run
    except ImportError as problem:
        raise EngineUnavailable(
            f"the engine {name!r} cannot be loaded here",
            got=problem,
            todo="install what it needs, or use engine='tiled'",
        ) from problem
    return run


def places(region: Region, engine: str) -> bool:
    """Whether an engine puts results where `region.output` says; if not, they are moved there."""
    return region.output is None or (engine in PLACERS and PLACERS[engine](region))


def result_shape(region: Region, numbers: Mapping[Sym, int]) -> list[int]:
    """(*batch, query, *value), or the shape of the output, for these sizes."""
    if region.output is not None:
        return placing.shape_of(region.output, numbers)
    return [size_of(axis.size, numbers) for axis in (*region.batch, region.query, *region.value)]


def call(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
    """Run a region by the operator, as a graph would."""
    _know_dtensors()
    result: Tensor = attend(list(operands), list(sizes), repr(region), repr(plan))
    return result


@torch.library.custom_op(
    "refocus::attend",
    mutates_args=(),
    schema="(Tensor[] operands, SymInt[] sizes, str region, str plan) -> Tensor",
)
def attend(operands: list[Tensor], sizes: list[int], region: str, plan: str) -> Tensor:
    """Dispatch to the plan's engine. Raises `BadRegion` for tensors or sizes that the region does not describe."""
    (what, syms), how = parse_region(region), plans.parse(plan)
    _check(what, syms, operands, sizes)
    run = engine_named(how.engine)
    if places(what, how.engine):
        return run(what, _tuned(what, how, operands, sizes, run), operands, sizes)
    bare = replace(what, output=None)
    out = run(bare, _tuned(bare, how, operands, sizes, run), operands, sizes)
    return _moved(what, out, dict(zip(syms, sizes)))


def _tuned(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int], run: Callable[..., Any]
) -> Plan:
    """The plan, or a faster one where `REFOCUS_TUNE` asks for it."""
    if plan.engine != "triton" or not os.environ.get("REFOCUS_TUNE"):
        return plan
    from refocus.codegen import tuning

    return tuning.tuned(region, plan, operands, sizes, lambda one: run(region, one, operands, sizes))


def _moved(region: Region, result: Tensor, numbers: Mapping[Sym, int]) -> Tensor:
    return placing.put(region, result, result, numbers)


@attend.register_fake
def _fake(operands: list[Tensor], sizes: list[int], region: str, plan: str) -> Tensor:
    what, syms = parse_region(region)
    shape = result_shape(what, dict(zip(syms, sizes, strict=True)))
    like = operands[0] if operands else torch.empty(0)
    return like.new_empty(shape, dtype=getattr(torch, what.out_dtype))


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Called only when grad mode is on and an operand requires a gradient. A silent detach would train a wrong model.
    what, _ = parse_region(inputs[2])
    names = [o.name for o, t in zip(what.operands, inputs[0]) if t.requires_grad]
    raise NeedsGradient(
        "refocus::attend has no gradient",
        expected="operands that require none, or torch.no_grad()",
        got=f"requires_grad on {', '.join(names)}",
        todo="use refocus::attend_saving, or run the model under torch.no_grad() or torch.inference_mode()",
    )


def _no_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise NeedsGradient("refocus::attend has no gradient")


attend.register_autograd(_no_backward, setup_context=lambda ctx, inputs, output: _no_gradient(ctx, inputs, output))


# ---------------------------------------------------------------------------------------------------- training


def call_saving(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
    """Run a region by the operator that can be differentiated, as a graph would."""
    return call_with_sums(region, plan, operands, sizes)[0]


def call_with_sums(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The same, with the row sums, which gradients flow back into if they are a result of the region's."""
    _know_dtensors()
    result: tuple[Tensor, Tensor] = attend_saving(list(operands), list(sizes), repr(region), repr(plan))
    return result


@torch.library.custom_op(
    "refocus::attend_saving",
    mutates_args=(),
    schema="(Tensor[] operands, SymInt[] sizes, str region, str plan) -> (Tensor, Tensor)",
)
def attend_saving(operands: list[Tensor], sizes: list[int], region: str, plan: str) -> tuple[Tensor, Tensor]:
    """As `attend`, with the row sums. Raises `BadRegion`, and `EngineUnavailable` for an engine without a backward."""
    (what, syms), how = parse_region(region), plans.parse(plan)
    _check(what, syms, operands, sizes)
    run = _trainer(how.engine)[0]
    if places(what, how.engine):
        result: tuple[Tensor, Tensor] = run(what, _tuned(what, how, operands, sizes, run), operands, sizes)
        return result
    bare = replace(what, output=None)
    out, sums = run(bare, _tuned(bare, how, operands, sizes, run), operands, sizes)
    return _moved(what, out, dict(zip(syms, sizes))), sums


@torch.library.custom_op(
    "refocus::attend_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] operands, Tensor out, Tensor sums, SymInt[] sizes, str region, str plan, "
    "bool[] needs, Tensor? grad_sums=None) -> Tensor[]",
)
def attend_backward(
    grad: Tensor, operands: list[Tensor], out: Tensor, sums: Tensor, sizes: list[int], region: str, plan: str,
    needs: list[bool], grad_sums: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the operands for which `needs` holds."""
    (what, syms), how = parse_region(region), plans.parse(plan)
    # What flows back into row sums lies as these do: row by row, wherever the result is put.
    if not places(what, how.engine) or (what.output is not None and grad_sums is not None):
        grad, out = (placing.taken(what, t, dict(zip(syms, sizes))) for t in (grad, out))
        what = replace(what, output=None)
    # One function of both is all that is read of them: either's gradient is that of their sum.
    into_rows = None if grad_sums is None else grad_sums[1]
    result: list[Tensor] = _trainer(how.engine)[1](what, how, grad, operands, out, sums, sizes, needs, into_rows)
    return result


@lru_cache(maxsize=16)
def _trainer(engine: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if engine not in TRAINERS:
        raise EngineUnavailable(
            f"the engine {engine!r} has no backward", expected=", ".join(TRAINERS), todo="name one of these engines"
        )
    forward, backward = (importlib.import_module(module) for module in TRAINERS[engine])
    return forward.run_saving, backward.run_backward


@attend_saving.register_fake
def _fake_saving(operands: list[Tensor], sizes: list[int], region: str, plan: str) -> tuple[Tensor, Tensor]:
    what, syms = parse_region(region)
    out = _fake(operands, sizes, region, plan)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    rows = result_shape(replace(what, output=None), dict(zip(syms, sizes, strict=True)))[: len(what.batch) + 1]
    return out, out.new_empty([2, *rows], dtype=dtype)


@attend_backward.register_fake
def _fake_backward(
    grad: Tensor, operands: list[Tensor], out: Tensor, sums: Tensor, sizes: list[int], region: str, plan: str,
    needs: list[bool], grad_sums: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, need in zip(operands, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    operands, sizes, region, plan = inputs
    out, sums = output
    ctx.of_rows = parse_region(region)[0].row_sums
    if not ctx.of_rows:
        ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(*operands, out, sums)
    ctx.sizes, ctx.region, ctx.plan = sizes, region, plan
    ctx.needs = [bool(t.requires_grad) for t in operands]


def _backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[list[Tensor | None], list[None] | None, None, None]:
    *operands, out, sums = ctx.saved_tensors
    more = (grad_sums,) if ctx.of_rows else ()
    found = iter(attend_backward(grad, operands, out, sums, ctx.sizes, ctx.region, ctx.plan, ctx.needs, *more))
    # PyTorch takes an empty list for one of tensors, and wants a list of their gradients.
    return [next(found) if need else None for need in ctx.needs], None if ctx.sizes else [], None, None


attend_saving.register_autograd(_backward, setup_context=_save)
refuse_second_order(attend_backward)


def _check(region: Region, syms: tuple[Sym, ...], operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
    if len(operands) != len(region.operands) or len(sizes) != len(syms):
        raise BadRegion(
            "the call does not fit its region",
            expected=f"{len(region.operands)} operands and {len(syms)} sizes",
            got=f"{len(operands)} and {len(sizes)}",
            todo="pass operands in the order of region.operands, sizes in that of region.syms",
        )
    numbers = dict(zip(syms, sizes))
    for operand, tensor in zip(region.operands, operands):
        shape = tuple(size_of(s, numbers) for s in operand.shape)
        if tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{operand.dtype}":
            raise BadRegion(
                f"operand {operand.name!r} does not fit its region",
                expected=f"{operand.dtype}{list(shape)}",
                got=f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                todo="pass operands in the order of region.operands, sizes in that of region.syms",
            )


@lru_cache(maxsize=1)
def _register_dtensors() -> None:
    from refocus.codegen import sharding

    sharding.register(attend, attend_saving, attend_backward, parse_region)


def _know_dtensors() -> None:
    """Rules for DTensors, once there can be any: their package takes long to import."""
    if "torch.distributed.tensor" in sys.modules:
        _register_dtensors()


_know_dtensors()
