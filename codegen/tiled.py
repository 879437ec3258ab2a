"""The portable engine: a region interpreted tile by tile in ATen operations, on any device.

Online softmax over tiles of `plan.block_q` queries by `plan.block_k` keys, all batch axes at once (in chunks, where
they are many), and all tiles of queries at once whose keys move along with them (`refocus.codegen.runs`). Tiles that
the mask empties are skipped, and in full ones the mask is not evaluated. Statistics and sums are float32 (float64 for
float64 operands). Peak memory is the result plus a few tiles: linear in the sequence.

This is also what the other engines are compared with, so it is kept close to the definition in `refocus.ir.Region`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.codegen import placing
from refocus.codegen.plan import Plan
from refocus.codegen.runs import Column, Run, Tiled
from refocus.evaluate import Scope, arange_env, device_of, size_of
from refocus.grid import Term, contract
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Region, Sym
from refocus.masks import EMPTY, FULL, PARTIAL, TileMap, Tiling, classify

# Scores alive at once, at most (4 MiB of float32): beyond this a batch axis is cut into chunks, which is also what
# keeps a tile in cache.
TILE_ELEMENTS = 1 << 20
# What a tile costs beside its scores, in scores: some fifteen operations.
_TILE_COST = 1 << 14
# Scores beyond which it is better to take heads one by one than to copy overlapping keys for products of several.
WORTH_A_CALL = 1 << 17

Span = tuple[tuple[int, int], ...]


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
    """The region's result: contiguous (*batch, query, *value), or as `region.output` says, of dtype `region.out_dtype`.

    `operands` in the order of `region.operands`, `sizes` in that of `region.syms`.
    """
    return Tiles.of(region, plan, operands, sizes).forward()[0]


def run_saving(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The result, and the row sums that the backward needs: (2, *batch, query), float32 or float64.

    They are the largest logit of a row and log sum exp(logit - largest), of the logits which the row was computed from
    (its fills, where the mask leaves it no key). Their sum is the log-sum-exp; kept apart, they still tell one fill
    from the mean of a thousand where the fill is -1e9.
    """
    return Tiles.of(region, plan, operands, sizes).forward()


