"""The backward of the portable engine: the same tiles as its forward, probabilities computed again from the saved sums.

    for each tile of queries, for each tile of keys that the mask does not empty:
        p = exp(score - largest - log of the sum) where the mask keeps the pair, else 0
        every operand that wants it receives its shares (`refocus.codegen.cotangents`)

Each share is summed over what the operand does not depend on, within the tile, and added to the place that the operand
is read at, tile after tile: the order never changes, so gradients are the same in every run. Sums are float32 (float64
for float64 operands). Beyond the gradients themselves, memory is a few tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.codegen import placing
from refocus.codegen.cotangents import Cotangents, cotangents
from refocus.codegen.plan import Plan
from refocus.codegen.runs import Column
from refocus.codegen.tiled import Tiles, exp_, scaled, spread
from refocus.differentiate import Share
from refocus.evaluate import Scope
from refocus.grid import Grid, contract
from refocus.ir import Call, Const, Expr, Load, Region


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

    `grad`: what flows back into the result `out`, both as the forward puts it. `sums`: from `tiled.run_saving`.
    `into_rows`: what flows back into the log-sum-exp of each row, (*batch, query).
    """
    numbers = dict(zip(region.syms, sizes, strict=True))
    grad, out = (placing.taken(region, t, numbers) for t in (grad, out))
    return _Backward(region, plan, operands, sizes, needs).gradients(grad, out, sums, into_rows)


@dataclass(frozen=True)
class Row:
    """What the backward knows of a tile of queries: what flows back into its result, `delta`, and its row sums."""

    grad: Tensor
    delta: Tensor
    top: Tensor
    log_total: Tensor

    def probability(self, logits: Tensor) -> Tensor:
        return exp_(torch.sub(logits, self.top).sub_(self.log_total))


