"""Sums over keys that are added up, and differ in their masks alone: one sum, under another mask.

    cumsum(x) - x                     [j <= i] - [j == i]       =  [j < i]
    x.sum() - cumsum(x) + x           1 - [j <= i] + [j == i]   =  [j >= i]
    cumsum(x) + u * x                 [j <= i] + u [j == i]     a causal mask, and something of the query's own position

A mask is how often it counts a key before, at and after the query. What is left at the query itself, once a mask is
chosen for the rest, is no part of the sum (`refocus.patterns.local_terms`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from refocus import simplify as s
from refocus.ir import Const, Expr
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Pair, Product, renamed


@dataclass(frozen=True)
class _Counted:
    """A product without its number and its mask, and how often it counts keys before, at and after the query."""

    product: Product
    counts: tuple[float, float, float]

    @staticmethod
    def of(product: Product, pair: Pair) -> _Counted:
        number = math.prod(float(f.value) for f in product.factors if isinstance(f, Const))
        masks = tuple(c for c in product.conditions if {*pair} <= c.axes)
        others = tuple(c for c in product.conditions if c not in masks)
        factors = tuple(f for f in product.factors if not isinstance(f, Const))
        before, own, after = _counts(masks, pair)
        bare = replace(product, factors=factors, conditions=others)
        return _Counted(bare, (number * before, number * own, number * after))


def _counts(masks: Sequence[Expr], pair: Pair) -> tuple[int, int, int]:
    query, key = pair
    known = {
        (): (1, 1, 1),
        (s.le(key, query),): (1, 1, 0),
        (s.lt(key, query),): (1, 0, 0),
        (s.le(query, key),): (0, 1, 1),
        (s.lt(query, key),): (0, 0, 1),
    }
    if tuple(masks) not in known:
        raise Stop(Declined("sums over keys with other masks than causal ones are added up"))
    return known[tuple(masks)]


def one_sum(products: Sequence[Product], pair: Pair) -> tuple[Product, list[Product]]:
    """Products over a pair, and such of the query's own position, as one product over the pair and what is added to it.
    Raises `Stop` where they are not the same but for their masks."""
    query, key = pair
    sums = [_Counted.of(p, pair) for p in products if key in p.summed]
    first = sums[0].product
    total = [math.fsum(x.counts[k] for x in sums) for k in range(3)]
    if any(_bag(x.product) != _bag(first) for x in sums):
        raise Stop(Declined("several attentions are added up in one sum", pairwise=True))
    own = _at_own(first, pair)
    rest = []
    for p in (p for p in products if key not in p.summed):
        number = math.prod(float(f.value) for f in p.factors if isinstance(f, Const))
        bare = replace(p, factors=tuple(f for f in p.factors if not isinstance(f, Const)))
        if own is not None and _bag(bare) == _bag(own):
            total[1] += number
        else:
            rest.append(p)
    before, here, after = total
    if before == 0.0 == after or (before and after and before != after):
        raise Stop(Declined("keys before and after a query are weighted differently"))
    count = before or after
    low = Const(count, "float32")
    inclusive = here != 0.0
    if before and after:
        mask: tuple[Expr, ...] = ()
        inclusive = True
    elif before:
        mask = (s.le(key, query),) if inclusive else (s.lt(key, query),)
    else:
        mask = (s.le(query, key),) if inclusive else (s.lt(query, key),)
    left = here - (count if inclusive else 0.0)
    if left:
        if own is None:
            raise Stop(Declined("something of the query's own position is added to a sum that decays"))
        rest.append(replace(own, factors=(Const(left, "float32"), *own.factors)))
    numbers = () if count == 1.0 else (low,)
    return replace(first, factors=(*numbers, *first.factors), conditions=(*first.conditions, *mask)), rest


def _at_own(product: Product, pair: Pair) -> Product | None:
    """What a sum adds at the query's own position; None where that has a decay."""
    if product.exponents:
        return None
    own = renamed(product, {pair[1]: pair[0]})
    return replace(own, summed=tuple(a for a in product.summed if a != pair[1]))


def _bag(product: Product) -> tuple[Counter[object], ...]:
    parts = product.summed, product.factors, product.divisors, product.exponents, product.conditions
    return tuple(Counter[object](x) for x in parts)
