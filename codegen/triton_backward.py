"""The backward of the `triton` engine: generated kernels, and what is left to sum once they are done.

delta (what flows back into a row, times the row) and the sums that are linear in the sequence are torch operations:
a key's gradient over the heads that share it, a slope's over the queries, what is gathered. They have one order too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.codegen import cache, flash_backward, flash_pairs
from refocus.codegen.backward_fit import KEYS, PAIRS, QUERIES, Gradient, backward_plan, gradients, supports_backward
from refocus.codegen.cotangents import cotangents
from refocus.codegen.launch import INT32_MAX, Kernel, device_of, needs_wide, start
from refocus.codegen.plan import Plan
from refocus.codegen.tiled import factors
from refocus.codegen.triton_engine import fitted
from refocus.errors import EngineUnavailable
from refocus.evaluate import Scope, arange_env, size_of
from refocus.grid import Grid
from refocus.ir import Axis, Region


@dataclass(frozen=True)
class Task:
    """One kernel of the backward: its loop, the axes that its programs go through, and the gradients it sums."""

    loop: str
    members: tuple[Axis, ...]
    gradients: tuple[Gradient, ...]


@lru_cache(maxsize=256)
def tasks(region: Region, wanted: frozenset[str]) -> tuple[Task, ...]:
    """The kernels that the wanted operands need. Raises `EngineUnavailable`."""
    reason = supports_backward(region, wanted)
    if reason is not None:
        raise EngineUnavailable(
            "the triton engine cannot differentiate this region", got=reason, todo="use engine='tiled'"
        )
    found: dict[tuple[str, tuple[Axis, ...]], list[Gradient]] = {}
    for one in gradients(region, wanted):
        loop = QUERIES if one.loop == PAIRS and not one.members else one.loop
        found.setdefault((loop, one.members), []).append(one)
    return tuple(Task(loop, members, tuple(some)) for (loop, members), some in found.items())


@lru_cache(maxsize=512)
def emit(region: Region, wanted: frozenset[str], task: Task, plan: Plan, wide: bool = False) -> Kernel:
    """The kernel of a task, its source saved. Needs neither a GPU nor Triton."""
    flows = cotangents(region, wanted)
    if task.loop == PAIRS:
        source = flash_pairs.write(region, flows, task.gradients, plan, wide)
    else:
        source = flash_backward.write(region, flows, task.gradients, task.loop, plan, wide)
    key = cache.key_of(region, sorted(wanted), task, plan, wide)
    return Kernel(
        source.name, source.text, cache.save(source.text, key), key, region, plan, source.arguments, task.loop
    )


def run_backward(
    region: Region,
    plan: Plan,
    grad: Tensor,
    operands: Sequence[Tensor],
    out: Tensor,
    sums: Tensor,
    sizes: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradient of each operand for which `needs` holds, in order, in the operand's shape and dtype.

    `grad`: what flows back into the result `out`, (*batch, query, *value). `sums`: from `triton_engine.run_saving`.
    """
    named = {o.name: t for o, t in zip(region.operands, operands, strict=True)}
    names = [o.name for o, need in zip(region.operands, needs, strict=True) if need]
    wanted = frozenset(names)
    shapes = _Shapes(region, sizes)
    parts: list[tuple[Gradient, Tensor]] = []
    if sums.numel() and shapes.length(region.key) and names:
        grad = grad.to(out.dtype).contiguous()
        delta = _delta(grad, out, len(region.value))
        for task in tasks(region, wanted):
            outputs = _sum(region, wanted, task, plan, operands, shapes, (grad, sums, delta))
            parts += zip(task.gradients, outputs)
    return [_placed(named[name], [(g, t) for g, t in parts if g.load.tensor == name], named, shapes) for name in names]


class _Shapes:
    """The sizes of one call."""

    def __init__(self, region: Region, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.numbers = dict(zip(region.syms, sizes, strict=True))

    def length(self, axis: Axis) -> int:
        return size_of(axis.size, self.numbers)

    def of(self, axes: Sequence[Axis]) -> list[int]:
        return [self.length(a) for a in axes]


def _delta(grad: Tensor, out: Tensor, value_axes: int) -> Tensor:
    """(*batch, query), float32"""
    product = grad.to(torch.float32) * out
    return product.sum(tuple(range(-value_axes, 0))) if value_axes else product


def _sum(
    region: Region,
    wanted: frozenset[str],
    task: Task,
    plan: Plan,
    operands: Sequence[Tensor],
    shapes: _Shapes,
    saved: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor]:
    """What one kernel sums up, each with its gradient's axes."""
    device = device_of(operands)
    outputs = []
    for one in task.gradients:
        # Programs of queries do not write the tiles that the mask empties.
        make = torch.zeros if one.loop == PAIRS and task.loop == QUERIES else torch.empty
        outputs.append(make(shapes.of(one.axes), dtype=getattr(torch, one.dtype), device=device))
    wide = needs_wide(region, operands, shapes.sizes) or any(t.numel() > INT32_MAX for t in outputs)
    batch = math.prod(shapes.of([a for a in region.batch if a not in task.members]))
    queries, keys = shapes.length(region.query), shapes.length(region.key)

    def attempt(fitting: Plan) -> None:
        rows, columns = -(-queries // fitting.block_q), -(-keys // fitting.block_k)
        programs = {QUERIES: (batch * rows,), KEYS: (batch * columns,), PAIRS: (batch * rows, columns)}[task.loop]
        start(emit(region, wanted, task, fitting, wide), programs, operands, shapes.sizes, outputs, saved)

    fitted((region, task), backward_plan(region, plan, task.loop), device, attempt)
    return outputs


def _placed(like: Tensor, parts: list[tuple[Gradient, Tensor]], named: dict[str, Tensor], shapes: _Shapes) -> Tensor:
    """The gradient of an operand, from those of its loads."""
    if len(parts) == 1 and parts[0][0].direct:
        return parts[0][1].reshape(like.shape)
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for gradient, part in parts:
        lengths = {a: factors(a, shapes.length(a), [gradient.load]) for a in gradient.axes}
        env = arange_env(gradient.axes, shapes.numbers, part.device, lengths)
        scope = Scope(env, named, shapes.numbers, torch.float32)
        index = [scope.value(i) for i in gradient.load.index]
        kept = set[int]()
        for at in index:
            kept |= at.dims if isinstance(at, Grid) else grids.spread(at) if isinstance(at, Tensor) else set()
        split = part.reshape([n for a in gradient.axes for n in lengths[a]])
        over = [d for d in range(-split.dim(), 0) if d not in kept]
        grids.add_at(total, index, split.sum(over, keepdim=True).to(like.device) if over else split, like.device)
    return total.to(like.dtype)
