"""Nodes that compute the same value twice: `q * scale` in each turn of a loop. The region reads the first of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import fx


def equal_values(
    graph: fx.Graph,
    apart: Set[fx.Node],
    grad_enabled: Mapping[fx.Node, bool],
    writes_before: Callable[[fx.Node, fx.Node], int],
) -> dict[fx.Node, fx.Node]:
    """Node -> the first node that is the same operation on the same values, under the same gradient mode. What is drawn
    at random equals nothing but itself, and so does what is `apart`: written in place, or cut off from gradients.
    `writes_before`: how often what a node (the second) reads (the first) was written in place before."""
    first: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node in apart or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        drawn = torch.Tag.nondeterministic_seeded in node.target.tags
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in node.target._schema.arguments)
        if drawn or writes:
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: found.get(n, n))
        written = tuple(writes_before(source, node) for source in node.all_input_nodes)
        key = (node.target, repr((args, sorted(kwargs.items()))), grad_enabled[node], written)
        if node is not first.setdefault(key, node):
            found[node] = first[key]
    return found
