"""Numbers that are computed while the graph runs, from sizes, are values that a region may load.

    scores / math.sqrt(q.shape[-1])      ->      t = scalar_tensor(sqrt(n)), which is read as any other tensor

Python computes them in float64, and an operation rounds them once to the dtype it computes in: so does the load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_MARK = "refocus_number"  # a tensor that the model made of a number may be rounded
_HELD = torch.ops.aten.scalar_tensor.default


def hold_numbers(gm: fx.GraphModule, mode: Any) -> None:
    """Make a tensor of every number that tensors are computed with; where it has no use, it is dead code."""
    for node in list(gm.graph.nodes):
        number = node.meta.get("val")
        if not isinstance(number, torch.SymFloat):
            continue
        made = [u.meta["val"] for u in node.users if isinstance(u.meta.get("val"), torch.Tensor)]
        if not made or len({value.device for value in made}) > 1:
            continue
        dtype = torch.float64 if any(value.dtype == torch.float64 for value in made) else torch.float32
        options = {"dtype": dtype, "device": made[0].device}
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(_HELD, (node,), options)
        new.meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "seq_nr")})
        new.meta[_MARK] = True
        with mode:
            new.meta["val"] = _HELD(number, **options)


def held(number: fx.Node) -> fx.Node | None:
    """The tensor that holds a number; None where there is none."""
    return next((user for user in number.users if _MARK in user.meta), None)
