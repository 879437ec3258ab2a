"""Literals of equal value are one: `torch.tensor([...])` in each turn of a loop is the same tensor each time.

The tracer keeps one tensor for each call. Operations that read different tensors are different operations, and the
turns of a loop would not be alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_MOST = 1 << 20  # elements of tensors that are compared
_COPIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


def merge_equal_literals(gm: fx.GraphModule) -> None:
    """Read the first of several literals that are bit for bit the same. Only those that are copied before anything is
    done with them: nobody can write to them, or give them out."""
    known: dict[Any, list[tuple[fx.Node, Tensor]]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute(gm, node)
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.numel() > _MOST:
            continue
        if value.requires_grad or any(user.target not in _COPIES for user in node.users):
            continue
        key = (value.dtype, value.device, value.shape, value.stride())
        same = next((first for first, other in known.get(key, ()) if _identical(value, other)), None)
        if same is None:
            known.setdefault(key, []).append((node, value))
            continue
        node.replace_all_uses_with(same)
        gm.graph.erase_node(node)


def attribute(gm: fx.GraphModule | None, node: fx.Node) -> Any:
    """What a graph holds under the name that a node reads."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _identical(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits (zeros have a sign, and NaN equals itself)."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        one, two = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (value, other))
        return bool(torch.equal(one, two))
