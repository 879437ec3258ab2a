"""Linear attention in which every query sees every key: three products, with no chunks and no gates."""

from __future__ import annotations

from torch import Tensor

from refocus.codegen.linear_form import Grads, LinearForm, Operands, state_dtype


def forward(form: LinearForm, given: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`linear_form.forward` of a form that is not causal."""
    q, k, _, state = _products(given)
    out = (q @ state).reshape(*given.q.shape[:2], given.v.shape[2]).to(given.v.dtype)
    sums = (q @ k.sum(1)[..., None]).reshape(given.q.shape[:2]) if form.sums else None
    return out, sums, state if form.final else None


def backward(form: LinearForm, given: Operands, grads: Grads) -> tuple[Tensor | None, ...]:
    """`linear_form.backward` of a form that is not causal."""
    q, k, v, state = _products(given)
    out, sums, final = (None if x is None else x.to(q.dtype) for x in grads)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    into = state.new_zeros(state.shape) if final is None else final
    if out is not None:
        flow = out.reshape(q.shape[0], q.shape[1], v.shape[2])
        dq += flow @ state.mT
        into = into + q.mT @ flow
    if sums is not None:
        flow = sums.reshape(q.shape[0], q.shape[1], 1)
        dq += flow * k.sum(1)[:, None]
        dk += (q * flow).sum(1)[:, None]
    dk += v @ into.mT
    dv += k @ into
    initial = None if given.initial is None else into.to(given.initial.dtype)
    dq = dq.reshape(given.q.shape).to(given.q.dtype)
    return dq, dk.to(given.k.dtype), dv.to(given.v.dtype), None, None, initial, None


def _products(given: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the dtype of the state: the queries of each key head in one, (C, share N, D), keys, values, the state."""
    wide = state_dtype(given.q, given.k, given.v)
    q, k, v = (x.to(wide) for x in (given.q, given.k, given.v))
    state = k.mT @ v
    state = state if given.initial is None else state + given.initial.to(wide)
    share = q.shape[0] // max(k.shape[0], 1)
    return q.reshape(k.shape[0], share * q.shape[1], q.shape[2]), k, v, state
