"""The meaning of an expression: it is evaluated over torch tensors.

    evaluate(expr, axes, tensors, sizes)         one value, as a tensor
    Scope(axes, tensors, sizes).child(...)       the same, keeping what does not depend on the axes that change

Axis positions are integers, integer tensors that broadcast together, or `Grid`s (whole ranges: loads become slices,
and a `Dot` one matrix product). Floats are computed in one dtype, float32 or float64, whatever the model's dtype; only
what is cast to an integer is computed in its own declared dtype, so that bucket boundaries stay where they were.

It can be traced (symbolic sizes included), and works inside FlexAttention's score_mod and mask_mod, where all axes
are tensors without dimensions.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refocus import grid as grids
from refocus.grid import Grid, Term
from refocus.ir import BOOL, Axis, Call, Const, Dot, Expr, Load, Reduce, Sym

Position = Grid | Tensor | int
Value = Any  # bool | int | float | SymInt | Grid | Tensor
_NUMBER = (int, float, bool, torch.SymInt, torch.SymFloat)
_INTEGER = (int, torch.SymInt)


def evaluate(
    expr: Expr,
    axes: Mapping[Axis, Position],
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    float_dtype: torch.dtype | None = None,
) -> Tensor:
    """The value of `expr` for every combination of `axes`.

    `axes`: a position (or a tensor or `Grid` of them) for each free axis. `tensors`: the operands by name. `sizes`: the
    symbols' values. `float_dtype`: what floats are computed in; by default float64 if an operand is float64, else
    float32. The result broadcasts against the axes' positions (it has 1 where it does not depend on one).
    """
    return Scope(axes, tensors, sizes, float_dtype).tensor(expr)


def arange_env(
    axes_in_order: Sequence[Axis],
    sizes: Mapping[Sym, int],
    device: torch.device | None = None,
    split: Mapping[Axis, Sequence[int]] | None = None,
) -> dict[Axis, Position]:
    """Every axis over its whole range, one dimension each, in this order, the last axis along the last dimension.

    `split` gives an axis several dimensions, by their lengths from the outermost in: with (2, 4) for h, `h // 4` and
    all that is loaded at it are broadcast views. `device` is where positions are made when no operand says so.
    """
    lengths = [
        list((split or {}).get(axis, ())) or [size_of(axis.size, sizes)] for axis in axes_in_order
    ]
    dim = -sum(len(parts) for parts in lengths)
    out: dict[Axis, Position] = {}
    for axis, parts in zip(axes_in_order, lengths):
        terms = []
        for k, length in enumerate(parts):
            terms.append(Term(dim, length, math.prod(parts[k + 1 :])))
            dim += 1
        out[axis] = grids.grid(0, tuple(terms), device)
    return out


def size_of(expr: Expr, sizes: Mapping[Sym, int]) -> int:
    """The value of an expression of constants and symbols alone."""
    if isinstance(expr, Const):
        return expr.value  # type: ignore[return-value]
    if isinstance(expr, Sym):
        return sizes[expr]
    value = Scope({}, {}, sizes).value(expr)
    assert isinstance(value, _INTEGER), expr
    return value  # type: ignore[return-value]


class Scope:
    """Positions for some axes, and the values already computed under them.

    `depth`: how many dimensions positions may span, over all children to come. A child's axes shadow its parent's;
    what does not depend on them is computed, once, in the parent.
    """

    def __init__(
        self,
        axes: Mapping[Axis, Position],
        tensors: Mapping[str, Tensor],
        sizes: Mapping[Sym, int],
        float_dtype: torch.dtype | None = None,
        depth: int = 0,
    ) -> None:
        self.axes, self.tensors, self.sizes = dict(axes), tensors, sizes
        self.parent: Scope | None = None
        self.root = self
        self.changed: frozenset[Axis] = frozenset()
        self.memo: dict[tuple[Expr, int], Value] = {}
        wide = any(t.dtype == torch.float64 for t in tensors.values())
        self.float_dtype = float_dtype or (torch.float64 if wide else torch.float32)
        self.device = _device(self.axes, tensors)
        self.depth = max([depth, *(_rank(p) for p in self.axes.values())])
        self.bound: dict[Axis, tuple[int, int]] = {}  # axes of Dots and Reduces: dimension and length

    def child(self, axes: Mapping[Axis, Position]) -> Scope:
        scope = Scope.__new__(Scope)
        scope.__dict__.update(self.__dict__)
        scope.axes = {**self.axes, **axes}
        scope.parent, scope.changed, scope.memo = self, frozenset(axes), {}
        return scope

    # ------------------------------------------------------------------------------------------------ results

    def tensor(self, expr: Expr) -> Tensor:
        """The value as a tensor: bool, int64, or the float dtype of this scope."""
        value = self._plain(expr, False)
        if expr.is_float:
            value = self._float(value, self.float_dtype)
        dtype = self.float_dtype if expr.is_float else torch.bool if expr.dtype == BOOL else torch.int64
        return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=dtype, device=self.device)

    def value(self, expr: Expr, declared: bool = False) -> Value:
        """A number, a `Grid` or a tensor. `declared`: floats are computed each in its own dtype."""
        return self._cached(expr, int(declared), lambda scope: scope._compute(expr, declared))

    def _plain(self, expr: Expr, declared: bool) -> Value:
        """A number or a tensor: grids are laid out (once)."""
        value = self.value(expr, declared)
        if isinstance(value, Grid):
            return self._cached(expr, 2, lambda scope: value.tensor(scope.device))
        return value

    def _cached(self, expr: Expr, kind: int, make: Callable[[Scope], Value]) -> Value:
        scope = self
        while scope.parent is not None and not (scope.changed & expr.axes):
            scope = scope.parent
        key = (expr, kind)
        if key not in scope.memo:
            scope.memo[key] = make(scope)
        return scope.memo[key]

    def _float(self, value: Value, dtype: torch.dtype) -> Value:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.sym_float(value) if isinstance(value, torch.SymInt) else float(value)

    # ------------------------------------------------------------------------------------------------ nodes

    def _compute(self, node: Expr, declared: bool) -> Value:
        if isinstance(node, Const):
            return node.value
        if isinstance(node, Sym):
            return self.sizes[node]
        if isinstance(node, Axis):
            return self._position(node)
        if isinstance(node, Load):
            return self._load(node, declared)
        if isinstance(node, Dot):
            return self._dot(node, declared)
        if isinstance(node, Reduce):
            return self._reduce(node, declared)
        assert isinstance(node, Call)
        if node.op == "where":
            return self._where(node, declared)
        if node.op == "cast":
            return self._cast(node, declared)
        if node.is_float or node.op in ("isnan", "isinf") or any(a.is_float for a in node.args):
            return self._float_call(node, declared)
        return self._exact_call(node, declared)

    def _dtype(self, node: Expr, declared: bool) -> torch.dtype:
        return getattr(torch, node.dtype) if declared else self.float_dtype

    def _position(self, axis: Axis) -> Value:
        if axis in self.axes:
            return self.axes[axis]
        dim, length = self.bound[axis]
        return grids.grid(0, (Term(dim, length, 1),))

    def _bind(self, over: tuple[Axis, ...]) -> tuple[Scope, dict[int, int]]:
        """The scope of a body, and the dimension -> length of each bound axis.

        A bound axis takes a dimension left of all others, the same in every scope: so one side of a product is computed
        once for all tiles of the other. Only where the name is a free axis too does the body get a scope of its own.
        """
        for axis in over:
            if axis not in self.bound:
                self.root.depth += 1
                self.bound[axis] = (-self.root.depth, size_of(axis.size, self.sizes))
        lengths = dict(self.bound[axis] for axis in over)
        clash = {a: grids.grid(0, (Term(*self.bound[a], 1),)) for a in over if a in self.axes}
        return (self.child(clash) if clash else self), lengths

    def _load(self, node: Load, declared: bool) -> Value:
        source = self.tensors[node.tensor]
        value = grids.read(source, [self.value(i) for i in node.index], self.device)
        if value.is_floating_point():
            return value.to(self._dtype(node, declared))
        return value if value.dtype == torch.bool else value.to(torch.int64)

    def _dot(self, node: Dot, declared: bool) -> Value:
        scope, over = self._bind(node.over)
        query, key = scope._laid_out(node.query, node, declared), scope._laid_out(node.key, node, declared)
        return grids.contract(query, key, over)

    def _laid_out(self, expr: Expr, like: Expr, declared: bool) -> Tensor:
        """A tensor of the kind (float or int64) of `like`."""
        value = self._plain(expr, declared)
        dtype = self._dtype(like, declared) if like.is_float else torch.bool if like.dtype == BOOL else torch.int64
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.scalar_tensor(value, dtype=dtype, device=self.device)

    def _reduce(self, node: Reduce, declared: bool) -> Value:
        scope, lengths = self._bind((node.axis,))
        [(dim, length)] = lengths.items()
        body = scope._laid_out(node.body, node, declared)
        if body.dim() < -dim:
            body = body.reshape((1,) * (-dim - body.dim()) + tuple(body.shape))
        shape = list(body.shape)
        shape[dim] = length
        result = _REDUCE[node.op](body.expand(shape), dim)
        along = sorted(grids.spread(result))
        return grids.place(grids.only(result, along), along)

    def _where(self, node: Call, declared: bool) -> Value:
        cond = self._plain(node.args[0], declared)
        if not isinstance(cond, Tensor):
            picked = node.args[1 if cond else 2]
            return self._float(self._plain(picked, declared), self._dtype(node, declared)) if node.is_float else (
                self.value(picked, declared)
            )
        a, b = (self._plain(x, declared) for x in node.args[1:])
        if node.is_float:
            dtype = self._dtype(node, declared)
            a, b = self._float(a, dtype), self._float(b, dtype)
        else:
            dtype = torch.bool if node.dtype == BOOL else torch.int64
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.scalar_tensor(a, dtype=dtype, device=self.device)
        return torch.where(cond, a, b)

    def _cast(self, node: Call, declared: bool) -> Value:
        arg = node.args[0]
        if node.is_float:
            return self._float(self._plain(arg, declared), self._dtype(node, declared))
        # Truncation is where rounding shows: the eager code's own precision decides which bucket a position is in.
        value = self.value(arg, True) if arg.is_float else self.value(arg, declared)
        if node.dtype == BOOL:
            return (value.tensor(self.device) if isinstance(value, Grid) else value) != 0
        if isinstance(value, Tensor):
            return value.to(torch.int64)
        return value if isinstance(value, (Grid, torch.SymInt)) else int(value)

    def _float_call(self, node: Call, declared: bool) -> Value:
        kind: Expr = node if node.is_float else next((a for a in node.args if a.is_float), node.args[0])
        dtype = self._dtype(kind, declared) if kind.is_float else self.float_dtype
        args = [self._float(self._plain(a, declared), dtype) for a in node.args]
        if not any(isinstance(a, Tensor) for a in args) or node.op in _TENSORS_ONLY:
            args = [a if isinstance(a, Tensor) else torch.scalar_tensor(a, dtype=dtype, device=self.device) for a in args]
        run = _FLOAT[node.op]
        return functools.reduce(run, args) if len(args) > 2 else run(*args)

    def _exact_call(self, node: Call, declared: bool) -> Value:
        op, args = node.op, [self.value(a, declared) for a in node.args]
        if op in _LOGIC:
            return functools.reduce(_LOGIC[op], (self._flat(a) for a in args))
        if op == "not":
            return torch.logical_not(args[0]) if isinstance(args[0], Tensor) else not args[0]
        args = [a.to(torch.int64) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in args]
        if op == "neg":
            op, args = "mul", [-1, args[0]]
        elif op == "sub":
            op, args = "add", [args[0], grids.scale(args[1], -1) if isinstance(args[1], Grid) else -args[1]]
        if op == "add":
            flat = [a for a in args if isinstance(a, Tensor)]
            line = functools.reduce(grids.add, (a for a in args if not isinstance(a, Tensor)), 0)
            if not flat:
                return line
            total = functools.reduce(operator.add, flat)
            return total if type(line) is int and line == 0 else total + self._flat(line)
        if op == "mul" and sum(isinstance(a, Grid) for a in args) == 1 and not any(isinstance(a, Tensor) for a in args):
            spread = next(a for a in args if isinstance(a, Grid))
            return grids.scale(spread, math.prod(a for a in args if not isinstance(a, Grid)))
        if len(args) == 2 and any(isinstance(a, Grid) for a in args) and not any(isinstance(a, Tensor) for a in args):
            known = _decide(op, *args)
            if known is not None:
                return known
        args = [self._flat(a) for a in args]
        run = _EXACT[op]
        return functools.reduce(run, args) if len(args) > 2 else run(*args)

    def _flat(self, value: Value) -> Value:
        return value.tensor(self.device) if isinstance(value, Grid) else value


def _decide(op: str, a: Grid | int, b: Grid | int) -> Value:
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


def _device(axes: Mapping[Axis, Position], tensors: Mapping[str, Tensor]) -> torch.device:
    for tensor in (*tensors.values(), *(p for p in axes.values() if isinstance(p, Tensor))):
        return tensor.device
    return next((p.device for p in axes.values() if isinstance(p, Grid) and p.device), torch.device("cpu"))


def _rank(position: Position) -> int:
    if isinstance(position, Grid):
        return max(-d for d in position.dims)
    return position.dim() if isinstance(position, Tensor) else 0


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
_LOGIC: dict[str, Callable[..., Value]] = {"and": _and, "or": _or, "xor": operator.xor}
_EXACT: dict[str, Callable[..., Value]] = _COMPARE | {
    "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod, "min": _MIN, "max": _MAX, "abs": abs,
    "square": lambda a: a * a, "pow": operator.pow, "relu": lambda a: _MAX(a, 0),
    "fmod": lambda a, b: torch.fmod(a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else int(math.fmod(a, b)),
    "sign": lambda a: torch.sign(a) if isinstance(a, Tensor) else (a > 0) - (a < 0),
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), lambda a: a),
}  # fmt: skip
_TENSORS_ONLY = {"logaddexp", "fmod"}
_FLOAT: dict[str, Callable[..., Value]] = _COMPARE | {
    "add": operator.add, "mul": operator.mul, "sub": operator.sub, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "mod": torch.remainder, "fmod": torch.fmod, "min": _MIN, "max": _MAX,
    "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2,
    "log1p": torch.log1p, "expm1": torch.expm1, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "pow": torch.pow,
    "reciprocal": torch.reciprocal, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "erf": torch.erf, "sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "sign": torch.sign,
    "softplus": torch.nn.functional.softplus, "isnan": torch.isnan, "isinf": torch.isinf, "square": torch.square,
    "logaddexp": torch.logaddexp,
}  # fmt: skip
_REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda t, d: t.sum(d, keepdim=True), "prod": lambda t, d: t.prod(d, keepdim=True),
    "max": lambda t, d: t.amax(d, keepdim=True), "min": lambda t, d: t.amin(d, keepdim=True),
    "any": lambda t, d: t.any(d, keepdim=True), "all": lambda t, d: t.all(d, keepdim=True),
}  # fmt: skip
