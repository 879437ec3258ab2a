"""Masks told apart from scores: fills, and what is added, that leave nothing of a key."""

from __future__ import annotations

from refocus import simplify as s
from refocus.ir import TRUE, Call, Const, Dot, Expr, Load, rewrite
from refocus.masks import MASK_FILL
from refocus.patterns.factors import holds_scores
from refocus.steps import branches, cases, from_cases, line


def separate_mask(logits: Expr, fill: float = MASK_FILL) -> tuple[Expr, Expr]:
    """(score, mask): fills and additive masks become a predicate, everything else stays. `fill`: what is this low, or
    lower, leaves nothing of a key.

        where(p, x, -inf) + bias        ->  x + bias,  p
        x + where(p, 0.0, finfo.min)    ->  x,         p
        x * [p] - 1e4 * (1 - [p])       ->  x,         p
        x + (1.0 - t[j]) * finfo.min    ->  itself,    t[j] > 0.5
    """
    score, mask = _separate(logits, fill)
    score = known_inside(score, mask)
    if mask != TRUE:  # what only pairs that are kept have: where(p, x, 0.0) + where(p, 0.0, -1e4)
        score, more = _separate(score, fill)
        score, mask = known_inside(score, more), s.and_(mask, more)
    return score, mask


def known_inside(value: Expr, mask: Expr) -> Expr:
    """A value of the pairs that a mask keeps: its parts are known there. But what is loaded is loaded everywhere: an
    index that a part of the mask keeps in range stays as it is."""
    if mask == TRUE:
        return value
    known = dict.fromkeys(s.conjuncts(mask), TRUE)
    return rewrite(value, lambda node: known.get(node, node if isinstance(node, Load) else None), s.rebuild)


def _as_choice(e: Expr) -> Expr | None:
    """What is computed with numbers from a product of two masks, as a choice by the one that is a condition:

    (1.0 - where(p, 1.0, 0.0) * t[j]) * -1e9     ->  where(p, (1.0 - t[j]) * -1e9, -1e9)
    """
    if not (isinstance(e, Call) and e.is_float and e.op in ("add", "sub", "mul", "div", "neg")):
        return None
    rest = [k for k, a in enumerate(e.args) if not isinstance(a, Const)]
    if len(rest) == 1 and not isinstance(e.args[rest[0]], Load | Dot):
        inner = e.args[rest[0]]
        below = inner if isinstance(inner, Call) and inner.op == "where" else _as_choice(inner)
        if not (isinstance(below, Call) and below.op == "where"):
            return None
        ends = [
            s.call(e.op, *(x if k == rest[0] else a for k, a in enumerate(e.args)), dtype=e.dtype)
            for x in below.args[1:]
        ]
        return s.where(below.args[0], *ends)
    told = branches(e) if e.op == "mul" and not holds_scores(e) else None
    return None if told is None else s.where(*told)


def _separate(logits: Expr, lowest: float) -> tuple[Expr, Expr]:
    if not (isinstance(logits, Call) and logits.is_float):
        return logits, TRUE
    args = logits.args
    values = cases(logits)
    if values is not None:
        stay = {value: where for value, where in values.items() if not value <= lowest}
        if len(stay) == len(values) or not stay:
            return logits, TRUE
        return from_cases(stay, logits.dtype), s.or_(*stay.values())
    steep = line(logits)
    if steep is not None:  # what it adds where it keeps a key stays
        low = steep.below(lowest)
        return logits, TRUE if low is None else s.not_(low)
    chosen = _as_choice(logits)
    # What is as low as a fill, and no mask, would take part in a row that is left with nothing else.
    if chosen is not None and all(isinstance(x, Const) or _separate(x, lowest)[1] != TRUE for x in chosen.children[1:]):
        return _separate(chosen, lowest)
    if logits.op == "where":
        for cond, kept, fill in ((args[0], args[1], args[2]), (s.not_(args[0]), args[2], args[1])):
            if isinstance(fill, Const) and fill.value <= lowest:
                score, mask = _separate(kept, lowest)
                return score, s.and_(cond, mask)
        (yes, mask_yes), (no, mask_no) = _separate(args[1], lowest), _separate(args[2], lowest)
        if (mask_yes, mask_no) != (TRUE, TRUE):  # keys of two sources, each with a mask of its own
            mask = s.or_(s.and_(args[0], mask_yes), s.and_(s.not_(args[0]), mask_no))
            return s.where(args[0], yes, no), mask
    elif logits.op == "add":
        parts = [_separate(a, lowest) for a in args]
        score = parts[0][0]
        for part, _ in parts[1:]:
            score = s.call("add", score, part, dtype=logits.dtype)
        return score, s.and_(*(m for _, m in parts))
    elif logits.op == "sub":
        taken = args[1]
        if isinstance(taken, Call) and taken.op == "where" and all(isinstance(a, Const) for a in taken.args[1:]):
            given = s.call("neg", taken, dtype=logits.dtype)
            return _separate(s.call("add", args[0], given, dtype=logits.dtype), lowest)
        score, mask = _separate(args[0], lowest)
        return s.call("sub", score, taken, dtype=logits.dtype), mask
    elif logits.op in ("mul", "div"):
        for inner, factor in ((args[0], args[1]), (args[1], args[0])):
            if isinstance(factor, Const) and factor.value > 0 and (logits.op == "mul" or factor is args[1]):
                ratio = factor.value if logits.op == "mul" else 1 / factor.value
                score, mask = _separate(inner, lowest / ratio)
                pair = (score, factor) if inner is args[0] else (factor, score)
                return s.call(logits.op, *pair, dtype=logits.dtype), mask
    return logits, TRUE
