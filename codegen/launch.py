"""Running a generated kernel: pointers, strides and sizes, a grid, and an output to fill."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from refocus.codegen import placing
from refocus.codegen.cache import key_of, load_module, save
from refocus.codegen.interpreter import interpreted, mend
from refocus.codegen.kernel_file import Source
from refocus.codegen.plan import Plan
from refocus.codegen.printer import Argument
from refocus.codegen.tile_lists import QUERIES, lists_of
from refocus.evaluate import size_of
from refocus.ir import Call, Const, Expr, Region
from refocus.simplify import bounds, substitute

INT32_MAX = 2**31 - 1


class Written(Protocol):
    """What was saved to a file, and is loaded from there: the function `name` of the module at `path`."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class Kernel:
    """A kernel in a file: the function `name` of the module at `path`, and how to call it. `own`: what its programs
    have a tile of (see `refocus.codegen.tile_lists`)."""

    name: str
    source: str
    path: Path
    key: str
    region: Region
    plan: Plan
    arguments: tuple[Argument, ...]
    own: str = QUERIES


def saved(source: Source, region: Region, plan: Plan, *more: object) -> Kernel:
    """A kernel whose source is saved; `more`: what it depends on besides region and plan."""
    key = key_of(region, plan, *more)
    return Kernel(source.name, source.text, save(source.text, key), key, region, plan, source.arguments)


def launch(
    kernel: Kernel, operands: Sequence[Tensor], sizes: Sequence[int], grid: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The region's result, contiguous, of `region.out_dtype`, on the operands' device; and the row sums
    (2, *batch, query), which are nothing but memory unless the kernel saves them. `grid`: how many programs, if not one
    for each tile of queries of each batch position."""
    region = kernel.region
    shape, keys = result_shape(region, tuple(sizes))
    device, rank = device_of(operands), len(region.batch)
    out = empty_result(region, sizes, device)
    saves = any(a.kind == "output" and a.index == 1 for a in kernel.arguments)
    sums = torch.empty([2, *shape[: rank + 1]] if saves else [0], dtype=torch.float32, device=device)
    if keys == 0:
        return out.zero_(), sums.fill_(-inf)  # a sum of nothing
    if out.numel():
        programs = -(-shape[rank] // kernel.plan.block_q) * prod(shape[:rank])
        start(kernel, grid or (programs,), operands, sizes, (out, sums))
    return out, sums


def start(
    kernel: Kernel,
    grid: tuple[int, ...],
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor] = (),
    counts: Sequence[int] = (),
) -> None:
    """Run so many programs of a kernel."""
    device, plan = device_of(operands), kernel.plan
    # A tensor without dimensions may stay on the CPU, as in eager code; a kernel cannot read it there.
    operands = [x if x.device == device else x.to(device) for x in operands]
    lists = lists_of(kernel.region, plan, operands, sizes, device, kernel.own) if plan.listed else ()
    given = {"tensor": operands, "list": lists, "size": sizes, "output": outputs, "saved": saved, "count": counts}
    values = [
        operands[a.index].stride(a.dim) if a.kind == "stride" else given[a.kind][a.index] for a in kernel.arguments
    ]
    with on_device(device):
        function_of(kernel)[grid](*values, num_warps=plan.num_warps, num_stages=plan.num_stages)


def device_of(operands: Sequence[Tensor]) -> torch.device:
    """Where the result goes: to the operands that have dimensions."""
    devices = [x.device for x in operands if x.dim()] or [x.device for x in operands]
    return devices[0] if devices else torch.device("cpu")


def function_of(kernel: Written) -> Any:
    """The kernel's Triton function, loaded once; its file is written again if it is gone."""
    known = _functions.get((kernel.path, kernel.source))
    if known is None:
        if interpreted():
            mend()
        known = getattr(load_module(save(kernel.source, kernel.key)), kernel.name)
        _functions[kernel.path, kernel.source] = known
    return known


_functions: dict[tuple[Path, str], Any] = {}


def needs_wide(region: Region, operands: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    """Whether an address or an index of this call may exceed 31 bits."""
    spans = (sum((s - 1) * abs(t) for s, t in zip(x.shape, x.stride())) for x in operands if x.numel())
    return max(spans, default=0) > INT32_MAX or _indices_wide(region, tuple(sizes))


@lru_cache(maxsize=1024)
def _indices_wide(region: Region, sizes: tuple[int, ...]) -> bool:
    if prod(result_shape(region, sizes)[0]) > INT32_MAX:
        return True
    known: dict[Expr, Expr] = {sym: Const(value) for sym, value in zip(region.syms, sizes)}
    placed = () if region.output is None else (placing.row_of(region) or Const(0),)
    for node in {n for root in (*region.expressions, *placed) for n in root.walk()}:
        if isinstance(node, Call) and node.is_int and node.op in ("add", "mul"):
            low, high = bounds(substitute(node, known))
            if (low or 0) < -INT32_MAX or (high or 0) > INT32_MAX:
                return True
    return False


def empty_result(region: Region, sizes: Sequence[int], device: torch.device) -> Tensor:
    """Memory for a result: (*batch, query, *value), or what `region.output` says."""
    shape, _ = result_shape(region, tuple(sizes))
    if region.output is not None:
        shape = placing.shape_of(region.output, dict(zip(region.syms, sizes, strict=True)))
    return torch.empty(shape, dtype=getattr(torch, region.out_dtype), device=device)


@lru_cache(maxsize=1024)
def result_shape(region: Region, sizes: tuple[int, ...]) -> tuple[list[int], int]:
    """(*batch, query, *value) for these sizes, and the number of keys."""
    numbers = dict(zip(region.syms, sizes, strict=True))
    shape = [size_of(a.size, numbers) for a in (*region.batch, region.query, *region.value)]
    return shape, size_of(region.key.size, numbers)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
