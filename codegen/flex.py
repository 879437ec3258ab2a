"""A region as the FlexAttention operator: score_mod, mask_mod and the lists of tiles, to be traced and compiled.

Two things that FlexAttention cannot say are said otherwise here:

  * its CPU template returns no log-sum-exp, so further logits (sinks) become further keys: zero rows after the last
    one, whose score is the extra logit and whose value is zero;
  * which tiles are empty, partial or full comes from the predicate (`refocus.masks`), never from N x N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention_hop

from refocus import simplify
from refocus.codegen.heads import SCORE, Fitted, unflatten
from refocus.codegen.plan import Plan
from refocus.codegen.quotients import divided
from refocus.evaluate import evaluate, size_of
from refocus.ir import TRUE, Axis, Expr, Sym
from refocus.masks import BlockLists, Tiling, block_lists, classify, tile_states
from refocus.refine import leaves_open

# Fewer tiles are visited as quickly as they are found.
_MANY_TILES = 16


@dataclass(frozen=True)
class Pairs:
    """Score (None: the product alone) and mask of the (query, key) pairs that the kernel sees.

    `key` has one position more for each extra logit. In `scored` and `kept`, the same two expressions, the batch axes
    are taken from the kernel's own two, `b` and `h`.
    """

    fitted: Fitted
    key: Axis
    mask: Expr
    b: Axis
    h: Axis
    scored: Expr | None
    kept: Expr


def pairs_of(fitted: Fitted) -> Pairs:
    region = fitted.region
    key, score, mask = region.key, fitted.score, region.mask
    if region.extra:
        size = region.key.size
        key = Axis(f"{region.key.name}_and_extra", simplify.add(size, len(region.extra)))
        inside = simplify.le(simplify.add(key, 1), size)
        clamped: dict[Expr, Expr] = {region.key: simplify.minimum(key, simplify.sub(size, 1))}
        column: Expr = region.extra[-1]
        for k, extra in reversed(list(enumerate(region.extra[:-1]))):
            column = simplify.where(simplify.le(key, simplify.add(size, k)), extra, column)
        score = simplify.where(inside, simplify.substitute(SCORE if score is None else score, clamped), column)
        mask = simplify.or_(simplify.not_(inside), simplify.substitute(mask, clamped))
    b, outer = unflatten("@b", fitted.outer)
    h, inner = unflatten("@h", fitted.inner)
    scored = None if score is None else simplify.substitute(score, {**outer, **inner})
    return Pairs(fitted, key, mask, b, h, scored, simplify.substitute(mask, {**outer, **inner}))


def call(
    pairs: Pairs,
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    lists: BlockLists | None = None,
) -> Tensor:
    """[B, H, L, Ev] from query [B, H, L, E], key and value [B or 1, H / group, S, E and Ev].

    `tensors`: the operands that score and mask load. `lists`: what `lists_of` gives; made here if None. Traceable.
    """
    extra = len(pairs.fitted.region.extra)
    if extra:
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, extra)) for t in (key, value))
    found = lists or lists_of(pairs, plan, tensors, sizes, query.device, traced=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *buffers: Any) -> Tensor:
        if pairs.scored is None:
            return score
        named = scored.bind(buffers)
        named[0][SCORE.tensor] = score
        return _at(pairs, pairs.scored, (b, h, i, j), *named)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *buffers: Any) -> Tensor:
        if pairs.kept == TRUE:
            return torch.ones_like(b, dtype=torch.bool)
        return _at(pairs, pairs.kept, (b, h, i, j), *kept.bind(buffers))

    scored, kept = (_Reads.of(expr, tensors, sizes) for expr in (pairs.scored, pairs.kept))
    block_mask = BlockMask(
        seq_lengths=(query.shape[2], key.shape[2]),
        kv_num_blocks=found.partial_count,
        kv_indices=found.partial_index,
        full_kv_num_blocks=found.full_count,
        full_kv_indices=found.full_index,
        q_num_blocks=None,  # the lists by key tile serve the backward alone
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=mask_mod,
    )
    out, _, _ = flex_attention_hop(
        query, key, value, score_mod, block_mask.as_tuple(), pairs.fitted.scale, _options(pairs, plan), scored.buffers,
        kept.buffers,
    )  # fmt: skip
    return out


def lists_of(
    pairs: Pairs,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    device: torch.device,
    traced: bool = False,
) -> BlockLists:
    """The tiles of each [B or 1, H or 1, query tile]. `traced`: by plain operations at tile granularity, which leave a
    few more tiles open than a look at pairs does."""
    fitted, region = pairs.fitted, pairs.fitted.region
    tiling = Tiling(region.batch, region.query, pairs.key, plan.block_q, plan.block_k, tensors, sizes, device)
    state = tile_states(pairs.mask, tiling) if traced else classify(pairs.mask, tiling).state
    used = pairs.mask.axes
    for dim, axis in enumerate(region.batch):  # 1 along axes that the mask does not depend on
        if axis not in used:
            state = state.unsqueeze(dim)
    flat = []
    full: list[int] = []
    for group in (fitted.outer, fitted.inner):
        whole = any(a in used for a in group)
        full += [size_of(a.size, sizes) if whole else 1 for a in group]
        flat.append(math.prod(full[len(full) - len(group) :]) if group else 1)
    tiles = state.shape[-2:]
    return block_lists(state.expand(*full, *tiles).reshape(*flat, *tiles))


def may_look(pairs: Pairs, plan: Plan, sizes: Mapping[Sym, int]) -> bool:
    """Whether a look at pairs may empty more tiles, of enough to be worth it on each call."""
    region = pairs.fitted.region
    tiles = -(-size_of(region.query.size, sizes) // plan.block_q) * -(-size_of(pairs.key.size, sizes) // plan.block_k)
    return tiles >= _MANY_TILES and leaves_open(pairs.mask, region.query, pairs.key, (plan.block_q, plan.block_k))


@dataclass(frozen=True)
class _Reads:
    """What one of the two functions reads: FlexAttention takes tensors and traced sizes beside the function."""

    names: tuple[str, ...]
    syms: tuple[Sym, ...]
    known: dict[Sym, int]
    buffers: tuple[Any, ...]

    @staticmethod
    def of(expr: Expr | None, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> _Reads:
        names = loaded(expr)
        found = dict.fromkeys(n for n in expr.walk() if isinstance(n, Sym)) if expr is not None else {}
        syms = tuple(s for s in found if not isinstance(sizes[s], int))
        known = {s: sizes[s] for s in found if s not in syms}
        return _Reads(names, syms, known, (*(tensors[n] for n in names), *(sizes[s] for s in syms)))

    def bind(self, buffers: Sequence[Any]) -> tuple[dict[str, Tensor], dict[Sym, int]]:
        return dict(zip(self.names, buffers)), {**self.known, **dict(zip(self.syms, buffers[len(self.names) :]))}


def loaded(expr: Expr | None) -> tuple[str, ...]:
    """The operands that a function of the score loads."""
    return tuple(dict.fromkeys(load.tensor for load in expr.loads if load != SCORE)) if expr is not None else ()


def _at(
    pairs: Pairs, expr: Expr, at: Sequence[Tensor], tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]
) -> Tensor:
    """One element, at the kernel's b, h, query and key."""
    axes, read = dict(zip((pairs.b, pairs.h, pairs.fitted.region.query, pairs.key), at)), dict(tensors)
    expr, parts = divided(expr)
    for part in parts:
        read[part.held.tensor] = part.of(evaluate(part.dividend, axes, read, sizes, torch.float32).reshape(()))
    return evaluate(expr, axes, read, sizes, torch.float32).reshape(())


def _options(pairs: Pairs, plan: Plan) -> dict[str, Any]:
    """What the Python front end would pass; Inductor's lowering expects all of it."""
    return {
        "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": False, "OUTPUT_MAX": False,
        # With neither score nor mask to apply, both functions can be left out.
        "SKIP_MASK_SCORE": pairs.scored is None and pairs.kept == TRUE,
        # The template's decoding variant takes the maximum of a fully masked partition for 0, and so loses rows whose
        # scores all lie far below: a partition that is no multiple of a tile keeps it out.
        "PARTITION_SIZE": plan.block_k + 1,
    }  # fmt: skip
