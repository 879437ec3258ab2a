"""Lifting down to factors: products are taken apart, wherever they were computed, and exponents into their terms.

A model that works in chunks multiplies queries and keys with decays early, for all chunks at once. To tell what is a
query and what a decay, each value is read as a product of what was not multiplied together; under an exponential, as
a sum of what was not added up.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from torch import fx

from refocus import simplify as s
from refocus.expand import Expander
from refocus.ir import Const, Expr, Reduce
from refocus.lift import Index, arguments, dtype_of, op_name
from refocus.lift_joins import JOINS
from refocus.linear_candidates import product_operands

_PRODUCTS = frozenset(("mul", "div", "neg", "exp", "exp2", "tril", "triu", "masked_fill", "where"))
_SUMS = frozenset(("add", "sub", "rsub", "mul", "div", "neg", "cumsum", "sum", "where", "masked_fill", "tril", "triu"))


@dataclass
class Factored(Expander):
    """`data`: the nodes that depend on the model's input; products of them are written out. Under an exponential
    (`summing`), sums are taken apart, too."""

    data: Set[fx.Node] = frozenset()
    summing: bool = False
    alike: bool = True
    _inner: list[Factored] = field(default_factory=list)

    def at(self, node: fx.Node, index: Sequence[Expr]) -> Expr:  # type: ignore[override]
        name = op_name(node)
        if name in ("exp", "exp2") and not self.summing and node not in self.known.opaque:
            self.visited.add(node)
            return s.call(name, self._exponents().at(arguments(node)[0], index), dtype=dtype_of(node))
        return super().at(node, index)

    def _exponents(self) -> Factored:
        if not self._inner:
            self._inner.append(replace(self, summing=True, _memo={}, _inner=[]))
        return self._inner[0]

    def within(self, node: fx.Node, index: Index) -> bool:
        if node in self.interior or node not in self.data:
            return True
        if self.summing:
            return op_name(node) in _SUMS
        return op_name(node) in _PRODUCTS or product_operands(node, self.data) is not None

    def sums_keys(self, node: fx.Node) -> bool:
        return False

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        if op_name(node) in JOINS and node in self.data and node not in self.interior:
            # What was padded is read with its padding, the same for every chunk, unless it is itself taken apart.
            if not isinstance(below, Const) and not any(isinstance(n, Reduce) for n in below.walk()):
                return self.leaf(node, index)
        return below
