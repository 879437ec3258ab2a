"""A linear attention cut into chunks of steps: its tensors, their decays, states between chunks, pairs inside them.

An exponent is always a sum of gates that stand next to each other, never the difference of two long sums: nothing is
divided by a product of decays, however small, and nothing grows where gates are at most 0.

With a gate for each channel the weights of a chunk are no one matrix product: of a pair of halves, the decay is split
at the middle, and each half is taken apart again (Yang et al. 2024 call it secondary chunking).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.codegen.linear_form import LinearForm, Operands, state_dtype

# Pairs this close are weighted one by one where every channel has its own decay.
_NEAR = 4


def gate_flow(form: LinearForm, flows: GateFlows) -> Tensor | None:
    """What flows into the gates: a gate is in the weight of every pair on both sides of it. Summed as such, chunk by
    chunk, and not as the difference of what flows to queries and to keys, which all but cancels."""
    reads, writes, passing = flows.reads, flows.writes, flows.passing
    if form.gate == "head":
        reads, writes, passing = reads.sum(-1), writes.sum(-1), passing.sum(-1)
    found = flows.inside + reads.flip(2).cumsum(2).flip(2) + (writes.cumsum(2) - writes) + passing.unsqueeze(2)
    return found.flatten(1, 2)


@dataclass(frozen=True)
class GateFlows:
    """What the gates of a chunk are in: weights of pairs `inside` it, (C, T, L) or (C, T, L, D), by gate; what queries
    read of the state before it and keys write to the one after it, (C, T, L, D), by step; what passes, (C, T, D)."""

    inside: Tensor
    reads: Tensor
    writes: Tensor
    passing: Tensor


# ---------------------------------------------------------------------------------------------------- preparing


@dataclass(frozen=True)
class Decays:
    """Of each chunk: from its start up to and with step i; after step j to its end; over all of it. The first two are
    (C, T, L, 1 or D), the last is (C, T, 1 or D, 1), each of size 1 where there is no gate.

    `whole` is also `most` + `rest`, with 1 for `most` where little is lost: of a decay that is nearly 1, rounded, every
    chunk would lose as much too little or too much, and over many chunks that adds up."""

    into: Tensor
    out_of: Tensor
    whole: Tensor
    most: Tensor
    rest: Tensor

    def spread(self, heads: int, chunks: int) -> Decays:
        """`most` and `rest` for each head and chunk."""
        most, rest = (x.expand(heads, chunks, -1, -1) for x in (self.most, self.rest))
        return Decays(self.into, self.out_of, self.whole, most, rest)

    def passed(self, chunk: int, state: Tensor, added: Tensor) -> Tensor:
        """What is left of a state after a chunk (or the flow into it, before), and what is added."""
        return torch.addcmul(torch.addcmul(added, self.rest[:, chunk], state), self.most[:, chunk], state)


@dataclass(frozen=True)
class Work:
    """The tensors in the dtype of the state, padded to whole chunks: q (C, share, N, D), k (C, N, D), v (C, N, E), gate
    (C, N) or (C, N, D)."""

    chunk: int
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    initial: Tensor | None
    decays: Decays
    steady: bool  # the gate is the same at every step

    def chunked(self, x: Tensor) -> Tensor:
        """(..., N, F) as (..., T, L, F)."""
        return x.unflatten(-2, (-1, self.chunk))

    @property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (C, share, T, L, D), k (C, 1, T, L, D) and v (C, 1, T, L, E)."""
        return self.chunked(self.q), self.chunked(self.k).unsqueeze(1), self.chunked(self.v).unsqueeze(1)


