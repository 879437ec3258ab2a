"""Rows that the mask empties, made what the eager code makes of them.

A kernel that only ever visits allowed pairs leaves zeros in a row that has none, where eager code that fills with a
finite minimum gives the mean of all values, and one that fills with -inf gives NaN. `run` finds those rows and
computes them from `region.logits`. It costs one look at one number a row when there are none: an emptied row is zero,
so whatever is not zero needs no repair, and of what is zero the mask decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from refocus.evaluate import Position, Scope, arange_env, size_of
from refocus.grid import contract
from refocus.ir import Axis, Const, Region

# Logits alive at once, in elements.
_BUDGET = 1 << 22


def run(region: Region, out: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Overwrite the emptied rows of `out` (*batch, query, *value), which hold zeros, in place."""
    lanes = out.flatten(len(region.batch) + 1) if region.value else out.unsqueeze(-1)
    if not lanes.numel():
        return
    suspect = lanes[..., 0] == 0
    if bool(suspect.any()):
        _Rows(region, tensors, sizes, out.device).fill(out, suspect)


class _Rows:
    """Recomputes rows densely, for the part of the (*batch, query) grid that the suspects span."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> None:
        self.region = region
        self.named = {o.name: t for o, t in zip(region.operands, tensors, strict=True)}
        self.numbers = dict(zip(region.syms, sizes, strict=True))
        self.rows = (*region.batch, region.query)
        # Dimensions: *batch, query, key, *value.
        self.env = arange_env((*self.rows, region.key, *region.value), self.numbers, device)
        self.key = -1 - len(region.value)
        self.keys = size_of(region.key.size, self.numbers)

    def fill(self, out: Tensor, suspect: Tensor) -> None:
        at = [index.unique() for index in suspect.nonzero(as_tuple=True)]
        lanes = math.prod(size_of(a.size, self.numbers) for a in self.region.value)
        row = math.prod(len(index) for index in at[:-1]) * (self.keys + lanes)
        for queries in at[-1].split(max(1, _BUDGET // row)):
            self._fill(out, suspect, [*at[:-1], queries])

    def _fill(self, out: Tensor, suspect: Tensor, at: list[Tensor]) -> None:
        corner = torch.meshgrid(*at, indexing="ij")
        scope = self._scope(at, torch.float32)
        kept = self._spread(scope.tensor(self.region.mask)).any(self.key)
        kept = kept.reshape((1,) * (len(at) + -self.key - 1 - kept.dim()) + tuple(kept.shape))
        kept = kept.reshape(kept.shape[: len(at)])  # a mask has no value axes
        empty = suspect[corner] & ~kept
        if not bool(empty.any()):
            return
        region = self.region
        weight = self._weight(at)
        if region.gate != Const(1.0, region.gate.dtype):
            weight = weight * scope.tensor(region.gate)
        rows = contract(weight, scope.tensor(region.values), {self.key: self.keys})
        rows = rows.squeeze(self.key) if rows.dim() >= -self.key else rows
        rows = rows.expand(*corner[0].shape, *(size_of(a.size, self.numbers) for a in region.value))
        out[tuple(index[empty] for index in corner)] = rows[empty].to(out.dtype)

    def _weight(self, at: list[Tensor]) -> Tensor:
        """softmax of the logits as the model wrote them, fills included: their rounding is the meaning."""
        wide = any(t.dtype == torch.float64 for t in self.named.values())
        scope = self._scope(at, torch.float64 if wide else torch.float32)
        logits = self._spread(scope.tensor(self.region.logits))
        columns = [scope.tensor(x) for x in self.region.extra]
        if not columns:
            return torch.softmax(logits, self.key)
        shape = list(torch.broadcast_shapes(logits.shape, *(c.shape for c in columns)))
        alone = shape.copy()
        alone[self.key] = 1
        every = torch.cat([logits.expand(shape), *(c.expand(alone) for c in columns)], self.key)
        return torch.softmax(every, self.key).narrow(self.key, 0, self.keys)

    def _scope(self, at: list[Tensor], dtype: torch.dtype) -> Scope:
        rank = len(self.rows) - self.key
        axes: dict[Axis, Position] = dict(self.env)
        for dim, (axis, index) in enumerate(zip(self.rows, at)):
            axes[axis] = index.reshape((-1,) + (1,) * (rank - dim - 1))
        wide = any(t.dtype == torch.float64 for t in self.named.values())
        return Scope(axes, self.named, self.numbers, torch.float64 if wide else dtype)

    def _spread(self, t: Tensor) -> Tensor:
        """Make a value as long as the keys, even if it is the same for all of them."""
        t = t.reshape((1,) * (-self.key - t.dim()) + tuple(t.shape)) if t.dim() < -self.key else t
        shape = list(t.shape)
        shape[self.key] = self.keys
        return t.expand(shape)
