"""One step of a recurrence by itself, as in decoding: what its one query and its one key are made of.

    S'[d, e] = keep * S[d, e] + key[d] * value[e],     out[e] = sum over d of query[d] * S'[d, e]

There is one position, so no factor has an axis of it; what belongs to the key is known from where it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refocus import simplify as s
from refocus.ir import Axis, Expr
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Roles, logarithm


def roles_of_step(
    query: Axis, key: Axis, dot: tuple[Axis, ...], state: frozenset[Axis], read: Sequence[Expr],
    written: Sequence[Expr], by_head: frozenset[Axis],
) -> Roles:  # fmt: skip
    """`read`: what the state is multiplied with where it is read, over the axes `dot`; `written`: the factors of what
    is written to it; `state`: its axes, of which `by_head` are known to be none of a value. Raises Stop."""
    of_dot = frozenset(dot)
    keys = tuple(f for f in written if f.axes & of_dot)
    values = tuple(f for f in written if not f.axes & of_dot)
    queries = tuple(f for f in read if f.axes & of_dot)
    rows = tuple(f for f in read if not f.axes & of_dot)
    outside = by_head.union(*(f.axes for f in (*keys, *read)))
    found = frozenset[Axis]().union(*(f.axes for f in values))
    value = tuple(sorted((state & found) - of_dot - outside, key=lambda a: a.name))
    if not value or any(not any(a in f.axes for f in side) for a in dot for side in (queries, keys)):
        raise Stop(Declined("what a step writes to its state is no product of a key and a value"))
    return Roles(query, key, dot, value, queries, keys, values, rows, ())


def gate_of(keep: Sequence[Expr], log: Callable[[Expr], Expr | None]) -> Expr | None:
    """The sum of the logarithms of decays; None where one is not known."""
    total: Expr | None = None
    for decay in keep:
        gate = logarithm(decay)
        gate = log(decay) if gate is None else gate
        if gate is None:
            return None
        total = gate if total is None else s.call("add", total, gate, dtype=gate.dtype)
    return total
