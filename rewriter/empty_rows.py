"""Rows that a mask leaves no key: what the model makes of them, and which conditions make zeros of them.

    where(mask[i, j], softmax(x | mask), 0)             rows without keys are zeros
    where(any_j mask[i, j], softmax(x | mask), 0)       likewise
    where(rows[i], softmax(x | mask), 0)                likewise, if every row has a key or fails the condition

A softmax over nothing but -inf is no number, and zero times it is none. What is known of the condition decides: if it
holds in rows with a key only, all others are zeros. Where neither is proved, the site is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refocus import simplify as s
from refocus.facts import Facts
from refocus.finite_rows import Open
from refocus.ir import BOOL, TRUE, Axis, Call, Const, Dot, Expr, Load, rewrite
from refocus.lift import Lifter, arguments, op_name
from refocus.masks import MASK_FILL, never_empty
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.fills import KEPT, ROUNDED, UNCLEAR
from refocus.patterns.masking import separate_mask
from refocus.patterns.softmax import Softmax
from refocus.row_sums import opened, summed_dims


@dataclass(frozen=True)
class Rows:
    """The rows of a softmax: the axes that its mask is read in, and the graph that its loads are of."""

    facts: Facts
    batch: list[Axis]
    query: Axis
    key: Axis

    def settled(self, soft: Softmax, logits: Expr) -> Expr:
        """Logits whose rows without keys are what the model makes of these. Raises Stop where that is not known."""
        if soft.fills == KEPT or not self._may_be_filled(logits):
            return logits
        emptied = _with_infinite_fills(logits)
        mask = separate_mask(logits)[1]
        if soft.fills == UNCLEAR or separate_mask(emptied)[1] != mask or any(_is_fill(n) for n in emptied.walk()):
            raise Stop(UNPLAIN_FILLS)
        return logits if self.rounded(soft, logits) else emptied

    def rounded(self, soft: Softmax, logits: Expr) -> bool:
        """Whether the weights of a row of nothing but fills are what the rounding of its log-sum-exp leaves."""
        if soft.fills != ROUNDED or not self._may_be_filled(logits):
            return False
        # Fills that are added let gradients through, and those of rounded weights are no softmax's.
        added = any(map(_is_fill, _but_for_chosen_fills(logits).walk()))
        if added or soft.cleaned or soft.extra or soft.selected != TRUE:
            raise Stop(UNPLAIN_FILLS)
        return True

    def _may_be_filled(self, logits: Expr) -> bool:
        """Whether a row may hold nothing but finite fills."""
        return any(_is_fill(n) for n in logits.walk()) and not self._never_empty(separate_mask(logits)[1])

    def rule(self, soft: Softmax, logits: Expr, mask: Expr, zeros: bool) -> str:
        """`Region.empty_row`; `zeros`: the model's softmax is one that makes zeros of rows that are no numbers.
        Raises Stop where a condition makes zeros of some rows without keys, maybe not of all."""
        apart = set(s.conjuncts(soft.selected)) - {TRUE, *s.conjuncts(mask)}
        if apart and self._may_be_emptied(logits):
            raise Stop(_UNPLAIN)
        if self._never_empty(mask):
            return "zero" if (zeros or soft.cleaned) and self._may_be_emptied(logits) else "never"
        if soft.cleaned:
            return "zero"
        if soft.selected == TRUE:
            return "logits"
        if any(_implies(held, mask) for held in (soft.selected, *self._of_some_key(soft.selected))):
            return "zero"
        if self.key not in soft.selected.axes and self._never_empty(s.or_(mask, s.not_(soft.selected))):
            return "zero"
        if any(isinstance(n, Const) and n.is_float and n.value == -math.inf for n in logits.walk()):
            raise Stop(_UNPLAIN)
        return "logits"

    def _never_empty(self, mask: Expr) -> bool:
        return never_empty(mask, self.batch, self.query, self.key)

    def _may_be_emptied(self, logits: Expr) -> bool:
        """Whether what is added to the products of queries and keys is a tensor's, which may hold -inf for all keys."""
        most = min(map(_largest, {n.dtype for n in logits.walk() if n.is_float}))
        stack = [logits]
        while stack:
            e = stack.pop()
            if isinstance(e, Load) and e.is_float and not self._is_within(e, most):
                return True
            scaled = isinstance(e, Call) and e.op in ("mul", "div")
            if not isinstance(e, Dot | Load):
                stack.extend(a for a in e.children if a.dtype != BOOL and not (scaled and isinstance(a, Load)))
        return False

    def _is_within(self, load: Load, most: float) -> bool:
        """Whether the graph makes a tensor of conditions and numbers that are no larger."""
        node = self.facts.nodes.get(load.tensor)
        if node is None or node.op != "call_function":
            return False
        low, high = _ends(Open(self.facts).at(node, load.index))
        return -most <= low and high <= most

    def _of_some_key(self, condition: Expr) -> Iterator[Expr]:
        """What holds for some key where a condition holds: p[i, j], for any_j p[i, j] and for not all_j not p[i, j]."""
        for part in s.conjuncts(condition):
            negated = isinstance(part, Call) and part.op == "not"
            load = part.args[0] if isinstance(part, Call) and negated else part
            node = self.facts.nodes.get(load.tensor) if isinstance(load, Load) else None
            if not isinstance(load, Load) or node is None or op_name(node) != ("all" if negated else "any"):
                continue
            dims, _ = summed_dims(node)
            if len(dims) == 1:
                position = opened(node, load.index, {dims[0]: self.key})
                body = s.as_bool(Lifter(self.facts, far=True).at(arguments(node)[0], position))
                yield s.not_(body) if negated else body


