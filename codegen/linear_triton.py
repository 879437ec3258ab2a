"""The `triton` engine for linear attention, by the contract of `refocus.codegen.linear_form`.

forward     gate_sums, chunk_states, chunk_outputs; a single step is one kernel
backward    the same states again, chunk_states_backward, and one kernel for each gradient
the delta rule in between: delta_inverse, delta_effects and delta_states, and their backward
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refocus.codegen import delta_call
from refocus.codegen.chunk_call import Call
from refocus.codegen.chunk_kernel import SMALLEST, dtype_name, empty
from refocus.codegen.flash_fit import OUT_DTYPES
from refocus.codegen.linear_form import Grads, LinearForm
from refocus.codegen.triton_engine import available
from refocus.errors import EngineUnavailable

WIDEST = 256  # features or values that a kernel holds
Result = tuple[Tensor, Tensor | None, Tensor | None]


def supports(form: LinearForm, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> str | None:
    """Why there are no kernels for this call; None where there are."""
    if not form.causal:
        return "without an order the form is two products of matrices"
    if form.erase and form.gate == "channel":
        return "there are no kernels of the delta rule with gates for each channel"
    for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if x is not None and dtype_name(x) not in OUT_DTYPES:
            return f"{name} is {dtype_name(x)}"
    if not 0 < min(q.shape[2], v.shape[2]) <= max(q.shape[2], v.shape[2]) <= WIDEST:
        return f"the state is {q.shape[2]} by {v.shape[2]}; the kernels hold {WIDEST} by {WIDEST} at most"
    return None


def default_chunk(form: LinearForm, d: int, e: int, dtype: torch.dtype) -> int:
    """Steps that a chunk has where nothing asks for another number."""
    return 64 if dtype in (torch.float16, torch.bfloat16) else 32


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None,
    erase: Tensor | None = None, initial: Tensor | None = None,
) -> Result:  # fmt: skip
    """See `refocus.codegen.linear_form`. Raises `EngineUnavailable`."""
    call = _call(form, chunk, q, k, v, gate, erase, initial)
    final = empty(q, *call.state_shape) if form.final else None
    if call.length == 1:
        return *call.step(final, v), final
    if form.erase:
        return delta_call.forward(call, final), None, final
    buffers = call.states(call.setting(), {"final": final})
    out, sums = call.outputs(buffers, v)
    return out, sums, final


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, grads: Grads,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See `refocus.codegen.linear_form`. Each gradient has its tensor's dtype. Raises `EngineUnavailable`."""
    grad, grad_sums, grad_final = grads
    # What nothing flows back into need not be computed again.
    sums = form.sums and grad_sums is not None
    call = _call(replace(form, sums=sums, final=False), chunk, q, k, v, gate, erase, initial)
    call = call.receiving(grad, grad_sums if sums else None, grad_final)
    return delta_call.gradients(call) if form.erase else call.gradients()


def _call(form: LinearForm, chunk: int, *given: Tensor | None) -> Call:
    tensors = {name: x for name, x in zip(("q", "k", "v", "gate", "erase", "initial"), given) if x is not None}
    assert [name in tensors for name in ("gate", "erase", "initial")] == [
        form.gate != "none",
        form.erase,
        form.initial,
    ]
    reason = available(tensors["q"].device)
    reason = reason or supports(form, tensors["q"], tensors["k"], tensors["v"], tensors.get("gate"))
    if chunk < SMALLEST or chunk & (chunk - 1):
        reason = f"chunks of {chunk}, which must be a power of two from {SMALLEST} on"
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run this", got=reason, todo="use engine='tiled'")
    if "initial" in tensors:
        tensors["initial"] = tensors["initial"].to(torch.float32).contiguous()
    return Call(form, chunk, tensors)
