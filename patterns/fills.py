"""What becomes of a row that holds nothing but finite fills, -1e9 or finfo.min: where the mask leaves it no key.

    softmax(x), exp(x - max x) / sum exp(x - max x)     "kept": the softmax of the fills, the mean of all values
    exp(x) / sum exp(x)                                 "lost": every exponential is zero, and 0 / 0 no number
    exp(x - logsumexp(x))                               "rounded": -1e9 + log(n) is -1e9, and every weight one
    anything else                                       "unclear"

"Rounded" weights are those of the softmax times exp(L - round L), where L is the log-sum-exp of the row: one, but for
rows that are so low that the logarithm of the sum is lost beside the fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Expr, Reduce
from refocus.patterns.factors import but_for_base
from refocus.patterns.guards import unguarded

KEPT, LOST, ROUNDED, UNCLEAR = "kept", "lost", "rounded", "unclear"


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
    return but_for_base(largest) == logits


def by_rounded_sum(weights: Expr, key: Axis, stable: bool) -> bool:
    """Whether weights are exp(x - L) with L one number, the log-sum-exp of x, in float32 or wider. `stable`: what is
    spelled as log(sum(exp(x))) is an operation that takes the maximum away."""
    exponents = [n for n in _outside_sums(weights) if isinstance(n, Call) and n.op == "exp" and key in n.axes]
    if len(exponents) != 1 or not (isinstance(exponents[0].args[0], Call) and exponents[0].args[0].op == "sub"):
        return False
    logits, lowered = exponents[0].args[0].args
    if key in lowered.axes or lowered.dtype not in ("float32", "float64"):
        return False
    terms = lowered.args if isinstance(lowered, Call) and lowered.op == "add" else (lowered,)
    shifts = [t for t in terms if not (isinstance(t, Call) and t.op == "log")]
    logs = [t.args[0] for t in terms if isinstance(t, Call) and t.op == "log"]
    if len(logs) != 1 or not (isinstance(logs[0], Reduce) and logs[0].op == "sum" and logs[0].axis.size == key.size):
        return False
    if len(shifts) > 1 or (shifts and not _is_maximum(shifts[0], logits, key)) or not (shifts or stable):
        return False
    shifted = s.call("sub", logits, shifts[0], dtype=logits.dtype) if shifts else logits
    return s.substitute(logs[0].body, {logs[0].axis: key}) == s.call("exp", shifted, dtype=logits.dtype)


def _outside_sums(e: Expr) -> Iterator[Expr]:
    yield e
    if not isinstance(e, Reduce):
        for child in e.children:
            yield from _outside_sums(child)


def same_sum(a: Expr, b: Expr) -> bool:
    """Whether two sums over keys are one and the same: what is divided by it twice was divided by one."""
    if not (isinstance(a, Reduce) and isinstance(b, Reduce)) or (a.op, a.axis.size) != (b.op, b.axis.size):
        return False
    return s.substitute(a.body, {a.axis: b.axis}) == b.body
