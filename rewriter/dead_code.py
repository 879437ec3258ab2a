"""Removing what nobody reads, from one graph.

`torch.fx` does the same, and goes on into the bodies of higher-order operations. These are Dynamo's graphs still, in
which `x.add_(y)` is a method without a reader, and no dead code: a checkpoint would lose its writes, and a
`torch.autograd.Function` the gradients that its backward adds up in place.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_WRITES = (operator.setitem, operator.delitem)


def remove_dead_code(graph: fx.Graph) -> None:
    """Erase the nodes of a graph, not of those inside it, that nobody reads and that do nothing but compute."""
    draws = _keeps_draws()
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure(draws) and not _writes(node):
            graph.erase_node(node)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that `remove_dead_code` would keep."""
    draws = _keeps_draws()
    stack = [n for n in graph.nodes if n.is_impure(draws) or _writes(n)]
    found = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _keeps_draws() -> bool:
    """Whether numbers that are drawn and not read are drawn all the same, for those that follow."""
    tracing = torch._guards.TracingContext.try_get()
    return True if tracing is None else bool(torch._inductor.config.fallback_random)


def _writes(node: fx.Node) -> bool:
    """Whether a call that is no operation of PyTorch's, kept as the model made it, may write to what it is given."""
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return node.op == "call_function" and (node.target in _WRITES or node.target in _IN_PLACE)


# x += y and its like: iadd, iand, ...
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and (name[1:] in dir(operator) or f"{name[1:]}_" in dir(operator))
)
