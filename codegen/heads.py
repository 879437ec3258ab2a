"""A region seen as batched multi-head attention: what PyTorch's own kernels take.

    query [B, H, L, E]      key [B, H / group, S, E]      value [B, H / group, S, Ev]

`fit(region)` decides how the region's batch axes become B and H, and splits the score into `scale * Dot` and the
rest. `Fitted.query(...)` and its companions read the operands in that form, as views wherever the index expressions
allow it. Keys and values that several heads in a row share (`h // g`, or axes they do not depend on) are not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from refocus import simplify
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Region, Sym

# A score that is no linear function of its Dot is a function of this: the kernel's own product, as a tensor.
SCORE = Load("@score", (), "float32")

_REDUCED = ("float16", "bfloat16")


@dataclass(frozen=True)
class Product:
    """One Dot of the score with its constant factors taken out: factor * sum over `over` of query * key."""

    over: tuple[Axis, ...]
    query: Expr
    key: Expr
    factor: float


@dataclass(frozen=True)
class Fitted:
    """How a region maps to B x H attention.

    `outer` axes flatten to B, `inner` ones to H; `keys` are the axes along which keys and values have heads (their
    product times the group is H) and `keys_batched` tells whether they have the outer axes too. With several
    `products` their features are concatenated. The kernel computes `scale * query . key`, and `score` is the whole
    score as a function of it, `SCORE` (None: it is that product alone). `gates` multiply the result.
    """

    region: Region
    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    keys_batched: bool
    products: tuple[Product, ...]
    values: Expr
    scale: float
    score: Expr | None
    gates: tuple[Expr, ...]
    dtype: torch.dtype

    # ------------------------------------------------------------------------------------------------- operands

    def query(self, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> Tensor:
        """[B, H, L, E], dtype `self.dtype`."""
        axes = (self.outer, self.inner, (self.region.query,))
        parts = [self._read(p.query, (*axes, p.over), tensors, sizes) for p in self.products]
        # One kernel scale serves all products: the others' factors are relative to the first.
        parts = [t if p.factor == self.scale else t * (p.factor / self.scale) for t, p in zip(parts, self.products)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def key(self, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> Tensor:
        """[B or 1, H / group, S, E]."""
        axes = (self._key_outer, self.keys, (self.region.key,))
        parts = [self._read(p.key, (*axes, p.over), tensors, sizes) for p in self.products]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def value(self, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> Tensor:
        """[B or 1, H / group, S, Ev]."""
        axes = (self._key_outer, self.keys, (self.region.key,), self.region.value)
        return self._read(self.values, axes, tensors, sizes)

    def result(self, out: Tensor, tensors: Mapping[str, Tensor], sizes: Mapping[Sym, int]) -> Tensor:
        """From [B, H, L, Ev] to the region's (*batch, query, *value), contiguous, in its dtype."""
        region = self.region
        for gate in self.gates:
            out = out * self._read(gate, (self.outer, self.inner, (region.query,)), tensors, sizes).unsqueeze(-1)
        shape = [size_of(a.size, sizes) for a in (*region.batch, region.query, *region.value)]
        return out.to(getattr(torch, region.out_dtype)).contiguous().reshape(shape)

    @property
    def _key_outer(self) -> tuple[Axis, ...]:
        return self.outer if self.keys_batched else ()

    def _read(
        self,
        expr: Expr,
        groups: Sequence[tuple[Axis, ...]],
        tensors: Mapping[str, Tensor],
        sizes: Mapping[Sym, int],
    ) -> Tensor:
        """`expr` over all axes, each group flattened to one dimension."""
        axes = [a for group in groups for a in group]
        device = next(iter(tensors.values())).device
        value = evaluate(expr, arange_env(axes, sizes, device), tensors, sizes, self.dtype)
        full = [size_of(a.size, sizes) for a in axes]
        value = value.expand(full)
        if all(len(group) == 1 for group in groups):
            return value
        return value.reshape([math.prod(size_of(a.size, sizes) for a in group) for group in groups])


def unflatten(name: str, axes: Sequence[Axis]) -> tuple[Axis, dict[Expr, Expr]]:
    """One axis over all of `axes`, and each of them as an index expression of it."""
    flat = Axis(name, simplify.mul(1, *(a.size for a in axes)))
    out: dict[Expr, Expr] = {}
    for k, axis in enumerate(axes):
        below = simplify.mul(1, *(a.size for a in axes[k + 1 :]))
        out[axis] = simplify.mod(simplify.floordiv(flat, below), axis.size) if k else simplify.floordiv(flat, below)
    return flat, out


