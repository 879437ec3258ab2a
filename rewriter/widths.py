"""Numbers as a tensor holds them: integers come round at the ends of their dtype, floats round past their mantissa.

Positions are integers of any size in index notation. Those of a model are int64, and nobody gets to the end of these;
but a difference of two bytes does, and a position in bfloat16 is exact up to 256 only.
"""

from __future__ import annotations

import torch

from refocus import simplify as s
from refocus.ir import Const, Expr
from refocus.polynomial import to_poly
from refocus.steps import cases

_NARROW = (torch.uint8, torch.int8, torch.int16, torch.uint16)
# Lengths that are only known when the graph runs are taken to be no larger.
_LONGEST = 1 << 24


def narrowed(value: Expr, dtype: torch.dtype) -> Expr | None:
    """An integer expression as a tensor of `dtype` holds what is computed in it; None where that has no index notation.

    Where nothing is known of a number's size (an element of a tensor, a symbolic length), it is taken to fit an int32,
    int64 or float32, as the model does, unless it is multiplied with a large literal; and nothing narrower.
    """
    if dtype.is_floating_point:
        return value if _is_exact(value, dtype) else None
    info = torch.iinfo(dtype)
    large = _has_large(value, info.max // _LONGEST)
    if dtype == torch.int64 and not large:
        return value
    low, high = s.bounds(value)
    if low is None or high is None:
        if dtype not in _NARROW and not large:
            return value
    elif info.min <= low and high <= info.max:
        return value
    if info.bits == 64:
        return None
    found = cases(value)
    if found is not None:
        out: Expr | None = None
        for number, where in found.items():
            here = Const((int(number) - info.min) % (1 << info.bits) + info.min)
            out = here if out is None else s.where(where, here, out)
        return out
    return s.add(s.mod(s.sub(value, info.min), 1 << info.bits), info.min)


def recast(value: Expr, source: torch.dtype, dtype: torch.dtype) -> Expr | None:
    """The same for a number that was held in another dtype."""
    if not value.is_int or dtype == torch.bool or source == torch.bool:
        return value
    if source.is_floating_point or dtype.is_floating_point:
        return narrowed(value, dtype) if dtype.is_floating_point else value
    before, after = torch.iinfo(source), torch.iinfo(dtype)
    return value if after.min <= before.min and before.max <= after.max else narrowed(value, dtype)


def _is_exact(value: Expr, dtype: torch.dtype) -> bool:
    """Whether a float has a number for each integer that an expression may be."""
    if dtype == torch.float64:
        return True
    low, high = s.bounds(value)
    most = round(2 / torch.finfo(dtype).eps)
    if low is None or high is None:
        return dtype == torch.float32
    return -most <= low and high <= most


def _has_large(value: Expr, least: int) -> bool:
    """Whether something is multiplied with a large literal."""
    return any(mono and abs(factor) >= max(least, 2) for mono, factor in to_poly(value).items())
