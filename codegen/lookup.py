"""States that are looked up by other keys than are written: any change of rank one, in chunks.

    S[t] = a[t] S[t-1] - y[t] u[t]^T + k[t] v[t]^T,     u[t] = S[t-1]^T x[t]        a = exp(gate), x = lookup, y = erase

What is found, u, is what a query x[t] reads one step before its own. Inside a chunk that is a triangular system, solved
once for what the values put there and once for the state before the chunk:

    (1 + L) u = M v + x exp(gates before i) S,     L[i,j] = (x[i] . y[j]) exp(gates between, without i's), j < i
                                                   M[i,j] the same with k[j]

What is left is linear attention to two kinds of keys, k with v for values and -y with u. Its gradients are those of
linear attention for the queries q, and for x with what flows into u, which is the solution of the transposed system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.codegen.chunks import (
    ChannelPairs,
    Flows,
    GateFlows,
    Pairs,
    Work,
    flow_into,
    gate_flow,
    pairs_of,
    prepare,
)
from refocus.codegen.linear_form import LinearForm, Operands


def _earlier(x: Tensor) -> Tensor:
    """Each row of a chunk one step before; zeros at its end."""
    return F.pad(x, (0, 0, -1, 1))


def _later(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


@dataclass(frozen=True)
class _Chunks:
    """Chunks of keys, values, `lookup` and `erase`, (C, T, L, ...). `before`: the decays up to the step before each.
    `ahead`: what is looked up, at the step before. `system` is 1 + L, of which what is below the diagonal is read,
    `weights` is M; u = own + seen @ S."""

    keys: Tensor
    values: Tensor
    lookup: Tensor
    erase: Tensor
    before: Tensor
    among: Pairs | ChannelPairs
    system: Tensor
    weights: Tensor
    own: Tensor
    seen: Tensor

    @property
    def ahead(self) -> Tensor:
        return _earlier(self.lookup).unsqueeze(1)


def _chunks(form: LinearForm, work: Work, given: Operands) -> _Chunks:
    assert given.erase is not None and given.lookup is not None
    keys, values = work.chunked(work.k), work.chunked(work.v)
    rest = work.k.shape[1] - given.erase.shape[1]
    x, y = (work.chunked(F.pad(part.to(work.k.dtype), (0, 0, 0, rest))) for part in (given.lookup, given.erase))
    into, among = work.decays.into, pairs_of(form, work, False)
    before = into if work.gate is None else torch.cat((torch.ones_like(into[:, :, :1]), into[:, :, :-1]), 2)
    ahead = _earlier(x).unsqueeze(1)
    weights, system = (_later(among.scores(ahead, part.unsqueeze(1)).squeeze(1)) for part in (keys, y))
    wanted = torch.cat((weights @ values, before * x), -1)
    found = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    own, seen = found.split((values.shape[-1], keys.shape[-1]), -1)
    return _Chunks(keys, values, x, y, before, among, system, weights, own, seen)


def _states(work: Work, chunks: _Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, u, and the state after the last."""
    count, (heads, _, width), value_width = chunks.keys.shape[1], work.k.shape, work.v.shape[2]
    state = work.k.new_zeros(heads, width, value_width) if work.initial is None else work.initial
    before = work.k.new_empty(heads, count, width, value_width)
    u = torch.empty_like(chunks.own)
    added = (chunks.keys * work.decays.out_of).mT @ chunks.values
    erased = (chunks.erase * work.decays.out_of).mT
    decays = work.decays.spread(heads, count)
    for t in range(count):
        before[:, t] = state
        u[:, t] = torch.baddbmm(chunks.own[:, t], chunks.seen[:, t], state)
        state = decays.passed(t, state, torch.baddbmm(added[:, t], erased[:, t], u[:, t], alpha=-1))
    return before, u, state


def forward(form: LinearForm, chunk: int, given: Operands) -> tuple[Tensor, Tensor]:
    """The output (C, share, T, L, E) and the last state."""
    work = prepare(chunk, given)
    chunks = _chunks(form, work, given)
    before, u, final = _states(work, chunks)
    queries, keys, values = work.chunks
    pairs = pairs_of(form, work, form.strict)
    out = pairs.scores(queries, keys) @ values
    out -= pairs.scores(queries, chunks.erase.unsqueeze(1)) @ u.unsqueeze(1)
    out += (queries * work.decays.into.unsqueeze(1)) @ before.unsqueeze(1)
    return out, final


