"""More regions for the generated kernels, as in `tests.region_cases`: `MORE` by name, and one for each operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from refocus import simplify as s
from refocus.ir import BOOL, INT, TRUE, Axis, Call, Const, Dot, Expr, Load, Operand, Region, Sym
from tests import region_cases as cases
from tests.region_cases import Case, Setting, operand, randn

F = "float32"


def odd_width() -> Case:
    """Widths that are no powers of two, and differ."""
    setting = Setting(torch.float32, 37, 50, 12, 20)
    return setting.case(setting.score)


def two_axes() -> Case:
    """A product over two axes, read at transposed strides; two value axes of odd sizes."""
    b, i, j = Axis("b", Const(2)), Axis("i", Const(21)), Axis("j", Const(35))
    c, d, e, g = Axis("c", Const(3)), Axis("d", Const(5)), Axis("e", Const(3)), Axis("g", Const(7))
    q, k = randn(1, torch.float32, 2, 5, 21, 3), randn(2, torch.float32, 2, 35, 3, 5)
    v = randn(3, torch.float32, 2, 35, 7, 3)
    dot = Dot((c, d), Load("q", (b, d, i, c), F), Load("k", (b, j, c, d), F), F)
    region = Region((b,), i, j, (e, g), dot, TRUE, dot, Load("v", (b, j, g, e), F),
                    (operand("q", q), operand("k", k), operand("v", v)), F, empty_row="never")
    return region, [q, k, v], []


def block_table() -> Case:
    """Keys and values are read through a table of pages; the length is read too, and bounds the loop."""
    b, i, j, d, e = (Axis(n, Const(z)) for n, z in (("b", 3), ("i", 20), ("j", 40), ("d", 16), ("e", 8)))
    pages = torch.tensor([[3, 0, 5, 1, 7], [2, 6, 4, 0, 1], [7, 7, 2, 3, 5]])
    lengths = torch.tensor([40, 17, 3], dtype=torch.int32)
    q, k, v = randn(1, torch.float32, 3, 20, 16), randn(2, torch.float32, 8, 8, 16), randn(3, torch.float32, 8, 8, 8)
    page = Load("pages", (b, s.floordiv(j, 8)), INT)
    dot = Dot((d,), Load("q", (b, i, d), F), Load("k", (page, s.mod(j, 8), d), F), F)
    mask = s.lt(j, Load("lengths", (b,), "int32"))
    operands = tuple(operand(n, t) for n, t in (("q", q), ("k", k), ("v", v), ("pages", pages), ("lengths", lengths)))
    values = Load("v", (page, s.mod(j, 8), e), F)
    region = Region((b,), i, j, (e,), dot, mask, dot, values, operands, F, empty_row="never")
    return region, [q, k, v, pages, lengths], []


def head_windows() -> Case:
    """Each head has a window of its own: the loop's bounds depend on the head."""
    setting = Setting(torch.float32, 70, 70, 16, 16)
    width = s.add(s.mul(setting.h, 8), 4)
    mask = s.and_(s.le(setting.j, setting.i), s.lt(s.sub(setting.i, setting.j), width))
    return setting.case(setting.score, mask)


def prefix() -> Case:
    """Bidirectional over a prefix, then causal; the first tiles are whole."""
    setting = Setting(torch.float32, 90, 90, 16, 16)
    return setting.case(setting.score, s.or_(s.le(setting.j, setting.i), s.lt(setting.j, 20)))


def dilated() -> Case:
    """A remainder and a division of a difference that is negative half of the time."""
    setting = Setting(torch.float32, 40, 40, 16, 16)
    difference = s.sub(setting.j, setting.i)
    mask = s.eq(s.mod(difference, 3), 0)
    bias = s.cast(s.floordiv(difference, 6), F)
    shifted = s.cast(s.floordiv(difference, 8), F)
    bias = cases.mul(cases.call("add", bias, shifted, dtype=F), Const(0.1, F))
    return setting.case(cases.add(setting.score, bias), mask)


def bias_of_minima() -> Case:
    """A loaded additive mask: a row of nothing but finite minima is the mean, one of -inf is NaN."""
    setting = Setting(torch.float32, 40, 40, 16, 16)
    bias = torch.where(torch.ones(40, 40).tril().bool(), 0.0, torch.finfo(torch.float32).min)
    bias[5] = torch.finfo(torch.float32).min
    bias[7, :30] = -math.inf
    setting.tensors["bias"] = bias
    return setting.case(cases.add(setting.score, Load("bias", (setting.i, setting.j), F)))


def transposed() -> Case:
    """Operands that are views: strides of any kind, and of zero."""
    region, (q, k, v), sizes = cases.causal()
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    return region, [q, k[:, :1].expand_as(k), v.mT.contiguous().mT], sizes


def scaled_keys() -> Case:
    """Products of expressions, not of loads; zero times infinity must not leak in from outside."""
    setting = Setting(torch.float32, 20, 37, 12, 12)
    setting.tensors["scale"] = randn(4, torch.float32, 37).abs() + 0.1
    scale = Load("scale", (setting.j,), F)
    key = cases.call("div", Load("k", (setting.b, setting.h, setting.j, setting.d), F), scale)
    dot = Dot((setting.d,), Load("q", (setting.b, setting.h, setting.i, setting.d), F), key, F)
    values = cases.call("div", setting.values, scale)
    region, tensors, sizes = setting.case(dot)
    return replace(region, values=values), tensors, sizes


