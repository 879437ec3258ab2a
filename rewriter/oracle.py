"""The dense reference: what a region means, computed all at once in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refocus.evaluate import Scope, arange_env, size_of
from refocus.grid import contract
from refocus.ir import Const, Region


def run(
    region: Region, tensors: Sequence[Tensor], sizes: Sequence[int] = (), dtype: torch.dtype = torch.float64
) -> Tensor:
    """The region's result (*batch, query, *value) in `dtype`; stores every score.

    `tensors` in the order of `region.operands`, `sizes` in the order of `region.syms`. All float work is done in
    `dtype`, and autograd can differentiate it; but rows that the mask empties take their weights from logits of float32
    (float64 for float64 operands): there the rounding is the meaning. Adding -1e9 to a float32 score leaves -1e9, and
    so the mean of all values.
    """
    named = {o.name: t for o, t in zip(region.operands, tensors, strict=True)}
    numbers = dict(zip(region.syms, sizes, strict=True))
    env = arange_env((*region.batch, region.query, region.key, *region.value), numbers)
    scope = Scope(env, named, numbers, dtype)
    key = -1 - len(region.value)
    weight = weights(region, scope, key)
    if region.empty_row == "logits":
        kept = _spread(scope.tensor(region.mask), key, size_of(region.key.size, numbers)).any(key, keepdim=True)
        narrow = any(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
        faithful = Scope(env, named, numbers, torch.float32 if narrow else torch.float64)
        logits = _spread(faithful.tensor(region.logits), key, size_of(region.key.size, numbers)).to(dtype)
        extra = [faithful.tensor(x).to(dtype) for x in region.extra]
        weight = torch.where(kept, weight, softmax(logits, extra, key))
    if region.gate != Const(1.0, region.gate.dtype):
        gate = scope.tensor(region.gate)
        weight = torch.where(weight == 0, 0.0, weight * gate)  # which may be anything where nothing is weighed
    out = contract(weight, scope.tensor(region.values), {key: size_of(region.key.size, numbers)})
    shape = [size_of(a.size, numbers) for a in (*region.batch, region.query)]
    value = [size_of(a.size, numbers) for a in region.value]
    return (out.squeeze(key) if out.dim() >= -key else out).expand(*shape, *value).contiguous()


def log_sums(
    region: Region, tensors: Sequence[Tensor], sizes: Sequence[int] = (), dtype: torch.dtype = torch.float64
) -> Tensor:
    """The logarithm of each row's normaliser, (*batch, query), as `run` does it."""
    named = {o.name: t for o, t in zip(region.operands, tensors, strict=True)}
    numbers = dict(zip(region.syms, sizes, strict=True))
    env = arange_env((*region.batch, region.query, region.key, *region.value), numbers)
    key, length = -1 - len(region.value), size_of(region.key.size, numbers)

    def of(scope: Scope, logits: Tensor) -> Tensor:
        columns = [scope.tensor(x).to(dtype) for x in region.extra]
        every = [_spread(logits, key, length).to(dtype), *(_spread(x, key, 1) for x in columns)]
        shape = torch.broadcast_shapes(*(t.narrow(key, 0, 0).shape for t in every))
        whole = []
        for part in every:
            lengths = list(shape)
            lengths[key] = part.shape[key]
            whole.append(part.expand(lengths))
        every_column = torch.cat(whole, key)
        top = every_column.detach().amax(key, keepdim=True)
        base = torch.where(top == -torch.inf, 0.0, top)
        # Fills of finfo.min absorb the logarithm, but not its derivatives, which are the probabilities.
        total = (every_column - base).exp().sum(key, keepdim=True)
        none = total == 0  # and nothing flows back through it
        return torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + top)

    scope = Scope(env, named, numbers, dtype)
    mask = scope.tensor(region.mask)
    found = of(scope, torch.where(mask, scope.tensor(region.score), -torch.inf))
    if region.empty_row == "logits":
        narrow = any(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
        faithful = Scope(env, named, numbers, torch.float32 if narrow else torch.float64)
        kept = _spread(mask, key, length).any(key, keepdim=True)
        found = torch.where(kept, found, of(faithful, faithful.tensor(region.logits)))
    shape = [size_of(a.size, numbers) for a in (*region.batch, region.query)]
    return found.reshape(found.shape[: key + found.dim()]).expand(shape)


def weights(region: Region, scope: Scope, key: int) -> Tensor:
    """softmax of the score where the mask keeps a pair; rows without any are zero."""
    mask = scope.tensor(region.mask)
    score = scope.tensor(region.score)
    length = size_of(region.key.size, scope.sizes)
    kept = torch.logical_and(mask, score != -torch.inf) if region.empty_row == "zero" else mask
    some = _spread(kept, key, length).any(key, keepdim=True)
    # A row without keys is given scores before it is taken out, so that no NaN flows back through it.
    score = _spread(torch.where(some, torch.where(mask, score, -torch.inf), 0.0), key, length)
    weight = softmax(score, [scope.tensor(x) for x in region.extra], key)
    return torch.where(some, weight, torch.zeros_like(weight))


def softmax(logits: Tensor, extra: Sequence[Tensor], dim: int) -> Tensor:
    """softmax over `dim` and over the columns `extra` (1 along `dim`), which are dropped."""
    if not extra:
        return torch.softmax(logits, dim)
    shape = list(torch.broadcast_shapes(logits.shape, *(x.shape for x in extra)))
    length = logits.shape[dim]
    shape[dim] = 1
    columns = [x.expand(shape) for x in extra]
    shape[dim] = length
    return torch.softmax(torch.cat([logits.expand(shape), *columns], dim), dim).narrow(dim, 0, length)


def _spread(t: Tensor, dim: int, length: int) -> Tensor:
    """Make a value as long as the keys, even if it is the same for all of them."""
    t = t.reshape((1,) * (-dim - t.dim()) + tuple(t.shape)) if t.dim() < -dim else t
    shape = list(t.shape)
    shape[dim] = length
    return t.expand(shape)
