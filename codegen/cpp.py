"""The `cpp` engine: a region as the FlexAttention operator, which Inductor lowers to its C++ flash template on CPU.

`attend` is written in tensor operations and is meant to be traced (`make_fx`, symbolic sizes too) and inlined into
the user's graph: the score becomes a score_mod, the mask a mask_mod, and which tiles are empty, partial or full is
computed at tile granularity in the same graph. Inference only: the template has no backward.

What the template cannot do is expressed otherwise:

  * it returns no log-sum-exp, so further logits (sinks) are further keys: zero rows after the last key, whose score
    is the extra logit and whose value is zero;
  * a query without any key gets zeros; where the eager code gives something else, `refocus.codegen.repair` runs;
  * its decoding variant (one query) takes an empty partition's maximum for 0, which loses rows whose scores are all
    far below; a partition size that no tile fits keeps it out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention_hop

from refocus import simplify
from refocus.codegen import repair
from refocus.codegen.heads import SCORE, Fitted, fit, unflatten
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.evaluate import evaluate, size_of
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Reduce, Region, Sym
from refocus.masks import block_lists, tile_states


class Pairs(NamedTuple):
    """Score and mask of every (query, key) pair of the kernel; `key` includes one position for each extra logit."""

    key: Axis
    score: Expr | None
    mask: Expr


def supports(region: Region) -> str | None:
    """Why this engine cannot run the region on this machine; None where it can."""
    fitted = fit(region)
    if isinstance(fitted, str):
        return fitted
    for part, expr in (("score", fitted.score), ("mask", region.mask), *(("extra logit", x) for x in region.extra)):
        if expr is not None and any(isinstance(n, (Dot, Reduce)) for n in expr.walk()):
            return f"the {part} holds a sum or reduction that the kernel's pointwise functions cannot"
    return machine_reason()


def machine_reason() -> str | None:
    """Why Inductor's CPU template does not exist here; None where it does."""
    if sys.platform == "darwin":
        return "Inductor's CPU attention template does not exist on macOS"
    if os.getenv("ATEN_CPU_CAPABILITY") == "default" or not torch.cpu._is_avx2_supported():
        return "Inductor's CPU attention template needs AVX2"
    if torch.xpu.is_available():
        return "Inductor's CPU attention template is switched off beside an XPU"
    return None


