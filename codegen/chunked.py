"""The portable engine of linear attention: `linear_form` in chunks, as matrix products of plain tensors.

    inside a chunk        out[i] += sum over j <= i of (sum_d q[i,d] k[j,d] exp(gates between j and i)) v[j]
    between chunks        S <- exp(gates of the chunk) * S + sum over j of exp(gates after j) k[j] v[j]^T
    what came before      out[i] += exp(gates up to i) q[i]^T S

All chunks go through each product together; only the states follow one another. Time and memory are linear in the
length: one state a chunk is kept while a call lasts, and the backward makes them again. An exponent is always a sum of
gates that stand next to each other, never the difference of two long sums: nothing is divided by a product of decays,
however small, and nothing grows where gates are at most 0.

With a gate for each channel the weights of a chunk do not come apart into one matrix product: of a pair of halves, the
decay is split at the middle, and each half is taken apart again (Yang et al. 2024 call it secondary chunking).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.codegen import delta
from refocus.codegen.linear_form import Grads, LinearForm

# Pairs this close are weighted one by one where every channel has its own decay.
_NEAR = 4


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None,
    erase: Tensor | None = None, initial: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_form.forward` in chunks of `chunk` (a power of two) steps."""
    if form.erase:
        return delta.forward(form, chunk, q, k, v, gate, erase, initial)
    work = _prepare(form, chunk, q, k, v, gate, initial)
    if not form.causal:
        state = work.k.mT @ work.v
        state = state if work.initial is None else state + work.initial
        out, final = work.q @ state[:, None], state
    else:
        before, final = _states(work)
        out = _inside(form, work)
        reach = work.chunked(work.q) * work.decays.into.unsqueeze(1)
        out = (out.view_as(work.chunked(out)) + reach @ before.unsqueeze(1)).view_as(out)
    out = out[:, :, : q.shape[1]].flatten(0, 1)
    width = v.shape[2]
    # What was asked for is memory of its own.
    sums = out[..., width].contiguous() if form.sums else None
    return out[..., :width].to(v.dtype).contiguous(), sums, final[..., :width].contiguous() if form.final else None


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, grads: Grads,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, gate, erase, initial), in the dtypes of these; None where there is none."""
    if form.erase:
        return delta.backward(form, chunk, q, k, v, gate, erase, initial, grads)
    work = _prepare(form, chunk, q, k, v, gate, initial)
    flow, flow_final = _flow(form, work, grads)
    if not form.causal:
        state = work.k.mT @ work.v
        state = state if work.initial is None else state + work.initial
        into = (work.q.mT @ flow).sum(1)  # of the state
        into = into if flow_final is None else into + flow_final
        dq, dk, dv = flow @ state[:, None].mT, work.v @ into.mT, work.k @ into
        return _results(form, work, (q, k, v), (dq, dk, dv, None, into if initial is not None else None))
    before, final = _states(work)
    dq, dk, dv = _inside_backward(form, work, flow)
    decays, flows = work.decays, work.chunked(flow)
    # A state is read by its chunk, and carried on to the next.
    read = ((work.chunked(work.q) * decays.into.unsqueeze(1)).mT @ flows).sum(1)
    after = torch.empty_like(read)
    whole = decays.whole.expand(read.shape[0], read.shape[1], -1, -1)
    carried = torch.zeros_like(read[:, 0]) if flow_final is None else flow_final
    for t in reversed(range(read.shape[1])):
        after[:, t] = carried
        carried = torch.addcmul(read[:, t], whole[:, t], carried)
    dq = dq + ((flows @ before.unsqueeze(1).mT) * decays.into.unsqueeze(1)).view_as(dq)
    keys, values = work.chunked(work.k), work.chunked(work.v)
    dk = dk + ((values @ after.mT) * decays.out_of).view_as(dk)
    dv = dv + ((keys * decays.out_of) @ after).view_as(dv)
    dgate = None
    if gate is not None:
        # d/d(gates up to i): every weight of row i grows with it, every weight of column i shrinks.
        moved = (work.q * dq).sum(1) - work.k * dk
        if flow_final is not None:
            moved[:, q.shape[1] - 1] += (flow_final * final).sum(-1)
        moved = moved.sum(-1) if form.gate == "head" else moved
        moved = moved[:, : q.shape[1]].double()
        dgate = moved.flip(1).cumsum(1).flip(1).to(gate.dtype)
    return _results(form, work, (q, k, v), (dq, dk, dv, dgate, carried if initial is not None else None))


# ---------------------------------------------------------------------------------------------------- preparing


@dataclass(frozen=True)
class _Decays:
    """Of each chunk: from its start up to and with step i; after step j to its end; over all of it. The first two are
    (C, T, L, 1 or D), the last is (C, T, 1 or D, 1), each of size 1 where there is no gate."""

    into: Tensor
    out_of: Tensor
    whole: Tensor


@dataclass(frozen=True)
class _Work:
    """The tensors in the dtype of the state, padded to whole chunks: q (C, share, N, D), k (C, N, D), v (C, N, E) and
    one more column of ones for the sums, gate (C, N) or (C, N, D)."""

    chunk: int
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    initial: Tensor | None
    decays: _Decays
    steady: bool  # the gate is the same at every step

    def chunked(self, x: Tensor) -> Tensor:
        """(..., N, F) as (..., T, L, F)."""
        return x.unflatten(-2, (-1, self.chunk))


def _prepare(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, initial: Tensor | None
) -> _Work:
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    length = k.shape[1]
    chunk = min(chunk, max(_NEAR, 1 << (length - 1).bit_length()))
    rest = -length % chunk if form.causal else 0

    def padded(x: Tensor) -> Tensor:
        x = x.to(wide)
        return F.pad(x, (0, 0, 0, rest)) if rest else x.contiguous()

    if form.sums:
        v = torch.cat((v.to(wide), v.new_ones(v.shape[:2], dtype=wide)[..., None]), -1)
        initial = None if initial is None else F.pad(initial, (0, 1))
    steady = gate is not None and (gate.stride(1) == 0 or length == 1)
    if gate is not None:
        gate = padded(gate[..., None]).squeeze(-1) if gate.dim() == 2 else padded(gate)
    initial = None if initial is None else initial.to(wide)
    share = q.shape[0] // k.shape[0]
    queries = padded(q).unflatten(0, (k.shape[0], share))
    decays = _decays(gate, chunk, wide, k.device) if form.causal else _no_decays(wide, k.device)
    return _Work(chunk, queries, padded(k), padded(v), gate, initial, decays, steady)


def _no_decays(wide: torch.dtype, device: torch.device) -> _Decays:
    one = torch.ones(1, 1, 1, 1, dtype=wide, device=device)
    return _Decays(one, one, one.expand(1, 1, 1, 1))


def _decays(gate: Tensor | None, chunk: int, wide: torch.dtype, device: torch.device) -> _Decays:
    if gate is None:
        return _no_decays(wide, device)
    steps = gate if gate.dim() == 3 else gate[..., None]
    steps = steps.unflatten(1, (-1, chunk))
    into = _up_to(steps, 2)
    return _Decays(into.exp(), _after(steps, 2).exp(), into[:, :, -1, :, None].exp())


def _up_to(steps: Tensor, dim: int) -> Tensor:
    """Sums of the gates from the first up to and with each."""
    return steps.cumsum(dim)


def _after(steps: Tensor, dim: int) -> Tensor:
    """Sums of the gates after each."""
    later = steps.flip(dim).cumsum(dim).flip(dim)
    rest = later.narrow(dim, 1, later.shape[dim] - 1)
    pad = [0, 0] * (steps.dim() - 1 - dim % steps.dim()) + [0, 1]
    return F.pad(rest, pad)


def _flow(form: LinearForm, work: _Work, grads: Grads) -> tuple[Tensor, Tensor | None]:
    """What flows back into the padded output (C, share, N, E) and into the last state, with the column of the sums."""
    out, sums, final = grads
    wide, (heads, share, length, _) = work.q.dtype, work.q.shape
    width = work.v.shape[2] - form.sums
    flow = work.q.new_zeros(heads, share, length, work.v.shape[2])
    for part, grad in ((slice(0, width), out), (slice(width, None), None if sums is None else sums[..., None])):
        if grad is not None:
            flow[:, :, : grad.shape[1], part] = grad.to(wide).unflatten(0, (heads, share))
    if final is not None:
        final = F.pad(final.to(wide), (0, 1)) if form.sums else final.to(wide)
    return flow, final


def _results(
    form: LinearForm, work: _Work, given: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    (q, k, v), (dq, dk, dv, dgate, dinitial) = given, found
    assert dq is not None and dk is not None and dv is not None
    if dinitial is not None and form.sums:
        dinitial = dinitial[..., :-1].contiguous()
    dq = dq[:, :, : q.shape[1]].flatten(0, 1).to(q.dtype)
    dk, dv = dk[:, : k.shape[1]].to(k.dtype), dv[:, : k.shape[1], : v.shape[2]].to(v.dtype)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dgate, None, dinitial


# ---------------------------------------------------------------------------------------------------- states


def _states(work: _Work) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (C, T, D, E), and after the last."""
    added = (work.chunked(work.k) * work.decays.out_of).mT @ work.chunked(work.v)
    state = torch.zeros_like(added[:, 0]) if work.initial is None else work.initial
    before = torch.empty_like(added)
    whole = work.decays.whole.expand(added.shape[0], added.shape[1], -1, -1)
    for t in range(added.shape[1]):
        before[:, t] = state
        state = torch.addcmul(added[:, t], whole[:, t], state)
    return before, state


