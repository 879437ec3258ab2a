"""`torch.vmap` inside a graph: what runs under it becomes the operations on whole tensors that it stands for.

    attend = torch.vmap(lambda q, k, v: (q @ k.T).softmax(-1) @ v)     ->      bmm, softmax, bmm
    attend(q, k, v)

Dynamo records the beginning and end of a vmap, and operations in between that see one slice of their tensors. Each such
stretch is traced by itself below the dispatcher, where the slices are put together, and stands in the graph like that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

_BEGIN, _END, _PREPARE = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


class NotFlattened(Exception):
    """What runs under a vmap cannot be told as operations on whole tensors."""


def without_vmaps(gm: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """The graph with what runs under vmaps on whole tensors; `gm` itself where there is none. Raises NotFlattened."""
    if not any(_name(n) == _BEGIN for n in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    output, old_output = (g.output_node() for g in (graph, gm.graph))
    output.meta.update(old_output.meta)
    twin = fx.GraphModule(gm, graph)
    twin.meta.update(gm.meta)
    for stretch in list(_stretches(twin.graph)):
        _flatten(twin, stretch, mode)
    twin.graph.lint()
    twin.recompile()
    return twin


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes from the beginning to the end of each vmap that is in no other."""
    depth, found = 0, list[fx.Node]()
    for node in graph.nodes:
        depth += _name(node) == _BEGIN
        if depth:
            found.append(node)
        depth -= _name(node) == _END
        if found and not depth:
            yield found
            found = []
    if found:
        raise NotFlattened("a vmap does not end in the graph that it begins in")


def _flatten(twin: fx.GraphModule, stretch: list[fx.Node], mode: Any) -> None:
    """Replace a stretch of nodes by what it does to whole tensors."""
    inside = set(stretch)
    inputs = list(dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside))
    results = [n for n in stretch if any(user not in inside for user in n.users)]
    values = [n.meta.get("example_value", n.meta.get("val")) for n in inputs]
    if any(value is None or isinstance(value, fx.GraphModule) for value in values):
        raise NotFlattened("an operation with a body of its own runs under a vmap")
    if any(_name(n) == "_set_grad_enabled" for n in stretch):
        raise NotFlattened("gradients are switched on or off under a vmap")
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: part.placeholder(n.name) for n in inputs}
    for node in stretch:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[n] for n in results])
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(fx.Interpreter(fx.GraphModule(twin, part)).run)(*values)
    _inline(twin, traced, stretch[0], dict(zip(traced.graph.find_nodes(op="placeholder"), inputs)), results)
    for node in reversed(stretch):
        twin.graph.erase_node(node)


def _inline(
    twin: fx.GraphModule, traced: fx.GraphModule, before: fx.Node, env: dict[fx.Node, fx.Node], results: list[fx.Node]
) -> None:
    for node in traced.graph.nodes:
        with twin.graph.inserting_before(before):
            if node.op == "get_attr":
                held = getattr(traced, str(node.target))
                if isinstance(held, FakeTensor):
                    raise NotFlattened("a value that is made under a vmap was lost")
                name = f"refocus_under_vmap_{sum(1 for _ in twin.buffers())}"
                twin.register_buffer(name, held, persistent=False)
                env[node] = twin.graph.get_attr(name)
                env[node].meta.update(node.meta)
            elif node.op == "output":
                for old, new in zip(results, node.args[0], strict=True):  # type: ignore[arg-type]
                    old.replace_all_uses_with(env[new])
            elif node.op != "placeholder":
                env[node] = twin.graph.node_copy(node, env.__getitem__)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