UNPLAIN_FILLS = Declined("a row may hold nothing but fills, and it is not plain what the model makes of these")
_UNPLAIN = Declined("rows without keys are no numbers, and it is not plain which of them become zeros")


def _largest(dtype: str) -> float:
    """How large a number may be that is added to a score: of all dtypes but one, the largest absorbs any score."""
    most = torch.finfo(getattr(torch, dtype)).max
    return most / 2 if dtype == "float16" else most


def _ends(e: Expr) -> tuple[float, float]:
    """Between which numbers a value lies that is made of numbers and conditions; infinite where that is not known."""
    if isinstance(e, Const):
        return float(e.value), float(e.value)
    if e.dtype == BOOL:
        return 0.0, 1.0
    if isinstance(e, Call) and e.op == "cast":
        return _ends(e.args[0])
    if isinstance(e, Call) and e.op == "where":
        ends = [_ends(a) for a in e.args[1:]]
        return min(a for a, _ in ends), max(b for _, b in ends)
    if isinstance(e, Call) and e.op in ("add", "mul", "sub") and len(e.args) == 2:
        (a, b), (c, d) = map(_ends, e.args)
        if e.op != "mul":
            return (a + c, b + d) if e.op == "add" else (a - d, b - c)
        corners = [x * y for x in (a, b) for y in (c, d)]
        return (-math.inf, math.inf) if any(map(math.isnan, corners)) else (min(corners), max(corners))
    return -math.inf, math.inf


def _is_fill(e: Expr) -> bool:
    return isinstance(e, Const) and e.is_float and -math.inf < e.value <= MASK_FILL


def _but_for_chosen_fills(logits: Expr) -> Expr:
    """Logits with -inf for the fills that stand in their place, and are not added to them."""
    if isinstance(logits, Call) and logits.op == "where":
        return s.where(logits.args[0], *map(_but_for_chosen_fills, logits.args[1:]))
    return Const(-math.inf, logits.dtype) if _is_fill(logits) else logits


def _with_infinite_fills(logits: Expr) -> Expr:
    """where(mask, x, -1e9) as where(mask, x, -inf), wherever it stands: gradients find the same way."""

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Call) and node.op == "where" and node.is_float):
            return None
        cond, *values = node.args
        return s.where(cond, *(Const(-math.inf, v.dtype) if _is_fill(v) else _with_infinite_fills(v) for v in values))

    return rewrite(logits, visit, s.rebuild)


def _implies(condition: Expr, mask: Expr) -> bool:
    return s.under(mask, s.assume(condition)) == TRUE
