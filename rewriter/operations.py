"""What each operation of `refocus.ir.OPS` does to numbers and tensors, and to whole ranges where that can be told.

A value is a number (possibly a traced size) or a tensor, and the operands of one call may be of both kinds. Numbers
stay numbers, so that sizes and offsets fold; a constant operand never becomes a tensor without need.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.grid import Grid

Value = Any  # bool | int | float | SymInt | Grid | Tensor


def decide(op: str, a: Grid | int, b: Grid | int) -> Value:
    """A result for whole ranges, where their bounds tell; None where they do not."""
    if op in ("floordiv", "mod"):
        parts = grids.divide(a, b) if isinstance(a, Grid) and isinstance(b, int) else None
        return None if parts is None else parts[op == "mod"]
    diff = grids.add(a, grids.scale(b, -1))
    lo, hi = (diff.bounds() or (None, None)) if isinstance(diff, Grid) else (diff, diff)
    if lo is None or hi is None:
        return None
    if op in ("min", "max"):
        low, high = (a, b) if op == "min" else (b, a)
        return low if hi <= 0 else high if lo >= 0 else None
    if op in ("le", "lt"):
        edge = 0 if op == "le" else -1
        return True if hi <= edge else False if lo > edge else None
    if op in ("eq", "ne") and (lo > 0 or hi < 0 or lo == hi == 0):
        return (lo == hi == 0) == (op == "eq")
    return None


def _extreme(scalar: Callable[..., Any], tensor: Callable[..., Tensor], bound: str) -> Callable[..., Value]:
    def run(a: Value, b: Value) -> Value:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return tensor(a, b)
        if isinstance(b, Tensor):
            a, b = b, a
        return torch.clamp(a, **{bound: b}) if isinstance(a, Tensor) else scalar(a, b)

    return run


def _and(a: Value, b: Value) -> Value:
    if not isinstance(a, Tensor):
        return b if a else False
    return a & b if isinstance(b, Tensor) else _and(b, a)


def _or(a: Value, b: Value) -> Value:
    if not isinstance(a, Tensor):
        return True if a else b
    return a | b if isinstance(b, Tensor) else _or(b, a)


_MIN = _extreme(torch.sym_min, torch.minimum, "max")
_MAX = _extreme(torch.sym_max, torch.maximum, "min")
_COMPARE: dict[str, Callable[..., Value]] = {
    "eq": operator.eq, "ne": operator.ne, "le": operator.le, "lt": operator.lt,
}  # fmt: skip
COMPARISONS = frozenset(_COMPARE)
LOGIC: dict[str, Callable[..., Value]] = {"and": _and, "or": _or, "xor": operator.xor}
EXACT: dict[str, Callable[..., Value]] = _COMPARE | {
    "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod, "min": _MIN, "max": _MAX, "abs": abs,
    "square": lambda a: a * a, "pow": operator.pow, "relu": lambda a: _MAX(a, 0),
    "fmod": lambda a, b: torch.fmod(a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else int(math.fmod(a, b)),
    "sign": lambda a: torch.sign(a) if isinstance(a, Tensor) else (a > 0) - (a < 0),
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), lambda a: a),
}  # fmt: skip
TENSORS_ONLY = {"logaddexp", "fmod", "detach"}
FLOAT: dict[str, Callable[..., Value]] = _COMPARE | {
    "add": operator.add, "mul": operator.mul, "sub": operator.sub, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "mod": torch.remainder, "fmod": torch.fmod, "min": _MIN, "max": _MAX,
    "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "expm1": torch.expm1, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "pow": torch.pow,
    "reciprocal": torch.reciprocal, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "erf": torch.erf, "sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "sign": torch.sign,
    "softplus": torch.nn.functional.softplus, "isnan": torch.isnan, "isinf": torch.isinf, "square": torch.square,
    "logaddexp": torch.logaddexp, "detach": torch.detach,
}  # fmt: skip
REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda t, d: t.sum(d, keepdim=True), "prod": lambda t, d: t.prod(d, keepdim=True),
    "max": lambda t, d: t.amax(d, keepdim=True), "min": lambda t, d: t.amin(d, keepdim=True),
    "any": lambda t, d: t.any(d, keepdim=True), "all": lambda t, d: t.all(d, keepdim=True),
}  # fmt: skip
