"""Reverse mode over the scalar IR: what flows back from an expression into the tensors that it loads.

    before   y[b,i,j] = tanh(sum_d q[b,i,d] * k[b,j,d]) + table[i - j]          and dy[b,i,j], what flows back into y
    after    q      receives  (dy * (1 - tanh(..)**2))[b,i,j] * k[b,j,d]        at [b, i, d]
             k      receives  (dy * (1 - tanh(..)**2))[b,i,j] * q[b,i,d]        at [b, j, d]
             table  receives  dy[b,i,j]                                         at [i - j]

Each `Share` is such a line: it holds for every position of all its axes, and an element of the tensor receives the sum
over all positions that read it. The derivative of a function with a kink is the one that PyTorch takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Dot, Expr, Load


class NotDifferentiable(Exception):
    """The reason why an expression has no derivative here."""


@dataclass(frozen=True)
class Share:
    """`load` receives `cotangent` (times `other`, the opposite side of the product `over` these axes, if not None)."""

    load: Load
    cotangent: Expr
    other: Expr | None = None
    over: tuple[Axis, ...] = ()


def differentiate(root: Expr, seed: Expr, wanted: Collection[str]) -> tuple[Share, ...]:
    """What flows back into loads of the `wanted` tensors when `seed` flows back into `root`.

    Raises NotDifferentiable for a reduction, or for a product whose sides are computed inside it.
    """
    order = [n for n in _children_last(root) if _reaches(n, wanted)]
    flowing: dict[Expr, Expr] = {root: seed}
    shares: list[Share] = []
    for node in order:
        cotangent = flowing.get(node)
        if cotangent is None or _is_zero(cotangent):
            continue
        if isinstance(node, Load):
            shares.append(Share(node, cotangent))
        elif isinstance(node, Dot):
            shares += _sides(node, cotangent, wanted)
        elif isinstance(node, Call):
            for child, part in _through(node, cotangent):
                if _reaches(child, wanted):
                    held = flowing.get(child)
                    flowing[child] = part if held is None else s.call("add", held, part, dtype=part.dtype)
        else:
            raise NotDifferentiable(f"a {type(node).__name__.lower()} has no derivative here")
    return tuple(shares)


def _children_last(root: Expr) -> list[Expr]:
    """Every node before the nodes that it is made of."""
    done: list[Expr] = []
    seen: set[Expr] = set()
    stack: list[tuple[Expr, Iterator[Expr]]] = [(root, iter(root.children))]
    seen.add(root)
    while stack:
        node, rest = stack[-1]
        child = next(rest, None)
        if child is None:
            done.append(node)
            stack.pop()
        elif child not in seen:
            seen.add(child)
            stack.append((child, iter(child.children)))
    return done[::-1]


def _reaches(node: Expr, wanted: Collection[str]) -> bool:
    """Whether a float flows from a wanted tensor into this node."""
    return node.is_float and any(x.is_float and x.tensor in wanted for x in node.loads)


def connected(root: Expr) -> frozenset[str]:
    """The tensors that something flows back into from `root`, if only zeros: through a rounding, but not through a
    comparison, a position or what is detached."""
    found: set[str] = set()
    seen: set[Expr] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen or not node.is_float or (isinstance(node, Call) and node.op == "detach"):
            continue
        seen.add(node)
        if isinstance(node, Load):
            found.add(node.tensor)
        else:
            stack.extend(node.children)
    return frozenset(found)


def _is_zero(value: Expr) -> bool:
    return isinstance(value, Const) and value.value == 0


def _sides(dot: Dot, cotangent: Expr, wanted: Collection[str]) -> Iterator[Share]:
    for side, other in ((dot.query, dot.key), (dot.key, dot.query)):
        if not _reaches(side, wanted):
            continue
        if not isinstance(side, Load):
            raise NotDifferentiable("one side of a product of queries and keys is computed inside it")
        yield Share(side, cotangent, other, dot.over)


# ------------------------------------------------------------------------------------------ derivatives of operations

Derivative = Callable[[Call, Expr], Iterator[tuple[Expr, Expr]]]


def _through(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    """(argument, what flows into it) for one operation."""
    rule = _RULES.get(node.op)
    if rule is None:
        raise NotDifferentiable(f"`{node.op}` has no derivative here")
    return rule(node, cotangent)


def _times(*factors: Expr | float) -> Expr:
    dtype = next(f.dtype for f in factors if isinstance(f, Expr))
    out: Expr | None = None
    for factor in factors:
        value = factor if isinstance(factor, Expr) else Const(float(factor), dtype)
        out = value if out is None else s.call("mul", out, value, dtype=dtype)
    assert out is not None
    return out


def _over(a: Expr, b: Expr) -> Expr:
    return s.call("div", a, b, dtype=a.dtype)


def _minus(a: Expr | float, b: Expr) -> Expr:
    return s.call("sub", a if isinstance(a, Expr) else Const(float(a), b.dtype), b, dtype=b.dtype)


def _plus(a: Expr, b: float) -> Expr:
    return s.call("add", a, Const(float(b), a.dtype), dtype=a.dtype)


def _negated(a: Expr) -> Expr:
    return s.call("neg", a, dtype=a.dtype)


def _only_if(condition: Expr, value: Expr) -> Expr:
    """A choice, never a product with zero: what is infinite must not become NaN where it does not count."""
    return s.where(condition, value, Const(0.0, value.dtype))


def _le(a: Expr, b: Expr) -> Expr:
    return s.call("le", a, b, dtype="bool")


def _of_one(factor: Callable[[Expr, Expr], Expr | float]) -> Derivative:
    """An operation f(x) = y of one argument: `factor(x, y)` is its derivative."""

    def rule(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
        yield node.args[0], _times(cotangent, factor(node.args[0], node))

    return rule


def _add(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    for arg in node.args:
        yield arg, cotangent


def _sub(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    yield node.args[0], cotangent
    yield node.args[1], _negated(cotangent)


def _mul(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    for k, arg in enumerate(node.args):
        yield arg, _times(cotangent, *node.args[:k], *node.args[k + 1 :])


def _div(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    above, below = node.args
    yield above, _over(cotangent, below)
    yield below, _negated(_over(_times(cotangent, node), below))


def _neg(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    yield node.args[0], _negated(cotangent)


def _where(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    condition, yes, no = node.args
    yield yes, _only_if(condition, cotangent)
    yield no, _only_if(s.not_(condition), cotangent)


def _extreme(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    """A bound lets a tie through (torch.clamp); between two tensors a tie is shared (torch.maximum)."""
    first, second = node.args
    for arg, other in ((first, second), (second, first)):
        wins = _le(other, arg) if node.op == "max" else _le(arg, other)
        if not first.loads or not second.loads:
            yield arg, _only_if(wins, cotangent)
        else:
            tie = s.call("eq", first, second, dtype="bool")
            yield arg, _only_if(wins, s.where(tie, _times(cotangent, 0.5), cotangent))


def _pow(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    base, exponent = node.args
    lower = s.call("pow", base, _plus(exponent, -1.0), dtype=node.dtype)
    into_base = _times(cotangent, exponent, lower)
    if not isinstance(exponent, Const):
        zero = s.call("eq", exponent, Const(0.0, exponent.dtype), dtype="bool")
        into_base = _only_if(s.not_(zero), into_base)
    elif exponent.value == 0:
        into_base = Const(0.0, node.dtype)
    yield base, into_base
    if exponent.loads:
        vanishes = s.call("eq", base, Const(0.0, base.dtype), dtype="bool")
        constant = s.and_(vanishes, _le(Const(0.0, exponent.dtype), exponent))
        yield exponent, _only_if(s.not_(constant), _times(cotangent, node, s.call("log", base, dtype=node.dtype)))


def _logaddexp(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    for arg in node.args:
        yield arg, _times(cotangent, s.call("exp", _minus(arg, node), dtype=node.dtype))


def _remainder(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    above, below = node.args
    round_ = "floor" if node.op == "mod" else "trunc"
    yield above, cotangent
    quotient = s.call("div", above, below, dtype=node.dtype)  # what is divided may be integers
    yield below, _negated(_times(cotangent, s.call(round_, quotient, dtype=node.dtype)))


def _nothing(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    return iter(())


def _same(node: Call, cotangent: Expr) -> Iterator[tuple[Expr, Expr]]:
    yield node.args[0], cotangent


def _square(x: Expr) -> Expr:
    return s.call("square", x, dtype=x.dtype)


_RULES: dict[str, Derivative] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "neg": _neg, "where": _where, "min": _extreme, "max": _extreme,
    "pow": _pow, "logaddexp": _logaddexp, "mod": _remainder, "fmod": _remainder, "cast": _same,
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign", "floordiv", "detach", "random"), _nothing),
    "exp": _of_one(lambda x, y: y), "exp2": _of_one(lambda x, y: _times(y, math.log(2.0))),
    "log": _of_one(lambda x, y: s.call("reciprocal", x, dtype=x.dtype)),
    "log2": _of_one(lambda x, y: s.call("reciprocal", _times(x, math.log(2.0)), dtype=x.dtype)),
    "log1p": _of_one(lambda x, y: s.call("reciprocal", _plus(x, 1.0), dtype=x.dtype)),
    "expm1": _of_one(lambda x, y: _plus(y, 1.0)),
    "sqrt": _of_one(lambda x, y: s.call("reciprocal", _times(y, 2.0), dtype=x.dtype)),
    "rsqrt": _of_one(lambda x, y: _times(y, y, y, -0.5)),
    "reciprocal": _of_one(lambda x, y: _negated(_square(y))), "square": _of_one(lambda x, y: _times(x, 2.0)),
    "abs": _of_one(lambda x, y: s.call("sign", x, dtype=x.dtype)),
    "tanh": _of_one(lambda x, y: _minus(1.0, _square(y))),
    "sigmoid": _of_one(lambda x, y: _times(y, _minus(1.0, y))),
    "relu": lambda node, cotangent: iter((
        (node.args[0], _only_if(s.not_(_le(node.args[0], Const(0.0, node.dtype))), cotangent)),)),
    "erf": _of_one(lambda x, y: _times(s.call("exp", _negated(_square(x)), dtype=x.dtype), 2.0 / math.sqrt(math.pi))),
    "sin": _of_one(lambda x, y: s.call("cos", x, dtype=x.dtype)),
    "cos": _of_one(lambda x, y: _negated(s.call("sin", x, dtype=x.dtype))),
    "softplus": _of_one(lambda x, y: s.call("sigmoid", x, dtype=x.dtype)),
    "atan": _of_one(lambda x, y: s.call("reciprocal", _plus(_square(x), 1.0), dtype=x.dtype)),
}  # fmt: skip
