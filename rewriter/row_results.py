"""What a model reads of an attention's rows beside the result: functions of their log-sum-exps.

    lse = scores.logsumexp(-1);  out = (scores - lse).exp() @ v          merged outside with what other keys gave
    m = scores.amax(-1);  z = (scores - m).exp().sum(-1);  m + z.log()   the same, by hand
    lse.square().mean()                                                  a loss that keeps the normaliser small

From a value that holds scores and is read outside of the region, readers are followed until what they compute depends
on the row's log-sum-exp alone, which the region yields, too. Where one of them depends on more, nothing is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import BOOL, Axis, Const, Expr, Region
from refocus.lift import Lifter, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.lift_views import SPLITS
from refocus.lifted import Lifted
from refocus.masks import MASK_FILL
from refocus.normal_form import has_number
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.fills import KEPT, LOST
from refocus.patterns.log_sums import LOG_SUM, LogSum, of_log_sum
from refocus.patterns.softmax import Softmax
from refocus.quotient import EXPONENTIALS
from refocus.roles import Axes
from refocus.sizes import shape_of


@dataclass(frozen=True)
class RowResult:
    """A node as a function of the log-sum-exps of rows, at the axes of its dimensions. `value`: of
    `log_sums.LOG_SUM`, of the row at these axes."""

    node: fx.Node
    value: LogSum
    dims: tuple[tuple[Axis, ...], ...]


@dataclass
class RowReader:
    """Follows what is read of one attention's scores outside of it. `results`: found so far."""

    facts: Facts
    lifted: Lifted
    axes: Axes
    results: dict[fx.Node, RowResult] = field(default_factory=dict)
    _known: dict[fx.Node, bool] = field(default_factory=dict)
    _budget: int = 64

    def follows(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether all that a user of a value makes of it depends on log-sum-exps of rows alone."""
        if len(self.lifted.terms) != 1 or self.lifted.terms[0][0] or self.lifted.heads:
            return False
        return self._is_result(node) or self._read(user)

    def _read(self, node: fx.Node) -> bool:
        if node not in self._known:
            self._budget -= 1
            self._known[node] = self._budget > 0 and self._is_followed(node)
        return self._known[node]

    def _is_followed(self, node: fx.Node) -> bool:
        if self._is_result(node):
            return True
        name = op_name(node)
        known = name in MOVES or name in OPERATIONS or name in (*SPLITS, "max", "unbind")
        if node.op != "call_function" or not known or name in CONTRACTIONS or node in self.facts.opaque:
            return False
        return all(self._read(user) for user in node.users)

    def _is_result(self, node: fx.Node) -> bool:
        if node not in self.results and is_tensor(node) and node not in self.facts.opaque:
            found = self._result(node)
            if found is not None:
                self.results[node] = found
        return node in self.results

    def _result(self, node: fx.Node) -> RowResult | None:
        soft, given = self.lifted.terms[0][2], self.lifted.lifter
        rows = [a for a in self.axes.flat() if a in soft.logits.axes.union(*(e.axes for e in soft.extra))]
        for n, dims in enumerate(_placements(shape_of(node), rows)):
            if n == _TRIED:
                break
            index = Axes(dims).index()
            if self.lifted.log_sum is not None:
                running = self.lifted.log_sum(node, index)
                if running is not None:
                    return RowResult(node, running, tuple(map(tuple, dims)))
                continue
            lifter = Lifter(self.facts, given.tainted, query_axes=set(given.query_axes), far=given.far)
            lifter.unpads, lifter.kept = given.unpads, given.kept
            found = of_log_sum(lifter.at(node, index), soft, self.lifted.key)
            if found is None:
                continue
            if found.fills == LOST and not any(op_name(n) in EXPONENTIALS for n in lifter.visited):
                found = replace(found, fills=KEPT)  # `logsumexp` takes the maximum away, whatever its notation says
            return RowResult(node, found, tuple(map(tuple, dims)))
        return None


_TRIED = 24


def _placements(shape: Sequence[Expr], rows: list[Axis]) -> Iterator[list[list[Axis]]]:
    """Ways to read dimensions at axes of rows, each at one or at several that follow one another; in order first."""
    if not shape:
        yield []
        return
    if shape[0] == Const(1):
        yield from ([[], *rest] for rest in _placements(shape[1:], rows))
    for first in range(len(rows)):
        for last in range(first + 1, len(rows) + 1):
            group = rows[first:last]
            if s.mul(*(a.size for a in group)) == shape[0]:
                yield from ([group, *rest] for rest in _placements(shape[1:], rows[:first] + rows[last:]))


def settled(result: RowResult, soft: Softmax, region: Region) -> RowResult:
    """The result, in rows that keep no key, too. Raises Stop where these have another log-sum-exp in the model."""
    value = result.value
    never = region.empty_row == "never"
    filled = any(isinstance(n, Const) and n.is_float and -math.inf < n.value <= MASK_FILL for n in soft.logits.walk())
    if not never and filled and (region.empty_row == "zero" or (value.fills == LOST) != (soft.fills == LOST)):
        reason = "the log-sum-exp of a row of nothing but fills is another one than that of its weights"
        raise Stop(Declined(reason, result.node.name))
    if value.guarded or has_number(soft.logits, never):
        return result
    if soft.extra:
        reason = "a log-sum-exp that is read elsewhere is no number where a row has no keys, but its weights are"
        raise Stop(Declined(reason, result.node.name))
    # exp(-inf - -inf): the model has no number.
    none = s.call("eq", LOG_SUM, Const(-math.inf, LOG_SUM.dtype), dtype=BOOL)
    told = s.substitute(value.value, {LOG_SUM: s.where(none, Const(math.nan, LOG_SUM.dtype), LOG_SUM)})
    return replace(result, value=replace(value, value=told))
