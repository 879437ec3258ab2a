"""What becomes of a row that holds nothing but finite fills, -1e9 or finfo.min: where the mask leaves it no key.

    softmax(x), exp(x - max x) / sum exp(x - max x)     "kept": the softmax of the fills, the mean of all values
    exp(x) / sum exp(x)                                 "lost": every exponential is zero, and 0 / 0 no number
    exp(x - logsumexp(x))                               "unclear": -1e9 + log(n) is -1e9, and every weight one
"""

from __future__ import annotations

from collections.abc import Iterable

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Expr, Reduce
from refocus.patterns.guards import unguarded

KEPT, LOST, UNCLEAR = "kept", "lost", "unclear"


def of_shift(rows: Iterable[tuple[int, Expr]], logits: Expr, key: Axis) -> str:
    """By what the rows of exponents are shifted: their own maximum, nothing, or something else."""
    shifts = [e for sign, e in rows if sign < 0 and any(isinstance(n, Reduce) for n in e.walk())]
    if not shifts:
        return LOST
    return KEPT if len(shifts) == 1 and _is_maximum(shifts[0], logits, key) else UNCLEAR


def _is_maximum(shift: Expr, logits: Expr, key: Axis) -> bool:
    """Whether a shift is the largest of a row's logits, or a multiple where they are."""
    factors = []
    shift = unguarded(shift) or shift
    while isinstance(shift, Call) and shift.op in ("mul", "detach"):
        factors += [a for a in shift.args if isinstance(a, Const)]
        rest = [a for a in shift.args if not isinstance(a, Const)]
        if len(rest) != 1:
            return False
        shift = unguarded(rest[0]) or rest[0]
    if not (isinstance(shift, Reduce) and shift.op == "max"):
        return False
    largest = s.substitute(shift.body, {shift.axis: key})
    for factor in reversed(factors):
        largest = s.call("mul", largest, factor, dtype=logits.dtype)
    return largest == logits


def same_sum(a: Expr, b: Expr) -> bool:
    """Whether two sums over keys are one and the same: what is divided by it twice was divided by one."""
    if not (isinstance(a, Reduce) and isinstance(b, Reduce)) or (a.op, a.axis.size) != (b.op, b.axis.size):
        return False
    return s.substitute(a.body, {a.axis: b.axis}) == b.body