def last_state(form: LinearForm, chunk: int, given: Operands) -> Tensor:
    work = prepare(chunk, given)
    return _states(work, _chunks(form, work, given))[2]


def backward(form: LinearForm, chunk: int, given: Operands, flow: Tensor, flow_final: Tensor | None) -> Flows:
    """From what flows into the output (B, N, E) and the last state."""
    work = prepare(chunk, given)
    chunks = _chunks(form, work, given)
    before, u, _ = _states(work, chunks)
    flows, decays, (queries, keys, values) = flow_into(work, flow), work.decays, work.chunks
    into, erased, ahead = decays.into.unsqueeze(1), chunks.erase.unsqueeze(1), chunks.ahead
    pairs, among = pairs_of(form, work, form.strict), chunks.among
    direct = -(pairs.scores(queries, erased).mT @ flows).sum(1)
    after, flow_u, first = _flow_of_states(work, chunks, ((queries * into).mT @ flows).sum(1), direct, flow_final)
    flow_ahead = _earlier(flow_u).unsqueeze(1)
    # Of every product of a query and a key: the flow into its weight, and from there into both and into the gates.
    products = (
        (pairs, flows @ values.mT, queries, keys),
        (pairs, -(flows @ u.unsqueeze(1).mT), queries, erased),
        (among, flow_ahead @ values.mT, ahead, keys),
        (among, -(flow_ahead @ u.unsqueeze(1).mT), ahead, erased),
    )
    (dq, dk), (dq_erased, dy), (dx, dk_found), (dx_erased, dy_found) = (
        weighed.backward(*given) for weighed, *given in products
    )
    read = (flows @ before.unsqueeze(1).mT) * into
    found = (flow_u @ before.mT) * chunks.before
    written, taken = ((part @ after.mT) * decays.out_of for part in (chunks.values, -u))
    dq = dq + dq_erased + read
    dk, dy = (dk + dk_found).squeeze(1) + written, (dy + dy_found).squeeze(1) + taken
    dx = _later((dx + dx_erased).squeeze(1)) + found
    dv = (pairs.scores(queries, keys).mT @ flows).sum(1) + chunks.weights.mT @ flow_u
    dv = dv + (chunks.keys * decays.out_of) @ after
    dgate = None
    if work.gate is not None:
        inside = sum(weighed.gates(*given) for weighed, *given in products)
        assert isinstance(inside, Tensor)
        reads = (queries * read).sum(1) + _earlier(chunks.lookup * found)
        writes, passing = chunks.keys * written + chunks.erase * taken, (decays.whole * before * after).sum(-1)
        dgate = gate_flow(form, GateFlows(inside, reads, writes, passing))
    dk, dv, dy, dx = (x.flatten(1, 2) for x in (dk, dv, dy, dx))
    return Flows(dq.flatten(2, 3), dk, dv, dgate, first, erase=dy, lookup=dx)


def _flow_of_states(
    work: Work, chunks: _Chunks, read: Tensor, direct: Tensor, final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What flows into the state after each chunk, into u, and into the first state. `read`: what queries have flow into
    the state before each chunk; `direct`: into u."""
    after, flow_u = torch.empty_like(read), torch.empty_like(direct)
    known = torch.cat((direct, -chunks.erase * work.decays.out_of), -1)
    back = torch.linalg.solve_triangular(chunks.system.mT, known, upper=True, unitriangular=True)
    own, seen = back.split((direct.shape[-1], known.shape[-1] - direct.shape[-1]), -1)
    looked_up = (chunks.lookup * chunks.before).mT
    decays = work.decays.spread(*read.shape[:2])
    carried = torch.zeros_like(read[:, 0]) if final is None else final
    for t in reversed(range(read.shape[1])):
        after[:, t] = carried
        flow_u[:, t] = torch.baddbmm(own[:, t], seen[:, t], carried)
        carried = decays.passed(t, carried, torch.baddbmm(read[:, t], looked_up[:, t], flow_u[:, t]))
    return after, flow_u, carried
