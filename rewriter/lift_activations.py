"""Activations and other functions that are made of simpler ones: leaky_relu(x) = x where x > 0 else slope * x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from refocus import simplify as s
from refocus.ir import BOOL, FALSE, INT, ONE, TRUE, ZERO, Const, Expr
from refocus.lift import Handler, Index, Lifter, dtype_of, kind_of
from refocus.lift_views import arguments_of
from refocus.sizes import shape_of

# What a formula is given: the value, its dtype, and the parameters of the activation in the order of its schema.
Formula = Callable[..., Expr]


def _activation(formula: Formula, **parameters: Any) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        source, *given = arguments_of(node, "self", *parameters, **parameters)
        if any(isinstance(g, fx.Node) for g in given):
            return None
        return formula(lift.broadcast(source, index), dtype_of(node), *given)

    return handler


def _clamped(x: Expr, dtype: str, low: float, high: float) -> Expr:
    """A choice, not extremes: unlike that of `clamp`, the derivative of these activations is zero at both bounds."""
    least, most = Const(float(low), dtype), Const(float(high), dtype)
    below, above = s.call("le", x, least, dtype=BOOL), s.call("le", most, x, dtype=BOOL)
    return s.where(below, least, s.where(above, most, x))


def _times(dtype: str, *factors: Expr | float) -> Expr:
    out: Expr | None = None
    for f in factors:
        factor = f if isinstance(f, Expr) else Const(float(f), dtype)
        out = factor if out is None else s.call("mul", out, factor, dtype=dtype)
    assert out is not None
    return out


def _plus(dtype: str, a: Expr, b: Expr | float) -> Expr:
    return s.call("add", a, b if isinstance(b, Expr) else Const(float(b), dtype), dtype=dtype)


def _is_positive(x: Expr, dtype: str) -> Expr:
    return s.call("lt", Const(0.0, dtype), x, dtype=BOOL)


def _leaky_relu(x: Expr, dtype: str, slope: float) -> Expr:
    return s.where(_is_positive(x, dtype), x, _times(dtype, x, slope))


def _elu(x: Expr, dtype: str, alpha: float, scale: float, inner: float) -> Expr:
    # The exponential is of what is not positive, where it is not used either: its gradient is a number there.
    below = s.call("expm1", _times(dtype, s.call("min", x, Const(0.0, dtype), dtype=dtype), inner), dtype=dtype)
    return s.where(_is_positive(x, dtype), _times(dtype, x, scale), _times(dtype, below, alpha * scale))


def _selu(x: Expr, dtype: str) -> Expr:
    return _elu(x, dtype, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


def _gelu(x: Expr, dtype: str, approximate: str) -> Expr:
    if approximate == "tanh":
        cube = _times(dtype, 0.044715, x, x, x)
        share = s.call("tanh", _times(dtype, math.sqrt(2 / math.pi), _plus(dtype, x, cube)), dtype=dtype)
    else:
        share = s.call("erf", _times(dtype, x, math.sqrt(0.5)), dtype=dtype)
    return _times(dtype, 0.5, x, _plus(dtype, share, 1.0))


def _softplus(x: Expr, dtype: str, beta: float, threshold: float) -> Expr:
    """log(1 + exp(beta * x)) / beta, and x itself past the threshold; from 20 on, the default, the two are the same."""
    scaled = x if beta == 1 else _times(dtype, x, beta)
    curve = s.call("softplus", scaled, dtype=dtype)
    if beta != 1:
        curve = s.call("div", curve, Const(float(beta), dtype), dtype=dtype)
    if threshold >= 20:
        return curve
    return s.where(s.call("lt", Const(float(threshold), dtype), scaled, dtype=BOOL), x, curve)


def _log_sigmoid(x: Expr, dtype: str) -> Expr:
    return s.call("neg", s.call("softplus", s.call("neg", x, dtype=dtype), dtype=dtype), dtype=dtype)


def _hardsigmoid(x: Expr, dtype: str) -> Expr:
    return s.call("div", _clamped(_plus(dtype, x, 3.0), dtype, 0.0, 6.0), Const(6.0, dtype), dtype=dtype)


def _hardswish(x: Expr, dtype: str) -> Expr:
    return _times(dtype, x, _hardsigmoid(x, dtype))


def _mish(x: Expr, dtype: str) -> Expr:
    return _times(dtype, x, s.call("tanh", s.call("softplus", x, dtype=dtype), dtype=dtype))


def _threshold(x: Expr, dtype: str, threshold: float, value: float) -> Expr:
    """What is no number stays so."""
    return s.where(s.call("le", x, Const(float(threshold), dtype), dtype=BOOL), Const(float(value), dtype), x)


def _shrunk(x: Expr, dtype: str, width: float, by: float) -> Expr:
    """Zero from -width to width, and less by so much beyond."""
    low, high = Const(-float(width), dtype), Const(float(width), dtype)
    inside = s.call("and", s.call("le", low, x, dtype=BOOL), s.call("le", x, high, dtype=BOOL), dtype=BOOL)
    below = s.call("lt", x, low, dtype=BOOL)
    return s.where(inside, Const(0.0, dtype), s.where(below, _plus(dtype, x, by), _plus(dtype, x, -by)))


def _logit(x: Expr, dtype: str, eps: float | None) -> Expr:
    if eps is not None:
        least, most = Const(float(eps), dtype), Const(1.0 - float(eps), dtype)
        above = s.where(s.call("lt", most, x, dtype=BOOL), most, x)
        x = s.where(s.call("lt", x, least, dtype=BOOL), least, above)
    rest = s.call("sub", Const(1.0, dtype), x, dtype=dtype)
    return s.call("sub", s.call("log", x, dtype=dtype), s.call("log", rest, dtype=dtype), dtype=dtype)


def _quotient(a: Expr, b: Expr, dtype: str) -> Expr:
    return s.call("div", a, b, dtype=dtype)


def _tan(x: Expr, dtype: str) -> Expr:
    return _quotient(s.call("sin", x, dtype=dtype), s.call("cos", x, dtype=dtype), dtype)


def _frac(x: Expr, dtype: str) -> Expr:
    return s.call("sub", x, s.call("trunc", x, dtype=dtype), dtype=dtype)


def _erfc(x: Expr, dtype: str) -> Expr:
    return s.call("sub", Const(1.0, dtype), s.call("erf", x, dtype=dtype), dtype=dtype)


def _atanh(x: Expr, dtype: str) -> Expr:
    up, down = (s.call("log1p", y, dtype=dtype) for y in (x, s.call("neg", x, dtype=dtype)))
    return _times(dtype, 0.5, s.call("sub", up, down, dtype=dtype))


def _log10(x: Expr, dtype: str) -> Expr:
    return _times(dtype, math.log10(math.e), s.call("log", s.cast(x, dtype), dtype=dtype))


def _is_finite(x: Expr, dtype: str) -> Expr:
    if not x.is_float:
        return TRUE
    return s.not_(s.call("or", *(s.call(op, x, dtype=BOOL) for op in ("isinf", "isnan")), dtype=BOOL))


def _is_infinity(sign: int) -> Formula:
    def formula(x: Expr, dtype: str) -> Expr:
        return s.call("eq", x, Const(sign * math.inf, x.dtype), dtype=BOOL) if x.is_float else FALSE

    return formula


def _sinc(x: Expr, dtype: str) -> Expr:
    """sin(pi x) / (pi x), and 1 at zero, where what is not used is a number, too."""
    zero, one = Const(0.0, dtype), Const(1.0, dtype)
    at_zero = s.call("eq", x, zero, dtype=BOOL)
    angle = _times(dtype, math.pi, s.where(at_zero, one, x))
    return s.where(at_zero, one, _quotient(s.call("sin", angle, dtype=dtype), angle, dtype))


def _of_two(formula: Callable[[Expr, Expr, str], Expr | None]) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        dtype = dtype_of(node)
        if kind_of(dtype) in (INT, BOOL):
            return None
        given = arguments_of(node, "self", "other")
        a, b = (s.cast(lift.broadcast(x, index, dtype), dtype) for x in given)
        return formula(a, b, dtype)

    return handler


def _copysign(a: Expr, b: Expr, dtype: str) -> Expr | None:
    """The sign of a zero counts: 1 / -0 is less than zero. Floats that are made of positions have lost it."""
    zero, one = Const(0.0, dtype), Const(1.0, dtype)
    if not isinstance(b, Const) and not any(x.is_float for x in b.loads):
        return None
    below = s.call("lt", s.call("reciprocal", b, dtype=dtype), zero, dtype=BOOL)
    of_zero = s.where(below, Const(-1.0, dtype), one)
    sign = s.where(s.call("eq", b, zero, dtype=BOOL), of_zero, s.call("sign", b, dtype=dtype))
    return _times(dtype, s.call("abs", a, dtype=dtype), sign)


def _hypot(a: Expr, b: Expr, dtype: str) -> Expr:
    squares = (s.call("square", x, dtype=dtype) for x in (a, b))
    return s.call("sqrt", s.call("add", *squares, dtype=dtype), dtype=dtype)


def _logaddexp2(a: Expr, b: Expr, dtype: str) -> Expr:
    natural = (_times(dtype, x, math.log(2)) for x in (a, b))
    return _times(dtype, s.call("logaddexp", *natural, dtype=dtype), math.log2(math.e))


def _prelu(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """One slope for all, or one for each position of the second dimension."""
    source, slope = arguments_of(node, "self", "weight")
    shape = shape_of(slope)
    at = tuple(ZERO if size == ONE else index[1] for size in shape)
    x, dtype = lift.broadcast(source, index), dtype_of(node)
    return s.where(_is_positive(x, dtype), x, _times(dtype, lift.at(slope, at), x))


ACTIVATIONS: dict[str, Handler] = {
    "leaky_relu": _activation(_leaky_relu, negative_slope=0.01),
    "hardtanh": _activation(_clamped, min_val=-1.0, max_val=1.0),
    "relu6": _activation(lambda x, dtype: _clamped(x, dtype, 0.0, 6.0)),
    "elu": _activation(_elu, alpha=1.0, scale=1.0, input_scale=1.0),
    "selu": _activation(_selu),
    "gelu": _activation(_gelu, approximate="none"),
    "softplus": _activation(_softplus, beta=1.0, threshold=20.0),
    "log_sigmoid": _activation(_log_sigmoid),
    "hardsigmoid": _activation(_hardsigmoid),
    "hardswish": _activation(_hardswish),
    "mish": _activation(_mish),
    "celu": _activation(lambda x, dtype, alpha: _elu(x, dtype, alpha, 1.0, 1.0 / alpha), alpha=1.0),
    "threshold": _activation(_threshold, threshold=0.0, value=0.0),
    "hardshrink": _activation(lambda x, dtype, width: _shrunk(x, dtype, width, 0.0), lambd=0.5),
    "softshrink": _activation(lambda x, dtype, width: _shrunk(x, dtype, width, width), lambd=0.5),
    "prelu": _prelu,
    **dict.fromkeys(("logit", "special_logit"), _activation(_logit, eps=None)),
    "copysign": _of_two(_copysign), "hypot": _of_two(_hypot), "logaddexp2": _of_two(_logaddexp2),
    "tan": _activation(_tan), "frac": _activation(_frac), "erfc": _activation(_erfc),
    "atanh": _activation(_atanh), "sinc": _activation(_sinc), "log10": _activation(_log10),
    "isfinite": _activation(_is_finite), "isposinf": _activation(_is_infinity(1)),
    "isneginf": _activation(_is_infinity(-1)),
    "special_expit": _activation(lambda x, dtype: s.call("sigmoid", x, dtype=dtype)),
}  # fmt: skip
