"""The backward of the `triton` engine: generated kernels, and what is left to sum once they are done.

delta (what flows back into a row, times the row) and the sums that are linear in the sequence are torch operations:
a key's gradient over the heads that share it, a slope's over the queries, what is gathered. They have one order too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.codegen import cache, flash_backward, flash_diagonals, flash_pairs, placing
from refocus.codegen.backward_fit import DIAGONALS, MIXED, Gradient, backward_plan, gradients, square, supports_backward
from refocus.codegen.cotangents import cotangents
from refocus.codegen.launch import INT32_MAX, Kernel, device_of, needs_wide, start
from refocus.codegen.plan import Plan
from refocus.codegen.tile_lists import KEYS, PAIRS, QUERIES
from refocus.codegen.tiled import factors
from refocus.codegen.triton_engine import fitted
from refocus.errors import EngineUnavailable
from refocus.evaluate import Scope, arange_env, size_of
from refocus.grid import Grid
from refocus.ir import Axis, Expr, Region, Sym
from refocus.simplify import add, substitute


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
    if task.loop == DIAGONALS:
        source = flash_diagonals.write(region, flows, task.gradients, plan, wide)
    elif task.loop in (PAIRS, MIXED):
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
    into_rows: Tensor | None = None,
) -> list[Tensor]:
    """The gradient of each operand for which `needs` holds, in order, in the operand's shape and dtype.

    `grad`: what flows back into the result `out`, both as the forward puts it. `sums`: from `triton_engine.run_saving`.
    `into_rows`: what flows back into the log-sum-exp of each row, (*batch, query), of a region without an `output`.
    """
    names = [o.name for o, need in zip(region.operands, needs, strict=True) if need]
    wanted = frozenset(names)
    numbers = dict(zip(region.syms, sizes, strict=True))
    results = _Results(dict(zip((o.name for o in region.operands), operands, strict=True)))
    whole = _part(region, numbers, grad, out, sums)
    if into_rows is not None:
        assert region.output is None
        delta = whole.saved[2] - into_rows.to(torch.float32)  # its derivatives are the row's probabilities
        whole = replace(whole, saved=(*whole.saved[:2], delta.contiguous()))
    if sums.numel() and whole.length(region.key) and names:
        for task in tasks(region, wanted):
            parts: Iterable[_Part] = (whole,)
            if task.loop == MIXED:
                parts = _by_rows(whole if region.output is None else _by_query(region, numbers, grad, out, sums))
            for part in parts:
                # The same kernel of the same gradients, in terms of the part's axes.
                same = task if part is whole else _like(task, tasks(part.region, wanted))
                for gradient, value in zip(same.gradients, _sum(part, wanted, same, plan, operands)):
                    results.add(gradient, value, part)
    return [results.of(name) for name in names]


def _like(task: Task, others: Sequence[Task]) -> Task:
    members = {a.name for a in task.members}
    return next(t for t in others if t.loop == task.loop and {a.name for a in t.members} == members)


@dataclass(frozen=True)
class _Part:
    """A region of so many queries, the sizes of its symbols, and its rows of (what flows back, row sums, delta)."""

    region: Region
    numbers: Mapping[Sym, int]
    saved: tuple[Tensor, Tensor, Tensor]

    @property
    def sizes(self) -> list[int]:
        return [self.numbers[s] for s in self.region.syms]

    def length(self, axis: Axis) -> int:
        return size_of(axis.size, self.numbers)

    def of(self, axes: Sequence[Axis]) -> list[int]:
        return [self.length(a) for a in axes]


def _part(region: Region, numbers: Mapping[Sym, int], grad: Tensor, out: Tensor, sums: Tensor) -> _Part:
    """All queries. What flows back and delta lie as the result does, row of values after row of values."""
    lanes = [size_of(axis.size, numbers) for axis in region.value]
    if region.output is not None:
        grad, out = grad.reshape([-1, *lanes]), out.reshape([-1, *lanes])
    return _Part(region, numbers, (grad.to(out.dtype).contiguous(), sums, _delta(grad, out, len(lanes))))


def _by_query(region: Region, numbers: Mapping[Sym, int], grad: Tensor, out: Tensor, sums: Tensor) -> _Part:
    """The same, with both in order of the queries, wherever the result lies."""
    grad, out = (placing.taken(region, t, numbers) for t in (grad, out))
    return _part(replace(region, output=None), numbers, grad, out, sums)


def _by_rows(whole: _Part) -> Iterator[_Part]:
    """So few queries at a time that a number for each of their pairs is little memory."""
    region = whole.region
    queries = whole.length(region.query)
    rest = math.prod(whole.of([*region.batch, region.key]))
    step = max(64, _PAIRS_AT_ONCE // rest // 64 * 64)
    if step >= queries:
        yield whole
        return
    some = _some_queries(region)
    at = len(region.batch)
    grad, sums, delta = whole.saved
    for first in range(0, queries, step):
        count = min(step, queries - first)
        rows = [t.narrow(d, first, count).contiguous() for t, d in ((grad, at), (sums, at + 1), (delta, at))]
        yield _Part(some, {**whole.numbers, _FIRST: first, _COUNT: count}, (rows[0], rows[1], rows[2]))


_PAIRS_AT_ONCE = 1 << 24
_FIRST, _COUNT = Sym("first_row", 0), Sym("row_count", 1)


@lru_cache(maxsize=256)
def _some_queries(region: Region) -> Region:
    """The region for `_COUNT` queries from `_FIRST` on: the operands are whole, and read further on."""
    query = Axis(region.query.name, _COUNT)

    def moved(e: Expr) -> Expr:
        return substitute(e, {region.query: add(query, _FIRST)})

    return replace(
        region,
        query=query,
        score=moved(region.score),
        mask=moved(region.mask),
        logits=moved(region.logits),
        gate=moved(region.gate),
        extra=tuple(moved(x) for x in region.extra),
    )


def _delta(grad: Tensor, out: Tensor, value_axes: int) -> Tensor:
    """(*batch, query), float32"""
    product = grad.to(torch.float32) * out
    return product.sum(tuple(range(-value_axes, 0))) if value_axes else product


def _sum(part: _Part, wanted: frozenset[str], task: Task, plan: Plan, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """What one kernel sums up, each with its gradient's axes."""
    region, device = part.region, device_of(operands)
    batch = math.prod(part.of([a for a in region.batch if a not in task.members]))
    queries, keys = part.length(region.query), part.length(region.key)

    def attempt(fitting: Plan) -> list[Tensor]:
        fitting = square(fitting) if task.loop == DIAGONALS else fitting
        rows, columns = -(-queries // fitting.block_q), -(-keys // fitting.block_k)
        programs = {
            QUERIES: (batch * rows,),
            KEYS: (batch * columns,),
            DIAGONALS: (batch * (rows + columns - 1),),
        }.get(task.loop, (batch * rows, columns))
        outputs = []
        for one in task.gradients:
            shape = part.of(one.axes)
            if task.loop == DIAGONALS:
                shape = [*shape[:-1], rows + columns - 1, fitting.block_q, fitting.block_k]
            # Programs of queries do not write the tiles that the mask empties.
            make = torch.zeros if one.loop == PAIRS and task.loop == QUERIES else torch.empty
            outputs.append(make(shape, dtype=getattr(torch, one.dtype), device=device))
        wide = needs_wide(region, operands, part.sizes) or any(t.numel() > INT32_MAX for t in outputs)
        start(emit(region, wanted, task, fitting, wide), programs, operands, part.sizes, outputs, part.saved)
        if task.loop == DIAGONALS:
            return [flash_diagonals.by_difference(t, queries, keys) for t in outputs]
        return outputs

    return fitted((region, task), backward_plan(region, plan, task.loop), device, attempt)


class _Results:
    """The gradients of the operands, put together from those of their loads."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named
        self._whole: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, gradient: Gradient, value: Tensor, part: _Part) -> None:
        name = gradient.load.tensor
        like = self.named[name]
        if gradient.direct:
            self._whole[name] = value.reshape(like.shape)
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros(like.shape, dtype=torch.float32, device=value.device)
        lengths = {a: factors(a, part.length(a), [gradient.place]) for a in gradient.axes}
        env = arange_env(gradient.axes, part.numbers, value.device, lengths)
        scope = Scope(env, self.named, part.numbers, torch.float32)
        index = [scope.value(i) for i in gradient.place.index]
        kept = set[int]()
        for at in index:
            kept |= at.dims if isinstance(at, Grid) else grids.spread(at) if isinstance(at, Tensor) else set()
        split = value.reshape([n for a in gradient.axes for n in lengths[a]])
        over = [d for d in range(-split.dim(), 0) if d not in kept]
        grids.add_at(self._sums[name], index, split.sum(over, keepdim=True) if over else split, value.device)

    def of(self, name: str) -> Tensor:
        like = self.named[name]
        if name in self._whole:
            return self._whole[name]
        total = self._sums.get(name)
        return torch.zeros_like(like, memory_format=torch.contiguous_format) if total is None else total.to(like)
