"""What flows back into each tensor of a region, as shares of a few quantities that a tile of the backward knows.

With w = gate * p the weights, p the probabilities and dO what flows back into the result:

    @weight[b,i,j]  w                                  values receive  w * dO
    @gate[b,i,j]    p * (dO . v)                       what flows back into the gate
    @score[b,i,j]   p * (gate * (dO . v) - delta)      ... into the score,        delta[b,i] = sum_e dO * O
    @extra[b,i]     - p_extra * delta                  ... into an extra logit

What flows back into the log-sum-exp of a row, if that is a result too, is taken away from delta.

From these on, `refocus.differentiate` follows the score, the gate and the extra logits to what they load. (The
softmax's own derivative is that of FlashAttention-2, arXiv:2307.08691, with the gate and the extra logits added.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

from refocus import simplify
from refocus.differentiate import NotDifferentiable, Share, connected, differentiate
from refocus.ir import TRUE, Call, Const, Expr, Load, Region


@dataclass(frozen=True)
class Cotangents:
    """The shares of each source; `weight`, `out`, `score`, `gate` and `extra` are the loads that stand for it."""

    weight: Load
    out: Load
    score: Load
    gate: Load
    extra: tuple[Load, ...]
    of_values: tuple[Share, ...]
    of_score: tuple[Share, ...]
    of_logits: tuple[Share, ...]  # in rows that the mask empties
    of_gate: tuple[Share, ...]
    of_extra: tuple[tuple[Share, ...], ...]


@lru_cache(maxsize=256)
def cotangents(region: Region, wanted: frozenset[str]) -> Cotangents:
    """What `wanted` operands receive. Raises NotDifferentiable with the reason."""
    rows = (*region.batch, region.query)
    pairs = (*rows, region.key)
    weight, score, gate = (Load(name, pairs, "float32") for name in ("@weight", "@score", "@gate"))
    out = Load("@out", (*rows, *region.value), "float32")
    extra = tuple(Load(f"@extra{k}", rows, "float32") for k in range(len(region.extra)))
    if not region.values.is_float:
        raise NotDifferentiable("the values are no floating-point numbers")
    values = tuple(_into_values(region.values, weight, out, wanted))
    emptied = region.empty_row == "logits" and region.mask != TRUE
    return Cotangents(
        weight, out, score, gate, extra, values,
        differentiate(region.score, score, wanted),
        differentiate(region.logits, score, wanted) if emptied else (),
        differentiate(region.gate, gate, wanted),
        tuple(differentiate(x, seed, wanted) for x, seed in zip(region.extra, extra)),
    )  # fmt: skip


def _into_values(value: Expr, weight: Expr, out: Load, wanted: frozenset[str]) -> Iterator[Share]:
    """What the tensors receive that the values are read from, each for the keys that are read there."""
    if isinstance(value, Load):
        if value.tensor in wanted:
            yield Share(value, weight, out)
    elif isinstance(value, Call) and value.op == "where" and not any(x.is_float for x in value.args[0].loads):
        condition, first, second = value.args
        nothing = Const(0.0, weight.dtype)
        yield from _into_values(first, simplify.where(condition, weight, nothing), out, wanted)
        yield from _into_values(second, simplify.where(condition, nothing, weight), out, wanted)
    elif any(load.tensor in wanted for load in value.loads):
        raise NotDifferentiable("the values are computed inside the region")


def why_not_trainable(region: Region, wanted: Collection[str]) -> str | None:
    """Why no gradient of these operands can be generated; None where it can."""
    if region.normalizer != "softmax":
        return f"there is no derivative of a {region.normalizer} normaliser"
    try:
        cotangents(region, frozenset(wanted))
    except NotDifferentiable as problem:
        return str(problem)
    return None


@lru_cache(maxsize=256)
def flows_into(region: Region) -> frozenset[str]:
    """The operands that have a gradient, as in eager code: floats that flow into the result, be it by a function whose
    derivative is zero, and those that cancelled and are not read.

    What only a mask or an index reads has none: not even zeros."""
    read = {load.tensor for e in region.expressions for load in e.loads}
    read |= {e.tensor for e in region.expressions if isinstance(e, Load)}
    flowing = (region.values, region.score, region.logits, region.gate, *region.extra)
    found = frozenset().union(*map(connected, flowing))
    return found | {operand.name for operand in region.operands if operand.name not in read}


def shares_of(found: Cotangents) -> tuple[Share, ...]:
    """All shares of a region together."""
    return (
        *found.of_values,
        *found.of_score,
        *found.of_logits,
        *found.of_gate,
        *(x for some in found.of_extra for x in some),
    )


def reads(share: Share) -> tuple[Expr, ...]:
    """What must be computed for a share."""
    return (share.cotangent,) if share.other is None else (share.cotangent, share.other)
