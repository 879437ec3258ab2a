"""Attention that is computed in chunks all at once: pairs inside of each chunk, and states of all chunks before it.

The sum of the two is read like what a loop over chunks gives out (`refocus.patterns.chunked_form`): there, the state
before a chunk is a sum over earlier ones because a loop was rolled back, here because the model says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import suppress
from itertools import permutations

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.factored import Factored
from refocus.facts import Facts
from refocus.held_values import HeldValues
from refocus.ir import Axis, Const
from refocus.lift import Unliftable, arguments, is_tensor, op_name
from refocus.linear_candidates import cores_of
from refocus.loop_steps import Rolled
from refocus.patterns.chunked_form import Cut, over_all
from refocus.patterns.declined import Stop
from refocus.sizes import shape_of

_LEAST_DIMS = 3  # chunks, rows and values


def chunked_at(root: fx.Node, facts: Facts, data: set[fx.Node], closed: set[fx.Node]) -> Rolled | None:
    """The attention over all positions that a sum of two products is; None where it is none."""
    if op_name(root) != "add" or not is_tensor(root) or len(arguments(root)) != 2 or root in closed:
        return None
    parts = [n for n in arguments(root) if isinstance(n, fx.Node) and cores_of(n, data, closed)]
    if len(parts) != 2 or root.kwargs or root.meta["val"].dim() < _LEAST_DIMS:
        return None
    dims = tuple(None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape_of(root)))
    lifter = Factored(facts, interior=frozenset((root,)), data=data)
    with suppress(Unliftable, Stop):
        value = lifter.at(root, [Const(0) if a is None else a for a in dims])
        for at in _cuts(dims, root):
            with suppress(Stop):
                values = HeldValues(facts)
                found = over_all(value, at, values)
                values.assume()
                place = s.add(s.mul(at.chunk, at.size), at.row)
                visited = frozenset(lifter.visited)
                return Rolled(found.product, found.weight, dims, at.query, at.key, place, visited, rows=at.size)
    return None


def _cuts(dims: tuple[Axis | None, ...], root: fx.Node) -> Iterator[Cut]:
    """The ways in which two dimensions may be chunks and their rows."""
    for chunk, row in permutations([a for a in dims if a is not None], 2):
        length = s.mul(chunk.size, row.size)
        yield Cut(chunk, row, Axis("position", length), Axis(f"{root.name}.key", length))


def inside_of(root: fx.Node, visited: Set[fx.Node], facts: Facts) -> frozenset[fx.Node]:
    """The root, and what of the visited nodes is for it alone."""
    found = {root}
    above = nx.ancestors(facts.flow, root) & visited
    for node in sorted(above, key=facts.order.__getitem__, reverse=True):
        if all(user in found for user in node.users):
            found.add(node)
    return frozenset(found)
