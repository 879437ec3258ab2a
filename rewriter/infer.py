"""The closed form of a constant mask, found in its values and proved on every one of them.

    constant_form(tensor)          a number, a position or a closed form over `axes_of(tensor)`, or None
    closed_form(tensor)            a predicate, or a choice between two numbers
    agrees(form, axes, tensor)     the proof: every element compared, in blocks

A mask that was built by a loop, read from a file or kept as a buffer is as regular as one written with arange; what it
is a function of only has to be found again. The search (`refocus.infer_matrix`) may guess freely, because nothing is
believed that `agrees` does not confirm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.bits import Rows, full, pack
from refocus.evaluate import evaluate
from refocus.grid import Grid, Term, grid
from refocus.infer_family import family
from refocus.infer_matrix import Matrix, search
from refocus.infer_sets import set_form
from refocus.ir import BOOL, INT, Axis, Const, Expr
from refocus.lags import lags

# Elements of a tensor that is looked at, and of one block of it; planes that may differ; nodes of a form.
_HARD = 1.0e4  # a fill at least so large removes keys
_LARGEST, _BLOCK, _MOST_PLANES, _MOST_NODES = 1 << 27, 1 << 18, 256, 100


def axes_of(tensor: Tensor) -> tuple[Axis, ...]:
    """The axes that a form of this tensor is over: one for each dimension."""
    return tuple(Axis(f"dim{k}", Const(size)) for k, size in enumerate(tensor.shape))


def constant_form(tensor: Tensor) -> Expr | None:
    """A constant as an expression over `axes_of` it: one number, a position, or a `closed_form`."""
    if tensor.numel() == 0 or tensor.is_complex():
        return None
    first = tensor[(0,) * tensor.dim()]
    if tensor.numel() == 1 or (bool((_some(tensor) == first).all()) and bool((tensor == first).all())):
        number = first.item()
        if tensor.dtype == torch.bool:
            return Const(bool(number), BOOL)
        if not tensor.is_floating_point():
            return Const(number)
        return Const(float(number), str(tensor.dtype).removeprefix("torch."))
    return _affine(tensor) or closed_form(tensor)


def _affine(tensor: Tensor) -> Expr | None:
    """An integer tensor that is linear in its position (a kept arange) is an index expression."""
    if tensor.dtype not in (torch.int64, torch.int32):
        return None
    axes = axes_of(tensor)
    origin = int(tensor[(0,) * tensor.dim()])
    form: Expr = Const(origin)
    for dim, axis in enumerate(axes):
        if tensor.shape[dim] > 1:
            at = [0] * tensor.dim()
            at[dim] = 1
            form = s.add(form, s.mul(int(tensor[tuple(at)]) - origin, axis))
    return form if agrees(form, axes, tensor) else None


def closed_form(tensor: Tensor) -> Expr | None:
    """What a bool tensor, or one that holds two different numbers, is as a function of its dimensions `axes_of`."""
    if not 0 < tensor.numel() <= _LARGEST or tensor.is_complex() or tensor.layout != torch.strided:
        return None
    if tensor.is_floating_point() and not _may_switch(tensor):
        return None
    axes = axes_of(tensor)
    shape = _Shape.of(tensor)
    with torch.no_grad():
        read = _read(shape.planes(tensor))
    if read is None or not _is_mask(read):
        return None
    found = _planes_form(read, shape, axes)
    if found is None:
        return None
    form = s.where(found, read.yes, read.no)
    if sum(1 for _ in form.walk()) > _MOST_NODES or not agrees(form, axes, tensor):
        return None
    return form


def _may_switch(tensor: Tensor) -> bool:
    """Whether a few elements hold two numbers: caches and weights, which hold one or many, need not be read whole."""
    return len(_some(tensor.detach()).reshape(-1).cpu().double().unique()) == 2


def _some(tensor: Tensor) -> Tensor:
    """A few elements from all over a tensor."""
    return tensor[tuple(slice(None, None, max(1, size // 24)) for size in tensor.shape)]


def _is_mask(read: _Read) -> bool:
    """Integers and booleans always; floats that switch keys on and off. A soft bias stays in memory."""
    numbers = [read.yes.value, read.no.value]
    hard = numbers[0] != numbers[1] and all(v in (0.0, 1.0) or abs(v) >= _HARD for v in numbers)
    return hard or not read.yes.is_float


def agrees(form: Expr, axes: Sequence[Axis], tensor: Tensor) -> bool:
    """Whether the form gives every element of the tensor (of floats: up to the sign of zero)."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0:  # the same memory all along
            tensor = tensor.narrow(dim, 0, 1)
    wide = tensor.dtype in (torch.float64, torch.float32)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    known = lags(form, *axes[-2:]) if tensor.dim() >= 2 and not form.loads else None
    with torch.no_grad():
        for at, block in _blocks(tensor):
            positions, tensors = dict(zip(axes, at)), {}
            if known is not None and isinstance(rows := at[-2], Grid) and isinstance(at[-1], Grid):
                [term] = rows.terms
                positions[known.local] = grid(0, (term,))
                tensors = known.block(int(rows.start), term.length)
            value = evaluate(known.form if known is not None and tensors else form, positions, tensors, {}, dtype)
            if tensor.is_floating_point() and not wide:
                value = value.to(tensor.dtype)
            if not bool(torch.eq(value, block).all()):
                return False
    return True


