"""Quotients and remainders of positions by constants, for kernels whose vectors cannot divide.

No CPU divides vectors of integers: `j // 32` and `j % 7` would be computed element by element, and cost as much as the
products of the tile they are for. By a power of two they are a shift and a mask; by another constant, where the range
of the dividend is known, a product and a shift:

    x // d = (x * m) >> s    with  m = ceil(2^s / d)  for all  0 <= x < 2^31,  s = 31 + ceil(log2 d)

because m = (2^s + e) / d with 0 <= e < d, and x * e < 2^31 * 2^(s - 31) = 2^s adds less than 1 / d to the quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from refocus.ir import INT, Call, Const, Expr, Load
from refocus.simplify import bounds, rebuild

_BITS = 31


@dataclass(frozen=True)
class Part:
    """What an expression reads as `held`: `of` the value of `dividend`, an expression that may hold earlier parts."""

    held: Load
    dividend: Expr
    of: Callable[[Tensor], Tensor]


def divided(expr: Expr) -> tuple[Expr, tuple[Part, ...]]:
    """The expression without such divisions, and what it reads instead, in order."""
    parts: dict[tuple[str, Expr, int], Part] = {}
    done: dict[Expr, Expr] = {}

    def part(kind: str, dividend: Expr, by: int, of: Callable[[Tensor], Tensor]) -> Expr:
        # A load has no known range: what stands in its place may be negative.
        made = Part(Load(f"@{kind}{len(parts)}", (), INT), dividend, of)
        return parts.setdefault((kind, dividend, by), made).held

    def change(node: Expr, written: Expr) -> Expr:
        if not isinstance(written, Call) or written.op not in ("floordiv", "mod") or not written.is_int:
            return node
        (dividend, by), moves = node.children, written.axes or written.loads
        if not moves or not isinstance(by, Const) or not 1 < by.value < 1 << _BITS:
            return node
        d = int(by.value)
        shift = (d - 1).bit_length()
        if d == 1 << shift:
            if written.op == "floordiv":
                return part("quotient", dividend, d, lambda x: x >> shift)
            return part("remainder", dividend, d, lambda x: x & (d - 1))
        low, high = bounds(written.args[0])  # parts have no range
        if low is None or high is None or low < 0 or high >= 1 << _BITS:
            return node
        factor = -(-(1 << (_BITS + shift)) // d)
        quotient = part("quotient", dividend, d, lambda x: (x * factor) >> (_BITS + shift))
        if written.op == "floordiv":
            return quotient
        return Call("add", (dividend, Call("mul", (Const(-d), quotient), INT)), INT)

    def go(node: Expr) -> Expr:
        if node not in done:
            # Put together as it was: what is simplified may have another dividend, whose range is not that one's.
            children = tuple(go(c) for c in node.children)
            again = node
            if any(a is not b for a, b in zip(children, node.children)):
                again = Call(node.op, children, node.dtype) if isinstance(node, Call) else rebuild(node, children)
            done[node] = change(again, node)
        return done[node]

    return go(expr), tuple(parts.values())
