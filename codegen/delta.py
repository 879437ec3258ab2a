"""The delta rule in chunks: what a step adds to the state depends on the state itself.

    S[t] = a[t] S[t-1] + k[t] u[t]^T,     u[t] = b[t] (v[t] - (a[t] S[t-1])^T k[t])          a = exp(gate), b = erase

Inside a chunk the u depend on one another by a lower triangular matrix, so that one triangular solve gives them all, as
a part of their own and a part that reads the state before the chunk (the WY form of Yang et al. 2024):

    (1 + L) u = b v - b exp(gates up to i) k S,     L[i,j] = b[i] (k[i] . k[j]) exp(gates between), j < i

What is left is the linear form with u for values, chunk after chunk.
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


@dataclass(frozen=True)
class _Chunks:
    """A delta rule's chunks: keys (C, T, L, D), `erase` (C, T, L, 1), `between` the products of keys (C, T, L, L), and
    the solution: u = own - seen @ S."""

    keys: Tensor
    values: Tensor
    erase: Tensor
    among: Pairs | ChannelPairs
    between: Tensor
    own: Tensor
    seen: Tensor

    @property
    def system(self) -> Tensor:
        """1 + L; only what is below its diagonal is read."""
        return self.erase * self.between


def _chunks(form: LinearForm, work: Work, given: Operands) -> _Chunks:
    assert given.erase is not None
    keys, values = work.chunked(work.k), work.chunked(work.v)
    rest = work.k.shape[1] - given.erase.shape[1]
    erase = work.chunked(F.pad(given.erase.to(work.k.dtype), (0, rest))[..., None])
    among = pairs_of(form, work, True)
    between = among.scores(keys.unsqueeze(1), keys.unsqueeze(1)).squeeze(1)
    wanted = torch.cat((erase * values, erase * work.decays.into * keys), -1)
    found = torch.linalg.solve_triangular(erase * between, wanted, upper=False, unitriangular=True)
    own, seen = found.split((values.shape[-1], keys.shape[-1]), -1)
    return _Chunks(keys, values, erase, among, between, own, seen)


def _states(work: Work, chunks: _Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, u, and the state after the last."""
    count, (heads, _, width), value_width = chunks.keys.shape[1], work.k.shape, work.v.shape[2]
    state = work.k.new_zeros(heads, width, value_width) if work.initial is None else work.initial
    before = work.k.new_empty(heads, count, width, value_width)
    u = torch.empty_like(chunks.own)
    added = (chunks.keys * work.decays.out_of).mT
    decays = work.decays.spread(heads, count)
    for t in range(count):
        before[:, t] = state
        u[:, t] = torch.baddbmm(chunks.own[:, t], chunks.seen[:, t], state, alpha=-1)
        state = decays.passed(t, state, added[:, t] @ u[:, t])
    return before, u, state


def forward(form: LinearForm, chunk: int, given: Operands) -> tuple[Tensor, Tensor]:
    """The output (C, share, T, L, E) and the last state."""
    work = prepare(chunk, given)
    before, u, final = _states(work, _chunks(form, work, given))
    queries, keys, _ = work.chunks
    out = pairs_of(form, work, form.strict).scores(queries, keys) @ u.unsqueeze(1)
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
    flows, decays, (queries, keys_, _) = flow_into(work, flow), work.decays, work.chunks
    keys, into = chunks.keys, decays.into.unsqueeze(1)
    pairs = pairs_of(form, work, form.strict)
    du = (pairs.scores(queries, keys_).mT @ flows).sum(1)
    into_weights = flows @ u.unsqueeze(1).mT
    dq, dk = pairs.backward(into_weights, queries, keys_)
    read = (flows @ before.unsqueeze(1).mT) * into
    after, first = _flow_of_states(work, chunks, ((queries * into).mT @ flows).sum(1), du, flow_final)
    written = (u @ after.mT) * decays.out_of
    # u = own - seen @ S, both out of one solve: its transpose takes the gradients back.
    known = torch.cat((du, -du @ before.mT), -1)
    back = torch.linalg.solve_triangular(chunks.system.mT, known, upper=True, unitriangular=True)
    dsystem = -(back @ torch.cat((chunks.own, chunks.seen), -1).mT)
    back_v, back_k = back.split((u.shape[-1], keys.shape[-1]), -1)
    dbetween = (chunks.erase * dsystem).unsqueeze(1)
    first_key, second_key = chunks.among.backward(dbetween, keys_, keys_)
    seen = chunks.erase * decays.into * back_k
    dk = (dk + first_key + second_key).squeeze(1) + written + seen
    derase = (dsystem.tril(-1) * chunks.between).sum(-1) + (back_v * chunks.values).sum(-1)
    derase = (derase + (back_k * decays.into * keys).sum(-1)).flatten(1, 2)
    dgate = None
    if work.gate is not None:
        inside = pairs.gates(into_weights, queries, keys_) + chunks.among.gates(dbetween, keys_, keys_)
        reads, passing = (queries * read).sum(1) + keys * seen, (decays.whole * before * after).sum(-1)
        dgate = gate_flow(form, GateFlows(inside, reads, keys * written, passing))
    dv = (chunks.erase * back_v).flatten(1, 2)
    return Flows((dq + read).flatten(2, 3), dk.flatten(1, 2), dv, dgate, first, erase=derase)


def _flow_of_states(
    work: Work, chunks: _Chunks, read: Tensor, du: Tensor, final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What flows into the state after each chunk, and into the first; what flows into u through the states is added to
    `du`."""
    after = torch.empty_like(read)
    added = chunks.keys * work.decays.out_of
    decays = work.decays.spread(*read.shape[:2])
    carried = torch.zeros_like(read[:, 0]) if final is None else final
    for t in reversed(range(read.shape[1])):
        after[:, t] = carried
        du[:, t] += added[:, t] @ carried
        carried = torch.baddbmm(
            decays.passed(t, carried, read[:, t]), chunks.seen[:, t].mT, du[:, t], alpha=-1
        )  # fmt: skip
    return after, carried