class _Backward:
    def __init__(
        self, region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int], needs: Sequence[bool]
    ) -> None:
        self.region, self.operands = region, operands
        self.tiles = Tiles.of(region, plan, operands, sizes)
        self.dtype = self.tiles.scope.float_dtype
        self.wanted = [o.name for o, need in zip(region.operands, needs, strict=True) if need]
        self.flows: Cotangents = cotangents(region, frozenset(self.wanted))
        self.totals = {
            o.name: torch.zeros(t.shape, dtype=self.dtype, device=self.tiles.scope.device)
            for o, t in zip(region.operands, operands)
            if o.name in self.wanted
        }

    def gradients(self, grad: Tensor, out: Tensor, sums: Tensor, into_rows: Tensor | None) -> list[Tensor]:
        tiles = self.tiles
        lead, rank = tiles.lead, len(self.region.batch) + 1
        if sums.numel() and tiles.keys:
            rows = (*sums,) if into_rows is None else (*sums, into_rows)
            whole = [t.reshape([*lead, tiles.queries, *t.shape[rank:]]) for t in (grad, out, *rows)]
            for scope, parts in tiles.chunks(*whole):
                for run in tiles.runs(scope):
                    self._row(tiles.rows(scope, run), run.columns, *(tiles.part(t, run) for t in parts))
        named = {o.name: t for o, t in zip(self.region.operands, self.operands)}
        return [self.totals[name].to(device=named[name].device, dtype=named[name].dtype) for name in self.wanted]

    # ------------------------------------------------------------------------------------------------ rows

    def _row(
        self,
        rows: Scope,
        columns: Sequence[Column],
        grad: Tensor,
        out: Tensor,
        top: Tensor,
        total: Tensor,
        into_rows: Tensor | None = None,
    ) -> None:
        """The queries of a run. Tensors are (*batch, tile, query, *value); here they get a key dimension of 1."""
        tiles, flows = self.tiles, self.flows
        ones = [1] * (1 + len(tiles.value))
        grad = grad.to(self.dtype).unsqueeze(tiles.key_dim)
        over = tuple(range(tiles.key_dim + 1, 0))
        product = grad * out.to(self.dtype).unsqueeze(tiles.key_dim)
        delta = product.sum(over, keepdim=True) if over else product
        if into_rows is not None:  # a row's log-sum-exp has its probabilities as derivatives
            delta = delta - into_rows.reshape([*into_rows.shape, *ones])
        if self.region.empty_row == "zero":  # weights of rows without keys are zero, and no number less another
            none = top == -torch.inf
            top, total = torch.where(none, 0.0, top), torch.where(none, torch.inf, total)
        row = Row(grad, delta, top.reshape([*top.shape, *ones]), total.reshape([*total.shape, *ones]))
        empty = self._empty(rows, columns)
        _give(rows, flows.out, grad)
        for column, tile in tiles.columns(rows, columns):
            keep = tiles.keep(column, rows, tile)
            self._tile(tile, column.length, self.region.score, keep, row, flows.of_score)
        if empty is not None:
            for column, tile in tiles.columns(rows, tiles.tiled.everything()):
                self._tile(tile, column.length, self.region.logits, empty, row, flows.of_logits)
        for k, (extra, seed) in enumerate(zip(self.region.extra, flows.extra)):
            _give(rows, seed, -row.probability(rows.tensor(extra)) * delta)
            self._receive(rows, flows.of_extra[k])

    def _empty(self, rows: Scope, columns: Sequence[Column]) -> Tensor | None:
        """Which rows have no key and were computed from their fills; None if there are none."""
        tiles = self.tiles
        if self.region.empty_row != "logits" or not all(c.is_masked_throughout for c in columns):
            return None
        kept = torch.zeros(1, dtype=torch.bool, device=rows.device)
        for column, tile in tiles.columns(rows, columns):
            keep = spread(tile.tensor(self.region.mask), tiles.key_dim, column.length)
            kept = kept | keep.any(tiles.key_dim, keepdim=True)
        return None if bool(kept.all()) else ~kept

    def _tile(
        self,
        tile: Scope,
        length: int,
        score: Expr,
        keep: Tensor | None,
        row: Row,
        shares: Iterable[Share],
    ) -> None:
        """One tile of pairs, in which `keep` (None: all) count; `shares` are those of the score."""
        tiles, region, flows = self.tiles, self.region, self.flows
        probability = row.probability(spread(tile.tensor(scaled(score)), tiles.key_dim, length))
        if keep is not None:
            probability = torch.where(keep, probability, 0.0)
        back = contract(row.grad, tile.tensor(region.values), self._values(row.grad))
        gated = back
        if tiles.gated:
            gate = tile.tensor(region.gate)
            gated = gate * back
            weight = probability * gate
            _give(tile, flows.weight, weight if keep is None else torch.where(keep, weight, 0.0))
            if flows.of_gate:
                _give(tile, flows.gate, probability * back)
        else:
            _give(tile, flows.weight, probability)
        self._receive(tile, flows.of_values)
        self._receive(tile, flows.of_gate)
        if shares:
            back_score = probability * (gated - row.delta)
            # What does not count gives nothing, whatever is infinite or NaN in its row.
            _give(tile, flows.score, back_score if keep is None else torch.where(keep, back_score, 0.0))
            self._receive(tile, shares)

    def _values(self, grad: Tensor) -> dict[int, int]:
        """The value dimensions, with their lengths."""
        return {dim: grad.shape[dim] for dim in range(self.tiles.key_dim + 1, 0)}

    # ------------------------------------------------------------------------------------------------ gradients

    def _receive(self, scope: Scope, shares: Iterable[Share]) -> None:
        for share in shares:
            sums = self.totals[share.load.tensor]
            inner, _ = scope.bind(share.over) if share.over and share.other is not None else (scope, {})
            index = [inner.value(i) for i in share.load.index]
            kept = set[int]()
            for at in index:
                kept |= at.dims if isinstance(at, Grid) else grids.spread(at) if isinstance(at, Tensor) else set()
            factors, flowing = _factors(share)
            cotangent = inner.tensor(flowing)
            other = inner.tensor(share.other) if share.other is not None else torch.ones((), dtype=self.dtype)
            lengths = self._lengths(scope, cotangent, other)
            part = contract(cotangent, other, {d: n for d, n in lengths.items() if d not in kept})
            for op, factor in factors:
                part = part * factor if op == "mul" else part / factor
            grids.add_at(sums, index, part, scope.device)

    def _lengths(self, scope: Scope, *parts: Tensor) -> dict[int, int]:
        """How often each position of a share counts: the length of every dimension of the tile, and of a product."""
        rank = self.tiles.depth
        lengths = {}
        for axis in (*self.region.batch, self.region.query, self.region.key):
            position = scope.axes.get(axis)
            if isinstance(position, Grid):
                lengths.update({term.dim: term.length for term in position.terms})
        for part in parts:
            for dim in grids.spread(part):
                if dim >= -rank or dim not in lengths:
                    lengths[dim] = part.shape[dim]
        return lengths


def _factors(share: Share) -> tuple[list[tuple[str, float]], Expr]:
    """Constant factors of what flows into one side of a product (which is smaller than the pairs), and the rest."""
    factors: list[tuple[str, float]] = []
    rest = share.cotangent
    while share.other is not None and isinstance(rest, Call) and rest.op in ("mul", "div") and len(rest.args) == 2:
        first, second = rest.args
        if isinstance(first, Const) and rest.op == "mul":
            first, second = second, first
        if not isinstance(second, Const):
            break
        factors.append((rest.op, float(second.value)))
        rest = first
    return factors, rest


def _give(scope: Scope, load: Load, value: Tensor) -> None:
    """Let an expression that loads a quantity of the backward find it."""
    scope.memo[load, 0] = value
