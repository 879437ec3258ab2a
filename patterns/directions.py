"""Attention to later positions: with positions counted from the end, it is causal.

    out[i] = sum over j >= i of w(i, j) v[j]        i = n - 1 - i', j = n - 1 - j'        sum over j' <= i' of ..
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refocus import simplify as s
from refocus.ir import Axis, Expr, Reduce, rewrite
from refocus.patterns.linear import Pair, Product, product_of, renamed, settled


@dataclass(frozen=True)
class Turned:
    """Positions of queries, `old`, counted from the end as `new`."""

    old: Axis
    new: Axis

    @staticmethod
    def of(axis: Axis) -> Turned:
        return Turned(axis, Axis(f"{axis.name}.back", axis.size))

    @property
    def place(self) -> Expr:
        """Where a position that is counted from the end is, counted from the start: a function of `old`."""
        return from_end(self.old)

    def sums(self, value: Expr) -> Expr:
        """A value at a query's position, what it sums up over keys counted from the end, too."""

        def visit(node: Expr) -> Expr | None:
            if isinstance(node, Reduce) and node.op == "sum":
                pair = {self.old, node.axis}
                if any(pair <= c.axes for c in product_of(node).conditions):
                    body = s.substitute(rewrite(node.body, visit, s.rebuild), {node.axis: from_end(node.axis)})
                    return Reduce("sum", node.axis, body, node.dtype)
            return None

        return s.substitute(rewrite(value, visit, s.rebuild), {self.old: from_end(self.new)})


def from_end(axis: Axis) -> Expr:
    return s.sub(s.sub(axis.size, 1), axis)


def upright(product: Product, pair: Pair) -> Product:
    """The product, its keys counted as its queries are: what was turned around, summed up and turned around again has
    them counted from the other end."""
    query, key = pair
    here: dict[Axis, Expr] = {key: from_end(key)}
    masks = [c for c in product.conditions if {query, key} <= c.axes]
    places: dict[Expr, Expr] = dict(here.items())
    if query.size != key.size or not masks or any(s.substitute(c, places) not in _masks(pair) for c in masks):
        return product
    return _counted(product, here)


def _masks(pair: Pair) -> tuple[Expr, ...]:
    query, key = pair
    return s.le(key, query), s.lt(key, query), s.le(query, key), s.lt(query, key)


def looks_ahead(product: Product, pair: Pair) -> bool:
    """Whether the mask of a product keeps the keys after a query, with or without its own."""
    masks = {c for c in product.conditions if {*pair} <= c.axes}
    return pair[0].size == pair[1].size and len(masks) == 1 and masks <= {*_masks(pair)[2:]}


def turned_around(product: Product, pair: Pair) -> tuple[Product, Turned]:
    """The same with positions counted from the end."""
    turned = Turned.of(pair[0])
    divisors = tuple(turned.sums(d) for d in product.divisors)
    factors = tuple(turned.sums(f) for f in product.factors)
    whole = replace(product, divisors=divisors, factors=factors)
    whole = _counted(whole, {pair[1]: from_end(pair[1]), pair[0]: from_end(turned.new)})
    return settled(whole, (turned.new, pair[1])), turned


def _counted(product: Product, here: dict[Axis, Expr]) -> Product:
    """A product with positions counted otherwise; what is summed over stays."""
    return replace(renamed(product, here), summed=product.summed)
