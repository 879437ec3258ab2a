"""How far two computations of one attention may differ: the one table, with the reason for each number.

Two comparisons are made. *Against the oracle* (the eager code in float64): a fused result's error may be `FACTOR`
times the eager code's own error in the same dtype, plus a floor. *Pairwise* (`verify=`), where there is no oracle:
the fused and the eager result, each with an error of its own, may differ by `pairwise`. All are relative to the
largest finite magnitude of the expected tensor, since softmax attention averages values: an element near zero is a
cancellation and carries the error of its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A different order of summation changes an error by chance as often up as down; half as much again is beyond chance
# for a maximum over thousands of elements, and far below what a wrong formula would give.
FACTOR = 1.5


@dataclass(frozen=True)
class Tolerance:
    """`floor` and `pairwise` are relative to the largest expected magnitude."""

    floor: float
    pairwise: float
    reason: str


TABLE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        1e-12, 1e-10, "eager float64 is the oracle itself, so the floor alone must hold a reordered sum of 1e4 terms"
    ),
    torch.float32: Tolerance(
        4e-6, 1e-4, "about 32 units in the last place: where eager code happens to be exact (a one-hot row), exp is not"
    ),
    torch.float16: Tolerance(
        1e-3, 2e-2, "one unit in the last place: the result is rounded once, eager code may round it the other way"
    ),
    torch.bfloat16: Tolerance(
        8e-3, 1e-1, "one unit in the last place, as for float16; pairwise, eager code also rounds scores and weights"
    ),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The entry of `dtype`; integer and boolean tensors must agree exactly."""
    return TABLE.get(dtype, Tolerance(0.0, 0.0, "exact"))


def magnitude(expected: Tensor) -> float:
    """The largest finite absolute value, 0 if there is none."""
    values = expected.detach().to(torch.float64).abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite if shapes, NaNs or infinities are not in the same places."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().to(torch.float64), expected.detach().to(torch.float64)
    for kind in (Tensor.isnan, Tensor.isposinf, Tensor.isneginf):
        if not torch.equal(kind(got), kind(expected)):
            return float("inf")
    finite = expected.isfinite()
    return float((got - expected)[finite].abs().max()) if bool(finite.any()) else 0.0


def allowed_error(dtype: torch.dtype, eager_error: float, scale: float) -> float:
    """The largest error against the oracle that a result of `dtype` may have."""
    return FACTOR * eager_error + tolerance(dtype).floor * scale


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether two results of one dtype, neither of them an oracle, are close enough (`verify=`)."""
    if got.dtype != expected.dtype:
        return False
    return difference(got, expected) <= tolerance(got.dtype).pairwise * max(magnitude(expected), 1e-30)
