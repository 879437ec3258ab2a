"""Decays of a recurrence as exponentials: the logarithms of what a state is multiplied with, where it has one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from refocus import simplify as s
from refocus.expand import Follower
from refocus.facts import Facts
from refocus.ir import Call, Const, Expr, Load
from refocus.lift import Index, Lifter, arguments, dtype_of, op_name


def log_of(decay: Expr, facts: Facts) -> Expr | None:
    """The logarithm of a decay, where it is known to be one: of an exponential, a sigmoid, or what is positive because
    it is made of these, here or where the value that is read was made."""
    found = _log(decay)
    if found is not None:
        return found
    if isinstance(decay, Load) and decay.tensor in facts.nodes:
        node, index = facts.nodes[decay.tensor], decay.index
        while node not in facts.opaque and op_name(node) in _VIEWS:
            below = _Seen(facts).at(node, index)
            if not isinstance(below, Load) or below.tensor not in facts.nodes or below.tensor == node.name:
                return None
            node, index = facts.nodes[below.tensor], below.index
        if node in facts.opaque:
            return None
        if op_name(node) in ("exp", "sigmoid"):
            return _log(s.call(op_name(node), Lifter(facts).at(arguments(node)[0], index), dtype=dtype_of(node)))
        return _log(Follower(facts).at(node, index))
    return None


def _log(e: Expr) -> Expr | None:
    """The logarithm of an expression that is positive by what it is made of."""
    if isinstance(e, Const):
        return Const(math.log(e.value), e.dtype) if e.is_float and e.value > 0 else None
    if not isinstance(e, Call) or not e.is_float:
        return None
    args = e.args
    if e.op == "exp":
        return args[0]
    if e.op == "sigmoid":
        return _log_sigmoid(args[0], e.dtype)
    if e.op == "sub" and isinstance(args[0], Const) and args[0].value == 1 and isinstance(args[1], Call):
        inner = args[1]
        return _log_sigmoid(s.call("neg", inner.args[0], dtype=e.dtype), e.dtype) if inner.op == "sigmoid" else None
    if e.op == "reciprocal":
        inverse = _log(args[0])
        return None if inverse is None else s.call("neg", inverse, dtype=e.dtype)
    if e.op == "pow" and isinstance(args[1], Const):
        base = _log(args[0])
        return None if base is None else s.call("mul", s.cast(args[1], e.dtype), base, dtype=e.dtype)
    if e.op in ("mul", "div", "add"):
        logs = [_log(a) for a in args]
        if any(x is None for x in logs):
            return None
        if e.op == "add":
            return s.call("log", e, dtype=e.dtype)
        return s.call("add" if e.op == "mul" else "sub", *logs, dtype=e.dtype)  # type: ignore[arg-type]
    return None


def _log_sigmoid(x: Expr, dtype: str) -> Expr:
    """log(sigmoid(x)) = -log(1 + exp(-x)), which is finite wherever x is."""
    minus = s.call("neg", x, dtype=dtype)
    return s.call("neg", s.call("logaddexp", minus, Const(0.0, dtype), dtype=dtype), dtype=dtype)


@dataclass
class _Seen(Lifter):
    """Looks through whatever only moves values."""

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below


_VIEWS = frozenset(
    ("view", "reshape", "permute", "transpose", "select", "slice", "unsqueeze", "squeeze", "expand", "getitem",
     "unbind", "split", "chunk", "to", "_to_copy", "contiguous", "clone", "flatten", "unflatten", "mT", "t")
)  # fmt: skip
