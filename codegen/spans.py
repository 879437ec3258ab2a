"""A long sequence as spans of chunks, one after the other: only the state goes on from one to the next.

    forward     out[span], S <- the chunks of the span, begun with S
    backward    the states at which spans begin first; then the spans from the last to the first, what flows into the
                state going on

What a call keeps beside its results is one span's, however long the sequence: it stays in the caches, and in memory
that the C allocator keeps instead of mapping it anew for each tensor. A normaliser's sums are what one more column of
the values, of ones, comes to; the state carries it as it carries the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.codegen.chunks import Flows
from refocus.codegen.linear_form import Grads, LinearForm, Operands, state_dtype

_MOST = 1 << 20  # elements of a tensor of one span


class Recurrence(Protocol):
    """One way in which a state changes (`additive`, `delta`, `lookup`), in chunks."""

    def forward(self, form: LinearForm, chunk: int, given: Operands) -> tuple[Tensor, Tensor]: ...

    def last_state(self, form: LinearForm, chunk: int, given: Operands) -> Tensor: ...

    def backward(
        self, form: LinearForm, chunk: int, given: Operands, flow: Tensor, flow_final: Tensor | None
    ) -> Flows: ...


def forward(
    recurrence: Recurrence, form: LinearForm, chunk: int, given: Operands
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`linear_form.forward` of a causal form."""
    (rows, length, _), width = given.q.shape, given.v.shape[2]
    out = given.v.new_empty(rows, length, width)
    sums = out.new_empty(rows, length, dtype=state_dtype(given.q, given.k, given.v)) if form.sums else None
    state = _first_state(form, given)
    for at in _spans(chunk, given):
        found, state = recurrence.forward(form, chunk, _part(form, given, at, state))
        found = found.flatten(0, 1).flatten(1, 2)[:, : at.stop - at.start]
        out[:, at] = found[..., :width]
        if sums is not None:
            sums[:, at] = found[..., width]
    if not form.final:
        return out, sums, None
    # What was asked for is memory of its own.
    wide = state_dtype(given.q, given.k, given.v)
    none = given.k.new_zeros(given.k.shape[0], given.k.shape[2], width, dtype=wide)
    final = none if state is None else state[..., :width].clone(memory_format=torch.contiguous_format)
    return out, sums, final


def backward(
    recurrence: Recurrence, form: LinearForm, chunk: int, given: Operands, grads: Grads
) -> tuple[Tensor | None, ...]:
    """`linear_form.backward` of a causal form."""
    spans, states = _spans(chunk, given), [_first_state(form, given)]
    for at in spans[:-1]:
        states.append(recurrence.last_state(form, chunk, _part(form, given, at, states[-1])))
    flow_state = None if grads[2] is None else _widened(form, grads[2], 0.0)
    operands = (given.q, given.k, given.v, given.gate, given.erase, given.lookup)
    found = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in operands]
    for at, state in zip(reversed(spans), reversed(states)):  # of nothing, no spans
        flow = _flow(form, given, grads, at)
        flows = recurrence.backward(form, chunk, _part(form, given, at, state), flow, flow_state)
        into = (flows.q.flatten(0, 1), flows.k, flows.v, flows.gate, flows.erase, flows.lookup)
        for whole, part in zip(found, into, strict=True):
            if whole is not None and part is not None:
                part = part[:, : at.stop - at.start]
                whole[:, at] = part[..., : whole.shape[2]] if whole.dim() == 3 else part
        flow_state = flows.initial
    dq, dk, dv, dgate, derase, dlookup = found
    initial = given.initial
    if initial is None or flow_state is None:
        return dq, dk, dv, dgate, derase, None, dlookup
    dinitial = flow_state[..., : initial.shape[2]].to(initial.dtype).contiguous()
    return dq, dk, dv, dgate, derase, dinitial, dlookup


def _spans(chunk: int, given: Operands) -> Sequence[slice]:
    """Whole chunks, of spans as equal as can be."""
    length, width = given.k.shape[1], max(given.k.shape[2], given.v.shape[2], chunk)
    if 0 in (*given.q.shape[:2], given.k.shape[0]):  # an empty batch, no heads that read, or no steps
        return []
    chunks = max(-(-length // chunk), 1)
    most = max(_MOST // (given.q.shape[0] * width * chunk), 1)
    each = -(-chunks // -(-chunks // most)) * chunk
    return [slice(first, min(first + each, length)) for first in range(0, length, each)]


def _part(form: LinearForm, given: Operands, at: slice, state: Tensor | None) -> Operands:
    """A span of the operands, and the state before it."""
    gate, erase, lookup = (None if x is None else x[:, at] for x in (given.gate, given.erase, given.lookup))
    values = _widened(form, given.v[:, at], 1.0)
    return Operands(given.q[:, at], given.k[:, at], values, gate, erase, state, lookup)


def _first_state(form: LinearForm, given: Operands) -> Tensor | None:
    return None if given.initial is None else _widened(form, given.initial, 0.0)


def _widened(form: LinearForm, x: Tensor, value: float) -> Tensor:
    return F.pad(x, (0, 1), value=value) if form.sums else x


def _flow(form: LinearForm, given: Operands, grads: Grads, at: slice) -> Tensor:
    """What flows into the output of a span and its sums, (B, n, E or E + 1)."""
    (rows, _, _), width = given.q.shape, given.v.shape[2]
    out, sums, _ = (None if x is None else x[:, at] for x in (*grads[:2], None))
    if out is not None and not form.sums:
        return out
    wide = state_dtype(given.q, given.k, given.v)
    flow = given.q.new_zeros(rows, at.stop - at.start, width + form.sums, dtype=wide)
    if out is not None:
        flow[..., :width] = out
    if sums is not None:
        flow[..., width] = sums
    return flow
