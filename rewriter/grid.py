"""Axis positions over whole ranges, kept symbolic so that loads stay views.

A `Grid` is the integer `start + sum(stride * position)` over dimensions of a broadcast. Dimensions count from the
right (-1 is the last), so values of different rank broadcast without being reshaped. While index arithmetic stays of
this form, a load is a slice of the tensor and costs nothing; where it leaves it, `Grid.tensor` makes the positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """`stride` times a position in 0 <= position < `length`, laid along dimension `dim` (negative)."""

    dim: int
    length: int
    stride: int


@dataclass(frozen=True)
class Grid:
    """`start` plus the sum of `terms`, at most one term a dimension. Build it with `grid`."""

    start: int
    terms: tuple[Term, ...]
    device: torch.device | None = None

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(t.dim for t in self.terms)

    def bounds(self) -> tuple[int, int] | None:
        """Smallest and largest value; None for symbolic sizes, so that asking makes no guard."""
        if not all(type(n) is int for n in (self.start, *(x for t in self.terms for x in t))):
            return None
        ends = [(t.length - 1) * t.stride for t in self.terms]
        return self.start + sum(min(e, 0) for e in ends), self.start + sum(max(e, 0) for e in ends)

    def tensor(self, device: torch.device) -> Tensor:
        """The values as an int64 tensor of rank max(-dim), 1 where there is no term."""
        total: Tensor | None = None
        for term in self.terms:
            line = torch.arange(term.length, device=device)
            if type(term.stride) is not int or term.stride != 1:
                line = line * term.stride
            line = line.reshape((-1,) + (1,) * (-term.dim - 1))
            total = line if total is None else total + line
        assert total is not None
        return total + self.start if type(self.start) is not int or self.start else total


def grid(start: int, terms: tuple[Term, ...], device: torch.device | None = None) -> Grid | int:
    """A `Grid`, or the plain integer that it comes down to."""
    kept = tuple(t for t in terms if not (_is(t.length, 1) or _is(t.stride, 0)))
    return Grid(start, kept, device) if kept else start


def _is(value: int, wanted: int) -> bool:
    return type(value) is int and value == wanted


def add(a: Grid | int, b: Grid | int) -> Grid | int:
    if isinstance(a, int | torch.SymInt):
        a, b = b, a
    if isinstance(a, int | torch.SymInt):
        return a + b  # type: ignore[operator]
    if isinstance(b, int | torch.SymInt):
        return Grid(a.start + b, a.terms, a.device)
    merged = {t.dim: t for t in a.terms}
    for term in b.terms:
        held = merged.get(term.dim)
        merged[term.dim] = term if held is None else Term(term.dim, term.length, term.stride + held.stride)
    return grid(a.start + b.start, tuple(merged.values()), a.device)


def scale(a: Grid | int, factor: int) -> Grid | int:
    if isinstance(a, Grid):
        return grid(a.start * factor, tuple(Term(t.dim, t.length, t.stride * factor) for t in a.terms), a.device)
    return a * factor


def divide(a: Grid, by: int) -> tuple[Grid | int, Grid | int] | None:
    """Quotient and remainder, where both are grids again: each term divides, or is too short to carry."""
    if a.bounds() is None or type(by) is not int or by <= 0:
        return None
    whole = tuple(t for t in a.terms if t.stride % by == 0)
    rest = tuple(t for t in a.terms if t.stride % by)
    low = grid(a.start % by, rest, a.device)
    if isinstance(low, Grid):
        lo, hi = low.bounds() or (-1, by)
        if lo < 0 or hi >= by:
            return None
    return grid(a.start // by, tuple(Term(t.dim, t.length, t.stride // by) for t in whole), a.device), low


def read(tensor: Tensor, index: list[Grid | int | Tensor], device: torch.device, overlapping: bool = False) -> Tensor:
    """tensor[index...] over the broadcast of all indices: slices where possible, gathers only along the rest.

    `overlapping`: windows that share elements may be views in which these lie at one place."""
    gathered = _gathered(index, overlapping)
    if gathered and len(gathered) + sum(isinstance(i, int | torch.SymInt) for i in index) == len(index):
        # Constants next to nothing but tensors become tensors: inside FlexAttention's functions all must be.
        like = next((i for i in index if isinstance(i, Tensor)), None)
        if like is not None:
            return tensor[tuple(_as_index(i, like, device) for i in index)]
    labels: list[int] = []  # what each remaining dimension of `view` runs along; gathered ones come first at the end
    picked: list[int] = []
    view = tensor
    for position in reversed(range(len(index))):
        at = index[position]
        if position in gathered:
            labels.insert(0, 0)
            picked.insert(0, position)
        elif isinstance(at, Grid):
            terms = _outermost_first(at)
            view = _slice(view, position, at.start, terms)
            labels[:0] = [t.dim for t in terms]
        else:
            view = view.select(position, at)  # type: ignore[arg-type]
    if picked:
        indices = [i.tensor(device) if isinstance(i, Grid) else i for i in (index[p] for p in picked)]
        along = sorted({d for t in indices for d in spread(t)})  # type: ignore[arg-type]
        view = view.movedim([k for k, d in enumerate(labels) if d == 0], list(range(len(picked))))
        view = _indexed(view, [only(t, along) for t in indices])  # type: ignore[arg-type]
        labels = along + [d for d in labels if d != 0]
    return place(view, labels)


def _indexed(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """tensor[indices], which would ask an index without dimensions for its number."""
    return tensor[tuple(indices)] if any(t.dim() for t in indices) else torch.ops.aten.index.Tensor(tensor, indices)


def add_at(sums: Tensor, index: list[Grid | int | Tensor], part: Tensor, device: torch.device) -> None:
    """sums[index] += part, where several positions may be the same place."""
    if not _gathered(index, True):
        for apart, some in _apart(index, part):
            view = read(sums, apart, device, True)
            view += some.reshape(some.shape[some.dim() - view.dim() :]) if some.dim() > view.dim() else some
        return
    places = [i.tensor(device) if isinstance(i, Grid) else torch.as_tensor(i, device=device) for i in index]
    shape = torch.broadcast_shapes(*(p.shape for p in places))
    if part.dim() > len(shape):
        part = part.reshape(part.shape[part.dim() - len(shape) :])
    # index_put_ adds one after the other (on a GPU after sorting): repeated places give the same sum in every run.
    sums.index_put_(tuple(p.expand(shape) for p in places), part.expand(shape), accumulate=True)


def _apart(index: list[Grid | int | Tensor], part: Tensor) -> Iterator[tuple[list[Grid | int | Tensor], Tensor]]:
    """The same in parts that each reach no place twice: runs of windows no longer than the step between them."""
    for position, at in enumerate(index):
        terms = _outermost_first(at) if isinstance(at, Grid) else []
        if len(terms) < 2 or _in_line(terms) or terms[0].stride >= terms[1].stride * terms[1].length:
            continue
        outer, inner = terms
        step = outer.stride // inner.stride
        cut, step = (inner, step) if inner.length <= step * outer.length else (outer, 1)
        for first in range(0, cut.length, step):
            piece = cut._replace(length=min(step, cut.length - first))
            moved = grid(at.start + first * cut.stride, tuple(piece if t is cut else t for t in terms), at.device)  # type: ignore[union-attr]
            some = part
            if part.dim() >= -cut.dim and part.shape[cut.dim] != 1:
                some = part.narrow(cut.dim, first, piece.length)
            yield from _apart([*index[:position], moved, *index[position + 1 :]], some)
        return
    yield index, part


def _gathered(index: list[Grid | int | Tensor], overlapping: bool) -> set[int]:
    """Positions that need a gather: tensors, grids that are no slice, and grids that share a dimension with others."""
    out = {
        p
        for p, i in enumerate(index)
        if isinstance(i, Tensor) or (isinstance(i, Grid) and not _sliceable(i, overlapping))
    }
    while True:
        taken: set[int] = set()
        for p in out:
            at = index[p]
            taken |= at.dims if isinstance(at, Grid) else spread(at)  # type: ignore[arg-type]
        more: set[int] = set()
        once: dict[int, int] = {}
        for p, at in enumerate(index):
            if isinstance(at, Grid) and p not in out:
                shared = {once[d] for d in at.dims if d in once}
                if at.dims & taken or shared:
                    more |= {p, *shared}
                once.update(dict.fromkeys(at.dims, p))
        if not more:
            return out
        out |= more


def _sliceable(at: Grid, overlapping: bool) -> bool:
    terms = _outermost_first(at)
    if terms[-1].stride <= 0:
        return False
    if _in_line(terms):
        return True
    if not overlapping or len(terms) != 2 or not all(type(n) is int for t in terms for n in t):
        return False
    return terms[0].stride % terms[1].stride == 0


def _outermost_first(at: Grid) -> list[Term]:
    return sorted(at.terms, key=lambda t: -t.stride) if len(at.terms) > 1 else list(at.terms)


def _in_line(terms: Sequence[Term]) -> bool:
    """Whether the positions are one run at the stride of the last term."""
    return all(a.stride == b.stride * b.length for a, b in itertools.pairwise(terms))


def _slice(view: Tensor, position: int, start: int, terms: Sequence[Term]) -> Tensor:
    """The places start + sum of strides along one dimension, split into one dimension a term: a run, or windows."""
    stride = terms[-1].stride
    if not _in_line(terms):
        outer, inner = terms
        reach = (outer.length - 1) * outer.stride + (inner.length - 1) * stride + 1
        view = view.narrow(position, start, reach)
        if stride != 1:
            view = view[(slice(None),) * position + (slice(None, None, stride),)]
        return view.unfold(position, inner.length, outer.stride // stride).movedim(-1, position + 1)
    length = math.prod(t.length for t in terms)
    if not (_is(start, 0) and _is(stride, 1) and _is(length, view.shape[position])):
        if _is(stride, 1):
            view = view.narrow(position, start, length)
        else:
            stop = start + (length - 1) * stride + 1
            view = view[(slice(None),) * position + (slice(start, stop, stride),)]
    return view.unflatten(position, [t.length for t in terms]) if len(terms) > 1 else view


def spread(t: Tensor) -> frozenset[int]:
    """The dimensions (from the right) along which a value is not broadcast."""
    return frozenset(k - t.dim() for k, s in enumerate(t.shape) if s != 1)


def only(t: Tensor, dims: list[int]) -> Tensor:
    """Keep just these dimensions (most negative first); the others are broadcast."""
    rank = max((-d for d in dims), default=0)
    t = t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) if t.dim() < rank else t
    drop = tuple(k for k in range(t.dim()) if k - t.dim() not in dims)
    return t.squeeze(drop) if drop else t


def place(view: Tensor, labels: list[int]) -> Tensor:
    """Put a tensor whose dimensions run along `labels` where those belong, with 1 in between."""
    order = sorted(range(len(labels)), key=lambda k: labels[k])
    if order != list(range(len(labels))):
        view = view.permute(order)
    rank = max((-d for d in labels), default=0)
    if rank == len(labels):
        return view
    return view[tuple(slice(None) if -n in labels else None for n in range(rank, 0, -1))]


def contract(a: Tensor, b: Tensor, over: dict[int, int]) -> Tensor:
    """sum of a * b over the dimensions `over` (dimension -> length), as one matrix product where it is one."""
    in_a, in_b = spread(a), spread(b)
    dims_a, dims_b = sorted(in_a), sorted(in_b)
    out = sorted((in_a | in_b) - set(over))
    both = sorted(in_a | in_b)
    letter = {d: chr(ord("a") + k) for k, d in enumerate(both)}
    spec = ",".join("".join(letter[d] for d in dims) for dims in (dims_a, dims_b))
    spec += "->" + "".join(letter[d] for d in out)
    result = torch.einsum(spec, only(a, dims_a), only(b, dims_b))
    for dim, length in over.items():
        if dim not in in_a and dim not in in_b and not _is(length, 1):
            result = result * length
    return place(result, out)


def _as_index(i: Grid | int | Tensor, like: Tensor, device: torch.device) -> Tensor:
    if isinstance(i, Grid):
        return i.tensor(device)
    return i if isinstance(i, Tensor) else torch.zeros_like(like) + i
