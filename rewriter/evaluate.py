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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refocus import counter
from refocus import grid as grids
from refocus.grid import Grid, Term
from refocus.ir import BOOL, Axis, Call, Const, Dot, Expr, Load, Reduce, Sym
from refocus.operations import COMPARISONS, EXACT, FLOAT, LOGIC, REDUCE, TENSORS_ONLY, decide

Position = Grid | Tensor | int
Value = Any  # bool | int | float | SymInt | Grid | Tensor
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
    lengths = [list((split or {}).get(axis, ())) or [size_of(axis.size, sizes)] for axis in axes_in_order]
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
    what does not depend on them is computed, once, in the parent. `overlapping`: what is loaded may be a view in which
    windows share elements; then nobody may write to it.
    """

    def __init__(
        self,
        axes: Mapping[Axis, Position],
        tensors: Mapping[str, Tensor],
        sizes: Mapping[Sym, int],
        float_dtype: torch.dtype | None = None,
        depth: int = 0,
        overlapping: bool = False,
    ) -> None:
        self.axes, self.tensors, self.sizes, self.overlapping = dict(axes), tensors, sizes, overlapping
        # The outermost scope has neither: one that held itself would keep its values until garbage is collected.
        self.parent: Scope | None = None
        self.outermost: Scope | None = None
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
        scope.parent, scope.outermost, scope.changed, scope.memo = self, self.outermost or self, frozenset(axes), {}
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
        if node.op == "random":
            drawn = counter.random(*(self._laid_out(a, a, True) for a in node.args))
            return self._float(drawn, self._dtype(node, declared))
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

    def bind(self, over: tuple[Axis, ...]) -> tuple[Scope, dict[int, int]]:
        """The scope of a body, and the dimension -> length of each bound axis.

        A bound axis takes a dimension left of all others, the same in every scope: so one side of a product is computed
        once for all tiles of the other. Only where the name is a free axis too does the body get a scope of its own.
        """
        outermost = self.outermost or self
        for axis in over:
            if axis not in self.bound:
                outermost.depth += 1
                self.bound[axis] = (-outermost.depth, size_of(axis.size, self.sizes))
        lengths = dict(self.bound[axis] for axis in over)
        clash = {a: grids.grid(0, (Term(*self.bound[a], 1),)) for a in over if a in self.axes}
        return (self.child(clash) if clash else self), lengths

    def _load(self, node: Load, declared: bool) -> Value:
        source = self.tensors[node.tensor]
        value = grids.read(source, [self.value(i) for i in node.index], self.device, self.overlapping)
        if value.is_floating_point():
            return value.to(self._dtype(node, declared))
        return value if value.dtype == torch.bool else value.to(torch.int64)

    def _dot(self, node: Dot, declared: bool) -> Value:
        scope, over = self.bind(node.over)
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
        scope, lengths = self.bind((node.axis,))
        [(dim, length)] = lengths.items()
        body = scope._laid_out(node.body, node, declared)
        if body.dim() < -dim:
            body = body.reshape((1,) * (-dim - body.dim()) + tuple(body.shape))
        shape = list(body.shape)
        shape[dim] = length
        result = REDUCE[node.op](body.expand(shape), dim)
        along = sorted(grids.spread(result))
        return grids.place(grids.only(result, along), along)

    def _where(self, node: Call, declared: bool) -> Value:
        cond = self._plain(node.args[0], declared)
        if not isinstance(cond, Tensor):
            picked = node.args[1 if cond else 2]
            return (
                self._float(self._plain(picked, declared), self._dtype(node, declared))
                if node.is_float
                else (self.value(picked, declared))
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
        # As in a truncation, rounding shows where numbers are compared; with scores it is theirs that counts.
        declared = declared or (node.dtype == BOOL and not _holds_sum(node))
        dtype = self._dtype(kind, declared) if kind.is_float else self.float_dtype
        args = [self._float(self._plain(a, declared), dtype) for a in node.args]
        if not any(isinstance(a, Tensor) for a in args) or node.op in TENSORS_ONLY:
            args = [
                a if isinstance(a, Tensor) else torch.scalar_tensor(a, dtype=dtype, device=self.device) for a in args
            ]
        run = FLOAT[node.op]
        return functools.reduce(run, args) if len(args) > 2 else run(*args)

    def _exact_call(self, node: Call, declared: bool) -> Value:
        op, args = node.op, [self.value(a, declared) for a in node.args]
        if op in LOGIC:
            return functools.reduce(LOGIC[op], (self._flat(a) for a in args))
        if op == "not":
            return torch.logical_not(args[0]) if isinstance(args[0], Tensor) else not args[0]
        args = [a.to(torch.int64) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in args]
        if op == "neg":
            op, args = "mul", [-1, args[0]]
        elif op == "sub":
            op, args = "add", [args[0], grids.scale(args[1], -1) if isinstance(args[1], Grid) else -args[1]]
        if op == "add":
            flat = [a for a in args if isinstance(a, Tensor)]
            line: Grid | int = 0
            for a in args:
                line = line if isinstance(a, Tensor) else grids.add(line, a)
            if not flat:
                return line
            total = functools.reduce(operator.add, flat)
            return total if type(line) is int and line == 0 else total + self._flat(line)
        if op == "mul" and sum(isinstance(a, Grid) for a in args) == 1 and not any(isinstance(a, Tensor) for a in args):
            spread = next(a for a in args if isinstance(a, Grid))
            return grids.scale(spread, math.prod(a for a in args if not isinstance(a, Grid)))
        if len(args) == 2 and any(isinstance(a, Grid) for a in args) and not any(isinstance(a, Tensor) for a in args):
            known = decide(op, *args)
            if known is not None:
                return known
            if op in COMPARISONS and all(isinstance(a, Grid) for a in args):
                args = _without_common(*args)
        args = [self._flat(a) for a in args]
        if op in ("floordiv", "mod") and isinstance(args[0], Tensor) and _holds_bound(node.args[0]):
            args[0] = args[0] | 0  # Inductor fails on an index that divides Max(0, position); it does not look past `|`
        run = EXACT[op]
        return functools.reduce(run, args) if len(args) > 2 else run(*args)

    def _flat(self, value: Value) -> Value:
        return value.tensor(self.device) if isinstance(value, Grid) else value


@functools.lru_cache(maxsize=1 << 12)
def _holds_sum(expr: Expr) -> bool:
    return any(isinstance(n, Dot | Reduce) for n in expr.walk())


@functools.lru_cache(maxsize=1 << 12)
def _holds_bound(expr: Expr) -> bool:
    return any(isinstance(n, Call) and n.op == "max" for n in expr.walk())


def _without_common(a: Grid, b: Grid) -> list[Grid | int]:
    """Two grids that compare the same: without the dimensions along which they move alike."""
    alike = [t for t in a.terms if t in b.terms and all(type(n) is int for n in t)]
    return [grids.grid(g.start, tuple(t for t in g.terms if t not in alike), g.device) for g in (a, b)]


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Where to compute: an accelerator if any tensor is there (a tensor without dimensions may stay on the CPU)."""
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))


def _device(axes: Mapping[Axis, Position], tensors: Mapping[str, Tensor]) -> torch.device:
    positions = [p for p in axes.values() if isinstance(p, Tensor)]
    if tensors or positions:
        return device_of((*tensors.values(), *positions))
    return next((p.device for p in axes.values() if isinstance(p, Grid) and p.device), torch.device("cpu"))


def _rank(position: Position) -> int:
    if isinstance(position, Grid):
        return max(-d for d in position.dims)
    return position.dim() if isinstance(position, Tensor) else 0
