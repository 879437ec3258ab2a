"""The portable engine of linear attention: `linear_form` in chunks, as matrix products of plain tensors.

    inside a chunk        out[i] += sum over j <= i of (sum_d q[i,d] k[j,d] exp(gates between j and i)) v[j]
    between chunks        S <- exp(gates of the chunk) * S + sum over j of exp(gates after j) k[j] v[j]^T
    what came before      out[i] += exp(gates up to i) q[i]^T S

All chunks go through each product together; only the states follow one another. Time and memory are linear in the
length: one state a chunk is kept while a call lasts, and the backward makes them again. See `chunks` for the decays.
Long sequences go through one head after the other: their tensors are then of a size that stays in the caches, and that
the C allocator keeps instead of mapping it anew for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refocus.codegen import delta
from refocus.codegen import lookup as lookups
from refocus.codegen.chunks import GateFlows, flow_into, flow_of_states, gate_flow, pairs_of, prepare, results, states
from refocus.codegen.linear_form import Grads, LinearForm

_MOST = 1 << 22  # elements of a tensor that several heads share


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None,
    erase: Tensor | None = None, initial: Tensor | None = None, lookup: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_form.forward` in chunks of `chunk` (a power of two) steps."""
    heads, share = k.shape[0], q.shape[0] // max(k.shape[0], 1)
    together = max(_MOST // max(share * k.shape[1] * max(k.shape[2], v.shape[2], chunk), 1), 1)
    if heads <= together:
        return _heads(form, chunk, q, k, v, gate, erase, initial, lookup)
    found = []
    for first in range(0, heads, together):
        given = (None if x is None else x[first : first + together] for x in (gate, erase, initial, lookup))
        own, queries = slice(first, first + together), slice(first * share, (first + together) * share)
        found.append(_heads(form, chunk, q[queries], k[own], v[own], *given))
    outs, sums, finals = zip(*found)
    return torch.cat(outs), torch.cat(sums) if form.sums else None, torch.cat(finals) if form.final else None


def _heads(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    if form.lookup:
        return lookups.forward(form, chunk, q, k, v, gate, erase, initial, lookup)
    if form.erase:
        return delta.forward(form, chunk, q, k, v, gate, erase, initial)
    work = prepare(form, chunk, q, k, v, gate, initial)
    if not form.causal:
        state = work.k.mT @ work.v
        state = state if work.initial is None else state + work.initial
        out, final = work.q @ state[:, None], state
    else:
        before, final = states(work)
        q_, k_, v_ = work.chunks
        out = pairs_of(form, work, form.strict).scores(q_, k_) @ v_
        out += (q_ * work.decays.into.unsqueeze(1)) @ before.unsqueeze(1)
        out = out.flatten(2, 3)
    out = out[:, :, : q.shape[1]].flatten(0, 1)
    width = v.shape[2]
    # What was asked for is memory of its own.
    sums = out[..., width].contiguous() if form.sums else None
    return out[..., :width].to(v.dtype).contiguous(), sums, final[..., :width].contiguous() if form.final else None


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None, grads: Grads,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, gate, erase, initial, lookup), in the dtypes of these; None where there is none."""
    if form.lookup:
        return lookups.backward(form, chunk, q, k, v, gate, erase, initial, lookup, grads)
    if form.erase:
        return delta.backward(form, chunk, q, k, v, gate, erase, initial, grads)
    work = prepare(form, chunk, q, k, v, gate, initial)
    flow, flow_final = flow_into(form, work, grads)
    if not form.causal:
        state = work.k.mT @ work.v
        state = state if work.initial is None else state + work.initial
        into = (work.q.mT @ flow).sum(1)  # of the state
        into = into if flow_final is None else into + flow_final
        dq, dk, dv = flow @ state[:, None].mT, work.v @ into.mT, work.k @ into
        return results(form, work, (q, k, v), (dq, dk, dv, None, into if initial is not None else None))
    before, _ = states(work)
    decays, (q_, k_, v_), flows = work.decays, work.chunks, work.chunked(flow)
    pairs = pairs_of(form, work, form.strict)
    weights = pairs.scores(q_, k_)
    dv = (weights.mT @ flows).sum(1)
    into_weights = flows @ v_.mT
    dq, dk = pairs.backward(into_weights, q_, k_)
    # A state is read by its chunk, and carried on to the next.
    into = decays.into.unsqueeze(1)
    after, carried = flow_of_states(((q_ * into).mT @ flows).sum(1), decays, flow_final)
    keys, values = k_.squeeze(1), v_.squeeze(1)
    read, written = (flows @ before.unsqueeze(1).mT) * into, (values @ after.mT) * decays.out_of
    dgate = None
    if gate is not None:
        passing = (decays.whole * before * after).sum(-1)
        inside = pairs.gates(into_weights, q_, k_)
        dgate = gate_flow(form, work, GateFlows(inside, (q_ * read).sum(1), keys * written, passing), gate)
    dq, dk = (dq + read).flatten(2, 3), (dk.squeeze(1) + written).flatten(1, 2)
    dv = (dv + (keys * decays.out_of) @ after).flatten(1, 2)
    return results(form, work, (q, k, v), (dq, dk, dv, dgate, carried if initial is not None else None))
