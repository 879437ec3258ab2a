"""Single steps that follow on one another, with nothing that puts their results together: a loop, which is given that.

    S1, a = step(S0, x[:, 0])          f(a)              S1, a = step(S0, x[:, 0])
    S2, b = step(S1, x[:, 1])          g(b)       ->     S2, b = step(S1, x[:, 1])          stack([a, b])

As in decoding a few tokens at once, each of which goes on in its own way. The stack is read by nobody: results are rows
of it. A state that is read between the steps ends one loop, and begins the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from refocus.close_linear import LinearSite
from refocus.facts import Facts
from refocus.ir import Load
from refocus.lift import is_tensor
from refocus.sizes import same_shape


@dataclass(frozen=True)
class Run:
    """Steps that were given a stack of their results, and a start of their own where they go on from other ones."""

    gather: fx.Node
    start: fx.Node | None

    def helped(self, roots: Set[fx.Node]) -> bool:
        """Whether the stack is the root of an attention."""
        return self.gather in roots

    def undo(self) -> None:
        self.gather.graph.erase_node(self.gather)
        if self.start is not None:
            self.start.replace_all_uses_with(self.start.all_input_nodes[0])
            self.start.graph.erase_node(self.start)


@dataclass(frozen=True)
class _Step:
    """A site of one step: the states before and after it, and its result."""

    before: fx.Node
    after: fx.Node
    root: fx.Node


def joined_steps(found: Iterable[object], facts: Facts) -> list[Run]:
    """Put together the results of steps of which each goes on where the one before ended."""
    steps = [step for x in found if isinstance(x, LinearSite) and (step := _step(x, facts)) is not None]
    by_start = {step.before: step for step in steps}
    begun = [step for step in steps if not any(step.before is other.after for other in steps)]
    runs = []
    for first in begun:
        chain = list(_chain(first, by_start))
        at = 0
        for end in range(1, len(chain) + 1):
            if end == len(chain) or not _goes_on(chain[end - 1], chain[end], facts):
                runs.append(chain[at:end])
                at = end
    before = {step.after: step for step in steps}
    return [_gathered(run, before.get(run[0].before), facts) for run in runs if len(run) > 1]


def _step(site: LinearSite, facts: Facts) -> _Step | None:
    if site.spelled != "step":
        return None
    start = next(b.value for b, o in zip(site.bindings, site.region.operands) if o.name == "initial")
    loads = [start] if isinstance(start, Load) and not start.loads else list(start.loads)
    last = [o.node for o in site.outputs if o.node is not site.root]
    before = [facts.nodes[x.tensor] for x in loads if _like(facts.nodes[x.tensor], last[0])] if last else []
    return _Step(before[0], last[0], site.root) if len(before) == 1 else None


def _like(one: fx.Node, other: fx.Node) -> bool:
    return bool(same_shape(one.meta["val"], other.meta["val"]))


def _chain(first: _Step, by_start: dict[fx.Node, _Step]) -> Iterator[_Step]:
    step: _Step | None = first
    while step is not None:
        yield step
        step = by_start.get(step.after)


def _goes_on(step: _Step, after: _Step, facts: Facts) -> bool:
    """Whether nobody but the next step reads the state that a step ends with, and their results are alike."""
    inside = _made_for(facts, step.root, after.root, after.after)
    one, other = step.root.meta["val"], after.root.meta["val"]
    return bool(same_shape(one, other) and one.dtype == other.dtype) and inside.issuperset(step.after.users)


def _made_for(facts: Facts, *nodes: fx.Node) -> set[fx.Node]:
    """The nodes, and all that they are made of."""
    return set(nodes).union(*(nx.ancestors(facts.flow, n) for n in nodes))


def _gathered(run: Sequence[_Step], before: _Step | None, facts: Facts) -> Run:
    first, graph = run[0], facts.graph
    start: fx.Node | None = None
    begun = _first_result(first, facts) if before is None else None
    if begun is None and first.before.op == "call_function":
        # The steps before, whose operations are the same, are none of this loop.
        users = _made_for(facts, first.after, first.root)
        users -= set() if before is None else _made_for(facts, before.root)
        with graph.inserting_after(first.before):
            start = graph.call_function(torch.ops.aten.alias.default, (first.before,))
        start.meta.update(first.before.meta)
        first.before.replace_all_uses_with(start, delete_user_cb=users.__contains__)
    return Run(stacked([*([] if begun is None else [begun]), *(step.root for step in run)], facts), start)


def _first_result(first: _Step, facts: Facts) -> fx.Node | None:
    """The result of a step that starts from nothing, and is read in another way than those that have a state."""
    below = nx.descendants(facts.flow, first.before) - _made_for(facts, first.root, first.after)
    value = first.root.meta["val"]
    alike = [
        n for n in below
        if n.target is first.root.target and facts.order[n] < facts.order[first.root]
        and is_tensor(n) and _like(n, first.root) and n.meta["val"].dtype == value.dtype
    ]  # fmt: skip
    return max(alike, key=facts.order.__getitem__, default=None)


def stacked(nodes: Sequence[fx.Node], facts: Facts) -> fx.Node:
    """A stack of values, which is put into the graph right after the last of them."""
    graph = facts.graph
    with graph.inserting_after(max(nodes, key=facts.order.__getitem__)):
        gather = graph.call_function(torch.ops.aten.stack.default, (list(nodes), 0))
    gather.meta.update(nodes[-1].meta)
    gather.meta["val"] = torch.stack([n.meta["val"] for n in nodes])
    return gather
