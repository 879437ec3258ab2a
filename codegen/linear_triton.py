"""The `triton` engine for linear attention, by the contract of `refocus.codegen.linear_form`.

forward     gate_sums, chunk_states, chunk_outputs; a single step is one kernel
backward    the same states again, chunk_states_backward, and one kernel for each gradient
the delta rule, and states that are looked up by other keys, in between: delta_inverse, delta_effects and delta_states,
            and their backward
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from refocus.codegen import chunk_forward, chunk_step, delta_call
from refocus.codegen.chunk_call import Call
from refocus.codegen.chunk_kernel import dtype_name, empty
from refocus.codegen.chunk_setting import NARROW, SMALLEST
from refocus.codegen.flash_fit import OUT_DTYPES
from refocus.codegen.linear_form import Grads, LinearForm
from refocus.codegen.plan import Plan
from refocus.codegen.triton_engine import fitted
from refocus.errors import EngineUnavailable

WIDEST = 256  # features or values that a kernel holds
MOST_STEPS = 128  # steps of a chunk; for the delta rule half of that
NAMES = ("q", "k", "v", "gate", "erase", "initial", "lookup")
Result = tuple[Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, ...]
R = TypeVar("R")


def supports(form: LinearForm, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> str | None:
    """Why there are no kernels for this call and its gradients; None where there are. `rest`: gate, erase, initial,
    lookup, of which the last may be left out."""
    if not form.causal:
        return "without an order the form is two products of matrices"
    for name, x in zip(NAMES, (q, k, v, *rest)):
        if x is not None and name != "initial" and dtype_name(x) not in OUT_DTYPES:
            return f"{name} is {dtype_name(x)}"
    if not 0 < min(q.shape[2], v.shape[2]) <= max(q.shape[2], v.shape[2]) <= WIDEST:
        return f"the state is {q.shape[2]} by {v.shape[2]}; the kernels hold {WIDEST} by {WIDEST} at most"
    return None


def default_chunk(q: Tensor, *others: Tensor | None) -> int:
    """Steps of a chunk where nothing asks for another number: products of float32, which are taken where not all
    `others` that are multiplied are as narrow as q, run without tensor cores, and are better small."""
    return 64 if dtype_name(q) in NARROW and all(x is None or x.dtype == q.dtype for x in others) else 32


def kernel_path(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None = None,
) -> Path:  # fmt: skip
    """The file of the kernel that writes the results of such a call."""
    call = _call(form, chunk, q, k, v, gate, erase, initial, lookup)
    if call.length == 1:
        return chunk_step.step(call.setting(out=v.dtype)).path
    return chunk_forward.outputs(delta_call.reading(call) if form.erase else call.setting(out=v.dtype)).path


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None,
    erase: Tensor | None = None, initial: Tensor | None = None, lookup: Tensor | None = None,
) -> Result:  # fmt: skip
    """See `refocus.codegen.linear_form`. Chunks are smaller where the device has not the memory for them. Raises
    `EngineUnavailable`."""
    given = q, k, v, gate, erase, initial, lookup
    return _fitted("forward", form, chunk, given, lambda smaller: _forward(_call(form, smaller, *given)))


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None, grads: Grads,
) -> Gradients:  # fmt: skip
    """See `refocus.codegen.linear_form`. Each gradient has its tensor's dtype. Raises `EngineUnavailable`."""
    given = q, k, v, gate, erase, initial, lookup
    return _fitted("backward", form, chunk, given, lambda smaller: _backward(_call(form, smaller, *given), grads))


def _forward(call: Call) -> Result:
    q, v = call.tensors["q"], call.tensors["v"]
    final = empty(q, *call.state_shape) if call.form.final else None
    if call.length == 1:
        return *call.step(final, v), final
    if call.form.erase:
        return delta_call.forward(call, final), None, final
    buffers = call.states(call.setting(), {"final": final})
    out, sums = call.outputs(buffers, v)
    return out, sums, final


def _backward(call: Call, grads: Grads) -> Gradients:
    grad, grad_sums, grad_final = grads
    # What nothing flows back into need not be computed again.
    sums = call.form.sums and grad_sums is not None
    call = replace(call, form=replace(call.form, sums=sums))
    call = call.receiving(grad, grad_sums if sums else None, grad_final)
    return delta_call.gradients(call) if call.form.erase else call.gradients()


def _call(form: LinearForm, chunk: int, *given: Tensor | None) -> Call:
    tensors = {name: x for name, x in zip(NAMES, given) if x is not None}
    assert [name in tensors for name in NAMES[3:]] == [form.gate != "none", form.erase, form.initial, form.lookup]
    if "initial" in tensors:
        tensors["initial"] = tensors["initial"].to(torch.float32).contiguous()
    return Call(form, chunk, tensors)


def _fitted(
    what: str, form: LinearForm, chunk: int, given: tuple[Tensor | None, ...], attempt: Callable[[int], R]
) -> R:
    """`attempt` with this chunk, or with a smaller one."""
    q, k, v, *rest = given
    assert q is not None and k is not None and v is not None
    reason = supports(form, q, k, v, *rest)
    largest = MOST_STEPS // 2 if form.erase else MOST_STEPS
    if not SMALLEST <= chunk <= largest or chunk & (chunk - 1):
        reason = f"chunks of {chunk}, which must be a power of two from {SMALLEST} to {largest}"
    if reason is not None:
        raise EngineUnavailable("the triton engine cannot run this", got=reason, todo="use engine='tiled'")
    kind = (what, form, q.shape[2], v.shape[2], q.dtype, k.dtype, v.dtype)
    plan = Plan("triton", "chunked", chunk, chunk, num_stages=1)
    return fitted(kind, plan, q.device, lambda smaller: attempt(smaller.block_k))
