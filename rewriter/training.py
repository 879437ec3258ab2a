"""What a site needs to be trained: which operands gradients flow into, and which tensors must not lose theirs.

A number that is added to every logit of a row cancels in the softmax (the bias of a layer that mixes heads before it),
and so is no part of the region. Its gradient is zero, not absent: optimisers decay what has a gradient, and
data-parallel training waits for it. Such a tensor becomes an operand that nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import networkx as nx
from torch import fx

from refocus.attention import Part, Site
from refocus.facts import Facts
from refocus.ir import Operand
from refocus.lift import dtype_of
from refocus.normal_form import Binding
from refocus.sizes import shape_of
from refocus.splice import loads_of, sources


def trained_operands(site: Site, facts: Facts) -> list[frozenset[str]]:
    """For each part, the operands into which gradients will flow."""
    if not facts.grad_enabled[site.root]:
        return [frozenset() for _ in site.parts]

    def reached(binding: Binding) -> bool:
        return any(n in facts.needs_grad for n in sources(binding, facts))

    return [frozenset(o.name for o, b in zip(part.region.operands, part.bindings) if reached(b)) for part in site.parts]


def with_cancelled(site: Site, facts: Facts) -> Site:
    """The site, its first part given an unread operand for each leaf whose gradient is zero because it cancelled."""
    kept = [n for part in site.parts for b in part.bindings for n in sources(b, facts)]
    kept += loads_of(site.epilogue, facts)
    read = [n for inner in (*site.interior, site.root) for n in inner.all_input_nodes]
    lost = _leaves(read, facts) - _leaves(kept, facts)
    if not lost:
        return site
    part = site.parts[0]
    nodes = sorted(lost, key=facts.order.__getitem__)
    operands = tuple(Operand(f"unread{k}", dtype_of(n), shape_of(n)) for k, n in enumerate(nodes))
    region = replace(part.region, operands=(*part.region.operands, *operands))
    return replace(site, parts=(Part(region, (*part.bindings, *nodes)), *site.parts[1:]))


def _leaves(nodes: Iterable[fx.Node], facts: Facts) -> set[fx.Node]:
    """The inputs of the graph that require a gradient and reach one of these nodes."""
    trained = facts.flow.subgraph(facts.needs_grad)
    ends = [n for n in nodes if n in facts.needs_grad]
    reaching = set(ends).union(*(nx.ancestors(trained, end) for end in ends))
    return {n for n in reaching if n.op == "placeholder"}
