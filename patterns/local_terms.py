"""Sums over keys to which something of the query's own position is added: a bonus for the current token, say.

    out[i, e] = sum over d of q[i, d] * ((sum over j < i of k[j, d] * v[j, e]) + u[d] * k[i, d] * v[i, e])
              = sum over j < i and d of q[i, d] * k[j, d] * v[j, e]
              + (sum over d of q[i, d] * u[d] * k[i, d]) * v[i, e]

The second is no part of the attention: it takes no more work than what it is made of, and is added afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from refocus import simplify as s
from refocus.ir import Axis, Call, Expr, Reduce, rewrite
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Pair, Product, product_of
from refocus.patterns.linear_sums import of_one_row
from refocus.patterns.summands import terms_that, times


def with_local(value: Expr, pair: Pair) -> tuple[Product, tuple[Expr, ...]]:
    """A value as a product that is summed over the keys of a `pair`, and what is added to that before it is divided.
    Raises `Stop` where that is no value of the query's position."""
    whole = product_of(value, pair)
    key = pair[1]
    if any(d.axes & {*whole.summed} for d in whole.divisors):
        return whole, ()
    if key in whole.summed or whole.exponents or whole.conditions:
        return replace(whole, divisors=tuple(_by_terms(d, key) for d in whole.divisors)), ()
    above: Expr = times(whole.factors, value.dtype)
    for axis in reversed(whole.summed):
        above = Reduce("sum", axis, above, value.dtype)
    products = [(x, product_of(x, pair)) for x in _terms(above, key)]
    mains = [p for _, p in products if key in p.summed]
    if len(mains) > 1:
        raise Stop(Declined("several reads of states are added up", several=True))
    if not mains or mains[0].divisors:
        return whole, ()
    divisors = tuple(_by_terms(d, key) for d in whole.divisors)
    return replace(mains[0], divisors=divisors), tuple(of_position(x, key) for x, p in products if p is not mains[0])


def of_position(term: Expr, key: Axis) -> Expr:
    """A term that is no sum over the keys, each sum in it over as little as can be. Raises `Stop` where it is one."""
    product = product_of(term)
    inner = [f for f in product.factors if f.axes & {*product.summed}]
    value = times(inner, term.dtype)
    for axis in product.summed:
        value = Reduce("sum", axis, value, term.dtype)
    plain = not (product.divisors or product.exponents or product.conditions) and key not in term.axes
    if not plain or len(product.summed) > 1 or (product.summed and not of_one_row(value)):
        raise Stop(Declined("what is added to the sum over the keys is more than a value of the query's position"))
    return times([*(f for f in product.factors if f not in inner), value], term.dtype)


def _terms(e: Expr, key: Axis) -> list[Expr]:
    return terms_that(lambda x: _sums_keys(x, key), e)


def _sums_keys(e: Expr, key: Axis) -> bool:
    return any(isinstance(n, Reduce) and n.axis == key for n in e.walk())


def _by_terms(divisor: Expr, key: Axis) -> Expr:
    """A divisor, its sums over the keys apart from what is added to them."""

    def visit(node: Expr) -> Expr | None:
        terms = _terms(node, key) if isinstance(node, Reduce | Call) and node.is_float else [node]
        if len(terms) == 1:
            return None
        return s.call("add", *(apart(x) for x in terms), dtype=node.dtype)

    def apart(term: Expr) -> Expr:
        if not _sums_keys(term, key):
            return of_position(term, key)
        return term if key in product_of(term).summed else rewrite(term, visit, s.rebuild)

    return rewrite(divisor, visit, s.rebuild)