class Tiles:
    """One call, cut into tiles.

    Dimensions of every value, from the left: batch axes (split ones several), tile, query, key, value axes. The tiles
    are those of a run, and a query is one of its tile."""

    @classmethod
    def of(cls, region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tiles:
        tensors = {o.name: t for o, t in zip(region.operands, operands, strict=True)}
        return cls(region, plan, tensors, dict(zip(region.syms, sizes, strict=True)))

    def __init__(self, region: Region, plan: Plan, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> None:
        self.region, self.plan, self.sizes = region, plan, sizes
        self.batch = [size_of(a.size, sizes) for a in region.batch]
        self.queries, self.keys = size_of(region.query.size, sizes), size_of(region.key.size, sizes)
        self.value = [size_of(a.size, sizes) for a in region.value]
        self.block_q, self.block_k = min(plan.block_q, self.queries) or 1, min(plan.block_k, self.keys) or 1
        self.parts = {a: factors(a, n, region.expressions) for a, n in zip(region.batch, self.batch)}
        device = device_of(tensors.values())
        one = Axis("", Const(1))
        env = arange_env((*region.batch, one, region.query, region.key, *region.value), sizes, device, self.parts)
        self.key_dim = -1 - len(region.value)
        self.query_dim = self.key_dim - 1
        self.tile_dim = self.query_dim - 1
        del env[one], env[region.query], env[region.key]
        self.depth = sum(len(p) for p in self.parts.values()) + 3 + len(region.value)
        self.scope = Scope(env, tensors, sizes, depth=self.depth, overlapping=True)
        self.tiled = Tiled.of(region, self.block_q, self.block_k, sizes)
        positions = math.prod(self.batch)
        # Scores alive at once: no more than the result has elements, if that is more than a tile of the plan.
        self.most = max(positions * self.queries * math.prod(self.value), positions * self.block_q * self.block_k)
        self.most = min(self.most, TILE_ELEMENTS)
        self.map: TileMap | None = None
        self.found: dict[Span, list[Run]] = {}
        if region.mask != TRUE and (self.block_k < self.keys or self.block_q < self.queries):
            self.map = classify(region.mask, Tiling.of(region, self.block_q, self.block_k, tensors, sizes, device))
        self.apart = self._apart()
        self.gated = region.gate != Const(1.0, region.gate.dtype)

    def _apart(self) -> frozenset[Axis]:
        """Batch axes whose positions are better taken one by one, for the mask empties other tiles in each: documents
        packed in another way, spans by head. A tile is skipped where it is empty for all that is taken together."""
        if self.map is None:
            return frozenset()
        live, found = self.map.state != EMPTY, []
        scores = math.prod(self.batch) * self.block_q * self.block_k
        for k, axis in enumerate(self.map.axes):
            size = live.shape[k]
            if len(self.parts[axis]) == 1 and size > 1:
                rest = tuple(d for d in range(live.dim() - 2) if d != k)
                each = live.any(rest) if rest else live
                together, one_by_one = int(each.any(0).sum()), int(each.sum())
                if one_by_one * (_TILE_COST + scores // size) < together * (_TILE_COST + scores):
                    scores //= size
                    found.append(axis)
        return frozenset(found)

    @property
    def lead(self) -> list[int]:
        """The lengths of the batch dimensions."""
        return [n for a in self.region.batch for n in self.parts[a]]

    def forward(self) -> tuple[Tensor, Tensor]:
        """The result (*batch, query, *value) and the row sums (2, *batch, query)."""
        lead, device = self.lead, self.scope.device
        dtype = getattr(torch, self.region.out_dtype)
        filled, whole = placing.empty(self.region, self.sizes, dtype, device)
        out = filled.view([*lead, self.queries, *self.value])
        sums = torch.empty([2, *lead, self.queries], dtype=self.scope.float_dtype, device=device)
        if self.keys == 0:
            out.zero_()
            sums.fill_(-math.inf)
        elif sums.numel():
            for scope, parts in self.chunks(out, *sums):
                for run in self.runs(scope):
                    tiles = [self.part(t, run) for t in parts]
                    for tile, result in zip(tiles, self._row(self.rows(scope, run), run.columns, tiles[0])):
                        tile.copy_(result)
        return (
            placing.put(self.region, filled, whole, self.sizes),
            sums.reshape([2, *self.batch, self.queries]),
        )

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Scope, tuple[Tensor, ...]]]:
        """Parts of the batch small enough for tiles to stay in cache, with those parts of tensors (*batch, ...).

        Batch axes are cut before runs: overlapping tiles of several heads would be copied for the product."""
        whole = [a for a in self.region.batch if len(self.parts[a]) == 1]
        runs = self.runs(self.scope, math.inf)
        widest = max(1, *(run.queries * run.widest for run in runs))
        most = min(self.most, max(widest, WORTH_A_CALL)) if any(run.overlaps for run in runs) else self.most
        yield from self._chunks(self.scope, tensors, whole, math.prod(self.batch) * widest, most)

    def runs(self, scope: Scope, most: float | None = None) -> list[Run]:
        """All queries in runs of tiles, each of at most `most` pairs in a column (by default what a tile may have)."""
        span = self._span(scope)
        runs = self.found.get(span)
        if runs is None:
            runs = self.found[span] = self.tiled.runs(self.states(span))
        if most is None:
            most = self.most / max(1, math.prod(self._lengths(scope)))
        return [r for run in runs for r in run.cut(max(1, int(min(most / max(1, run.length * run.widest), run.tiles))))]

    def _lengths(self, scope: Scope) -> list[int]:
        """How many positions of each batch axis a scope has."""
        terms = (p.terms for a in self.region.batch if isinstance(p := scope.axes[a], grids.Grid))
        return [term.length for some in terms for term in some]

    def part(self, whole: Tensor, run: Run) -> Tensor:
        """The part of a tensor (*batch, query, ...) that a run computes, as (*batch, tile, query, ...)."""
        dim = len(self.lead)
        return whole.narrow(dim, run.start, run.queries).unflatten(dim, (run.tiles, run.length))

    def rows(self, scope: Scope, run: Run) -> Scope:
        """The queries of a run."""
        terms = Term(self.tile_dim, run.tiles, run.length), Term(self.query_dim, run.length, 1)
        return scope.child({self.region.query: grids.grid(run.start, terms)})

    def columns(self, rows: Scope, run: Sequence[Column]) -> Iterator[tuple[Column, Scope]]:
        """Each column, with the scope of its keys."""
        for column in run:
            yield column, self._keys(rows, column.start, column.length, column.step)

    def _keys(self, rows: Scope, start: int, length: int, step: int) -> Scope:
        at = rows.axes[self.region.query]
        tiles = next((t.length for t in at.terms if t.dim == self.tile_dim), 1) if isinstance(at, grids.Grid) else 1
        terms = Term(self.tile_dim, tiles, step), Term(self.key_dim, length, 1)
        return rows.child({self.region.key: grids.grid(start, terms)})

    def keep(self, column: Column, rows: Scope, keys: Scope) -> Tensor | None:
        """Which pairs of a column are kept; None for all of them. The mask is evaluated in partial tiles only."""
        if not column.masked:
            return None
        if column.is_masked_throughout:
            return keys.tensor(self.region.mask)
        parts: list[Tensor] = []
        end = 0
        every = torch.ones([1] * -self.key_dim, dtype=torch.bool, device=keys.device)
        for first, count in column.masked:
            some = self._keys(rows, column.start + first, count, column.step).tensor(self.region.mask)
            parts += [spread(every, self.key_dim, first - end), spread(some, self.key_dim, count)]
            end = first + count
        parts.append(spread(every, self.key_dim, column.length - end))
        others = torch.broadcast_shapes(*(t.narrow(self.key_dim, 0, 0).shape for t in parts))
        whole = []
        for part in parts:
            lengths = list(others)
            lengths[self.key_dim] = part.shape[self.key_dim]
            whole.append(part.expand(lengths))
        return torch.cat(whole, self.key_dim)

    def _chunks(
        self, scope: Scope, tensors: tuple[Tensor, ...], axes: Sequence[Axis], scores: int, most: int
    ) -> Iterator[tuple[Scope, tuple[Tensor, ...]]]:
        """Ranges of batch axes, outermost first, such that there are no more than `most` of `scores`; axes in
        `apart` position by position."""
        apart = self.apart.intersection(axes)
        if not axes or (scores <= most and not apart):
            yield scope, tensors
            return
        axis, size = axes[0], self.parts[axes[0]][0]
        position = sum(len(self.parts[a]) for a in self.region.batch[: self.region.batch.index(axis)])
        step = 1 if axis in apart else min(size, max(1, size * most // scores))
        for start in range(0, size, step):
            length = min(step, size - start)
            part = scope.child({axis: grids.grid(start, (Term(position - self.depth, length, 1),), scope.device)})
            narrow = tuple(t.narrow(position, start, length) for t in tensors)
            yield from self._chunks(part, narrow, axes[1:], -(-scores * step // size), most)

    def _span(self, scope: Scope) -> Span:
        """The range of each axis of the map, (first, last), that this scope is at."""
        out = []
        for k, axis in enumerate(self.map.axes if self.map is not None else ()):
            position = scope.axes[axis]
            found = position.bounds() if isinstance(position, grids.Grid) else (position, position)
            whole = (0, self.map.state.shape[k] - 1) if self.map is not None else (0, 0)
            single = len(self.parts[axis]) == 1 and found is not None and not isinstance(position, Tensor)
            out.append(found if single else whole)
        return tuple(out)  # type: ignore[arg-type]

    def states(self, span: Span) -> Tensor:
        """The state of each (query tile, key tile), over all batch positions of this span."""
        if self.map is None:
            state = FULL if self.region.mask == TRUE else PARTIAL
            return torch.full((len(self.tiled.query_kinds), len(self.tiled.key_kinds)), state, dtype=torch.int8)
        state_of = self.map.state
        for k, (first, last) in enumerate(span):
            state_of = state_of.narrow(k, first, last - first + 1)
        flat = state_of.reshape(-1, *state_of.shape[-2:])
        low, high = flat.amin(0), flat.amax(0)
        return torch.where(low == high, low, PARTIAL)

    # ------------------------------------------------------------------------------------------------ rows

    def _row(self, rows: Scope, columns: Sequence[Column], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The result for the queries of a run, shaped as `like`, and its two row sums."""
        region = self.region
        out, top, total, kept = self._online(rows, like, region.score, columns, region.empty_row == "logits")
        if region.empty_row == "zero":
            out = torch.where(top == -torch.inf, 0.0, out)
        elif kept is not None and not bool(kept.all()):
            # What a mask with finite fills does to an emptied row is in the logits, over all keys.
            others = self._online(rows, like, region.logits, self.tiled.everything(), False)
            out, top, total = (torch.where(kept, a, b) for a, b in zip((out, top, total), others[:3]))
        flat = tuple(range(self.key_dim, 0))
        return out.squeeze(self.key_dim), top.squeeze(flat), total.squeeze(flat)

    def _online(
        self, rows: Scope, like: Tensor, score: Expr, columns: Sequence[Column], watch: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Softmax of `score` where the mask keeps it, times values; the row sums; if `watch`, which rows keep a key."""
        region, key_dim, dtype = self.region, self.key_dim, rows.float_dtype
        lead = list(like.shape[: like.dim() - len(self.value)])
        ones = [1] * len(self.value)
        top = torch.full([*lead, 1, *ones], -torch.inf, dtype=dtype, device=like.device)
        total = torch.zeros_like(top)
        acc = torch.zeros([*lead, 1, *self.value], dtype=dtype, device=like.device)
        kept: Tensor | None = torch.zeros(1, dtype=torch.bool, device=like.device) if watch else None
        for column, tile in self.columns(rows, columns):
            logits, length = tile.tensor(scaled(score)), column.length
            keep = self.keep(column, rows, tile)
            if keep is not None:
                if kept is not None:
                    kept = kept | spread(keep, key_dim, length).any(key_dim, keepdim=True)
                logits = torch.where(keep, logits, -torch.inf)
            elif kept is not None:
                kept = torch.ones_like(kept)
            logits = spread(logits, key_dim, length)
            higher = torch.maximum(top, logits.amax(key_dim, keepdim=True))
            base = torch.where(higher == -torch.inf, 0.0, higher)  # nothing yet: exp(-inf - 0) = 0, not NaN
            weight = exp_(torch.sub(logits, base))
            shrink = exp_(torch.sub(top, base))
            total.mul_(shrink).add_(weight.sum(key_dim, keepdim=True))
            if self.gated:
                weight = weight * tile.tensor(region.gate)
                # Of what is left out the weight is zero, but the gate may be anything.
                weight = weight if keep is None else torch.where(keep, weight, 0.0)
            acc.mul_(shrink).add_(contract(weight, tile.tensor(region.values), {key_dim: length}))
            top = higher
        for extra in region.extra:
            logit = rows.tensor(extra)
            higher = torch.maximum(top, logit)
            base = torch.where(higher == -torch.inf, 0.0, higher)
            shrink = exp_(torch.sub(top, base))
            total.mul_(shrink).add_(exp_(torch.sub(logit, base)))
            acc.mul_(shrink)
            top = higher
        return acc / total, top, total.log(), kept


def exp_(t: Tensor) -> Tensor:
    """exp in place. On CPUs, exp itself is several times slower where there are infinities or tiny results."""
    return t.mul_(math.log2(math.e)).exp2_()


@lru_cache(maxsize=256)
def scaled(score: Expr) -> Expr:
    """The same with constant factors of a product moved to its queries, which are fewer than the pairs."""
    if isinstance(score, Call) and score.op in ("mul", "div") and len(score.args) == 2:
        dot, factor = score.args
        if isinstance(dot, Const) and score.op == "mul":
            dot, factor = factor, dot
        dot = scaled(dot)
        if isinstance(dot, Dot) and isinstance(factor, Const):
            return replace(dot, query=Call(score.op, (dot.query, factor), dot.query.dtype))
    return score


def spread(t: Tensor, dim: int, length: int) -> Tensor:
    """Make a value as long as the keys, even if it is the same for all of them."""
    if t.dim() < -dim:
        t = t.reshape((1,) * (-dim - t.dim()) + tuple(t.shape))
    if t.shape[dim] == length:
        return t
    shape = list(t.shape)
    shape[dim] = length
    return t.expand(shape)


def factors(axis: Axis, size: int, expressions: Sequence[Expr]) -> tuple[int, ...]:
    """Lengths, outermost first, into which a batch axis is split so that `axis // c` (grouped heads) is a view."""
    divisors: set[int] = set()
    for root in expressions:
        for node in root.walk():
            if isinstance(node, Call) and node.op in ("floordiv", "mod") and node.args[0] == axis:
                by = node.args[1]
                if isinstance(by, Const) and 1 < by.value < size:
                    divisors.add(int(by.value))
    parts, rest = [], size
    for divisor in sorted(divisors, reverse=True):
        if rest % divisor == 0:
            parts.append(rest // divisor)
            rest = divisor
    return (*parts, rest)
