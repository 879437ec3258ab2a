"""What pointwise operations do to numbers: constants are folded, neutral ones disappear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from refocus.ir import BOOL, Call, Const, Expr


def _either_nan(pick: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: math.nan if a != a or b != b else pick(a, b)


def _log(function: Callable[[float], float], zero: float = 0.0) -> Callable[[float], float]:
    """A logarithm that is -inf where IEEE says so, and Python raises: log(mask) of ones and zeros."""
    return lambda a: -math.inf if a == zero else function(a)


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda *args: sum(args), "sub": lambda a, b: a - b, "mul": lambda *args: math.prod(args),
    "div": lambda a, b: a / b, "neg": lambda a: -a, "abs": abs, "min": _either_nan(min), "max": _either_nan(max),
    "exp": math.exp, "exp2": lambda a: 2.0**a, "expm1": math.expm1, "log": _log(math.log),
    "log2": _log(math.log2), "log1p": _log(math.log1p, -1.0), "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a), "reciprocal": lambda a: 1 / a,
    "pow": math.pow, "square": lambda a: a * a, "tanh": math.tanh, "erf": math.erf, "sin": math.sin, "cos": math.cos,
    "atan": math.atan, "sigmoid": lambda a: 0.0 if a < -700 else 1 / (1 + math.exp(-a)),
    "relu": lambda a: a if a != a or a > 0 else 0.0,
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "fmod": math.fmod,
    "isinf": math.isinf, "isnan": math.isnan,
}  # fmt: skip


def fold(op: str, args: Sequence[Const], dtype: str) -> Const | None:
    """op of constants as a constant of `dtype`; None where Python has none: 1 / 0, log(-1), inf to integer."""
    function = _FOLD.get(op)
    if function is None:
        return None
    try:
        value = function(*(a.value for a in args))
    except (OverflowError, ZeroDivisionError, ValueError):
        return None
    if dtype == BOOL:
        return Const(bool(value), BOOL)
    if dtype.startswith(("float", "bfloat")):
        return Const(float(value), dtype)
    return Const(int(value)) if math.isfinite(value) and value == int(value) else None


def identities(op: str, args: tuple[Expr, ...], dtype: str) -> Expr:
    """The call, without what does not change a number: x + 0, x * 1, x / 1, x ** 1, --x, max(x, the lowest number)."""

    def const(k: int, value: float) -> bool:
        a = args[k]
        return isinstance(a, Const) and a.value == value

    if op in ("add", "sub", "div", "mul", "pow") and len(args) == 2:
        unit = 0.0 if op in ("add", "sub") else 1.0
        if const(1, unit):
            return args[0]
        if op in ("add", "mul") and const(0, unit):
            return args[1]
    if op == "neg" and isinstance(args[0], Call) and args[0].op == "neg":
        return args[0].args[0]
    lowest = -3.0e38
    if op == "max" and any(isinstance(a, Const) and a.value <= lowest for a in args):  # a clamp at finfo.min
        return next((a for a in args if not (isinstance(a, Const) and a.value <= lowest)), args[0])
    if op == "add" and len(args) > 2:
        return identities("add", (identities("add", args[:-1], dtype), args[-1]), dtype)
    return Call(op, args, dtype)


# From here on, a number rounds to infinity.
_INFINITE = {"float16": 65520.0, "bfloat16": (2 - 2**-8) * 2.0**127, "float32": (2 - 2**-24) * 2.0**127}


def overflows(a: Expr, dtype: str) -> bool:
    """Whether a literal, or one that is chosen by a condition, is infinite in `dtype` alone."""
    if isinstance(a, Call) and a.op == "where":
        return any(overflows(x, dtype) for x in a.args[1:])
    return isinstance(a, Const) and _INFINITE.get(dtype, math.inf) <= abs(a.value) < math.inf


def held(a: Const, dtype: str) -> Const:
    """A literal as a float of this dtype, not rounded unless to infinity."""
    return Const(math.copysign(math.inf, a.value) if overflows(a, dtype) else float(a.value), dtype)
