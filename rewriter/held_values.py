"""The values of what a model keeps: constants of the graph, and buffers that are watched from then on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from refocus.evaluate import arange_env, evaluate
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load

_MOST = 1 << 24  # elements


@dataclass(frozen=True)
class HeldValues:
    """`read`: the buffers that were asked for."""

    facts: Facts
    read: set[fx.Node] = field(default_factory=set)

    def __call__(self, e: Expr, axes: Sequence[Axis]) -> tuple[Tensor, torch.dtype] | None:
        """The values of an expression over axes, in float64, and the coarsest dtype that they were kept in; None where
        it is no constant."""
        lengths = [int(a.size.value) for a in axes if isinstance(a.size, Const)]
        if len(lengths) != len(axes) or math.prod(lengths) > _MOST:
            return None
        tensors: dict[str, Tensor] = {}
        dtype = torch.float64
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            for load in (x for x in e.walk() if isinstance(x, Load)):
                value = self._value(load)
                if value is None:
                    return None
                dtype = value.dtype if torch.finfo(value.dtype).eps > torch.finfo(dtype).eps else dtype
                tensors[load.tensor] = value.detach().cpu().double()
            return evaluate(e, arange_env(list(axes), {}), tensors, {}, torch.float64), dtype

    def _value(self, load: Load) -> Tensor | None:
        value = self.kept(load)
        if value is not None:
            self.take(load)
        return value

    def kept(self, load: Load) -> Tensor | None:
        """The tensor that is loaded from, if it is one of floats that the model keeps."""
        node = self.facts.nodes.get(load.tensor)
        if node is None or node in self.facts.opaque:
            return None
        value = self.facts.buffers.get(node)
        value = self.facts.constant(node) if value is None else value
        return value if value is not None and value.is_floating_point() else None

    def take(self, load: Load) -> None:
        """What is loaded is made use of."""
        node = self.facts.nodes[load.tensor]
        if node in self.facts.buffers:
            self.read.add(node)

    def assume(self) -> None:
        """From now on, what was read stays. No form describes it: after any write to it, the graph is compiled anew."""
        for node in self.read:
            self.facts.assumed.setdefault(node, Const(math.nan, "float32"))
