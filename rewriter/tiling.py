"""The space that a mask is a predicate over, cut into tiles, and the tensors that the predicate reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refocus.evaluate import size_of
from refocus.ir import Axis, Expr, Region, Sym


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles of `block_q` queries by `block_k` keys, at each position of the batch axes.

    `tensors`: what loads read, by name; `sizes` may hold traced (symbolic) integers; `device`: where tiles are found,
    by default where what the predicate loads is; `rows`: the queries that are looked at (from a whole tile on, up to
    but not including), by default all.
    """

    batch: tuple[Axis, ...]
    query: Axis
    key: Axis
    block_q: int
    block_k: int
    tensors: Mapping[str, Tensor]
    sizes: Mapping[Sym, int]
    device: torch.device | str | None = None
    rows: tuple[int, int] | None = None

    @staticmethod
    def of(
        region: Region, block_q: int, block_k: int, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int],
        device: torch.device | str | None = None,
    ) -> Tiling:  # fmt: skip
        return Tiling(region.batch, region.query, region.key, block_q, block_k, tensors, sizes, device)

    @property
    def queries(self) -> int:
        """How many queries are looked at."""
        return size_of(self.query.size, self.sizes) if self.rows is None else self.rows[1] - self.rows[0]

    @property
    def first(self) -> int:
        """The first of these."""
        return 0 if self.rows is None else self.rows[0]

    @property
    def keys(self) -> int:
        return size_of(self.key.size, self.sizes)

    @property
    def blocks(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    def seen_by(self, mask: Expr) -> Tiling:
        """With no more batch axes than the mask depends on, and a device."""
        device = self.device
        if device is None:
            device = next((self.tensors[load.tensor].device for load in mask.loads), torch.device("cpu"))
        return replace(self, batch=tuple(b for b in self.batch if b in mask.axes), device=device)
