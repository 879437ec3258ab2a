"""What a compiled graph takes for granted about the model's buffers, and what happens when it no longer holds.

A mask that a model keeps as a buffer is compiled as the closed form of its values. Each call checks that the buffer was
not written to since (a comparison of a few integers); if it was, the form is proved again; if it fails, the graph runs
without that knowledge from then on.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from refocus.errors import StaleMask
from refocus.identity import Identity
from refocus.infer import agrees, axes_of
from refocus.ir import Expr

_KNOWN = 4


@dataclass(frozen=True)
class Assumption:
    """The graph's input number `position` has the values of `form`, over `refocus.infer.axes_of` it."""

    position: int
    form: Expr


def model_buffers(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The inputs that belong to the model, need no gradient, and whose changes would be noticed."""
    found: dict[fx.Node, Tensor] = {}
    for node, value in zip(placeholders, inputs):
        kept = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
        if kept and isinstance(value, Tensor) and not value.requires_grad and Identity.of(value) is not None:
            if not any(isinstance(d, torch.SymInt) for d in node.meta["val"].shape):
                found[node] = value
    return found


def guarded(
    compiled: Callable[..., Any],
    assumptions: Sequence[Assumption],
    inputs: Sequence[Any],
    otherwise: Callable[[], Callable[..., Any]],
) -> Callable[..., Any]:
    """`compiled`, while all assumptions hold; else what `otherwise` makes, once it is needed."""
    return _Guarded(compiled, assumptions, inputs, otherwise)


class _Guarded:
    def __init__(
        self,
        compiled: Callable[..., Any],
        assumptions: Sequence[Assumption],
        inputs: Sequence[Any],
        otherwise: Callable[[], Callable[..., Any]],
    ) -> None:
        self.compiled, self.otherwise = compiled, otherwise
        # For each assumption the tensors that were last found to meet it.
        self.known = [(a, deque([Identity.of(inputs[a.position])], maxlen=_KNOWN)) for a in assumptions]
        self.instead: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.instead is not None:
            return self.instead(*inputs)
        for assumption, known in self.known:
            tensor = inputs[assumption.position]
            if any(identity is not None and identity.holds(tensor) for identity in known):
                continue
            if not agrees(assumption.form, axes_of(tensor), tensor):
                return self._changed()(*inputs)
            known.append(Identity.of(tensor))
        return self.compiled(*inputs)

    def _changed(self) -> Callable[..., Any]:
        warnings.warn(
            "a mask that the model keeps as a buffer has changed since it was compiled; the graph is compiled again, "
            "for whatever it may hold",
            StaleMask,
            stacklevel=4,
        )
        self.instead = self.otherwise()
        return self.instead
