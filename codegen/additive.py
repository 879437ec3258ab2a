"""Running sums of outer products in chunks: what a step adds to the state does not depend on it.

    inside a chunk        out[i] += sum over j <= i of (sum_d q[i,d] k[j,d] exp(gates between j and i)) v[j]
    between chunks        S <- exp(gates of the chunk) * S + sum over j of exp(gates after j) k[j] v[j]^T
    what came before      out[i] += exp(gates up to i) q[i]^T S

All chunks go through each product together; only the states follow one another.
"""

from __future__ import annotations

from torch import Tensor

from refocus.codegen.chunks import (
    Flows,
    GateFlows,
    flow_into,
    flow_of_states,
    gate_flow,
    pairs_of,
    prepare,
    states,
)
from refocus.codegen.linear_form import LinearForm, Operands


def forward(form: LinearForm, chunk: int, given: Operands) -> tuple[Tensor, Tensor]:
    """The output (C, share, T, L, E) and the last state."""
    work = prepare(chunk, given)
    before, final = states(work)
    q, k, v = work.chunks
    out = pairs_of(form, work, form.strict).scores(q, k) @ v
    out += (q * work.decays.into.unsqueeze(1)) @ before.unsqueeze(1)
    return out, final


def last_state(form: LinearForm, chunk: int, given: Operands) -> Tensor:
    return states(prepare(chunk, given))[1]


def backward(form: LinearForm, chunk: int, given: Operands, flow: Tensor, flow_final: Tensor | None) -> Flows:
    """From what flows into the output (B, N, E) and the last state."""
    work = prepare(chunk, given)
    before, _ = states(work)
    decays, (q, k, v), flows = work.decays, work.chunks, flow_into(work, flow)
    pairs = pairs_of(form, work, form.strict)
    weights = pairs.scores(q, k)
    dv = (weights.mT @ flows).sum(1)
    into_weights = flows @ v.mT
    dq, dk = pairs.backward(into_weights, q, k)
    # A state is read by its chunk, and carried on to the next.
    into = decays.into.unsqueeze(1)
    after, first = flow_of_states(((q * into).mT @ flows).sum(1), decays, flow_final)
    keys, values = k.squeeze(1), v.squeeze(1)
    read, written = (flows @ before.unsqueeze(1).mT) * into, (values @ after.mT) * decays.out_of
    dgate = None
    if work.gate is not None:
        passing = (decays.whole * before * after).sum(-1)
        inside = pairs.gates(into_weights, q, k)
        dgate = gate_flow(form, GateFlows(inside, (q * read).sum(1), keys * written, passing))
    dv = dv + (keys * decays.out_of) @ after
    dk = dk.squeeze(1) + written
    return Flows((dq + read).flatten(2, 3), dk.flatten(1, 2), dv.flatten(1, 2), dgate, first)
