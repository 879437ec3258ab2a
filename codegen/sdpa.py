"""The `sdpa` engine: PyTorch's own attention, for regions that it can express as they are.

Plain dense and causal regions go to its flash kernel. Others can too, at sizes where a few more bytes cost less than
a kernel of our own: mask and bias are then written out as one additive tensor over the axes they depend on.
`attend` is traced and inlined into the user's graph, where Inductor lowers the call and fuses what is around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from refocus import simplify
from refocus.codegen import operator, repair
from refocus.codegen.heads import SCORE, Fitted, fit
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Reduce, Region, Sym


def supports(region: Region) -> str | None:
    """Why this engine cannot run the region; None where it can."""
    if region.row_sums:
        return "PyTorch's attention returns no log-sum-exp"
    fitted = fit(region)
    if isinstance(fitted, str):
        return fitted
    if region.extra:
        return "PyTorch's attention has no extra logits"
    if fitted.score is not None and _bias(fitted) is None:
        return "PyTorch's attention applies no function to the scores"
    for part in (_bias(fitted), region.mask):
        if part is not None and any(isinstance(n, (Dot, Reduce)) for n in part.walk()):
            return "the bias or mask is itself a sum or reduction"
    return None


def plain(region: Region) -> bool:
    """Whether the region needs no additive tensor: dense or causal, without bias."""
    fitted = fit(region)
    return not isinstance(fitted, str) and fitted.score is None and (region.mask == TRUE or is_causal(region))


def is_causal(region: Region) -> bool:
    """Whether the mask is the kernel's own: key <= query, both counted from the start."""
    return region.query.size == region.key.size and region.mask == simplify.le(region.key, region.query)


def bias(region: Region) -> Expr | None:
    """What the region adds to its scaled product; None where that is nothing, or not all that it does."""
    fitted = fit(region)
    return None if isinstance(fitted, str) else _bias(fitted)


def bias_axes(region: Region) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The outer and the inner batch axes (see `refocus.codegen.heads`) that the additive tensor has."""
    fitted = fit(region)
    assert isinstance(fitted, Fitted)
    added = _bias(fitted)
    used = region.mask.axes | (added.axes if added is not None else frozenset())
    outer, inner = (group if any(a in used for a in group) else () for group in (fitted.outer, fitted.inner))
    return outer, inner


def attend(region: Region, plan: Plan, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result (*batch, query, *value), contiguous, dtype `region.out_dtype`; to be traced.

    `tensors` in the order of `region.operands`, `sizes` in that of `region.syms`. Raises `EngineUnavailable` for what
    `supports` refuses.
    """
    if _repairs(region):  # looks at values: a graph cannot
        return operator.call(region, plan, tensors, sizes)
    return _attend(region, tensors, sizes)


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The same, inside the operator `refocus::attend`."""
    out = _attend(region, operands, sizes)
    if _repairs(region):
        repair.run(region, out, operands, sizes)
    return out


def _repairs(region: Region) -> bool:
    return region.empty_row == "logits" and region.mask != TRUE and not is_causal(region)


def _attend(region: Region, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    reason, fitted = supports(region), fit(region)
    if reason is not None or isinstance(fitted, str):
        raise EngineUnavailable("the sdpa engine cannot run this region", got=reason, todo="use engine='tiled'")
    named = {o.name: t for o, t in zip(region.operands, tensors, strict=True)}
    numbers = dict(zip(region.syms, sizes, strict=True))
    query, key, value = fitted.query(named, numbers), fitted.key(named, numbers), fitted.value(named, numbers)
    if not fitted.keys_batched:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    causal = fitted.score is None and is_causal(region)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if causal or plain(region) else _additive(region, fitted, named, numbers),
        is_causal=causal,
        scale=fitted.scale,
        enable_gqa=fitted.keys != fitted.inner,
    )
    return fitted.result(out, named, numbers)


def _bias(fitted: Fitted) -> Expr | None:
    """What is added to the scaled product; None where it is more, or less, than a sum."""
    score = fitted.score
    if isinstance(score, Call) and score.op == "add" and len(score.args) == 2 and SCORE in score.args:
        rest = score.args[1] if score.args[0] == SCORE else score.args[0]
        return None if SCORE in rest.loads else rest
    return None


def _additive(region: Region, fitted: Fitted, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> Tensor:
    """Bias and mask as one tensor [B or 1, H or 1, L, S] of the query's dtype; what the mask removes is -inf."""
    added: Expr = _bias(fitted) or Const(0.0, "float32")
    masked = simplify.where(region.mask, added, Const(-math.inf, "float32"))
    outer, inner = bias_axes(region)
    axes = [*outer, *inner, region.query, region.key]
    device = next(iter(tensors.values())).device
    value = evaluate(masked, arange_env(axes, sizes, device), tensors, sizes, torch.float32)
    full = [size_of(a.size, sizes) for a in axes]
    flat = [math.prod(full[: len(outer)]), math.prod(full[len(outer) : -2]), *full[-2:]]
    return value.to(fitted.dtype).expand(full).reshape(flat)
