"""Second derivatives: a backward that is an operator of its own says that it has no derivative."""

from __future__ import annotations

from typing import Any

from torch.library import CustomOpDef

from refocus.errors import NeedsGradient


def refuse_second_order(backward: CustomOpDef) -> None:
    """Let a gradient that is differentiated again raise `NeedsGradient`, where it is recorded: there the user's line is
    on the stack still."""
    backward.register_autograd(_refuse_backward, setup_context=_refuse)


def _refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raise NeedsGradient(
        "a fused attention has no second derivative",
        expected="backward() without create_graph=True",
        todo="run the model without refocus where a gradient is differentiated again",
    )


def _refuse_backward(ctx: Any, *grads: Any) -> Any:
    raise NeedsGradient("a fused attention has no second derivative")
