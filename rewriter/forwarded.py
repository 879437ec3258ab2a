"""What is written to memory that others see, too, is read from the value that was written.

    cache.mul_(decay).add_(kv); use(cache)     ->    new = add(mul(cache, decay), kv); cache.copy_(new); use(new)

The write stays where it was: a cache is as eager code leaves it. Only reads up to the next write to memory of others
are moved, for inputs may share memory that nobody knows of.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from refocus.functional import aliases, functional_overload
from refocus.lift import op_name


def forward_writes(gm: fx.GraphModule, mode: Any) -> None:
    """Let whole inputs that are written in place be read from what is written."""
    written: list[tuple[fx.Node, fx.Node, fx.Node]] = []  # input, write, value
    for node in list(gm.graph.nodes):
        functional = functional_overload(node)
        cache = None if functional is None else _written_input(node)
        if cache is None or not _is_plain(cache.meta["val"]):
            continue
        new = _value(gm, mode, node, cache, functional)
        if new is None:
            continue
        write = node
        if op_name(node) != "copy_":
            with gm.graph.inserting_before(node):
                write = gm.graph.call_function(torch.ops.aten.copy_.default, (cache, new))
            write.meta.update(node.meta)
            node.replace_all_uses_with(write)
            gm.graph.erase_node(node)
        written.append((cache, write, new))
    for cache, write, new in written:
        _forward(cache, write, new)
    for cache, write, _ in written:
        if not write.users and _is_overwritten(cache, write):
            gm.graph.erase_node(write)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor of floats has each element once in memory, and nothing flows back into it."""
    return value.is_floating_point() and not value.requires_grad and value.is_contiguous()


def _written_input(write: fx.Node) -> fx.Node | None:
    """The input that an operation writes to, as a whole."""
    node = write.args[0]
    while isinstance(node, fx.Node) and (functional_overload(node) is not None or _is_itself(node)):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _is_itself(node: fx.Node) -> bool:
    """Whether an operation hands back its argument: a cast to what it is."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    return (
        op_name(node) == "to" and isinstance(source, fx.Node) and _like(node.meta["val"], source) and len(node.args) < 5
    )


def _value(gm: fx.GraphModule, mode: Any, write: fx.Node, cache: fx.Node, functional: Any) -> fx.Node | None:
    """The node of the value that is written, of the input's own shape and dtype; None where there is none."""
    if op_name(write) == "copy_":
        source = write.args[1]
        if not isinstance(source, fx.Node) or not _like(source.meta.get("val"), cache) or _changes(source):
            return None
        return source
    with mode:
        try:
            args, kwargs = fx.map_arg((write.args, dict(write.kwargs)), lambda n: n.meta["val"])
            after = functional(*args, **kwargs)
        except (RuntimeError, TypeError):
            return None
    if not isinstance(after, torch.Tensor) or not _like(after, cache):
        return None
    with gm.graph.inserting_before(write):
        new = gm.graph.call_function(functional, write.args, dict(write.kwargs))
    new.meta.update(write.meta)
    new.meta["val"] = after
    return new


def _like(value: Any, cache: fx.Node) -> bool:
    wanted = cache.meta["val"]
    same = isinstance(value, torch.Tensor) and value.dtype == wanted.dtype and value.device == wanted.device
    return same and tuple(value.shape) == tuple(wanted.shape)


def _changes(source: fx.Node) -> bool:
    """Whether the memory of a value may be written to: it is an input's, or something writes to it."""
    base = source
    while base.op == "call_function" and aliases(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    if base.op != "call_function" or aliases(base):
        return True
    stack, seen = [base], {base}
    while stack:
        node = stack.pop()
        for user in node.users:
            if (functional_overload(user) is not None and user.args[0] is node) or _is_unknown(user):
                return True
            if user not in seen and user.op == "call_function" and aliases(user) and user.args[0] is node:
                seen.add(user)
                stack.append(user)
    return False


def _is_unknown(node: fx.Node) -> bool:
    """Whether nothing is known of what an operation writes to."""
    if node.op != "call_function":
        return node.op != "output"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable and functional_overload(node) is None
    return node.target is not operator.getitem


def _forward(cache: fx.Node, write: fx.Node, new: fx.Node) -> None:
    """Let reads after a write read the value, up to the next write to what others see."""
    before_next: set[fx.Node] = set()
    node = write.next
    while node.op != "root" and not _is_unknown(node):
        if functional_overload(node) is not None and _written_base(node).op != "call_function":
            break
        before_next.add(node)
        node = node.next
    moved = {user for source in (cache, write) for user in source.users if _only_reads(user, before_next)}
    for source in (cache, write):
        source.replace_all_uses_with(new, delete_user_cb=moved.__contains__)


def _written_base(node: Any) -> fx.Node:
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if not aliases(node):
            break
        node = node.args[0]
    return node


def _only_reads(user: fx.Node, before_next: set[fx.Node]) -> bool:
    """Whether an operation, and all that sees the same memory through it, reads before the next write."""
    if user not in before_next or not isinstance(user.target, torch._ops.OpOverload):
        return False
    if user.target._schema.is_mutable:
        return False
    return not aliases(user) or all(_only_reads(u, before_next) for u in user.users)


def _is_overwritten(cache: fx.Node, write: fx.Node) -> bool:
    """Whether all of an input is written again before anything sees it."""
    node = write.next
    while node.op == "call_function" and not _is_unknown(node):
        if op_name(node) == "copy_" and node.args[0] is cache and _written_base(node.args[1]) is not cache:
            return True
        if any(_written_base(n) is cache for n in node.all_input_nodes):
            return False
        node = node.next
    return False
