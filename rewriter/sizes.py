"""Sizes: from what a traced graph carries (ints, SymInts, nodes) to expressions over `Sym`."""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch
from torch import fx

from refocus import simplify as s
from refocus.ir import Const, Expr, Sym

LEAST = -(2**63)  # what a number of which nothing is known may be: a position that the model is called with, say


def size_expr(size: Any, low: int = LEAST) -> Expr:
    """A size or another number as an expression: an int, a SymInt, or a node that holds either. `low`: what it is known
    to be at least, whatever it is made of."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        node = size.node
        concrete = node.maybe_as_int()
        return (
            Const(int(concrete)) if concrete is not None else _convert(node.expr, getattr(node, "shape_env", None), low)
        )
    return Const(int(size))


def whole_number(value: Any) -> Expr | None:
    """A float that is an integer made one, as that integer; None for any other."""
    if not isinstance(value, torch.SymFloat):
        return None
    number = value.node.expr
    if type(number).__name__ != "ToFloat":
        return None
    return _convert(number.args[0], getattr(value.node, "shape_env", None), LEAST)


def shape_of(node: fx.Node) -> tuple[Expr, ...]:
    """The shape of a tensor node."""
    return tuple(size_expr(d, 0) for d in node.meta["val"].shape)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are of one shape whatever the graph is called with. To ask their sizes would be to hold the
    graph to the answer of this call."""
    return [size_expr(d, 0) for d in a.shape] == [size_expr(d, 0) for d in b.shape]


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions of a tensor as they follow one another in memory, the outermost first."""
    return sorted(range(value.dim()), key=lambda d: (-hint(value.stride(d), 1), d))


def hint(size: Any, default: int = 1024) -> int:
    """A concrete stand-in for a size, for cost decisions only."""
    if isinstance(size, torch.SymInt):
        value = getattr(size.node, "hint", None)
        return default if value is None else int(value)
    return int(size)


def _low(symbol: sympy.Symbol, shape_env: Any) -> int:
    ranges = getattr(shape_env, "var_to_range", {})
    bound = ranges.get(symbol)
    if bound is None:
        return 0
    return int(bound.lower) if bound.lower.is_Integer else LEAST  # the infinities are none


def _convert(value: sympy.Expr, shape_env: Any, low: int) -> Expr:
    if value.is_Integer:
        return Const(int(value))
    if value.is_Symbol:
        return Sym(str(value), _low(value, shape_env))
    name = type(value).__name__
    if name in ("FloorDiv", "CleanDiv") and (number := _guarded(value, shape_env)) is not None:
        return Const(number)
    if name in _ROUNDED and (quotient := _quotient(value.args[0], shape_env)) is not None:
        above, by = quotient
        if name == "CeilToInt":
            return s.floordiv(s.add(above, by, -1), by)
        if name == "FloorToInt" or value.args[0].args[0].is_nonnegative:
            return s.floordiv(above, by)
    args = [_convert(a, shape_env, LEAST) for a in value.args]
    if value.is_Add:
        return s.add(*args)
    if value.is_Mul and all(a.is_int for a in args) and not any(a.is_Rational and not a.is_Integer for a in value.args):
        return s.mul(*args)
    if value.is_Pow and isinstance(args[1], Const) and 0 <= args[1].value <= 4:
        return s.mul(1, *(args[0],) * int(args[1].value))
    if name in ("FloorDiv", "CleanDiv"):
        return s.floordiv(args[0], args[1])
    if name in ("Mod", "PythonMod"):
        return s.mod(args[0], args[1])
    if name == "Min":
        return s.minimum(args[0], args[1])
    if name == "Max":
        return s.maximum(args[0], args[1])
    return Sym("u_" + re.sub(r"\W+", "_", str(value)), 0 if value.is_nonnegative else low)


_ROUNDED = ("CeilToInt", "FloorToInt", "TruncToInt")


def _quotient(value: sympy.Expr, shape_env: Any) -> tuple[Expr, Expr] | None:
    """a and b of the float a / b, for integers a and b > 0: a quotient that is rounded to a whole number is that of the
    integers, as long as these are floats (a fraction is off a whole number by 1 / b at least)."""
    if type(value).__name__ not in ("IntTrueDiv", "FloatTrueDiv"):
        return None
    parts = [_integer(a) for a in value.args]
    if any(a is None for a in parts):
        return None
    above, by = (_convert(a, shape_env, LEAST) for a in parts)
    return (above, by) if isinstance(by, Const) and by.value > 0 else None


def _integer(value: sympy.Expr) -> sympy.Expr | None:
    if type(value).__name__ == "ToFloat":
        return value.args[0]
    if value.is_Float:
        return sympy.Integer(int(value)) if value == int(value) else None
    return value if value.is_integer else None


def _guarded(value: sympy.Expr, shape_env: Any) -> int | None:
    """The number that a quotient has wherever this graph runs: a loop over so many chunks was unrolled, and the tracer
    guards on their number."""
    for guard in getattr(shape_env, "guards", ()):
        known = guard.expr
        if isinstance(known, sympy.Eq) and known.lhs == value and known.rhs.is_Integer:
            return int(known.rhs)
    return None
