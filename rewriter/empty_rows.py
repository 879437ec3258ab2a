"""Rows that a mask leaves no key, and that a condition makes zeros of.

    where(mask[i, j], softmax(x | mask), 0)             rows without keys are zeros
    where(any_j mask[i, j], softmax(x | mask), 0)       likewise
    where(rows[i], softmax(x | mask), 0)                likewise, if every row has a key or fails the condition

A softmax over nothing but -inf is no number, and zero times it is none. What is known of the condition decides: if it
holds in rows with a key only, all others are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import TRUE, Axis, Call, Const, Expr, Load
from refocus.lift import Lifter, arguments, op_name
from refocus.masks import never_empty
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.softmax import Softmax
from refocus.row_sums import opened, summed_dims


@dataclass(frozen=True)
class Roles:
    """The axes that a mask is read in, and the graph that its loads are of."""

    facts: Facts
    batch: list[Axis]
    query: Axis
    key: Axis


def makes_zeros(soft: Softmax, mask: Expr, roles: Roles) -> bool:
    """Whether rows without keys are made zeros by a condition. Raises Stop where only some of them may be."""
    batch, query, key = roles.batch, roles.query, roles.key
    if not soft.selected or never_empty(mask, batch, query, key):
        return False
    condition = s.and_(*soft.selected)
    if _implies(condition, mask) or any(_implies(held, mask) for held in _of_some_key(condition, roles)):
        return True
    if key not in condition.axes and never_empty(s.or_(mask, s.not_(condition)), batch, query, key):
        return True
    if any(isinstance(n, Const) and n.is_float and n.value == -math.inf for n in soft.logits.walk()):
        raise Stop(
            Declined("rows without keys are no numbers, and it is not plain which of them become zeros")
        )
    return False


def _implies(condition: Expr, mask: Expr) -> bool:
    return s.under(mask, s.assume(condition)) == TRUE


def _of_some_key(condition: Expr, roles: Roles) -> Iterator[Expr]:
    """What holds for some key where the condition holds: p[i, j], for any_j p[i, j] and for not all_j not p[i, j]."""
    for part in s.conjuncts(condition):
        negated = isinstance(part, Call) and part.op == "not"
        load = part.args[0] if isinstance(part, Call) and negated else part
        node = roles.facts.nodes.get(load.tensor) if isinstance(load, Load) else None
        if not isinstance(load, Load) or node is None or op_name(node) != ("all" if negated else "any"):
            continue
        dims, _ = summed_dims(node)
        if len(dims) == 1:
            position = opened(node, load.index, {dims[0]: roles.key})
            body = s.as_bool(Lifter(roles.facts, far=True).at(arguments(node)[0], position))
            yield s.not_(body) if negated else body
