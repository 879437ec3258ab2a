"""The operator that stands in a graph for one fused region.

    refocus::attend(Tensor[] operands, SymInt[] sizes, str region, str plan) -> Tensor

`operands` are in the order of `region.operands`, `sizes` in that of `region.syms`. `region` and `plan` are the
`repr` of a `Region` and a `Plan`: a graph that holds the call can be printed, hashed, saved and loaded. The result is
contiguous, (*batch, query, *value), of dtype `region.out_dtype`, and shares no memory with the operands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refocus import ir
from refocus.codegen import plan as plans
from refocus.codegen.plan import Plan
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


def result_shape(region: Region, numbers: Mapping[Sym, int]) -> list[int]:
    """(*batch, query, *value) for these sizes."""
    return [size_of(axis.size, numbers) for axis in (*region.batch, region.query, *region.value)]


def call(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
    """Run a region by the operator, as a graph would."""
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
    return engine_named(how.engine)(what, how, operands, sizes)


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
        todo="run the model under torch.no_grad() or torch.inference_mode(), or leave this region to the eager code",
    )


def _no_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise NeedsGradient("refocus::attend has no gradient")


attend.register_autograd(_no_backward, setup_context=lambda ctx, inputs, output: _no_gradient(ctx, inputs, output))


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
