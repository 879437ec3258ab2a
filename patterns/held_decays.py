"""Decays that a model keeps as tensors: their values are compared with the exponentials they should be.

The decays of a chunk are often computed once and kept, for pairs, for queries and for keys. What they are is known from
what passes between chunks; every element must be that, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.ir import Axis, Const, Expr
from refocus.patterns.gate_sums import Sums

# The values of an expression over axes, in float64, and the dtype that they were kept in; None where it is no constant.
Values = Callable[[Expr, Sequence[Axis]], "tuple[Tensor, torch.dtype] | None"]


def no_values(e: Expr, axes: Sequence[Axis]) -> None:
    """Nothing is known."""


@dataclass(frozen=True)
class Held:
    """Factors that are kept as tensors, over `row` and `column`, the last two axes, and others."""

    factors: tuple[Expr, ...]
    row: Axis
    column: Axis
    values: Values

    def sees(self) -> Expr | None:
        """The condition outside of which the factors are zero: a triangle, with or without its diagonal."""
        found = self._product(self._axes(()))
        if found is None or self.row.size != self.column.size:
            return None
        value, _ = found
        diagonal = value.diagonal(0, -2, -1) != 0
        if value.triu(1).any() or not (diagonal.all() or not diagonal.any()):
            return None
        return s.le(self.column, self.row) if diagonal.all() else s.lt(self.column, self.row)

    def are(self, sums: Sums, mask: Expr) -> bool:
        """Whether each element is the exponential of `sums`, up to rounding, where `mask` keeps it, and zero elsewhere.
        An exponent was itself computed in their dtype: the larger it is, the more was lost of it."""
        mine = {self.row, self.column}
        if any(gate.core is not None or place.axes - mine for gate, place in sums.counts):
            return False
        rest = [x for gate, _ in sums.counts for x in gate.rest]
        axes = self._axes(rest)
        found = self._product(axes)
        if found is None:
            return False
        value, dtype = found
        exponent: Tensor = torch.zeros((), dtype=torch.float64)
        for (gate, place), count in sums.counts.items():
            term: Tensor | float = count
            for x in (*gate.rest, place):
                known = self.values(x, axes)
                if known is None:
                    return False
                term = term * known[0]
            exponent = exponent + term
        if dtype not in (torch.float32, torch.float64):
            return False  # too coarse to tell one decay from another
        kept = self.values(s.where(mask, Const(1.0, "float64"), Const(0.0, "float64")), axes)
        if kept is None:
            return False
        wanted = exponent.exp() * kept[0]
        limits = torch.finfo(dtype)
        room = limits.eps * (2 + 2 * exponent.abs()) * len(self.factors) * wanted + limits.tiny
        return bool(((value - wanted).abs() <= room).all())

    def _axes(self, others: Sequence[Expr]) -> list[Axis]:
        found = frozenset[Axis]().union(*(x.axes for x in (*self.factors, *others))) - {self.row, self.column}
        return [*sorted(found, key=lambda a: a.name), self.row, self.column]

    def _product(self, axes: Sequence[Axis]) -> tuple[Tensor, torch.dtype] | None:
        """The product of the factors, over all of the axes, and the coarsest dtype among them."""
        value = torch.ones((), dtype=torch.float64)
        dtype = torch.float64
        for factor in self.factors:
            known = self.values(factor, axes)
            if known is None:
                return None
            value = value * known[0]
            dtype = known[1] if torch.finfo(known[1]).eps > torch.finfo(dtype).eps else dtype
        shape = [int(a.size.value) for a in axes if isinstance(a.size, Const)]
        return (value.expand(shape), dtype) if len(shape) == len(axes) else None
