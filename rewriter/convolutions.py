"""Convolutions that look at one position: a product with a matrix over channels, as talking heads are often written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
CHANNEL_PRODUCT = "pointwise_convolution"


def is_pointwise(node: fx.Node) -> bool:
    """Whether a convolution reads, at each position, the channels of that position and no other."""
    named = {arg.name: node.kwargs.get(arg.name, arg.default_value) for arg in node.target._schema.arguments}  # type: ignore[union-attr]
    named.update(zip(named, node.args))
    weight: Any = named["weight"]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if not isinstance(value, torch.Tensor) or any(size != 1 for size in value.shape[2:]):
        return False
    padding = named["padding"]
    return _all(named["stride"], 1) and (isinstance(padding, str) or _all(padding, 0))


def groups_of(node: fx.Node) -> int:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _all(numbers: Any, wanted: int) -> bool:
    return all(n == wanted for n in (numbers if isinstance(numbers, list | tuple) else [numbers]))
