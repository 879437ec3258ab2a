"""Weights that are functions of each pair by itself, and not normalised: sigmoid, ReLU, squared ReLU, SiLU attention.

    out[i,e] = sum over j of  f(q[i] . k[j] + b[i,j]) [mask]  v[j,e]

Read as g * exp(x), they are a gate g on a softmax of x, times what that divides by: where there is no exponential, the
softmax of equal logits, which weighs each of the n keys that a row keeps with 1 / n. So tiles are skipped, exponentials
shifted and gradients taken as for any attention. (Ramapuram et al. 2024, "Theory, analysis, and best practices for
sigmoid self-attention"; Wortsman et al. 2023, "Replacing softmax with ReLU in vision transformers"; Hua et al. 2022,
"Transformer quality in linear time"; Zhai et al. 2024, HSTU.)
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.masks import MASK_FILL
from refocus.patterns.declined import Declined
from refocus.patterns.factors import Factored, factored, holds_scores, summed
from refocus.patterns.softmax import TOTAL, Softmax


def match_pairwise(weights: Expr, key: Axis) -> tuple[Expr, Softmax] | Declined:
    """Read weights as (factor of the row, gated softmax that is not normalised)."""
    parts = factored(_with_zeros(weights))
    if not all(map(_is_tame, parts.factors)):
        parts = factored(weights)  # what a fill keeps from overflowing stays filled
    if parts.cleaned or parts.logged:
        return Declined("the weights are mended where they are no numbers")
    dtype = weights.dtype
    row: Expr = Const(1.0, dtype)
    gate: Expr = Const(1.0, dtype)
    for factor in parts.factors:
        if key in factor.axes or holds_scores(factor):
            gate = s.call("mul", gate, factor, dtype=dtype)
        else:
            row = s.call("mul", row, factor, dtype=dtype)
    divisor: Expr | None = None
    for by in parts.divisors:
        total = _of_total(by, parts, key) if holds_scores(by) else by
        if holds_scores(total) or key in total.axes:
            return Declined("the weights are divided by what is no function of their sum")
        divisor = total if divisor is None else s.call("mul", divisor, total, dtype=dtype)
    mask = s.and_(*(c for c in parts.conditions if not holds_scores(c)))
    scored = s.and_(*(c for c in parts.conditions if holds_scores(c)))
    gate = s.where(scored, gate, Const(0.0, gate.dtype))
    logits = summed(parts.exponents, dtype)
    made_of = [n for e in (gate, logits) for n in e.walk()]
    if not any(isinstance(n, Dot) and key in n.axes for n in made_of):
        return Declined("the weights hold no product of queries and keys")
    if any(isinstance(n, Reduce) and holds_scores(n) for n in made_of):
        return Declined("a weight depends on the scores of other keys")
    logits = s.where(mask, logits, Const(-math.inf, dtype))
    return row, Softmax(logits, (), gate, cleaned=True, unnormalised=True, divisor=divisor)


# Functions of a finite number that are finite, and have a finite derivative.
_TAME = frozenset(
    ("mul", "add", "sub", "neg", "square", "relu", "sigmoid", "tanh", "erf", "softplus", "abs", "min", "max", "where",
     "cast", "detach", "sin", "cos", "atan")
)  # fmt: skip


def _is_tame(e: Expr) -> bool:
    """Whether pairs that a mask leaves out may be computed like any other, for it makes zeros of them."""
    if not e.is_float or isinstance(e, Dot | Load | Const):
        return True
    if isinstance(e, Call) and e.op == "div":
        return isinstance(e.args[1], Const) and _is_tame(e.args[0])
    return isinstance(e, Call) and e.op in _TAME and all(map(_is_tame, e.args))


def _of_total(divisor: Expr, parts: Factored, key: Axis) -> Expr:
    """What weights are divided by, their sum over the keys replaced by `TOTAL`, times what factors of a row are summed
    that the weights do not have."""

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Reduce) and node.op == "sum" and node.axis.size == key.size):
            return None
        body = factored(_with_zeros(s.substitute(node.body, {node.axis: key})))
        mine, theirs = Counter(parts.factors), Counter(body.factors)
        rest, more = mine - theirs, theirs - mine
        alike = not body.divisors and set(body.conditions) == set(parts.conditions)
        if not alike or Counter(body.exponents) != Counter(parts.exponents):
            return None
        if any(key in f.axes or holds_scores(f) for f in (*rest, *more)):
            return None
        total: Expr = TOTAL
        for factor in more.elements():
            total = s.call("mul", total, factor, dtype=node.dtype)
        return total

    return rewrite(divisor, visit, s.rebuild)


def _with_zeros(weights: Expr) -> Expr:
    """Weights with zeros for what a function makes of a fill, where that is zero: masks are told by these.

    relu(where(mask, x, -inf))            ->  where(mask, relu(x), 0)
    sigmoid(x + where(mask, 0, -1e9))     ->  where(mask, sigmoid(x), 0)
    """
    return _Fills().followed(weights)


@dataclass
class _Fills:
    """Follows fills to what becomes of them. `blurred`: something was added to a finite one, and taken for nothing;
    `seen`: the number that came out of a fill is neither zero nor a fill, so that what was added may be seen."""

    blurred: bool = False
    seen: bool = False
    known: dict[Expr, Expr] = field(default_factory=dict)

    def followed(self, weights: Expr) -> Expr:
        """The weights themselves where a fill does not end in a zero, or would not have for what is added to it."""
        found = self._go(weights)
        kept = any(map(_is_fill, found.walk())) or (self.blurred and self.seen)
        return weights if kept else found

    def _go(self, e: Expr) -> Expr:
        if e not in self.known:
            whole = isinstance(e, Dot | Load | Reduce) or not e.is_float
            children = e.children if whole else tuple(map(self._go, e.children))
            again = e if children == e.children else s.rebuild(e, children)
            inside = isinstance(again, Call) and not whole and again.op != "where"
            self.known[e] = self._of_choice(again) if inside else again  # type: ignore[arg-type]
        return self.known[e]

    def _of_choice(self, node: Call) -> Expr:
        """A function of a choice between a value and a fill, as the choice between the function of the value and what
        becomes of the fill, where that is a number."""
        choices = [a for a in node.args if isinstance(a, Call) and a.op == "where" and a.is_float]
        conditions = {a.args[0] for a in choices}
        if len(conditions) != 1 or not any(map(_is_fill, (x for a in choices for x in a.args[1:]))):
            return node
        (condition,) = conditions
        if holds_scores(condition):
            return node
        ends = [self._side(node, [a.children[n] if a in choices else a for a in node.args]) for n in (1, 2)]
        return s.where(condition, *ends) if any(isinstance(x, Const) for x in ends) else node

    def _side(self, node: Call, args: list[Expr]) -> Expr:
        fills = [a for a in args if _is_fill(a)]
        if node.op == "add" and fills:
            self.blurred |= any(isinstance(a, Const) and math.isfinite(a.value) for a in fills)
            return fills[0]
        value = s.call(node.op, *args, dtype=node.dtype)
        number = fills and isinstance(value, Const)
        self.seen |= bool(number) and not _is_fill(value) and value.value != 0  # type: ignore[attr-defined]
        return value


def _is_fill(e: Expr) -> bool:
    return isinstance(e, Const) and e.is_float and e.value <= MASK_FILL