# ---------------------------------------------------------------------------------------------------- inside a chunk


def _keeps(form: LinearForm, size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if form.strict else 0)


def _pairs(form: LinearForm, work: _Work) -> Tensor:
    """exp(gates between) of each pair of a chunk, 0 where a query does not see a key: (C or 1, T or 1, L, L)."""
    keeps = _keeps(form, work.chunk, work.k.device)
    if work.gate is None:
        return keeps.to(work.k.dtype)[None, None]
    steps = work.gate[:, : work.chunk] if work.steady else work.gate
    # In float64, the difference of two sums over one chunk is as good as the sum between them in float32.
    sums = _up_to(steps.unflatten(1, (-1, work.chunk)).double(), 2)
    between = (sums[..., :, None] - sums[..., None, :]).to(work.k.dtype)
    return between.masked_fill_(~keeps, -torch.inf).exp_()


def _inside(form: LinearForm, work: _Work) -> Tensor:
    if form.gate == "channel":
        out = work.q.new_zeros(*work.q.shape[:3], work.v.shape[2])
        for halves in _halves(work):
            halves.second(out).add_(halves.weights @ halves.values)
        near = _near(form, work)
        near.cut(out).add_(near.weights @ near.values)
        return out
    weights = work.chunked(work.q) @ work.chunked(work.k).mT.unsqueeze(1)
    weights.mul_(_pairs(form, work).unsqueeze(1))
    return (weights @ work.chunked(work.v).unsqueeze(1)).flatten(2, 3)