def _blocks(tensor: Tensor) -> Iterator[tuple[list[Any], Tensor]]:
    """Parts of a tensor, with the position of each dimension."""
    shape = tensor.shape
    cut = next((d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= _BLOCK), 0)
    step = max(1, _BLOCK // max(1, math.prod(shape[cut + 1 :])))
    lead = [range(n) for n in shape[:cut]]
    inner = [grid(0, (Term(d - len(shape), n, 1),)) for d, n in enumerate(shape) if d > cut]
    for place in _product(lead):
        part = tensor[place]
        if not shape:
            yield [], part.cpu()
            return
        for start in range(0, shape[cut], step):
            count = min(step, shape[cut] - start)
            rows = grid(start, (Term(cut - len(shape), count, 1),))
            yield [*place, rows, *inner], part.narrow(0, start, count).cpu()


def _product(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _product(ranges[1:]):
            yield (first, *rest)


# ------------------------------------------------------------------------------------------------------ the planes


@dataclass(frozen=True)
class _Shape:
    """How dimensions are taken: `lead` one plane each, `query` and `key` flattened; the others do not vary."""

    lead: tuple[int, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        dims = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and tensor.stride(d) != 0]
        sizes = [tensor.shape[d] for d in dims]
        half = len(dims) // 2
        if len(dims) in (4, 6) and sizes[:half] == sizes[half:]:  # [H, W, H, W]
            return _Shape((), tuple(dims[:half]), tuple(dims[half:]))
        if len(dims) == 1:
            return _Shape((), (), tuple(dims))
        return _Shape(tuple(dims[:-2]), tuple(dims[-2:-1]), tuple(dims[-1:]))

    def planes(self, tensor: Tensor) -> Tensor:
        """[planes, query, key]"""
        kept = (*self.lead, *self.query, *self.key)
        flat = tensor[tuple(slice(None) if d in kept else 0 for d in range(tensor.dim()))]
        sizes = [math.prod(tensor.shape[d] for d in group) for group in (self.lead, self.query, self.key)]
        return flat.reshape(sizes)

    def flat(self, dims: Sequence[int], axes: Sequence[Axis]) -> Expr:
        out: Expr = Const(0)
        for d in dims:
            out = s.add(s.mul(out, axes[d].size), axes[d])
        return out


@dataclass(frozen=True)
class _Read:
    """Each plane's rows, with ones where the tensor holds `yes`; it holds `no` elsewhere."""

    planes: list[Rows]
    height: int
    width: int
    yes: Const
    no: Const


def _read(tensor: Tensor) -> _Read | None:
    """None where there are more than two numbers."""
    count, height, width = tensor.shape
    if count > _MOST_PLANES or max(height, width) > 1 << 17:
        return None
    truth = tensor.dtype == torch.bool
    numbers: list[Any] = [True, False] if truth else []
    planes: list[Rows] = []
    step = max(1, _BLOCK // width)
    for plane in tensor:
        rows: Rows = []
        for start in range(0, height, step):
            block = plane[start : start + step].cpu()
            if not truth:
                found = _two(block, numbers)
                if found is None:
                    return None
                block = found
            rows += pack(block)
        planes.append(rows)
    kind = BOOL if truth else str(tensor.dtype).removeprefix("torch.") if tensor.is_floating_point() else INT
    yes, no = (Const(float(v) if tensor.is_floating_point() else v, kind) for v in (*numbers, *numbers)[:2])
    return _Read(planes, height, width, yes, no)


def _two(block: Tensor, numbers: list[Any]) -> Tensor | None:
    """Where a block holds the first of two numbers. `numbers` are the ones known so far, of this block too after."""
    if not numbers:
        numbers.append(block.reshape(-1)[0].item())
    first = block == numbers[0]
    if len(numbers) == 1:
        if bool(first.all()):
            return first
        numbers.append(block[~first][0].item())
    if not bool((first | (block == numbers[1])).all()):
        return None
    return first


def _planes_form(read: _Read, shape: _Shape, axes: Sequence[Axis]) -> Expr | None:
    whole = full(read.width)
    i, j = Axis("row", Const(read.height)), Axis("column", Const(read.width))
    known: dict[tuple[int, ...], Expr | None] = {}
    for rows in read.planes:
        key = tuple(rows)
        if key not in known:
            if len(known) >= _MOST_PLANES:
                return None
            matrix = Matrix(rows, [whole & ~r for r in rows], read.width)
            if not shape.query:
                known[key] = set_form(matrix.on[0], matrix.off[0], j)
            else:
                known[key] = search(matrix, i, j)
            if known[key] is None:
                return None
    forms = [form for rows in read.planes if (form := known[tuple(rows)]) is not None]
    place = Axis("plane", Const(len(forms)))
    found = forms[0] if len(set(forms)) == 1 else family(forms, place)
    if found is None:
        return None
    at: Mapping[Expr, Expr] = {
        place: shape.flat(shape.lead, axes), i: shape.flat(shape.query, axes), j: shape.flat(shape.key, axes)
    }  # fmt: skip
    return s.substitute(found, at)
