"""Softmax over keys, however it is spelled.

    before   weights[i, j] = exp(x[i,j] - m[i]) * g[i,j] / sum_r exp(x[i,r] - m[i])      (any stable shift m)
    after    Softmax(logits=x, gate=g)

Recognition is arithmetic on factors and exponents, not a list of spellings: the weight is split into exponents,
factors and divisors; exponents without a key cancel between numerator and denominator; what is left must agree. A
denominator that runs over more columns than the weight (a sink column dropped after the softmax) gives `extra` logits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.masks import MASK_FILL
from refocus.patterns.declined import Declined
from refocus.patterns.factors import Factored, Signed, additive, factored, holds_scores, multiplied, summed
from refocus.patterns.fills import KEPT, UNCLEAR, of_shift, same_sum
from refocus.patterns.guards import sum_under_guard, unguarded
from refocus.patterns.key_parts import Part, ends_of_pieces, parts_like
from refocus.polynomial import order_key

TOTAL = Load("sum of the weights", (), "float32")  # of weights that are not a softmax


@dataclass(frozen=True)
class Softmax:
    """weights = gate * exp(logits) / (sum_key exp(logits) + sum exp(extra)).

    `cleaned`: where that is no number, for all logits are -inf, the model puts zeros. `selected`: the part of the gate
    outside of which it puts zeros, numbers or not: where(p, softmax(x), 0). `fills`: what becomes of a row that holds
    nothing but finite fills. It is the softmax of these ("kept"); 0 / 0, as they are so low that the exponential of
    each is zero ("lost"); that softmax times what rounding makes of it ("rounded"); or any, or none ("unclear").
    `strict`: where all logits are -inf the model has no number, whatever the extra ones are. `part`: the logits are of
    more keys than the weights that are used, which are at a part of them. `unnormalised`: the weights are
    gate * exp(logits), which may be divided by `divisor`, a function of their sum `TOTAL`.
    """

    logits: Expr
    extra: tuple[Expr, ...]
    gate: Expr
    cleaned: bool = False
    selected: Expr = TRUE
    fills: str = "kept"
    strict: bool = False
    part: Part | None = None
    unnormalised: bool = False
    divisor: Expr | None = None

    @property
    def dots(self) -> tuple[Dot, ...]:
        """The products of queries and keys that the weights are made of."""
        made_of = (self.logits, self.gate) if self.unnormalised else (self.logits,)
        return tuple(dict.fromkeys(n for e in made_of for n in e.walk() if isinstance(n, Dot)))


@dataclass(frozen=True)
class Term:
    """One summand of a weight that is linear in normalised weights: sum over `mixed` of factor * core."""

    mixed: tuple[Axis, ...]
    factor: Expr
    core: Expr


def steadied(factor: Expr, core: Expr, key: Axis) -> tuple[Expr, Expr]:
    """A softmax of which the factor holds the sum, shifted by its maxima as `softmax` does it: what is computed outside
    of a region is computed as it is written, and exp(x) / sum(exp(x)) overflows, its gradient even sooner.

    c / sum_j exp(x[j]), exp(x)  ->  c / sum_j exp(x[j] - m), exp(x - m)      m = max_j x[j]
    """
    if not (isinstance(core, Call) and core.op == "exp" and isinstance(factor, Call)):
        return factor, core
    if factor.op == "mul":
        for k, part in enumerate(factor.args):
            others = [a for n, a in enumerate(factor.args) if n != k]
            shifted, weight = steadied(part, core, key)
            if shifted is not part:
                return s.call("mul", *others, shifted, dtype=factor.dtype), weight
    if factor.op not in ("div", "reciprocal"):
        return factor, core
    total = factor.args[-1]
    if not (isinstance(total, Reduce) and total.op == "sum" and s.substitute(total.body, {total.axis: key}) == core):
        return factor, core
    one = total.body.children[0]
    most = s.call("detach", Reduce("max", total.axis, one, one.dtype), dtype=one.dtype)

    def shifted_by_most(x: Expr) -> Expr:
        return s.call("exp", s.call("sub", x, most, dtype=one.dtype), dtype=core.dtype)

    below = Reduce("sum", total.axis, shifted_by_most(one), total.dtype)
    return s.call(factor.op, *factor.args[:-1], below, dtype=factor.dtype), shifted_by_most(core.args[0])


def with_steady_softmaxes(value: Expr) -> Expr:
    """The same where a softmax of something else stands in what is added to scores."""

    def build(node: Expr, children: tuple[Expr, ...]) -> Expr:
        return quotient(s.rebuild(node, children))

    def quotient(node: Expr) -> Expr:
        if not (isinstance(node, Call) and node.op == "div"):
            return node
        core, total = node.args
        if not isinstance(total, Reduce):
            return node
        along = next((a for a in core.axes if s.substitute(total.body, {total.axis: a}) == core), None)
        if along is None:
            return node
        one = Const(1.0, node.dtype)
        factor, shifted = steadied(s.call("div", one, total, dtype=node.dtype), core, along)
        below = factor.children[-1]
        return node if shifted is core else Call("div", (shifted, below), node.dtype)

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Dot | Load):
            return node
        steady = quotient(node)
        return None if steady is node else steady

    return rewrite(value, visit, build)


def terms_of(weights: Expr, key: Axis) -> tuple[list[Term], Expr]:
    """Write a weight as a sum of terms around normalised cores, and a rest without key (talking heads' bias)."""
    dtype = weights.dtype
    one = Const(1.0, dtype)

    def go(e: Expr, mixed: tuple[Axis, ...], factor: Expr) -> tuple[list[Term], Expr]:
        if key not in e.axes:
            rest = s.call("mul", factor, e, dtype=dtype)
            for axis in reversed(mixed):
                rest = Reduce("sum", axis, rest, dtype)
            return [], rest
        if isinstance(e, Reduce) and e.op == "sum" and not isinstance(e.body, Dot):
            return go(e.body, (*mixed, e.axis), factor)
        if isinstance(e, Call):
            if e.op in ("add", "sub"):
                left, rest_left = go(e.args[0], mixed, factor)
                sign = factor if e.op == "add" else s.call("mul", factor, Const(-1.0, dtype), dtype=dtype)
                right, rest_right = go(e.args[1], mixed, sign)
                return left + right, s.call("add", rest_left, rest_right, dtype=dtype)
            if e.op == "neg":
                return go(e.args[0], mixed, s.call("mul", factor, Const(-1.0, dtype), dtype=dtype))
            whole = _row_sum(e.args[1]) if e.op == "div" and key not in e.args[1].axes else None
            if whole is not None:
                return go(e.args[0], mixed, s.call("div", factor, whole, dtype=dtype))
            if e.op in ("mul", "div"):
                for a, b in ((e.args[0], e.args[1]), (e.args[1], e.args[0])):
                    if key not in b.axes and not holds_scores(b) and (e.op == "mul" or b is e.args[1]):
                        return go(a, mixed, s.call(e.op, factor, b, dtype=dtype))
        return [Term(mixed, factor, e)], Const(0.0, dtype)

    found, rest = go(weights, (), one)
    return found, rest


def _row_sum(total: Expr) -> Expr | None:
    """The sum of a row of weights that are made of softmaxes: each adds up to one, so what is left are the factors."""
    if not (isinstance(total, Reduce) and total.op == "sum"):
        return None
    parts, rest = terms_of(total.body, total.axis)
    if rest != Const(0.0, rest.dtype) or not parts:
        return None
    out: Expr | None = None
    for part in parts:
        weight = s.call("mul", part.factor, part.core, dtype=total.dtype)
        read = match(weight, total.axis, of_scores=False)
        if part.mixed or isinstance(read, Declined) or read.extra or total.axis in read.gate.axes:
            return None
        if read.cleaned or read.selected != TRUE:  # zeros in the place of no numbers add up to zero
            return None
        out = read.gate if out is None else s.call("add", out, read.gate, dtype=total.dtype)
    return out


def match(
    core: Expr, key: Axis, of_scores: bool = True, by_hand: bool = False, in_part: bool = False
) -> Softmax | Declined:
    """Read `core` as a softmax over `key`, or say which part is not. `of_scores`: it has to hold products. `by_hand`:
    it is spelled with exponentials, whose rows may or may not be shifted by their maxima. `in_part`: it may be part of
    a softmax over more keys."""
    top = factored(core)
    dtype = core.dtype
    sums = [
        d for d in top.divisors if holds_scores(d) or (not of_scores and any(isinstance(n, Reduce) for n in d.walk()))
    ]
    if not sums:
        return Declined("the weights are not normalised over the keys", pairwise=True)
    same = True  # sums that were divided by one after the other
    while len(sums) > 1:
        fewer = _renormalised(sums)
        if fewer is None:
            break
        same = same and any(same_sum(d, fewer[-1]) for d in sums)
        for d in sums:
            top.divisors.remove(d)
        sums = fewer
        top.divisors += sums
    if len(sums) > 1:
        return Declined("the weights are normalised more than once")
    total = sums[0]
    top.divisors.remove(total)
    guarded = sum_under_guard(total)
    if guarded is not None and at_least_one(guarded):
        total = guarded  # one at least, or no number
    elif guarded is not None:
        rows = [e for _, e in top.exponents if key not in e.axes]
        if any(unguarded(e) is None for e in rows):
            return Declined("the normaliser is changed after the sum", "where")
        total, top.cleaned = guarded, True
    total = _unclamped(total)
    extras: list[Expr] = []
    while isinstance(total, Call) and total.op == "add":  # a sink added to the sum by hand
        plain = [a for a in total.args if (isinstance(a, Call) and a.op == "exp") or isinstance(a, Const)]
        rest = [a for a in total.args if a not in plain]
        if len(rest) == 1 and at_least_one(rest[0]):
            plain = [p for p in plain if not is_lost(p, dtype)]
            total = rest[0] if not plain else total
        if not plain and rest:
            break
        numbers = [p.value for p in plain if isinstance(p, Const)]
        if len(rest) != 1 or not plain or any(n != 1 for n in numbers):
            return Declined("something other than an exponential is added to the normaliser", "add")
        # 1 + sum exp(x) is softmax with one extra logit of zero
        extras += [p.args[0] if isinstance(p, Call) else Const(0.0, dtype) for p in plain]
        total = rest[0]
    if not isinstance(total, Reduce):
        return Declined("the normaliser is changed after the sum", total.op if isinstance(total, Call) else None)
    if total.op != "sum":
        return Declined(f"the normaliser is a {total.op}, not a sum", total.op)
    if total.axis.size == key.size and key not in core.axes:
        return Declined("the softmax does not run over the keys")
    surplus = s.sub(total.axis.size, key.size)
    few = isinstance(surplus, Const) and 0 <= surplus.value <= _EXTRAS
    more = int(surplus.value) if few else 0  # type: ignore[attr-defined]
    found = None
    for offset in dict.fromkeys((0, more) if few else ()):
        found = found or _match_at(top, total, key, offset, more, extras, dtype)
    if found is None and in_part:
        found = _match_part(top, total, key, extras, dtype)
    if found is None and not few:
        return Declined("the softmax runs over another axis than the keys")
    if found is None:
        return Declined("the exponents of the weights and of the normaliser differ")
    if found.cleaned and not only_infinite(found.logits):
        return Declined("probabilities that are no numbers are replaced, where it is not plain which these are")
    return replace(found, fills=UNCLEAR if not same else found.fills if by_hand else KEPT)


_EXTRAS = 64  # at most so many columns without keys


def _unclamped(total: Expr) -> Expr:
    """sum exp(x - max x) out of its maximum with a number up to 1, which it never is below; anything else as it is."""
    if not (isinstance(total, Call) and total.op == "max" and len(total.args) == 2):
        return total
    least, inner = sorted(total.args, key=lambda a: not isinstance(a, Const))
    return inner if isinstance(least, Const) and least.value <= 1 and at_least_one(inner) else total


def at_least_one(total: Expr) -> bool:
    """Whether a sum of exponentials is one of exp(x - max x)."""
    if not (isinstance(total, Reduce) and total.op == "sum"):
        return False
    parts = factored(total.body)
    mine, rows = by_key(parts.exponents, total.axis)
    if parts.factors or parts.divisors or parts.conditions or len(rows) != 1:
        return False
    sign, most = rows[0]
    if isinstance(most, Call) and most.op == "detach":
        most = most.args[0]
    if sign > 0 or not (isinstance(most, Reduce) and most.op == "max" and most.axis.size == total.axis.size):
        return False
    return Counter(additive(s.substitute(most.body, {most.axis: total.axis}), 1)) == Counter(mine)


def is_lost(number: Expr, dtype: str) -> bool:
    """Whether a number is so small that one, or more, is the same with it and without: in the arithmetic of the model,
    which adds it lest it divides by zero."""
    return isinstance(number, Const) and 0 <= number.value <= (2.0**-54 if dtype == "float64" else 2.0**-25)


def _renormalised(divisors: list[Expr]) -> list[Expr] | None:
    """Divisors of which one sums what another has divided already, without the other; None where there is none.

    softmax masked, and normalised again       a / (z * sum(b / z))  ->  a / sum(b)
    """
    for total in divisors:
        if not (isinstance(total, Reduce) and total.op == "sum"):
            continue
        body = factored(total.body)
        for z in body.divisors:
            if z in divisors and z is not total and total.axis not in z.axes:
                body.divisors.remove(z)
                rest = [d for d in divisors if d is not total]
                rest.remove(z)
                return [*rest, Reduce("sum", total.axis, multiplied(body, total.dtype), total.dtype)]
    return None


def only_infinite(logits: Expr) -> bool:
    """Whether a row has no number for a softmax only where all of it is -inf, by a condition or by what a tensor adds:
    beside a finite fill there is a softmax. What is added is taken for finite or -inf, and what scales the scores for
    finite, like these."""
    stack = [logits]
    while stack:
        e = stack.pop()
        if isinstance(e, Dot):
            continue
        if isinstance(e, Call) and e.op in ("mul", "div") and holds_scores(e):
            stack.extend(a for a in e.args if a.is_float and (holds_scores(a) or a.axes))
            continue
        if isinstance(e, Const) and e.is_float and -math.inf < e.value <= MASK_FILL:
            return False
        stack.extend(a for a in e.children if a.is_float)
    return True


def _match_at(
    top: Factored, total: Reduce, key: Axis, offset: int, surplus: int, extras: list[Expr], dtype: str
) -> Softmax | None:
    main = factored(s.substitute(total.body, {total.axis: s.add(key, offset)}))
    if main.divisors:
        return None
    mine, my_rows = by_key(top.exponents, key)
    theirs, their_rows = by_key(main.exponents, key)
    if Counter(mine) != Counter(theirs) or Counter(my_rows) != Counter(their_rows):
        return None
    factors = Counter(top.factors)
    if Counter(main.factors) - factors or not set(main.conditions) <= set(top.conditions):
        return None
    conditions = [c for c in dict.fromkeys(top.conditions) if c not in main.conditions]  # those of the gate
    weighted = [f for f in main.factors if key in f.axes]
    if not all(_is_number(f) for f in weighted):
        return None  # exp(x) * w / sum exp(x) * w with a w that may be negative
    logits = summed([*mine, *((1, s.call("log", f, dtype=dtype)) for f in weighted)], dtype)
    if main.conditions:
        logits = s.where(s.and_(*main.conditions), logits, Const(-math.inf, dtype))
    gate: Expr = Const(1.0, "float32")
    for factor in (factors - Counter(main.factors)).elements():
        gate = s.call("mul", gate, factor, dtype=dtype)
    for divisor in top.divisors:
        gate = s.call("div", gate, divisor, dtype=dtype)
    for condition in conditions:
        gate = s.where(condition, gate, Const(0.0, dtype))
    found: list[Expr] = []
    columns: list[list[Signed]] = [additive(e, 1) for e in extras]
    for column in (*range(offset), *range(offset, surplus)):
        at: Expr = Const(column) if column < offset else s.add(key.size, column)
        part = factored(s.substitute(total.body, {total.axis: at}))
        numbers = [f for f in part.factors if isinstance(f, Const) and f.value > 0]  # exp(0.3), which is known
        if part.divisors or len(numbers) < len(part.factors) or part.conditions:
            return None
        columns.append([*part.exponents, *((1, Const(math.log(f.value), dtype)) for f in numbers)])
    for exponents in columns:
        # What the keys' logits were rid of, for all of them have it, is taken from a column that lacks it.
        rows = Counter(their_rows)
        rest = [t for t in exponents if not _take(rows, t)]
        rest += [(-sign, e) for sign, e in rows.elements()]
        if any(key in e.axes or holds_scores(e) for _, e in rest):
            return None
        found.append(summed(rest, dtype))
    selected = s.and_(*top.selected)
    fills = UNCLEAR if top.logged else of_shift(my_rows, summed(mine, dtype), key)
    return Softmax(logits, tuple(found), gate, top.cleaned, selected, fills)


def _match_part(top: Factored, total: Reduce, key: Axis, extras: list[Expr], dtype: str) -> Softmax | None:
    """Weights of some of the keys of a softmax as those of all of them, from what its sum says of the others; columns
    at the ends that no key decides are none of them."""
    weights = [e for _, e in top.exponents] + top.factors + top.conditions
    one = not any(key in e.axes for e in weights)
    for part in parts_like(total.body, total.axis, weights, key):
        here = factored(s.substitute(total.body, {total.axis: part.start if one else part.place}))
        if here.divisors or Counter(_of_one_key(top.exponents, key)) != Counter(_of_one_key(here.exponents, key)):
            continue
        if Counter(here.factors) - Counter(top.factors) or not set(here.conditions) <= set(top.conditions):
            continue
        for first, more in _columns_at_ends(total, part):
            whole = Axis(f"{key.name}.whole", s.sub(total.axis.size, more))
            inner = replace(part, whole=whole, start=s.sub(part.start, first))
            if not inner.fits:
                continue
            there = factored(s.substitute(total.body, {total.axis: s.add(whole, first)}))
            found = _match_at(_of_whole(top, here, there, inner), total, whole, first, more, extras, dtype)
            if found is not None:
                return replace(found, part=inner)
    return None


def _of_one_key(exponents: list[Signed], key: Axis) -> list[Signed]:
    """Exponents, where the sides of a product at a single position are not told apart: no axis says which is the
    key's."""

    def visit(node: Expr) -> Expr | None:
        if not isinstance(node, Dot):
            return None
        if key in node.axes:
            return node
        both: Expr = Const(1.0, node.dtype)
        for factor in sorted([*_factors(node.query), *_factors(node.key)], key=order_key):
            both = s.call("mul", both, factor, dtype=node.dtype)
        return Dot(node.over, both, Const(1.0, node.dtype), node.dtype)

    return [(sign, rewrite(e, visit, s.rebuild)) for sign, e in exponents]


def _factors(e: Expr) -> list[Expr]:
    return [f for a in e.args for f in _factors(a)] if isinstance(e, Call) and e.op == "mul" else [e]


def _columns_at_ends(total: Reduce, part: Part) -> Iterator[tuple[int, int]]:
    """How many columns to leave out at the beginning, and how many in all: most first."""
    ends = ends_of_pieces(total.body, total.axis)
    before = {int(e.value) for e in ends if isinstance(e, Const) and 0 < e.value <= _EXTRAS}
    left = (s.sub(total.axis.size, e) for e in ends)
    after = {int(e.value) for e in left if isinstance(e, Const) and 0 < e.value <= _EXTRAS}
    for a in sorted({0, *before}, reverse=True):
        for b in sorted({0, *after}, reverse=True):
            if a + b <= _EXTRAS:
                yield a, a + b


def _of_whole(top: Factored, here: Factored, there: Factored, part: Part) -> Factored:
    """Weights of the keys of a part, taken apart, as those of all keys. `here`, `there`: what is summed at the keys of
    the part and at all keys."""
    factors = [part.spread(f) for f in (Counter(top.factors) - Counter(here.factors)).elements()]
    conditions = [part.spread(c, False) for c in top.conditions if c not in here.conditions]
    return replace(
        top,
        exponents=there.exponents,
        factors=[*there.factors, *factors],
        divisors=[part.spread(d, 1.0) for d in top.divisors],
        conditions=[*there.conditions, *conditions],
        selected=tuple(part.spread(c, False) for c in top.selected),
    )


def _is_number(weight: Expr) -> bool:
    """Whether a weight is one of a few numbers, none of them negative: exp(x) * w is exp(x + log w)."""
    if isinstance(weight, Call) and weight.op == "where":
        return all(map(_is_number, weight.args[1:]))
    return isinstance(weight, Const) and weight.value >= 0


def _take(rows: Counter[Signed], term: Signed) -> bool:
    if rows[term] > 0:
        rows[term] -= 1
        return True
    return False


def by_key(terms: list[Signed], key: Axis) -> tuple[list[Signed], list[Signed]]:
    """Terms with a key; and those without, which cancel."""
    rows = [t for t in terms if key not in t[1].axes and _cancels(t[1])]
    return [t for t in terms if t not in rows], rows


def _cancels(term: Expr) -> bool:
    """Whether a term of a whole row changes nothing: a row's own maximum, or a number that leaves of the scores what
    they are. What is -inf for a row makes it no number, what is finfo.min makes it the mean of all values, and a tensor
    may hold either."""
    if any(isinstance(n, Reduce) for n in term.walk()):
        return True
    constants = [n.value for n in term.walk() if isinstance(n, Const) and n.is_float]
    return not any(n.is_float for n in term.loads) and all(MASK_FILL < value < math.inf for value in constants)
