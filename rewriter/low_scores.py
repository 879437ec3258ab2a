"""Masks of finite fills beside scores that may be as low as these: rows that keep nothing but such scores.

    where(j <= i, s[i,j] + t[j], -1e4)      t may be a mask that is added, of zeros and -1e9

A row whose kept keys are all at -1e9 is decided by the fills that the mask would drop. So what is as low as a fill is
taken for masked, too, and the row for one that keeps no key: its weights are those of the logits as they are written.
Fills of -inf decide nothing beside a number, and are no matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.hoist import Hoisted
from refocus.ir import FALSE, TRUE, Call, Const, Dot, Expr, Load
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_views import VIEWS
from refocus.masks import MASK_FILL
from refocus.patterns.factors import holds_scores
from refocus.patterns.masking import known_inside, separate_mask
from refocus.steps import line


@dataclass(frozen=True)
class LowScores:
    """What the loads of a region's logits are made of. `hoisted`: those that are computed for the region alone."""

    facts: Facts
    hoisted: Mapping[str, Hoisted]

    def separated(self, logits: Expr) -> tuple[Expr, Expr]:
        """(score, mask), as `separate_mask` tells them apart, but that rows without a key above the fills keep none."""
        score, mask = separate_mask(logits)
        if mask == TRUE or separate_mask(logits, -math.inf)[1] == mask:
            return score, mask
        low = self._low(score, MASK_FILL)
        if low == FALSE:
            return score, mask
        if holds_scores(low):
            return logits, TRUE
        mask = s.and_(mask, s.not_(low))  # a NaN is kept
        return known_inside(score, mask), mask

    def _low(self, e: Expr, limit: float) -> Expr:
        """Where something that is added to scores may be `limit` or less. Scores are taken for what they are scaled
        to, and no lower."""
        if not e.is_float or isinstance(e, Dot):
            return FALSE
        if isinstance(e, Const):
            return TRUE if e.value <= limit else FALSE
        if isinstance(e, Call) and e.op in ("add", "where"):
            terms = e.args if e.op == "add" else e.args[1:]
            found = [self._low(a, limit) for a in terms]
            return s.or_(*found) if e.op == "add" else _chosen(e.args[0], *found)
        if isinstance(e, Call) and e.op == "sub":
            taken = s.call("neg", e.args[1], dtype=e.args[1].dtype)
            return s.or_(self._low(e.args[0], limit), FALSE if holds_scores(taken) else self._low(taken, limit))
        if isinstance(e, Call) and e.op in ("mul", "div") and holds_scores(e):
            factors = [a.value for a in e.args if isinstance(a, Const)]
            ratio = math.prod(factors) if e.op == "mul" else 1 / math.prod(factors)
            return s.or_(*(self._low(a, limit / ratio) for a in e.args if holds_scores(a))) if ratio > 0 else FALSE
        if holds_scores(e) or not self._may_be_low(e):
            return FALSE
        steep = line(e)
        if steep is not None and steep.below(limit) is not None:
            return FALSE  # which the mask says already
        return s.call("le", e, Const(limit, e.dtype), dtype="bool")

    def _may_be_low(self, e: Expr) -> bool:
        if isinstance(e, Const):
            return e.is_float and _is_huge(e.value)
        if isinstance(e, Dot):
            return False
        if not isinstance(e, Load):
            return any(self._may_be_low(a) for a in e.children if a.is_float)
        if e.tensor in self.hoisted:
            return self._may_be_low(self.hoisted[e.tensor].value)
        return e.tensor not in self.facts.nodes or _may_be_a_mask(self.facts.nodes[e.tensor], self.facts)


def _chosen(condition: Expr, yes: Expr, no: Expr) -> Expr:
    return s.or_(s.and_(condition, yes), s.and_(s.not_(condition), no))


def _may_be_a_mask(node: fx.Node, facts: Facts) -> bool:
    """Whether a tensor may hold fills: it came as numbers, or huge ones stand in how it is made. Parameters, which are
    learned, and products with them are taken for as large as scores."""
    seen, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if op_name(n) in CONTRACTIONS or op_name(n) in _BOUNDED or not _is_float(n):
            continue
        literal = facts.constant(n) if n.op == "get_attr" else None
        if literal is not None and not bool((literal.abs() >= -MASK_FILL).any()):
            continue
        if n.op != "call_function":
            if not isinstance(n.meta.get("example_value"), torch.nn.Parameter):
                return True
            continue
        numbers = () if op_name(n) in VIEWS else (*arguments(n), *n.kwargs.values())
        if op_name(n) in _STEEP or any(map(_is_huge, numbers)):
            return True
        stack.extend(a for a in n.all_input_nodes if a not in seen)
        seen.update(n.all_input_nodes)
    return False


_BOUNDED = frozenset(
    ("softmax", "_softmax", "sigmoid", "tanh", "relu", "gelu", "silu", "softplus", "exp", "exp2", "abs", "square",
     "layer_norm", "rms_norm", "group_norm", "batch_norm", "sin", "cos", "rand_like", "randn_like")
)  # fmt: skip
_STEEP = frozenset(("log", "log2", "log10", "log1p", "log_softmax", "logsigmoid"))


def _is_float(node: fx.Node) -> bool:
    return not is_tensor(node) or node.meta["val"].is_floating_point()


def _is_huge(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) >= -MASK_FILL
