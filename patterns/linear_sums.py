"""What the weights of a linear attention are divided by: sums of them over the keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import permutations

from refocus import simplify as s
from refocus.ir import Axis, Call, Expr, Reduce, rewrite
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, Roles, blamed, holds_sum, product_of


def sums_in(e: Expr, query: Axis) -> list[Reduce]:
    """The outermost sums of an expression that hold the query axis."""
    if isinstance(e, Reduce) and query in e.axes:
        return [e]
    return list(dict.fromkeys(found for child in e.children for found in sums_in(child, query)))


def of_one_row(total: Expr) -> bool:
    """Whether a sum runs over the features of a position: all that it sums up is read at once from some tensor that has
    its axes, and summing that is no more work than reading it. (An epsilon on each feature of summed keys is one.)"""
    return (
        isinstance(total, Reduce)
        and not any(isinstance(n, Reduce) or (isinstance(n, Call) and n.op == "where") for n in total.body.walk())
        and any(total.body.axes <= load.axes for load in total.body.loads)
    )


@dataclass(frozen=True)
class Shared:
    """The factors and conditions that the weights and their sum over the keys have in common."""

    factors: tuple[Expr, ...]
    conditions: tuple[Expr, ...]


def _not_linear(op: str | None) -> Declined:
    return Declined(f"the normaliser is not linear in the scores (`{op}` of them)", op)


def _is_of_scores(factor: Expr) -> bool:
    """Whether a factor is a function of a sum that is no decay: of scores."""
    return isinstance(factor, Call) and factor.op not in ("exp", "exp2") and holds_sum(factor)


def _same_dots(total: Reduce, roles: Roles) -> Reduce:
    """A sum over features of its own, named as those of the weights, where these are what its queries are read at."""
    summed = product_of(total).summed
    wanted = Counter(x for x in roles.queries if x.axes & set(roles.dot))
    if set(roles.dot) <= set(summed):
        return total
    for own in permutations(summed, len(roles.dot)):
        if all(a.size == d.size for a, d in zip(own, roles.dot)):
            named = _renamed(total, dict(zip(own, roles.dot)))
            if not wanted - Counter(product_of(named).factors):
                return named
    return total


def _renamed(total: Reduce, names: dict[Axis, Axis]) -> Reduce:
    here: dict[Expr, Expr] = {old: new for old, new in names.items()}  # noqa: C416
    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Reduce) and node.axis in names:
            body = s.substitute(rewrite(node.body, visit, s.rebuild), here)
            return Reduce(node.op, names[node.axis], body, node.dtype)
        return None

    found = rewrite(total, visit, s.rebuild)
    assert isinstance(found, Reduce)
    return found


def shared_by(total: Reduce, roles: Roles, product: Product) -> tuple[Shared, tuple[Expr, ...]]:
    """Read `total` as a sum of the weights of `product` over the keys: what both have in common, and factors that the
    sum has besides. The product may have values and factors of whole rows besides. Raises `Stop` for any other sum."""
    if total.op != "sum":
        raise Stop(_not_linear(total.op))
    try:
        total = _same_dots(total, roles)
    except Stop as stop:  # scores times scores
        raise Stop(_not_linear("mul")) from stop
    plain = product_of(total)
    own = [a for a in plain.summed if a not in roles.dot]
    if len(own) != 1 or own[0].size != roles.key.size or len(plain.summed) != len(roles.dot) + 1:
        changed = [f for f in plain.factors if _is_of_scores(f) and {roles.query, *own} <= f.axes]
        if changed:
            raise Stop(_not_linear(blamed(changed[0])))
        raise Stop(Declined("the normaliser is no sum of the weights over the keys"))
    found = product_of(total, (roles.query, own[0]))
    for factor in found.factors:
        if {roles.query, own[0]} <= factor.axes:
            raise Stop(_not_linear(blamed(factor)))
    here: dict[Expr, Expr] = {own[0]: roles.key}
    factors, conditions = (Counter(s.substitute(x, here) for x in xs) for xs in (found.factors, found.conditions))
    exponents = Counter((sign, s.substitute(e, here)) for sign, e in found.exponents)
    mine = Counter(product.factors)
    besides = list((factors - mine).elements())
    left = [x for x in (mine - factors).elements() if x in roles.queries]
    pairs = {roles.query, roles.key}
    masks = [{c for c in cs if pairs <= c.axes} for cs in (conditions, product.conditions)]
    if (
        found.divisors
        or exponents != Counter(product.exponents)
        or masks[0] != masks[1]
        or conditions - Counter(product.conditions)
        or left
        or any(x.axes & {roles.key, *roles.dot} for x in besides)
    ):
        raise Stop(Declined("the normaliser is a sum of other weights"))
    return Shared(tuple((factors & mine).elements()), tuple(conditions)), tuple(besides)
