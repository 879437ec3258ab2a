"""Models of the list as they can be computed in float64, too: what results and gradients are compared with."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks import models


def build(name: str, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """`models.build`, with experts multiplied in batches: PyTorch's grouped product has no float64."""
    module, inputs = models.build(name, tokens=tokens)
    if getattr(getattr(module, "config", None), "num_local_experts", None):
        module.set_experts_implementation("batched_mm")
    return module, inputs
