"""Numbers put in the place of what is none: a maximum that has met no key, a sum of nothing.

where(m == -inf, 0, m)          m, and a number
where(l == 0, 1, l)             l, and nothing to divide zero by
"""

from __future__ import annotations

import math

from refocus.ir import Call, Const, Expr


def unguarded(e: Expr) -> Expr | None:
    """The maximum under a guard; None where there is no guard."""
    found = _chosen(e)
    if found is None:
        return None
    cond, fill, kept = found
    none = _is_at_most(cond, kept, -math.inf) or (cond.op == "isinf" and cond.args == (kept,))
    return kept if none and math.isfinite(fill) else None


def sum_under_guard(e: Expr) -> Expr | None:
    """The sum of exponentials under a guard; None where there is no guard."""
    found = _chosen(e)
    if found is None:
        return None
    cond, fill, kept = found
    return kept if _is_at_most(cond, kept, 0.0) and math.isfinite(fill) and fill != 0 else None


def _is_at_most(cond: Call, kept: Expr, least: float) -> bool:
    """Whether a condition asks if a value is the least that it may be: x == least, or x <= least."""
    others = [a for a in cond.args if a != kept]
    if cond.op not in ("eq", "le") or len(others) != 1 or (cond.op == "le" and cond.args[0] != kept):
        return False
    return isinstance(others[0], Const) and others[0].value == least


def _chosen(e: Expr) -> tuple[Call, float, Expr] | None:
    """(condition, fill, x) of where(condition, fill, x)."""
    if not (isinstance(e, Call) and e.op == "where" and e.is_float):
        return None
    cond, fill, kept = e.args
    if isinstance(cond, Call) and cond.op == "not":
        cond, fill, kept = cond.args[0], kept, fill
    elif isinstance(cond, Call) and cond.op == "lt" and cond.args[1] == fill:  # where(l > 0, l, 1)
        cond, fill, kept = Call("le", cond.args[::-1], cond.dtype), kept, fill
    return (cond, fill.value, kept) if isinstance(cond, Call) and isinstance(fill, Const) else None
