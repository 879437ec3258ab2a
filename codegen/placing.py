"""Results that are put where the model wants them: heads merged, windows put together again, a roll undone.

`Region.output` says at which place of a tensor each element of the result belongs. Where strides say it (dimensions
in another order, or merged), the result is written there at once, through a view; elsewhere it is moved once.
Generated kernels write whole rows of values, at the number that `row_of` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import Axis, Const, Expr, Output, Region, Sym
from refocus.polynomial import isolate, to_poly

Numbers = Mapping[Sym, int]


@lru_cache(maxsize=512)
def row_of(region: Region) -> Expr | None:
    """Which row of values, of all that the output consists of, belongs to a batch position and a query; None where
    values are not put next to one another, in their order."""
    assert region.output is not None
    width = s.mul(1, *(axis.size for axis in region.value))
    if width == Const(0):
        return None
    value = _flat(region.value, [axis.size for axis in region.value])
    first = s.sub(_flat(region.output.index, region.output.shape), value)
    row = s.floordiv(first, width)
    return row if not row.axes & set(region.value) and s.mul(row, width) == first else None


def _flat(index: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """Where a position lies in contiguous memory."""
    flat: Expr = Const(0)
    for entry, size in zip(index, shape, strict=True):
        flat = s.add(s.mul(flat, size), entry)
    return flat


def axes_of(region: Region) -> tuple[Axis, ...]:
    """The axes of a result, in order."""
    return (*region.batch, region.query, *region.value)


def shape_of(output: Output, numbers: Numbers) -> list[int]:
    return [size_of(size, numbers) for size in output.shape]


def viewed(region: Region, placed: Tensor, numbers: Numbers) -> Tensor | None:
    """A contiguous tensor of the output's shape, seen as (*batch, query, *value). None where no strides say that."""
    assert region.output is not None
    flat = _flat(region.output.index, [Const(size) for size in placed.shape])
    known: dict[Expr, Expr] = {sym: Const(n) for sym, n in numbers.items()}
    rest = to_poly(s.substitute(flat, known))
    strides = []
    for axis in axes_of(region):
        slope, rest = isolate(rest, axis)
        if set(slope) - {()}:
            return None
        strides.append(slope.get((), 0))
    if set(rest) - {()} or min(strides, default=0) < 0:
        return None
    sizes = [size_of(axis.size, numbers) for axis in axes_of(region)]
    return placed.as_strided(sizes, strides, rest.get((), 0) + placed.storage_offset())


def empty(region: Region, numbers: Numbers, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for a result as (*batch, query, *value), and the tensor that it is part of, if it is put into one."""
    sizes = [size_of(axis.size, numbers) for axis in axes_of(region)]
    if region.output is not None:
        whole = torch.empty(shape_of(region.output, numbers), dtype=dtype, device=device)
        out = viewed(region, whole, numbers)
        if out is not None:
            return out, whole
    out = torch.empty(sizes, dtype=dtype, device=device)
    return out, out


def put(region: Region, out: Tensor, whole: Tensor, numbers: Numbers) -> Tensor:
    """A result of `empty`, once it is filled, where it belongs."""
    if region.output is None or whole is not out:
        return whole
    whole = out.new_empty(shape_of(region.output, numbers))
    there = viewed(region, whole, numbers)
    if there is not None:
        there.copy_(out)
    else:
        whole[_places(region, numbers, out.device)] = out
    return whole


def taken(region: Region, placed: Tensor, numbers: Numbers) -> Tensor:
    """The result as (*batch, query, *value), from where it was put."""
    if region.output is None:
        return placed
    placed = placed.contiguous()
    out = viewed(region, placed, numbers)
    return placed[_places(region, numbers, placed.device)] if out is None else out


def _places(region: Region, numbers: Numbers, device: torch.device) -> tuple[Tensor, ...]:
    assert region.output is not None
    axes = axes_of(region)
    env = arange_env(axes, numbers, device)
    found = [evaluate(entry, env, {}, numbers).to(device) for entry in region.output.index]
    # One of them in full: what is read at indices has the shape that these have together.
    sizes = [size_of(axis.size, numbers) for axis in axes]
    return (*found[:-1], found[-1].expand(sizes)) if found else ()
