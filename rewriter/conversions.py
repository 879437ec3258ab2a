"""Conversions to the dtype and device that a tensor has already: `x.to(y)` of what is like y is x itself.

What a model writes to afterwards is the tensor that it made, not a copy of it; to see that, they are left out.
"""

from __future__ import annotations

import torch
from torch import fx


def drop_idle_conversions(gm: fx.GraphModule) -> None:
    """Let whoever reads the result of such a conversion read the tensor that was converted."""
    for node in list(gm.graph.nodes):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _is_idle(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    source = node.args[0] if node.args else None
    if node.target._schema.name != "aten::to" or not isinstance(source, fx.Node):
        return False
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | dict(node.kwargs)
    if given.get("copy") or given.get("memory_format") not in (None, torch.preserve_format):
        return False
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    return bool((old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout))