def attend(region: Region, plan: Plan, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result (*batch, query, *value), contiguous, dtype `region.out_dtype`.

    `tensors` in the order of `region.operands`, `sizes` in that of `region.syms`. To be traced, then compiled by
    Inductor; run as it is, PyTorch computes the scores densely. Raises `EngineUnavailable` for what `supports` refuses.
    """
    reason, fitted = supports(region), fit(region)
    if reason is not None or isinstance(fitted, str):
        raise EngineUnavailable("the cpp engine cannot run this region", got=reason, todo="use engine='tiled'")
    named = {o.name: t for o, t in zip(region.operands, tensors, strict=True)}
    numbers = dict(zip(region.syms, sizes, strict=True))
    pairs = _pairs(region, fitted)
    query, key, value = fitted.query(named, numbers), fitted.key(named, numbers), fitted.value(named, numbers)
    if region.extra:
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, len(region.extra))) for t in (key, value))

    functions = _Functions(region, fitted, pairs, named, numbers, query.device)
    block_mask = _block_mask(region, fitted, pairs, plan, named, numbers, functions.mask_mod, query.device)
    options = _options(plan, skip=pairs.mask == TRUE and pairs.score is None)
    out, _, _ = flex_attention_hop(
        query, key, value, functions.score_mod, block_mask, fitted.scale, options, functions.score_buffers,
        functions.mask_buffers,
    )  # fmt: skip
    out = fitted.result(out, named, numbers)
    if region.empty_row == "logits" and region.mask != TRUE:
        torch.ops.refocus.repair(out, list(tensors), list(sizes), repr(region))
    return out


def _options(plan: Plan, skip: bool) -> dict[str, Any]:
    """What the Python front end would pass; Inductor's lowering expects all of it."""
    return {
        "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": False, "OUTPUT_MAX": False,
        "SKIP_MASK_SCORE": skip,  # leaves both functions out: nothing to apply
        "PARTITION_SIZE": plan.block_k + 1,  # no multiple of a tile: never the decoding variant
    }  # fmt: skip


def _pairs(region: Region, fitted: Fitted) -> Pairs:
    """Extra logits become keys past the last one."""
    if not region.extra:
        return Pairs(region.key, fitted.score, region.mask)
    size = region.key.size
    longer = Axis(f"{region.key.name}_and_extra", simplify.add(size, len(region.extra)))
    inside = simplify.le(simplify.add(longer, 1), size)
    clamped: dict[Expr, Expr] = {region.key: simplify.minimum(longer, simplify.sub(size, 1))}
    score = simplify.substitute(SCORE if fitted.score is None else fitted.score, clamped)
    column: Expr = region.extra[-1]
    for k, extra in reversed(list(enumerate(region.extra[:-1]))):
        column = simplify.where(simplify.le(longer, simplify.add(size, k)), extra, column)
    mask = simplify.or_(simplify.not_(inside), simplify.substitute(region.mask, clamped))
    return Pairs(longer, simplify.where(inside, score, column), mask)


class _Functions:
    """score_mod and mask_mod, and the tensors they read (FlexAttention takes these beside the functions)."""

    def __init__(
        self,
        region: Region,
        fitted: Fitted,
        pairs: Pairs,
        tensors: Mapping[str, Tensor],
        sizes: Mapping[Sym, int],
        device: torch.device,
    ) -> None:
        self.b, outer = unflatten("@b", fitted.outer)
        self.h, inner = unflatten("@h", fitted.inner)
        self.query, self.key = region.query, pairs.key
        flat = {**outer, **inner}
        self.score = None if pairs.score is None else simplify.substitute(pairs.score, flat)
        self.mask = simplify.substitute(pairs.mask, flat)
        # Sizes are passed as tensors: the template takes no traced number other than a bare symbol.
        self.syms = {s: torch.full((), n, dtype=torch.int64, device=device) for s, n in sizes.items()}
        self.tensors = tensors
        self.score_names, self.score_syms = _reads(self.score)
        self.mask_names, self.mask_syms = _reads(self.mask)

    @property
    def score_buffers(self) -> tuple[Tensor, ...]:
        return (*(self.tensors[n] for n in self.score_names), *(self.syms[s] for s in self.score_syms))

    @property
    def mask_buffers(self) -> tuple[Tensor, ...]:
        return (*(self.tensors[n] for n in self.mask_names), *(self.syms[s] for s in self.mask_syms))

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *buffers: Tensor) -> Tensor:
        if self.score is None:
            return score
        tensors, sizes = _named(self.score_names, self.score_syms, buffers)
        tensors[SCORE.tensor] = score
        axes = {self.b: b, self.h: h, self.query: i, self.key: j}
        return evaluate(self.score, axes, tensors, sizes, torch.float32).reshape(())

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *buffers: Tensor) -> Tensor:
        if self.mask == TRUE:
            return torch.ones_like(b, dtype=torch.bool)
        tensors, sizes = _named(self.mask_names, self.mask_syms, buffers)
        axes = {self.b: b, self.h: h, self.query: i, self.key: j}
        return evaluate(self.mask, axes, tensors, sizes, torch.float32).reshape(())


def _reads(expr: Expr | None) -> tuple[tuple[str, ...], tuple[Sym, ...]]:
    """The operands and the sizes that a pointwise expression needs."""
    if expr is None:
        return (), ()
    names = dict.fromkeys(load.tensor for load in expr.loads if load != SCORE)
    return tuple(names), tuple(dict.fromkeys(n for n in expr.walk() if isinstance(n, Sym)))


def _named(
    names: Sequence[str], syms: Sequence[Sym], buffers: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[Sym, Any]]:
    return dict(zip(names, buffers)), dict(zip(syms, buffers[len(names) :], strict=True))


def _block_mask(
    region: Region,
    fitted: Fitted,
    pairs: Pairs,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    mask_mod: Callable[..., Tensor],
    device: torch.device,
) -> tuple[Any, ...]:
    """FlexAttention's block mask for [B or 1, H or 1, query tiles, key tiles], as the operator takes it."""
    state = tile_states(
        pairs.mask, region.batch, region.query, pairs.key, plan.block_q, plan.block_k, tensors, sizes, device
    )
    used = pairs.mask.axes
    for dim, axis in enumerate(region.batch):  # [*batch, query tiles, key tiles], 1 where it is the same for all
        if axis not in used:
            state = state.unsqueeze(dim)
    split = len(fitted.outer)
    dims: list[int] = []
    for group in (fitted.outer, fitted.inner):
        whole = any(a in used for a in group)
        dims += [size_of(a.size, sizes) if whole else 1 for a in group]
    state = state.expand(*dims, *state.shape[-2:])
    flat = [_product(dims[:split]), _product(dims[split:])]
    lists = block_lists(state.reshape(*flat, *state.shape[-2:]))
    lengths = (size_of(region.query.size, sizes), size_of(pairs.key.size, sizes))
    mask = BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=lists.partial_count,
        kv_indices=lists.partial_index,
        full_kv_num_blocks=lists.full_count,
        full_kv_indices=lists.full_index,
        q_num_blocks=None,  # the q lists serve the backward alone
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=mask_mod,
    )
    return tuple(mask.as_tuple())


def _product(values: Sequence[int]) -> int:
    total = 1
    for value in values:
        total = total * value
    return total