@dataclass(frozen=True)
class Flows:
    """What flows back into the operands, padded to whole chunks: as they are, with q (C, share, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    initial: Tensor
    erase: Tensor | None = None
    lookup: Tensor | None = None


def prepare(chunk: int, given: Operands) -> Work:
    wide, (heads, length, _), gate = state_dtype(given.q, given.k, given.v), given.k.shape, given.gate
    chunk = min(chunk, max(_NEAR, 1 << (length - 1).bit_length()))
    rest = -length % chunk

    def padded(x: Tensor) -> Tensor:
        x = x.to(wide)
        return F.pad(x, (0, 0, 0, rest)) if rest else x.contiguous()

    steady = gate is not None and (gate.stride(1) == 0 or length == 1)
    if gate is not None:
        gate = padded(gate[..., None]).squeeze(-1) if gate.dim() == 2 else padded(gate)
    initial = None if given.initial is None else given.initial.to(wide)
    queries = padded(given.q).unflatten(0, (heads, -1))
    decays = _decays(gate, chunk, wide, given.k.device)
    return Work(chunk, queries, padded(given.k), padded(given.v), gate, initial, decays, steady)


def _no_decays(wide: torch.dtype, device: torch.device) -> Decays:
    one = torch.ones(1, 1, 1, 1, dtype=wide, device=device)
    return Decays(one, one, one, one, torch.zeros_like(one))


def _decays(gate: Tensor | None, chunk: int, wide: torch.dtype, device: torch.device) -> Decays:
    if gate is None:
        return _no_decays(wide, device)
    steps = gate if gate.dim() == 3 else gate[..., None]
    steps = steps.unflatten(1, (-1, chunk))
    into = _up_to(steps, 2)
    last = into[:, :, -1, :, None]
    whole = last.exp()
    near = whole > 0.5
    return Decays(into.exp(), _after(steps, 2).exp(), whole, near.to(wide), torch.where(near, last.expm1(), whole))


def _up_to(steps: Tensor, dim: int) -> Tensor:
    """Sums of the gates from the first up to and with each."""
    return steps.cumsum(dim)


def _after(steps: Tensor, dim: int) -> Tensor:
    """Sums of the gates after each."""
    later = steps.flip(dim).cumsum(dim).flip(dim)
    rest = later.narrow(dim, 1, later.shape[dim] - 1)
    pad = [0, 0] * (steps.dim() - 1 - dim % steps.dim()) + [0, 1]
    return F.pad(rest, pad)


def flow_into(work: Work, flow: Tensor) -> Tensor:
    """What flows back into the output (B, N, E), in chunks: (C, share, T, L, E)."""
    heads, share, length, _ = work.q.shape
    padded = F.pad(flow.to(work.q.dtype), (0, 0, 0, length - flow.shape[1]))
    return work.chunked(padded.unflatten(0, (heads, share)))


# ---------------------------------------------------------------------------------------------------- states


def states(work: Work) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (C, T, D, E), and after the last."""
    added = (work.chunked(work.k) * work.decays.out_of).mT @ work.chunked(work.v)
    state = torch.zeros_like(added[:, 0]) if work.initial is None else work.initial
    before = torch.empty_like(added)
    decays = work.decays.spread(*added.shape[:2])
    for t in range(added.shape[1]):
        before[:, t] = state
        state = decays.passed(t, state, added[:, t])
    return before, state


def flow_of_states(read: Tensor, decays: Decays, final: Tensor | None) -> tuple[Tensor, Tensor]:
    """What flows into the state after each chunk, and into the first: from `read`, what flows from each chunk into the
    state before it, (C, T, D, E)."""
    after = torch.empty_like(read)
    decays = decays.spread(*read.shape[:2])
    carried = torch.zeros_like(read[:, 0]) if final is None else final
    for t in reversed(range(read.shape[1])):
        after[:, t] = carried
        carried = decays.passed(t, carried, read[:, t])
    return after, carried


# ---------------------------------------------------------------------------------------------------- inside a chunk


