"""Loops whose steps do more than an attention does: what comes before the state and after it is cut off.

    for t in range(steps):                                   rows of the state     the rest of the graph
        k, v = normalize(x[:, t] @ W), x[:, t] @ V           stack of k            k, v of each step
        state = state + outer(k, v)                     ->   stack of v            layer_norm of each row
        rows.append(layer_norm(q[:, t] @ state))             stack of q @ state

What a step computes without a state is read at its place in a stack of all of them, as by the rule of the cut; what it
does with what it read is done with a row of the results. Where there are several states, and the reads of each come
together later, each is a loop of its own. Nobody reads the stacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import networkx as nx
from torch import fx

from refocus.attention import Left
from refocus.facts import Facts
from refocus.following_steps import stacked
from refocus.lift import is_tensor, op_name
from refocus.lift_pointwise import POINTWISE
from refocus.lift_tables import MOVES
from refocus.linear_candidates import elements
from refocus.loops import Loop, depends, loop_at

_START, _END = "start", "end"


@dataclass(frozen=True)
class Cut:
    """A loop that was left. `reads` are stacks of what its steps read from their states, or what put their results
    together; `made` are all stacks that are new."""

    loop: fx.Node
    reads: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]

    def helped(self, roots: Set[fx.Node]) -> bool:
        """Whether some read is the root of an attention."""
        return any(n in roots for n in self.reads)

    def undo(self) -> None:
        for node in self.made:
            node.graph.erase_node(node)


def cut_steps(found: Iterable[object], facts: Facts) -> list[Cut]:
    """Cut off what is before and after the states of loops that were left alone."""
    lefts = [x.root for x in found if isinstance(x, Left)]
    loops = [loop for root in lefts if (loop := loop_at(root, facts)) is not None]
    return [cut for loop in loops if (cut := _cut(loop, facts)) is not None]


def _cut(loop: Loop, facts: Facts) -> Cut | None:
    """None where steps have nothing but what has to do with their states."""
    given = [stacked(nodes, facts) for nodes in _given(loop, facts)]
    reads = tuple(stacked(nodes, facts) for nodes in _reads(loop, facts))
    made = (*given, *reads)
    return Cut(loop.gather, reads or (loop.gather,), made) if made else None


def _given(loop: Loop, facts: Facts) -> list[tuple[fx.Node, ...]]:
    """What steps compute without a state, and is more than can be told from where they read: projections, norms."""
    dependent, every = depends(loop, facts), loop.counterparts()
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [n for node in dependent for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in seen or node in dependent or node not in loop.body:
            continue
        seen.add(node)
        if op_name(node) in MOVES or op_name(node) in POINTWISE:
            stack.extend(node.all_input_nodes)
        elif is_tensor(node) and node in loop.firsts:
            found[loop.firsts[node]] = None
    together = loop.stacks()[0]
    firsts = sorted((n for n in found if n not in together), key=facts.order.__getitem__)
    return [every[n] for n in firsts if len(every[n]) == loop.steps]


def _reads(loop: Loop, facts: Facts) -> list[tuple[fx.Node, ...]]:
    """What steps read from each of their states, or from all of them at once: the first value that results, or other
    states, are made of and that is smaller than a state. None where that is the results."""
    result, every, together = loop.parts[-1], loop.counterparts(), loop.stacks()[0]
    way = facts.flow.subgraph(nx.ancestors(facts.flow, result) | {result})
    chains = [[n for n in chain if n in way] for chain in loop.states]
    if any(not chain for chain in chains):
        return []
    found = [_first_read(way, chains, [chain], result) for chain in chains] if len(chains) > 1 else []
    if not any(found):
        found = [_first_read(way, chains, chains, result)]
    reads = [every[loop.firsts[n]] for n in found if n is not None and n in loop.firsts]
    return [nodes for nodes in reads if len(nodes) == loop.steps and nodes[0] not in together]


def _first_read(
    way: nx.DiGraph, chains: Sequence[list[fx.Node]], own: Sequence[list[fx.Node]], result: fx.Node
) -> fx.Node | None:  # fmt: skip
    """The first value on every way from a loop's `own` states to the last result and to its other states, that is
    smaller than they are, and not made of the others."""
    mine = [n for chain in own for n in chain]
    others = [n for chain in chains if chain not in own for n in chain]
    flow = way.copy()
    flow.remove_edges_from([edge for n in mine for edge in way.in_edges(n)])
    mixed = set(others).union(*(nx.descendants(flow, n) for n in others))
    flow.add_edges_from((n, _END) for chain in chains if chain not in own for n in way.predecessors(chain[-1]))
    flow.remove_nodes_from(others)
    flow.add_edges_from((_START, n) for chain in own for n in chain[-2:])
    flow.add_edge(result, _END)
    if not nx.has_path(flow, _START, _END):
        return None
    above = nx.immediate_dominators(flow, _START)
    passed = [above[_END]]
    while passed[-1] is not _START:
        passed.append(above[passed[-1]])
    large = max(elements(n) for n in mine)
    first = next((n for n in reversed(passed[:-1]) if is_tensor(n) and elements(n) < large), None)
    return None if first in mixed or first is result else first
