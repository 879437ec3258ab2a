"""Blank tensors: zeros, ones and fills made in the image of another tensor, of which only the shape is read.

    mask = torch.zeros_like(scores)      ->      mask = torch.zeros((2, 4, 96, 96))

As the model wrote it, the scores would have to be there for a mask to be made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_FILLS = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "full_like": None, "new_full": None}


def detach_blanks(gm: fx.GraphModule) -> None:
    """Let blank tensors of known shape be made of numbers alone."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.split("::")[1]
        value = node.meta.get("val")
        if name not in _FILLS or not isinstance(value, torch.Tensor) or not _known(value):
            continue
        fill: Any = _FILLS[name]
        if fill is None:
            fill = node.kwargs.get("fill_value", node.args[-1])
        if not isinstance(fill, bool | int | float):
            continue
        if value.dtype == torch.bool:
            fill = bool(fill)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                torch.ops.aten.full.default,
                (list(value.shape), fill),
                {"dtype": value.dtype, "device": value.device, "pin_memory": False},
            )
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _known(value: torch.Tensor) -> bool:
    """Whether a plain contiguous tensor of fixed size stands for it."""
    fixed = not any(isinstance(size, torch.SymInt) for size in value.shape)
    return fixed and type(value).__name__ == "FakeTensor" and value.layout == torch.strided and value.is_contiguous()