def mixed_dtypes() -> Case:
    """bfloat16 queries and keys, float32 values, a float16 bias, a float32 result."""
    setting = Setting(torch.bfloat16, 30, 40, 16, 16)
    setting.tensors["v"] = randn(3, torch.float32, 2, 4, 40, 16)
    setting.tensors["bias"] = randn(4, torch.float16, 30, 40)
    setting.values = Load("v", (setting.b, setting.h, setting.j, setting.e), F)
    region, tensors, sizes = setting.case(cases.add(setting.score, Load("bias", (setting.i, setting.j), "float16")))
    return replace(region, out_dtype=F), tensors, sizes


def no_value_axis() -> Case:
    """One number for each query."""
    region, (q, k, v), sizes = cases.causal(n=20)
    e = region.value[0]
    values = s.substitute(region.values, {e: Const(3)})
    return replace(region, value=(), values=values), [q, k, v], sizes


def several_batches() -> Case:
    """Symbolic batch axes, one of size one, and a key axis of a symbolic expression."""
    n, m = Sym("s0"), Sym("s1", 1)
    b, one, h = Axis("b", n), Axis("o", Const(1)), Axis("h", m)
    i, j, d, e = Axis("i", Const(20)), Axis("j", s.mul(n, 10)), Axis("d", Const(16)), Axis("e", Const(16))
    q, k = randn(1, torch.float32, 3, 2, 20, 16), randn(2, torch.float32, 2, 30, 16)
    dot = Dot((d,), Load("q", (b, h, i, d), F), Load("k", (h, j, d), F), F)
    operands = (
        Operand("q", F, (n, m, Const(20), Const(16))),
        Operand("k", F, (m, s.mul(n, 10), Const(16))),
    )
    region = Region((b, one, h), i, j, (e,), dot, TRUE, dot, Load("k", (h, j, e), F), operands, F, empty_row="never")
    return region, [q, k], [3, 2]


def integers() -> Case:
    """No product at all: a score and values made of integers, and a gate that is a condition."""
    i, j, e = Axis("i", Const(20)), Axis("j", Const(30)), Axis("e", Const(4))
    ids = torch.arange(30) % 7
    values = cases.mul(Const(0.5, F), s.add(s.mul(j, 2), e, Load("ids", (j,), INT)))
    gate = s.le(s.mod(s.add(i, j), 3), 1)
    score = cases.mul(Const(-0.5, F), s.maximum(s.sub(i, j), s.sub(j, i)))
    region = Region((), i, j, (e,), score, TRUE, score, values, (operand("ids", ids),), F, gate=gate, empty_row="never")
    return region, [ids], []


MORE: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        odd_width, two_axes, block_table, head_windows, prefix, dilated, bias_of_minima, transposed, scaled_keys,
        mixed_dtypes, no_value_axis, several_batches, integers,
    )
}  # fmt: skip

UNARY = (
    "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid",
    "relu", "erf", "sin", "cos", "floor", "ceil", "round", "trunc", "sign", "softplus", "square", "atan", "isnan",
    "isinf",
)  # fmt: skip
BINARY = (
    "add", "mul", "sub", "div", "floordiv", "mod", "min", "max", "pow", "logaddexp", "fmod", "eq", "ne", "le", "lt",
)  # fmt: skip
POINTS = [0.0, -0.0, 0.3, -0.3, 0.5, 1.5, 2.5, -0.5, -1.5, 1e-4, -1e-4, 1.0, -1.0, 3.7, -3.7, 20.0, -20.0, 60.0, -60.0]
SPECIAL = [math.inf, -math.inf, math.nan]


def pointwise(op: str) -> Case:
    """One key, whose value is one: the result is the gate, op(x[i]) or op(x[i], y[i])."""
    b, j, e = Axis("b", Const(1)), Axis("j", Const(1)), Axis("e", Const(1))
    points = [*POINTS, *SPECIAL]
    pairs = [(x, y) for x in points for y in (points if op in BINARY else (1.0,))]
    x, y = (torch.tensor(column) for column in zip(*pairs))
    i = Axis("i", Const(len(pairs)))
    loads = (Load("x", (i,), F), Load("y", (i,), F))[: 2 if op in BINARY else 1]
    gate: Expr = Call(op, loads, BOOL if op in ("eq", "ne", "le", "lt", "isnan", "isinf") else F)
    if gate.dtype == BOOL:
        gate = Call("where", (gate, Const(2.0, F), Const(3.0, F)), F)
    operands = (operand("x", x), operand("y", y), operand("one", torch.ones(1)))
    region = Region((b,), i, j, (e,), Const(0.0, F), TRUE, Const(0.0, F), Load("one", (e,), F), operands, F,
                    gate=gate, empty_row="never")
    return region, [x, y, torch.ones(1)], []
