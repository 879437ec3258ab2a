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
    GateFlows,
    Pairs,
    Work,
    flow_into,
    gate_flow,
    pairs_of,
    prepare,
    results,
)
from refocus.codegen.linear_form import Grads, LinearForm


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


def _chunks(form: LinearForm, work: Work, erase: Tensor, lookup: Tensor) -> _Chunks:
    keys, values = work.chunked(work.k), work.chunked(work.v)
    rest = work.k.shape[1] - erase.shape[1]
    x, y = (work.chunked(F.pad(part.to(work.k.dtype), (0, 0, 0, rest))) for part in (lookup, erase))
    into, among = work.decays.into, pairs_of(form, work, False)
    before = into if into.shape[2] == 1 else torch.cat((torch.ones_like(into[:, :, :1]), into[:, :, :-1]), 2)
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


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_form.forward` of a form that looks up other keys."""
    assert erase is not None and lookup is not None
    work = prepare(form, chunk, q, k, v, gate, initial)
    chunks = _chunks(form, work, erase, lookup)
    before, u, final = _states(work, chunks)
    queries, keys, values = work.chunks
    pairs = pairs_of(form, work, form.strict)
    out = pairs.scores(queries, keys) @ values
    out -= pairs.scores(queries, chunks.erase.unsqueeze(1)) @ u.unsqueeze(1)
    out += (queries * work.decays.into.unsqueeze(1)) @ before.unsqueeze(1)
    out = out.flatten(2, 3)[:, :, : q.shape[1]].flatten(0, 1)
    return out.to(v.dtype).contiguous(), None, final.contiguous() if form.final else None


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None, grads: Grads,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`linear_form.backward` of a form that looks up other keys."""
    assert erase is not None and lookup is not None
    work = prepare(form, chunk, q, k, v, gate, initial)
    chunks = _chunks(form, work, erase, lookup)
    before, u, _ = _states(work, chunks)
    flow, flow_final = flow_into(form, work, grads)
    flows, decays, (queries, keys, values) = work.chunked(flow), work.decays, work.chunks
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
    if gate is not None:
        inside = sum(weighed.gates(*given) for weighed, *given in products)
        assert isinstance(inside, Tensor)
        reads = (queries * read).sum(1) + _earlier(chunks.lookup * found)
        writes, passing = chunks.keys * written + chunks.erase * taken, (decays.whole * before * after).sum(-1)
        dgate = gate_flow(form, work, GateFlows(inside, reads, writes, passing), gate)
    dq, dk, dv = dq.flatten(2, 3), dk.flatten(1, 2), dv.flatten(1, 2)
    found_all = results(form, work, (q, k, v), (dq, dk, dv, dgate, first if initial is not None else None))
    of_steps = (x.flatten(1, 2)[:, : k.shape[1]] for x in (dy, dx))
    derase, dlookup = (x.to(given.dtype).contiguous() for x, given in zip(of_steps, (erase, lookup)))
    return (*found_all[:4], derase, found_all[5], dlookup)


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
