"""Capture: a Dynamo graph becomes an ATen graph before autograd, composite operations kept whole.

The graph is re-traced under the fake mode of its own inputs, so symbolic sizes survive, every node keeps the user's
stack trace, and `aten.einsum`, `aten.softmax.int`, `aten.linear` and `aten.scaled_dot_product_attention` stay one node
each. In-place operations on values made in the graph are then made functional, where nothing else sees the write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.bodies import Retrace


class CaptureFailed(Exception):
    """The graph holds something that cannot be re-traced; it is compiled as it was."""


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """Re-trace a Dynamo graph. The result has the same inputs in the same order, and the same outputs.

    Raises CaptureFailed when the graph has no usable example values or re-tracing fails.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise CaptureFailed("no input carries a fake tensor")
    # Above the dispatcher an autocast region of the graph is only recorded, and its casts would be missing; below it,
    # they are operations like any other (and composite operations are taken apart, which the lift does not mind).
    called = {getattr(n.target, "__name__", "") for n in gm.graph.nodes}
    casts = "_enter_autocast" in called
    if casts and "_set_grad_enabled" in called and torch.is_grad_enabled():
        # ... where what runs under torch.no_grad() could not be told from the rest.
        raise CaptureFailed("autocast and torch.no_grad() meet in a graph that trains")
    # Compiling inside an activation checkpoint: its hooks count every tensor that is saved, and must not see ours.
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with mode, own, torch.fx.traceback.preserve_node_meta():
            traced = make_fx(Retrace(gm).run, pre_dispatch=not casts)(*values)
    except Exception as problem:  # anything may go wrong while tracing foreign code; the caller falls back
        raise CaptureFailed(f"{type(problem).__name__}: {problem}") from problem
    traced.meta.update(gm.meta)
    traced.graph.eliminate_dead_code()
    for old, new, value in zip(placeholders, traced.graph.find_nodes(op="placeholder"), values):
        new.meta["requires_grad"] = bool(getattr(value, "requires_grad", False))
        for key in ("tensor_dict", "grapharg", "_dynamo_source", "example_value"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source  # type: ignore[attr-defined]
    for node in traced.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = _attribute(traced, node)
    make_functional(traced, mode)
    return traced


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def make_functional(gm: fx.GraphModule, mode: Any) -> None:
    """Replace in-place operations on values that only the graph sees by their functional forms.

        scores.masked_fill_(mask, v); use(scores)    ->    new = masked_fill(scores, mask, v); use(new)

    A write to an input, or to memory that is read through another view later, is left as it is (the lift never reads
    across it).
    """
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        functional = _functional_overload(node)
        if functional is None:
            continue
        target = node.args[0]
        if not isinstance(target, fx.Node) or not _only_seen_here(target, node, order):
            continue
        before = target.meta["val"]
        with mode:
            try:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                after = functional(*args, **kwargs)
            except (RuntimeError, TypeError):
                continue
        if not isinstance(after, torch.Tensor) or after.dtype != before.dtype or after.shape != before.shape:
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(functional, node.args, dict(node.kwargs))
        new.meta.update(node.meta)
        new.meta["val"] = after
        position = order[node]
        order[new] = position
        _replace_after(target, new, position, order)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


_FRESH_ALIASING = frozenset(
    (
        "view", "reshape", "permute", "transpose", "expand", "slice", "select",
        "unsqueeze", "squeeze", "t", "detach", "alias", "contiguous", "to",
        "split", "chunk", "unbind", "getitem", "flatten", "as_strided", "diagonal",
    )
)  # fmt: skip


def _replace_after(old: fx.Node, new: fx.Node, position: int, order: dict[fx.Node, int]) -> None:
    """Let everything past a position read `new` instead of `old`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > position)


def _functional_overload(node: fx.Node) -> Any:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, name = node.target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__") or name.startswith("_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _name(node: fx.Node) -> str:
    return (
        node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
    )


def _aliases(node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return _name(node) in _FRESH_ALIASING or any(r.alias_info is not None for r in node.target._schema.returns)


def _only_seen_here(target: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a write to `target` changes nothing else that is read later: its memory was made in this graph, and no
    other view of it is read after the write."""
    base = target
    while base.op == "call_function" and _aliases(base):
        source = base.args[0] if base.args else None
        if not isinstance(source, fx.Node):
            return False
        base = source
    if base.op != "call_function":
        return False
    stack, group = [base], {base}
    while stack:
        for user in stack.pop().users:
            if user not in group and user.op == "call_function" and order[user] < order[write] and _aliases(user):
                group.add(user)
                stack.append(user)
    return all(order[user] <= order[write] for member in group - {target} for user in member.users)
