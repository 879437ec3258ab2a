"""Results that are put where the model wants them: heads merged, windows put together again, a roll undone.

`Region.output` says at which place of a tensor each element of the result belongs. Where strides say it (dimensions
in another order, or merged), the result is written there at once, through a view; elsewhere it is moved once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import Axis, Const, Expr, Output, Region, Sym
from refocus.polynomial import isolate, to_poly

Numbers = Mapping[Sym, int]


def axes_of(region: Region) -> tuple[Axis, ...]:
    """The axes of a result, in order."""
    return (*region.batch, region.query, *region.value)


def shape_of(output: Output, numbers: Numbers) -> list[int]:
    return [size_of(size, numbers) for size in output.shape]


def viewed(region: Region, placed: Tensor, numbers: Numbers) -> Tensor | None:
    """A contiguous tensor of the output's shape, seen as (*batch, query, *value). None where no strides say that."""
    assert region.output is not None
    flat: s.IntLike = 0
    for entry, size in zip(region.output.index, placed.shape):
        flat = s.add(s.mul(flat, size), entry)
    known: dict[Expr, Expr] = {sym: Const(n) for sym, n in numbers.items()}
    rest = to_poly(s.substitute(s.expr(flat), known))
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