def _inside_backward(form: LinearForm, work: _Work, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if form.gate == "channel":
        return _channels_backward(form, work, flow)
    pairs = _pairs(form, work).unsqueeze(1)
    q, k, v, flows = (work.chunked(x) for x in (work.q, work.k, work.v, flow))
    k, v = k.unsqueeze(1), v.unsqueeze(1)
    weights = (q @ k.mT).mul_(pairs)
    into = (flows @ v.mT).mul_(pairs)
    dq = (into @ k).flatten(2, 3)
    dk = (into.mT @ q).sum(1).flatten(1, 2)
    dv = (weights.mT @ flows).sum(1).flatten(1, 2)
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------- channel gates


@dataclass(frozen=True)
class _Halves:
    """Blocks of 2h steps: queries of the second half against keys of the first, the decay split at the middle."""

    half: int
    queries: Tensor  # (C, share, M, h, D), decayed from the middle
    keys: Tensor  # (C, 1, M, h, D), decayed up to the middle
    values: Tensor  # (C, 1, M, h, E)
    later: Tensor
    earlier: Tensor

    @property
    def weights(self) -> Tensor:
        return self.queries @ self.keys.mT

    def second(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, 2, self.half))[..., 1, :, :]

    def first(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, 2, self.half))[..., 0, :, :]


def _halves(work: _Work) -> Iterator[_Halves]:
    assert work.gate is not None
    half = work.chunk // 2
    while half >= _NEAR:
        steps = work.gate.unflatten(1, (-1, 2, half))
        later = _up_to(steps[:, :, 1], 2).exp().unsqueeze(1)
        earlier = _after(steps[:, :, 0], 2).exp().unsqueeze(1)
        q, k, v = (x.unflatten(-2, (-1, 2, half)) for x in (work.q, work.k.unsqueeze(1), work.v.unsqueeze(1)))
        yield _Halves(half, q[..., 1, :, :] * later, k[..., 0, :, :] * earlier, v[..., 0, :, :], later, earlier)
        half //= 2


@dataclass(frozen=True)
class _Near:
    """Blocks of a few steps, each pair with its decay for each channel."""

    queries: Tensor  # (C, share, M, s, D)
    keys: Tensor
    values: Tensor
    decays: Tensor  # (C, 1, M, s, s, D)

    @property
    def weights(self) -> Tensor:
        return torch.einsum("cgmid,czmjd,czmijd->cgmij", self.queries, self.keys, self.decays)

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (-1, _NEAR))


def _near(form: LinearForm, work: _Work) -> _Near:
    assert work.gate is not None
    steps = work.gate.unflatten(1, (-1, _NEAR))
    # between[i, j]: the gates after j, up to and with i
    later = torch.ones(_NEAR, _NEAR, dtype=torch.bool, device=steps.device).tril(-1)
    between = torch.where(later[..., None], steps[:, :, :, None, :], 0.0).cumsum(2)
    between = between.masked_fill_(~_keeps(form, _NEAR, steps.device)[..., None], -torch.inf).exp_()
    q, k, v = (x.unflatten(-2, (-1, _NEAR)) for x in (work.q, work.k.unsqueeze(1), work.v.unsqueeze(1)))
    return _Near(q, k, v, between.unsqueeze(1))


def _channels_backward(form: LinearForm, work: _Work, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(work.q), torch.zeros_like(work.k), torch.zeros_like(work.v)
    for halves in _halves(work):
        flows = halves.second(flow)
        into = flows @ halves.values.mT
        halves.second(dq).add_((into @ halves.keys) * halves.later)
        halves.first(dk).add_(((into.mT @ halves.queries) * halves.earlier).sum(1))
        halves.first(dv).add_((halves.weights.mT @ flows).sum(1))
    near = _near(form, work)
    flows = near.cut(flow)
    into = flows @ near.values.mT
    near.cut(dq).add_(torch.einsum("cgmij,czmjd,czmijd->cgmid", into, near.keys, near.decays))
    near.cut(dk).add_(torch.einsum("cgmij,cgmid,czmijd->cmjd", into, near.queries, near.decays))
    near.cut(dv).add_((near.weights.mT @ flows).sum(1))
    return dq, dk, dv
