"""Graphs inside a graph: higher-order operations, such as activation checkpointing, whose body is a sub-module.

Re-tracing through one would take it apart, and lose what it stands for: a checkpoint's recomputation, the gradient of a
`torch.autograd.Function`. So it is recorded as the call it is; and the body of a checkpoint is rewritten in place, as a
graph of its own. What is done to tensor subclasses is recorded whole, too: below their own dispatch it would be another
computation. Only a DTensor is what it says it is, a tensor of its global shape: operations that every tensor has are
traced on a plain one in its place, and do the same when the graph runs on DTensors; what moves its parts is kept whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from refocus.native_layers import expansion_of

DATA = "_get_data_attr"

# Operations that call their body once, with the arguments that follow it.
_CALLS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


def is_higher_order(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def bodies(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The attribute name and the graph of each body that may be rewritten."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        if is_higher_order(node) and node.target.name() in _CALLS:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and str(source.target) not in seen:
                    body = gm.get_submodule(str(source.target))
                    if isinstance(body, fx.GraphModule):
                        seen.add(str(source.target))
                        yield str(source.target), body


def closed_attentions(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The operations whose bodies are left as they are, and hold products and a softmax or exponentials."""
    for node in gm.graph.nodes:
        if is_higher_order(node) and node.target.name() not in _CALLS:
            inside = set().union(*(_names(gm, str(x.target)) for x in node.all_input_nodes if x.op == "get_attr"))
            if not inside.isdisjoint(_NORMALISERS) and not inside.isdisjoint(_PRODUCTS):
                yield node


def fused_attentions(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The operations that are a fused attention as the model calls them; their bodies say what is done to a score."""
    return (n for n in gm.graph.nodes if is_higher_order(n) and n.target.name() == "flex_attention")


_NORMALISERS = ("softmax", "exp", "exp_", "exp2", "_softmax")
_PRODUCTS = ("matmul", "einsum", "bmm", "baddbmm")


def _names(gm: fx.GraphModule, target: str) -> set[str]:
    """What the operations of a body, and of those inside it, are called."""
    body = gm.get_submodule(target) if "." in target or hasattr(gm, target) else None
    if not isinstance(body, fx.GraphModule):
        return set()
    names = {n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "") for n in body.graph.nodes}
    deeper = [str(n.target) for n in body.graph.find_nodes(op="get_attr")]
    return {n.split(".")[0] for n in names}.union(*(_names(body, d) for d in deeper))


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
    """Runs a Dynamo graph for `make_fx`; what is kept whole becomes one call with the results that Dynamo saw.

    To be made under the fake mode of the graph. `casts`: it is traced below autocast, where attention, too, is recorded
    with the casts that autocast gives it, for it would be one of PyTorch's kernels; else autocast changes nothing."""

    def __init__(self, gm: fx.GraphModule, casts: bool) -> None:
        super().__init__(gm)
        self.casts = casts
        values = {n: n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes}
        self.decided = _ends_of_chunks(gm.graph)
        self.values = {n: pytree.tree_map_only(_dtensors(), _plain, value) for n, value in values.items()}

    def run_node(self, n: fx.Node) -> Any:
        mode = get_proxy_mode()
        if n in self.decided:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return min(args) if n.target is torch.sym_min else max(args)
        if not self.casts and n.target in _AUTOCAST:
            return None
        whole = "example_value" in n.meta and (is_higher_order(n) or self._is_whole(n))
        sdpa = self.casts and "example_value" in n.meta and n.target is torch.nn.functional.scaled_dot_product_attention
        if mode is None or not (whole or sdpa):
            return super().run_node(n)
        tracer: Any = mode.tracer
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if sdpa and not whole:
            args, kwargs = pytree.tree_map(lambda x: _as_cast(x, n.meta["example_value"].dtype), (args, kwargs))
        held = pytree.tree_map(lambda x: _registered(tracer, x), (args, kwargs))
        inputs, options = pytree.tree_map(tracer.unwrap_proxy, held)
        with self._set_current_node(n):
            target = torch.ops.aten.scaled_dot_product_attention.default if sdpa and not whole else n.target
            call = tracer.create_proxy(n.op, target, inputs, options)
        return track_tensor_tree(self.values[n], call, constant=None, tracer=tracer)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(expansion_of(target, args) or target, args, kwargs)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether an operation reads or makes a tensor subclass, moves parts of a DTensor, or is none that the tracer
        sees: x.data, which reads and writes x past autograd."""
        if not node.op.startswith("call_"):
            return False
        if getattr(node.target, "__name__", "") == DATA:
            return True
        nodes = (node, *node.all_input_nodes)
        if any(_subclasses(self.values[n]) for n in nodes):
            return True
        return any(_subclasses(n.meta.get("example_value")) for n in nodes) and not _every_tensor_has(node)


_FEWEST = 3  # ends of chunks that a length is compared with


def _ends_of_chunks(graph: fx.Graph) -> set[fx.Node]:
    """Where one length is compared with several numbers: the ends of the chunks of an unrolled loop, which is for one
    number of chunks anyway. The tracer is asked which is less: then all chunks but the last have a number of rows."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (torch.sym_min, torch.sym_max) and not node.kwargs:
            lengths = [a for a in node.args if isinstance(a, fx.Node)]
            if len(node.args) == 2 and len(lengths) == 1:
                found.setdefault(lengths[0], []).append(node)
    return {n for nodes in found.values() if len({n.args for n in nodes}) >= _FEWEST for n in nodes}


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def changes_casts(node: fx.Node) -> bool:
    """Whether an operation begins a region in which autocast does something else than around the graph."""
    if node.target is not _AUTOCAST[0]:
        return False
    device, _, enabled, *_ = node.args
    return bool(enabled) or torch.is_autocast_enabled(str(device))


def _as_cast(value: Any, dtype: torch.dtype) -> Any:
    """An operand of an attention in the dtype of its result."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _dtensors() -> Any:
    """The type that tensor parallelism makes, once its package was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def _plain(value: Any) -> torch.Tensor:
    """A tensor of the shape that a DTensor says it has."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


def _every_tensor_has(node: fx.Node) -> bool:
    if node.op == "call_method":
        return hasattr(torch.Tensor, str(node.target))
    return not str(getattr(node.target, "__module__", None)).startswith("torch.distributed")


def _subclasses(value: Any) -> list[Any]:
    """The tensor subclasses in a value."""
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor) and is_traceable_wrapper_subclass(x)]


def _registered(tracer: Any, value: Any) -> Any:
    """A body becomes an attribute of the graph that is being traced."""
    if isinstance(value, fx.GraphModule) and value not in list(tracer.root.children()):
        name = tracer.get_fresh_qualname("body_")
        tracer.root.register_module(name, value)
    return value
