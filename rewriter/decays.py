"""Decays of a recurrence as exponentials: the logarithms of what a state is multiplied with, where it has one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from refocus import simplify as s
from refocus.expand import Follower
from refocus.facts import Facts
from refocus.ir import BOOL, Call, Const, Expr, Load
from refocus.lift import Index, Lifter, arguments, dtype_of, op_name
from refocus.patterns.linear import GONE


def log_of(decay: Expr, facts: Facts) -> Expr | None:
    """The logarithm of a decay, where it is known to be one: of an exponential, a sigmoid, or what is positive because
    it is made of these, here or where the value that is read was made."""
    if isinstance(decay, Load):
        made = _made(decay, facts)
        return None if made is None else log_of(made, facts)
    if isinstance(decay, Const):
        dtype = decay.dtype if decay.is_float else "float32"
        return Const(math.log(decay.value), dtype) if decay.value > 0 else None
    if not isinstance(decay, Call) or not decay.is_float:
        return None
    op, args, dtype = decay.op, decay.args, decay.dtype
    if op == "exp":
        return args[0]
    if op == "where":
        chosen = [_log_or_gone(x, facts) for x in args[1:]]
        return None if None in chosen else s.where(args[0], *chosen)  # type: ignore[arg-type]
    kept = _kept(decay)
    if kept is not None:
        return s.where(kept, Const(0.0, dtype), Const(GONE, dtype))
    if op == "sigmoid":
        return _log_sigmoid(args[0], dtype)
    if op == "sub" and isinstance(args[0], Const) and args[0].value == 1:
        rest = _made(args[1], facts) if isinstance(args[1], Load) else args[1]
        if not isinstance(rest, Call) or rest.op != "sigmoid":
            return None
        return _log_sigmoid(s.call("neg", rest.args[0], dtype=dtype), dtype)
    if op == "reciprocal":
        inverse = log_of(args[0], facts)
        return None if inverse is None else s.call("neg", inverse, dtype=dtype)
    if op == "pow" and isinstance(args[1], Const):
        base = log_of(args[0], facts)
        return None if base is None else s.call("mul", s.cast(args[1], dtype), base, dtype=dtype)
    if op in ("mul", "div", "add"):
        logs = [log_of(a, facts) for a in args]
        if any(x is None for x in logs):
            return None
        if op == "add":
            return s.call("log", decay, dtype=dtype)
        return s.call("add" if op == "mul" else "sub", *logs, dtype=dtype)  # type: ignore[arg-type]
    return None


def _log_or_gone(decay: Expr, facts: Facts) -> Expr | None:
    """The logarithm of a decay that may also be the number 0, which forgets all."""
    if isinstance(decay, Const) and decay.value == 0:
        return Const(GONE, decay.dtype)
    return log_of(decay, facts)


def _kept(decay: Expr) -> Expr | None:
    """The condition under which a decay of zeros and ones keeps the state, where it is made of one; None where not."""
    if isinstance(decay, Call) and decay.op == "cast" and decay.args[0].dtype == BOOL:
        return decay.args[0]
    if isinstance(decay, Call) and decay.op == "sub" and isinstance(decay.args[0], Const) and decay.args[0].value == 1:
        begins = _kept(decay.args[1])
        return None if begins is None else s.not_(begins)
    return None


def _made(read: Load, facts: Facts) -> Expr | None:
    """What a value that is read was made of, past what only moves it; None where that is not looked into."""
    if read.tensor not in facts.nodes:
        return None
    node, index = facts.nodes[read.tensor], read.index
    while node not in facts.opaque and op_name(node) in _VIEWS:
        below = _Seen(facts).at(node, index)
        if not isinstance(below, Load) or below.tensor not in facts.nodes or below.tensor == node.name:
            return None
        node, index = facts.nodes[below.tensor], below.index
    if node in facts.opaque:
        return None
    if op_name(node) in ("exp", "sigmoid"):
        return s.call(op_name(node), Lifter(facts).at(arguments(node)[0], index), dtype=dtype_of(node))
    made = Follower(facts).at(node, index)
    return None if isinstance(made, Load) else made


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
