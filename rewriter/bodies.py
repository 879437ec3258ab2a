"""Graphs inside a graph: higher-order operations, such as activation checkpointing, whose body is a sub-module.

Re-tracing through one would take it apart, and lose what it stands for. So its body is rewritten in place, as a graph
of its own, and the operation itself is recorded as the call it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree

# Operations that call their body once, with the arguments that follow it.
_KEPT = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


def is_kept(target: Any) -> bool:
    """Whether a node's target is a higher-order operation that is recorded whole."""
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _KEPT


def bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The attribute name and the graph of each body of a kept operation."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and is_kept(node.target):
            for source in node.all_input_nodes:
                if source.op == "get_attr" and str(source.target) not in seen:
                    body = gm.get_submodule(str(source.target))
                    if isinstance(body, fx.GraphModule):
                        seen.add(str(source.target))
                        yield str(source.target), body


def with_bodies(gm: fx.GraphModule, change: Callable[[fx.GraphModule], fx.GraphModule]) -> fx.GraphModule:
    """The graph with each body changed; `gm` itself, untouched, where `change` returns every body as it was."""
    changed = {name: change(body) for name, body in bodies(gm)}
    if all(changed[name] is body for name, body in bodies(gm)):
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    twin = fx.GraphModule(gm, graph)
    twin.meta.update(gm.meta)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for name, body in changed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, body)
    return twin


class Retrace(fx.Interpreter):
    """Runs a Dynamo graph for `make_fx`; a kept operation becomes one call with the results that Dynamo saw."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = get_proxy_mode()
        if not is_kept(target) or mode is None:
            return super().call_function(target, args, kwargs)
        tracer = mode.tracer
        held = pytree.tree_map(lambda x: _registered(tracer, x), (args, kwargs))
        inputs, options = pytree.tree_map(tracer.unwrap_proxy, held)
        call = tracer.create_proxy("call_function", target, inputs, options)
        result = self._current_node().meta["example_value"]
        return track_tensor_tree(result, call, constant=None, tracer=tracer)

    def _current_node(self) -> fx.Node:
        assert self._at is not None
        return self._at

    _at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._at = n
        return super().run_node(n)


def _registered(tracer: Any, value: Any) -> Any:
    """A body becomes an attribute of the graph that is being traced."""
    if isinstance(value, fx.GraphModule) and value not in list(tracer.root.children()):
        name = tracer.get_fresh_qualname("body_")
        tracer.root.register_module(name, value)
    return value
