"""Loops whose results are sums of what is read from several states: one loop for each term.

    for t in range(steps):                                   rows of A   rows of B
        A, B = f(A, x[:, t]), g(B, x[:, t])          ->      stack(p)  +  stack(q)
        rows.append(p(A) + q(B))

The sums are taken after the rows are put together. Each loop is read by itself then; where one of them cannot be, the
graph is put back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from torch import fx

from refocus.attention import Left
from refocus.facts import Facts
from refocus.lift import arguments, is_tensor, op_name
from refocus.sizes import same_shape

_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Split:
    """A gather of sums that became a sum of gathers."""

    whole: fx.Node
    gathers: tuple[fx.Node, fx.Node]

    def helped(self, roots: Set[fx.Node]) -> bool:
        """Whether both loops are attentions."""
        return all(n in roots for n in self.gathers)

    def undo(self) -> None:
        graph, parts = self.whole.graph, arguments(self.gathers[0])[0]
        others = arguments(self.gathers[1])[0]
        rows = []
        for one, other in zip(parts, others):
            with graph.inserting_before(self.gathers[0]):
                rows.append(graph.call_function(self.whole.target, (one, other)))  # type: ignore[arg-type]
            rows[-1].meta.update(one.meta)
        with graph.inserting_before(self.gathers[0]):
            gather = graph.call_function(self.gathers[0].target, (rows, *self.gathers[0].args[1:]))  # type: ignore[arg-type]
        gather.meta.update(self.whole.meta)
        self.whole.replace_all_uses_with(gather)
        for node in (self.whole, *self.gathers):
            graph.erase_node(node)


def split_apart(found: Iterable[object], _facts: Facts) -> list[Split]:
    """Split what was left alone because of several states, where its rows are sums."""
    roots = [x.root for x in found if isinstance(x, Left) and x.declined.several]
    return [split for root in roots if (split := _split(root)) is not None]


def _split(gather: fx.Node) -> Split | None:
    rows: Sequence[fx.Node] = arguments(gather)[0]
    if gather.kwargs or len({op_name(n) for n in rows}) > 1 or op_name(rows[0]) not in _SUMS:
        return None
    if any(n.kwargs or len(n.all_input_nodes) != 2 or len(n.args) != 2 or not _alike(n) for n in rows):
        return None
    graph = gather.graph
    gathers = []
    with graph.inserting_before(gather):
        for k in range(2):
            gathers.append(graph.call_function(gather.target, ([n.args[k] for n in rows], *gather.args[1:])))  # type: ignore[arg-type]
            gathers[-1].meta.update(gather.meta)
        whole = graph.call_function(rows[0].target, tuple(gathers))  # type: ignore[arg-type]
    whole.meta.update(gather.meta)
    gather.replace_all_uses_with(whole)
    graph.erase_node(gather)
    for node in dict.fromkeys(rows):
        if not node.users:
            graph.erase_node(node)
    return Split(whole, (gathers[0], gathers[1]))


def _alike(row: fx.Node) -> bool:
    """Whether both terms are tensors like their sum."""
    value = row.meta["val"]
    return all(
        is_tensor(n) and same_shape(n.meta["val"], value) and n.meta["val"].dtype == value.dtype
        for n in row.all_input_nodes
    )
