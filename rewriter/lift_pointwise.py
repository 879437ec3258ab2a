"""Pointwise operations: the same scalar operation at the same position, operands broadcast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from refocus import simplify as s
from refocus.dropout import keep
from refocus.ir import BOOL, INT, Call, Const, Expr, Reduce
from refocus.lift import Handler, Index, Lifter, arguments, dtype_of, is_tensor, kind_of
from refocus.lift_reductions import is_nonnegative
from refocus.masks import MASK_FILL
from refocus.sizes import shape_of


def _kind(node: fx.Node) -> str:
    return kind_of(dtype_of(node))


def _plain(op: str) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        kind = _kind(node)
        args = [lift.broadcast(a, index, kind) for a in arguments(node)[: 2 if op in _BINARY else 1]]
        if kind == BOOL and op in _OF_BOOLS:
            return s.call(_OF_BOOLS[op], *args, dtype=BOOL)
        if kind not in (INT, BOOL):
            args = [s.cast(a, kind) if a.dtype == BOOL else a for a in args]
        return s.call(op, *args, dtype=kind)

    return handler


_OF_BOOLS = {"mul": "and", "min": "and", "max": "or"}
_BINARY = {"mul", "min", "max", "pow", "logaddexp", "fmod"}


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return arguments(node)[position] if len(arguments(node)) > position else node.kwargs.get(name, default)


def _absolute(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    value = _plain("abs")(lift, node, index)
    return value.args[0] if isinstance(value, Call) and value.op == "abs" and is_nonnegative(value.args[0]) else value


def _add_sub(op: str, swapped: bool = False) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        kind = _kind(node)
        a, b = (lift.broadcast(x, index, kind) for x in arguments(node)[:2])
        alpha = _argument(node, 2, "alpha", 1)
        if kind == BOOL:
            return s.or_(a, b) if op == "add" and alpha in (1, True) else None
        a, b = (s.cast(x, kind) if x.dtype == BOOL else x for x in (a, b))
        if swapped:
            a, b = b, a
        if alpha != 1:
            factor = Const(alpha) if isinstance(alpha, int) else lift.factor(alpha, kind)
            b = s.call("mul", b, factor, dtype=kind)
        return s.call(op, a, b, dtype=kind)

    return handler


def _with_product(op: str) -> Handler:
    """addcmul(a, b, c) = a + value * b * c, and addcdiv(a, b, c) = a + value * b / c."""

    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        kind = _kind(node)
        if kind in (INT, BOOL):
            return None
        a, b, c = (lift.broadcast(x, index, kind) for x in arguments(node)[:3])
        product = s.call(op, b, c, dtype=kind)
        value = _argument(node, 3, "value", 1)
        if value != 1:
            product = s.call("mul", product, lift.factor(value, kind), dtype=kind)
        return s.call("add", a, product, dtype=kind)

    return handler


def _lerp(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """lerp(a, b, w) = a + w * (b - a)."""
    kind = _kind(node)
    a, b, weight = arguments(node)[:3]
    start, end = (lift.broadcast(x, index, kind) for x in (a, b))
    share = lift.broadcast(weight, index, kind) if is_tensor(weight) else lift.factor(weight, kind)
    way = s.call("mul", share, s.call("sub", end, start, dtype=kind), dtype=kind)
    return s.call("add", start, way, dtype=kind)


def _kron(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """kron(a, b)[i] = a[i // len(b)] * b[i % len(b)], in each dimension, aligned on the right."""
    kind = _kind(node)
    a, b = arguments(node)[:2]
    sizes = shape_of(b)
    outer = [s.floordiv(x, d) for x, d in zip(index[len(index) - len(sizes) :], sizes)]
    inner = [s.mod(x, d) for x, d in zip(index[len(index) - len(sizes) :], sizes)]
    blocks = [*index[: len(index) - len(sizes)], *outer]
    return _times(kind, lift.at(a, blocks[len(blocks) - len(shape_of(a)) :]), lift.at(b, inner))


def _outer(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """outer(a, b)[i, j] = a[i] * b[j]"""
    a, b = arguments(node)[:2]
    return _times(_kind(node), lift.at(a, index[:1]), lift.at(b, index[1:]))


def _times(kind: str, a: Expr, b: Expr) -> Expr:
    if kind == BOOL:
        return s.and_(a, b)
    return s.call("mul", *(s.cast(p, kind) if p.dtype == BOOL else p for p in (a, b)), dtype=kind)


def _div(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    kind = _kind(node)
    a, b = (lift.broadcast(x, index, kind) for x in arguments(node)[:2])
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return s.call("floordiv", a, b, dtype=kind)
    if mode == "trunc":
        if a.is_int and b.is_int and s.is_nonneg(a) and s.is_nonneg(s.sub(b, 1)):
            return s.floordiv(a, b)
        return None
    if a.dtype == BOOL:
        a = s.cast(a, kind)
    return s.call("div", a, b, dtype=kind)


def _floordiv(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (lift.broadcast(x, index, _kind(node)) for x in arguments(node)[:2])
    return s.call("floordiv", a, b, dtype=_kind(node))


def _remainder(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    a, b = (lift.broadcast(x, index, _kind(node)) for x in arguments(node)[:2])
    return s.call("mod", a, b, dtype=_kind(node))


def _compare(op: str, flip: bool = False) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        a, b = (lift.broadcast(x, index) for x in arguments(node)[:2])
        if BOOL in (a.dtype, b.dtype) and a.dtype != b.dtype:
            a, b = (s.where(x, Const(1), Const(0)) if x.dtype == BOOL else x for x in (a, b))
        if flip:
            a, b = b, a
        return s.call(op, a, b, dtype=BOOL)

    return handler


def _logic(op: str) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        if _kind(node) != BOOL:
            return None
        args = [s.as_bool(lift.broadcast(a, index)) for a in arguments(node)[: 1 if op == "not" else 2]]
        return s.call(op, *args, dtype=BOOL)

    return handler


def _where(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    if len(arguments(node)) < 3:
        return None
    kind = _kind(node)
    cond = s.as_bool(lift.broadcast(arguments(node)[0], index))
    a, b = (lift.broadcast(x, index, kind) for x in arguments(node)[1:3])
    return s.where(cond, s.cast(a, kind), s.cast(b, kind))


def _masked_fill(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    kind = _kind(node)
    source, mask, value = arguments(node)[:3]
    cond = s.as_bool(lift.broadcast(mask, index))
    return s.where(cond, s.cast(lift.broadcast(value, index, kind), kind), lift.broadcast(source, index))


def _nan_to_num(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    kind = _kind(node)
    x = lift.broadcast(arguments(node)[0], index, kind)
    if not x.is_float:
        return x
    dtype = node.meta["val"].dtype
    limits = torch.finfo(dtype)
    out = x
    for name, position, value, default in (
        ("neginf", 3, -math.inf, limits.min), ("posinf", 2, math.inf, limits.max),
    ):  # fmt: skip
        fill = _argument(node, position, name)
        number = Const(float(default if fill is None else fill), kind)
        out = s.where(s.call("eq", x, Const(value, kind), dtype=BOOL), number, out)
    nan = _argument(node, 1, "nan")
    return s.where(s.call("isnan", x, dtype=BOOL), Const(float(nan or 0.0), kind), out)


def _round(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """To integers, or to so many decimals."""
    kind = _kind(node)
    value = lift.broadcast(arguments(node)[0], index, kind)
    decimals = _argument(node, 1, "decimals", 0)
    if decimals == 0:
        return s.call("round", value, dtype=kind)
    if kind in (INT, BOOL):
        return None
    unit = Const(10.0 ** abs(decimals), kind)
    there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
    whole = s.call("round", s.call(there, value, unit, dtype=kind), dtype=kind)
    return s.call(back, whole, unit, dtype=kind)


def _clamp(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    kind = _kind(node)
    value = lift.broadcast(arguments(node)[0], index, kind)
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    least, most = (None if bound is None else lift.broadcast(bound, index, kind) for bound in (low, high))
    if least is not None and most is not None and low in lift.known.needs_grad:
        # A value below two bounds that are equal: its result is neither's, as far as gradients go.
        least = s.where(s.call("lt", least, most, dtype=BOOL), least, s.call("detach", least, dtype=kind))
    for op, bound in (("max", least), ("min", most)):
        if bound is not None:
            value = _bounded(op, value, bound, kind)
    return value


def _bounded(op: str, value: Expr, bound: Expr, kind: str) -> Expr:
    """A value that meets its bound is the one that a gradient flows to. Of tensors that are no more than extremes of
    each other the bound would get a share, so that there it is a choice."""
    if not bound.loads or kind in (INT, BOOL):
        return s.call(op, value, bound, dtype=kind)
    beyond = (value, bound) if op == "max" else (bound, value)
    return s.where(s.call("lt", *beyond, dtype=BOOL), bound, value)


def _clamp_one(op: str, name: str) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        kind = _kind(node)
        value = lift.broadcast(arguments(node)[0], index)
        return _bounded(op, value, lift.broadcast(_argument(node, 1, name), index, kind), kind)

    return handler


def _extreme(op: str, shares: bool = True) -> Handler:
    """The larger, or smaller, of two tensors; the reductions of the same name are in `lift_reductions`."""

    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        if len(arguments(node)) != 2 or not is_tensor(arguments(node)[1]):
            return None
        value = _plain(op)(lift, node, index)
        return _shared(value) if shares and value is not None and value.is_float else value

    return handler


def _shared(value: Expr) -> Expr:
    """Where two tensors are equal a gradient flows to each by half, also where one of them holds one number only, or
    positions: half of it is lost there, which the extreme of a value and a bound would pass on. At fills and for maxima
    of rows, by which exponents are shifted, it makes no difference (`LARGER`)."""
    if not (isinstance(value, Call) and value.op in ("min", "max")):
        return value
    bounds = [a for a in value.args if not a.loads]
    others = [a for a in value.args if a.loads and not any(isinstance(n, Reduce) for n in a.walk())]
    if len(bounds) != 1 or len(others) != 1:
        return value
    (bound,), (other,) = bounds, others
    if isinstance(bound, Const) and not MASK_FILL < bound.value < -MASK_FILL:
        return value
    half = Const(0.5, value.dtype)
    middle = s.call("add", *(s.call("mul", a, half, dtype=value.dtype) for a in (other, bound)), dtype=value.dtype)
    return s.where(s.call("eq", other, bound, dtype=BOOL), middle, value)


def _dropout(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, p, train = arguments(node)[0], _argument(node, 1, "p"), _argument(node, 2, "train")
    if train is False or (isinstance(p, int | float) and p == 0):
        return lift.at(source, index)
    if train is not True or not isinstance(p, float) or not 0 < p < 1 or not index:
        return None
    kind = _kind(node)
    return s.call("mul", lift.at(source, index), keep(node.name, p, index, shape_of(node), kind), dtype=kind)


def _batch_norm(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """With the statistics of training, a scale and a shift for each channel; with those of the batch, no such thing."""
    source, weight, bias, mean, variance, training, _, epsilon = arguments(node)[:8]
    if training is not False or mean is None or variance is None or len(index) < 2:
        return None
    kind = _kind(node)
    channel = (index[1],)
    spread = s.call("add", lift.at(variance, channel), lift.scalar(float(epsilon), kind), dtype=kind)
    value = s.call("sub", lift.at(source, index), lift.at(mean, channel), dtype=kind)
    value = s.call("mul", value, s.call("rsqrt", spread, dtype=kind), dtype=kind)
    if weight is not None:
        value = s.call("mul", value, lift.at(weight, channel), dtype=kind)
    return value if bias is None else s.call("add", value, lift.at(bias, channel), dtype=kind)


def _triangle(lower: bool) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        offset = lift.scalar(_argument(node, 1, "diagonal", 0))
        row, column = index[-2], index[-1]
        edge = s.add(row, offset)
        keep = s.le(column, edge) if lower else s.ge(column, edge)
        kind = _kind(node)
        zero = Const(False, BOOL) if kind == BOOL else Const(0) if kind == INT else Const(0.0, kind)
        return s.where(keep, lift.at(arguments(node)[0], index), zero)

    return handler


def _silu(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lift.broadcast(arguments(node)[0], index)
    return s.call("mul", x, s.call("sigmoid", x, dtype=_kind(node)), dtype=_kind(node))


def _square(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    kind = _kind(node)
    base, power = (lift.broadcast(x, index, kind) for x in arguments(node)[:2])
    if isinstance(power, Const) and power.value == 2 and base.is_float:
        return s.call("square", base, dtype=kind)
    if kind == INT and not (isinstance(power, Const) and power.value in (1, 2, 3)):
        return None  # kernels have powers of floats only, which are off by a bit where integers are exact
    return s.call("pow", base, power, dtype=kind)


def _cumsum(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """A running sum of something that does not change along the way is a multiple of the position. Where sums are
    written out, it is the sum over all steps up to this one."""
    source, dim = arguments(node)[0], _argument(node, 1, "dim")
    rank = len(index)
    dim = dim + rank if dim < 0 else dim
    if shape_of(source)[dim] == Const(1):
        return lift.at(source, index)
    step = lift.bound(node, 0, shape_of(source)[dim])
    if lift.expands and index[dim].axes & lift.query_axes and step not in lift.key_axes:
        lift.query_axes.add(step)  # what is summed for a query is still of queries
    body = lift.at(source, (*index[:dim], step, *index[dim + 1 :]))
    if body.is_float and lift.expands:
        kind = _kind(node)
        return Reduce("sum", step, s.where(s.le(step, index[dim]), body, Const(0.0, kind)), kind)
    if step in body.axes or body.is_float:
        return None
    return s.mul(s.cast(body, INT), s.add(index[dim], 1))


def _diff(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source = arguments(node)[0]
    n, dim = _argument(node, 1, "n", 1), _argument(node, 2, "dim", -1)
    before, after = _argument(node, 3, "prepend"), _argument(node, 4, "append")
    rank = len(index)
    dim = dim + rank if dim < 0 else dim
    kind = _kind(node)
    if n != 1 or after is not None or kind == BOOL:
        return None

    def read(tensor: fx.Node, at: Expr) -> Expr:
        return lift.at(tensor, (*index[:dim], at, *index[dim + 1 :]))

    def minus(a: Expr, b: Expr) -> Expr:
        return s.call("sub", a, b, dtype=kind)

    here = index[dim]
    if before is None:
        return minus(read(source, s.add(here, 1)), read(source, here))
    if shape_of(before)[dim] != Const(1):
        return None
    first = minus(read(source, Const(0)), read(before, Const(0)))
    earlier = s.maximum(s.under(s.sub(here, 1), s.assume(s.ge(here, 1))), 0)  # a load is carried out at the start, too
    later = minus(read(source, here), read(source, earlier))
    return s.where(s.le(here, 0), first, later)


LARGER = _extreme("max", shares=False)

POINTWISE: dict[str, Handler] = {
    **{name: _plain(name) for name in (
        "neg", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid",
        "relu", "erf", "sin", "cos", "floor", "ceil", "trunc", "sign", "isnan", "isinf", "square",
        "mul", "logaddexp", "atan", "fmod")},
    **dict.fromkeys(("abs", "absolute"), _absolute),
    **dict.fromkeys(("add",), _add_sub("add")), **dict.fromkeys(("sub", "subtract"), _add_sub("sub")),
    "rsub": _add_sub("sub", swapped=True), "multiply": _plain("mul"), "kron": _kron, "outer": _outer,
    "negative": _plain("neg"), "addcmul": _with_product("mul"), "addcdiv": _with_product("div"), "lerp": _lerp,
    **dict.fromkeys(("div", "true_divide", "divide"), _div), "floor_divide": _floordiv, "remainder": _remainder,
    **dict.fromkeys(("le", "less_equal"), _compare("le")), **dict.fromkeys(("lt", "less"), _compare("lt")),
    **dict.fromkeys(("ge", "greater_equal"), _compare("le", flip=True)),
    **dict.fromkeys(("gt", "greater"), _compare("lt", flip=True)), "eq": _compare("eq"), "ne": _compare("ne"),
    "not_equal": _compare("ne"),
    **dict.fromkeys(("bitwise_and", "logical_and", "__and__"), _logic("and")),
    **dict.fromkeys(("bitwise_or", "logical_or", "__or__"), _logic("or")),
    **dict.fromkeys(("bitwise_xor", "logical_xor", "__xor__"), _logic("xor")),
    **dict.fromkeys(("bitwise_not", "logical_not"), _logic("not")),
    "where": _where, "masked_fill": _masked_fill, "nan_to_num": _nan_to_num, "clamp": _clamp, "clip": _clamp,
    "clamp_min": _clamp_one("max", "min"), "clamp_max": _clamp_one("min", "max"),
    "round": _round, **dict.fromkeys(("minimum", "min"), _extreme("min")),
    **dict.fromkeys(("maximum", "max"), _extreme("max")),
    **dict.fromkeys(("pow", "float_power"), _square),
    "dropout": _dropout, "tril": _triangle(True), "triu": _triangle(False),
    "silu": _silu, "batch_norm": _batch_norm, "cumsum": _cumsum, "diff": _diff,
}  # fmt: skip