@lru_cache(maxsize=512)
def fit(region: Region) -> Fitted | str:
    """The region as B x H attention, or the reason why it is none."""
    reason = _shape_reason(region)
    if reason is not None:
        return reason
    split = products(region.score, region)
    score: Expr | None
    if split is not None:
        terms, rest = split
        score = None if rest is None else simplify.call("add", SCORE, rest, dtype="float32")
    else:
        dots = region.dots
        if len(dots) > 1:
            return "the score is not linear in its several products, and the kernel computes only one"
        terms, rest = {dots[0]: 1.0}, None
        score = simplify.substitute(region.score, {dots[0]: SCORE})
    found = tuple(_peel(dot, factor) for dot, factor in terms.items())
    outer, inner, keys, renamed = _heads(region, found)
    found = tuple(Product(p.over, p.query, simplify.substitute(p.key, renamed), p.factor) for p in found)
    values = simplify.substitute(region.values, renamed)
    gates = _gates(region)
    assert gates is not None
    by_key, by_query = gates
    for gate in by_key:
        values = simplify.call("mul", values, simplify.substitute(gate, renamed), dtype="float32")
    batched = any(a in e.axes for a in outer for e in (values, *(p.key for p in found)))
    dtype = _dtype(region, found, values)
    if dtype is None:
        return "float64 is not supported by the kernel"
    return Fitted(region, outer, inner, keys, batched, found, values, found[0].factor, score, by_query, dtype)


def _shape_reason(region: Region) -> str | None:
    if region.normalizer != "softmax":
        return f"the weights are not a softmax but {region.normalizer!r}"
    if not region.dots:
        return "the score has no product of a query and a key"
    if not region.score.is_float or any(not d.dtype.startswith(("float", "bfloat")) for d in region.dots):
        return "the products are not of floats"
    if region.query in region.values.axes:
        return "the values depend on the query"
    if _gates(region) is None:
        return "a gate multiplies the weights pair by pair"
    if any(a in e.axes for d in region.dots for e in (d.query, d.key) for a in region.value):
        return "the score depends on a value axis"
    return None


def _gates(region: Region) -> tuple[tuple[Expr, ...], tuple[Expr, ...]] | None:
    """The factors of the gate that belong to the values, and those that belong to the result."""
    by_key: list[Expr] = []
    by_query: list[Expr] = []
    stack = [region.gate]
    while stack:
        factor = stack.pop()
        if factor == Const(1.0, factor.dtype):
            continue
        if region.query not in factor.axes:
            by_key.append(factor)
        elif region.key not in factor.axes:
            by_query.append(factor)
        elif isinstance(factor, Call) and factor.op == "mul":
            stack.extend(factor.args)
        else:
            return None
    return tuple(by_key), tuple(by_query)


def products(score: Expr, region: Region) -> tuple[dict[Dot, float], Expr | None] | None:
    """score = sum of factor * Dot + rest, with constant factors; None where it is not linear in its Dots.

    A factor that varies with the query alone, or with the key alone, goes into that side of the Dot.
    """
    if isinstance(score, Dot):
        return {score: 1.0}, None
    if not _has_dot(score):
        return {}, score
    if not isinstance(score, Call) or not score.is_float:
        return None
    if score.op == "cast":
        return products(score.args[0], region)
    if score.op in ("add", "sub"):
        total: dict[Dot, float] = {}
        rest: Expr | None = None
        for k, arg in enumerate(score.args):
            part = products(arg, region)
            if part is None:
                return None
            sign = -1.0 if k and score.op == "sub" else 1.0
            for dot, factor in part[0].items():
                total[dot] = total.get(dot, 0.0) + sign * factor
            if part[1] is not None:
                rest = _plus(rest, part[1], sign)
        return total, rest
    constant = _factor(score)
    if constant is not None:
        part = products(constant[1], region)
        return None if part is None else _scaled(part, constant[0], None, region)
    if score.op in ("mul", "div") and len(score.args) == 2:
        a, b = score.args
        if score.op == "mul" and not _has_dot(a):
            a, b = b, a
        part = None if _has_dot(b) or not b.is_float else products(a, region)
        if part is not None:
            varying = b if score.op == "mul" else simplify.call("reciprocal", b, dtype=b.dtype)
            return _scaled(part, 1.0, varying, region)
    return None


def _has_dot(expr: Expr) -> bool:
    return any(isinstance(n, Dot) for n in expr.walk())