def keeps(size: int, strict: bool, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


@dataclass(frozen=True)
class Pairs:
    """How the pairs of a chunk are weighted, one number a pair: (C or 1, 1, T or 1, L, L), 0 where a query does not
    see a key; there, products may be infinite, and are left out all the same."""

    decays: Tensor
    strict: bool

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Decayed products of chunks of queries (C, share, T, L, D) and keys (C, 1, T, L, D)."""
        return (q @ k.mT).mul_(self.decays).tril_(-int(self.strict))

    def backward(self, grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What flows into the queries and keys."""
        grad = grad * self.decays
        return grad @ k, (grad.mT @ q).sum(1, keepdim=True)

    def gates(self, grad: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """What flows into the gates: for each, the pairs with the key before it and the query not."""
        weights = (grad * self.scores(q, k)).sum(1)
        return weights.flip(2).cumsum(2).flip(2).tril(-1).sum(-1)


@dataclass(frozen=True)
class ChannelPairs:
    """The same where each channel decays by itself: the sums over channels of q k exp(gates between)."""

    steps: Tensor  # gates (C, 1, T, L, D)
    strict: bool

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """As `Pairs.scores`: blocks of queries of a second half against keys of the first, then what is near."""
        out = q.new_zeros(*q.shape[:3], q.shape[3], q.shape[3])
        for half, later, earlier in self._levels():
            queries, keys = (x.unflatten(3, (-1, 2, half)) for x in (q, k))
            block = (queries[..., 1, :, :] * later) @ (keys[..., 0, :, :] * earlier).mT
            _blocks(out, 2 * half)[..., half:, :half] = block
        queries, keys, decays = self._near(q, k)
        _blocks(out, _NEAR)[...] = torch.einsum("cgtmid,cztmjd,cztmijd->cgtmij", queries, keys, decays)
        return out

    def backward(self, grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for half, later, earlier in self._levels():
            queries, keys, into_q, into_k = (x.unflatten(3, (-1, 2, half)) for x in (q, k, dq, dk))
            block = _blocks(grad, 2 * half)[..., half:, :half]
            into_q[..., 1, :, :] += (block @ (keys[..., 0, :, :] * earlier)) * later
            into_k[..., 0, :, :] += ((block.mT @ (queries[..., 1, :, :] * later)) * earlier).sum(1, keepdim=True)
        queries, keys, decays = self._near(q, k)
        block = _blocks(grad, _NEAR)
        dq.unflatten(3, (-1, _NEAR)).add_(torch.einsum("cgtmij,cztmjd,cztmijd->cgtmid", block, keys, decays))
        near = torch.einsum("cgtmij,cgtmid,cztmijd->ctmjd", block, queries, decays)
        dk.unflatten(3, (-1, _NEAR)).add_(near.unsqueeze(1))
        return dq, dk

    def gates(self, grad: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """As `Pairs.gates`, for each channel."""
        out = torch.zeros_like(k.squeeze(1))
        for half, later, earlier in self._levels():
            queries, keys, found = (x.unflatten(-2, (-1, 2, half)) for x in (q, k, out))
            after, before = queries[..., 1, :, :] * later, keys[..., 0, :, :] * earlier
            block = _blocks(grad, 2 * half)[..., half:, :half]
            found[..., 1, :, :] += ((block @ before) * after).sum(1).flip(3).cumsum(3).flip(3)
            written = (block.mT @ after).sum(1) * before.squeeze(1)
            found[..., 0, :, :] += written.cumsum(3) - written
        queries, keys, decays = self._near(q, k)
        near = torch.einsum("cgtmij,cgtmid,cztmjd,cztmijd->ctmijd", _blocks(grad, _NEAR), queries, keys, decays)
        near = near.flip(3).cumsum(3).flip(3) * keeps(_NEAR, True, near.device)[..., None]
        return out + near.sum(4).flatten(2, 3)

    def _levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Halves of blocks: their length, decays from the middle on, decays up to the middle."""
        half = self.steps.shape[3] // 2
        while half >= _NEAR:
            steps = self.steps.unflatten(3, (-1, 2, half))
            yield half, _up_to(steps[..., 1, :, :], 4).exp(), _after(steps[..., 0, :, :], 4).exp()
            half //= 2

    def _near(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, and the decays of each channel of each pair, in blocks of a few steps."""
        steps = self.steps.unflatten(3, (-1, _NEAR))
        # between[i, j]: the gates after j, up to and with i
        later = keeps(_NEAR, True, steps.device)
        between = torch.where(later[..., None], steps[..., :, None, :], 0.0).cumsum(4)
        between = between.masked_fill_(~keeps(_NEAR, self.strict, steps.device)[..., None], -torch.inf)
        return q.unflatten(3, (-1, _NEAR)), k.unflatten(3, (-1, _NEAR)), between.exp_()


def _blocks(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of (..., L, L) as (..., L // size, size, size), a view."""
    cut = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., row block, row, column block, column)
    return cut.diagonal(0, -4, -2).movedim(-1, -3)


def pairs_of(form: LinearForm, work: Work, strict: bool) -> Pairs | ChannelPairs:
    """How pairs are weighted inside a chunk; `strict`: a position does not see itself."""
    if form.gate == "channel":
        assert work.gate is not None
        return ChannelPairs(work.chunked(work.gate).unsqueeze(1), strict)
    if work.gate is None:
        return Pairs(keeps(work.chunk, strict, work.k.device).to(work.k.dtype), strict)
    steps = work.gate[:, : work.chunk] if work.steady else work.gate
    # In float64, the difference of two sums over one chunk is as good as the sum between them in float32.
    sums = _up_to(steps.unflatten(1, (-1, work.chunk)).double(), 2)
    between = (sums[..., :, None] - sums[..., None, :]).to(work.k.dtype)
    return Pairs(_exponentials(between).tril_(-int(strict)).unsqueeze(1), strict)


def _exponentials(x: Tensor) -> Tensor:
    """exp(x) in place, 0 where that is below the smallest normal number: exponentials at which the result is
    denormal, or the operand infinite, take several times as long as others."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.threshold_(x.clamp_(min=math.log(tiny) + 0.5).exp_(), 2 * tiny, 0.0)