def _scaled(
    part: tuple[dict[Dot, float], Expr | None], factor: float, varying: Expr | None, region: Region
) -> tuple[dict[Dot, float], Expr | None] | None:
    dots, rest = part
    if varying is not None:
        if region.query in varying.axes and region.key in varying.axes:
            return None
        dots = {_with_factor(d, varying, region.key in varying.axes): f for d, f in dots.items()}
        if rest is not None:
            rest = simplify.call("mul", rest, varying, dtype=rest.dtype)
    if factor != 1.0 and rest is not None:
        rest = simplify.call("mul", rest, Const(factor, rest.dtype), dtype=rest.dtype)
    scaled = {dot: factor * f for dot, f in dots.items()}
    return (scaled, rest) if all(math.isfinite(f) for f in scaled.values()) else None


def _with_factor(dot: Dot, factor: Expr, on_key: bool) -> Dot:
    query, key = dot.query, dot.key
    if on_key:
        key = simplify.call("mul", key, factor, dtype=key.dtype)
    else:
        query = simplify.call("mul", query, factor, dtype=query.dtype)
    return Dot(dot.over, query, key, dot.dtype)


def _plus(rest: Expr | None, more: Expr, sign: float) -> Expr:
    if rest is None:
        return more if sign > 0 else simplify.call("neg", more, dtype=more.dtype)
    return simplify.call("add" if sign > 0 else "sub", rest, more, dtype=rest.dtype)


def _factor(expr: Expr) -> tuple[float, Expr] | None:
    """(c, x) where expr is c * x with a finite constant c other than zero."""
    if not isinstance(expr, Call):
        return None
    if expr.op == "neg":
        return -1.0, expr.args[0]
    if expr.op == "div" and isinstance(expr.args[1], Const) and expr.args[1].value:
        return _finite(1.0 / expr.args[1].value, expr.args[0])
    if expr.op == "mul" and len(expr.args) == 2:
        a, b = expr.args
        if isinstance(a, Const):
            a, b = b, a
        if isinstance(b, Const) and b.value:
            return _finite(float(b.value), a)
    return None


def _finite(factor: float, expr: Expr) -> tuple[float, Expr] | None:
    return (factor, expr) if math.isfinite(factor) and factor else None


def _peel(dot: Dot, factor: float) -> Product:
    """Constant factors of either side belong to the scale: the operand is then a plain load, and a view."""
    sides = []
    for side in (dot.query, dot.key):
        while (found := _factor(side)) is not None:
            factor, side = factor * found[0], found[1]
        sides.append(side)
    return Product(dot.over, sides[0], sides[1], factor)


def _heads(
    region: Region, found: Sequence[Product]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...], tuple[Axis, ...], dict[Expr, Expr]]:
    """outer, inner and key axes, and what to put for `h // g` in keys and values."""
    sides = [region.values, region.gate, *(p.key for p in found)]
    used = frozenset().union(*(e.axes for e in sides))
    batch = region.batch
    if not batch:
        return (), (), (), {}
    shared = len(batch)
    while shared and batch[shared - 1] not in used:
        shared -= 1
    if shared < len(batch):  # keys and values do not have the trailing axes: their heads are shared along those
        first = shared - 1 if shared > 1 else shared if shared else len(batch) - 1
        return batch[:first], batch[first:], batch[first:shared], {}
    last = batch[-1]
    divisors = _divisors(sides, last)
    group = math.gcd(*divisors) if divisors else 0
    if group > 1 and isinstance(last.size, Const) and last.size.value % group == 0:
        narrow = Axis(f"{last.name}_kv", Const(last.size.value // group))
        renamed: dict[Expr, Expr] = {
            Call("floordiv", (last, Const(d)), "int64"): simplify.floordiv(narrow, d // group) for d in divisors
        }
        if not any(last in simplify.substitute(e, renamed).axes for e in sides):
            return batch[:-1], (last,), (narrow,), renamed
    return batch[:-1], (last,), (last,), {}


def _divisors(sides: Sequence[Expr], axis: Axis) -> set[int]:
    """All constants d of `axis // d` in these expressions."""
    out = set()
    for side in sides:
        for node in side.walk():
            if isinstance(node, Call) and node.op == "floordiv" and node.args[0] == axis:
                if isinstance(node.args[1], Const):
                    out.add(int(node.args[1].value))
    return out


def _dtype(region: Region, found: Sequence[Product], values: Expr) -> torch.dtype | None:
    """What the kernel runs in. A half type only where the operands are read as they are and the result is one too."""
    sides = [values, *(e for p in found for e in (p.query, p.key))]
    names = {n.dtype for e in sides for n in e.loads if n.is_float}
    if "float64" in names | {region.out_dtype}:
        return None
    name = region.out_dtype
    if name in _REDUCED and all(isinstance(e, Load) and e.dtype == name for e in sides) and names == {name}:
        return torch.bfloat16 if name == "bfloat16" else torch.float16
    return torch.float32


