"""Reformer: tokens sorted by their hashes, chunks of that order that see themselves and the one before, several rounds
merged by their log-sum-exps; queries are keys, and a token attends to itself only if there is no other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(regrouped=True)


class Reformer(nn.Module):
    """The buckets that tokens were hashed into, of each round, are inputs: (batch, heads, rounds, tokens)."""

    def __init__(self, causal: bool = True, chunk: int = 16, buckets: int = 4) -> None:
        super().__init__()
        self.causal, self.chunk, self.buckets = causal, chunk, buckets
        self.register_buffer("mask_value", torch.tensor(-1e9), persistent=False)
        self.register_buffer("self_mask_value", torch.tensor(-1e5), persistent=False)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.chunk, *x.shape[3:])

    def look_adjacent(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([x[:, :, -1:, ...], x[:, :, :-1, ...]], dim=2), x], dim=3)

    def forward(self, qk: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
        b, h, n, d = qk.shape
        rounds = buckets.shape[2]
        offsets = torch.arange(rounds, device=qk.device)[:, None] * self.buckets
        ticker = torch.arange(rounds * n, device=qk.device)
        order = (rounds * n * (buckets + offsets).flatten(2) + ticker).argsort(dim=-1)
        undo = torch.empty_like(order).scatter_(-1, order, ticker.expand_as(order))
        place = order % n
        qk, v = (x.gather(2, place[..., None].expand(-1, -1, -1, d)) for x in (qk, v))
        q, v, place = self.split(qk), self.split(v), self.split(place)
        k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) / d**0.5
        k, v, key_place = self.look_adjacent(k), self.look_adjacent(v), self.look_adjacent(place)
        dots = q @ k.transpose(-1, -2)
        if self.causal:
            dots = torch.where(place.unsqueeze(-1) >= key_place.unsqueeze(-2), dots, self.mask_value)
        dots = torch.where(place.unsqueeze(-1) != key_place.unsqueeze(-2), dots, self.self_mask_value)
        logits = torch.logsumexp(dots, dim=-1, keepdim=True)
        probs = torch.exp(dots - logits)
        out = (probs @ v).flatten(2, 3)
        logits = logits.flatten(2, 3).squeeze(-1)
        out = out.gather(2, undo[..., None].expand(-1, -1, -1, d)).view(b, h, rounds, n, d)
        logits = logits.gather(2, undo).view(b, h, rounds, n, 1)
        share = torch.exp(logits - torch.logsumexp(logits, dim=2, keepdim=True))
        return (out * share).sum(dim=2)


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16), torch.randint(0, 4, (2, 2, 2, 64))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Reformer(), _inputs()


VARIANTS = {"encoder": Variant(lambda: (Reformer(causal=False), _inputs()))}


def reference(module: Reformer, qk: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
    """Each pair counts as often as the rounds bring it together."""
    n, d, size = qk.shape[-2], qk.shape[-1], module.chunk
    rounds = buckets.shape[2]
    offsets = torch.arange(rounds)[:, None] * module.buckets
    order = (buckets + offsets).flatten(2).argsort(dim=-1, stable=True)
    chunk = (order.argsort(-1) // size).unflatten(2, (rounds, n))
    count = rounds * n // size
    k = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + 1e-6) / d**0.5
    scores = qk @ k.transpose(-1, -2)
    numerator, total = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    place = torch.arange(n)
    far = (place[:, None] >= place if module.causal else torch.ones(n, n, dtype=torch.bool)) & (place[:, None] != place)
    for one in range(rounds):
        mine = chunk[:, :, one]
        for other in range(rounds):
            # The chunk before the first one of a round is the last of the round before.
            ago = (mine[..., :, None] - chunk[:, :, other][..., None, :]) % count
            weight = scores.exp() * (far & (ago <= 1)).to(scores)
            numerator, total = numerator + weight @ v, total + weight.sum(-1, keepdim=True)
    return torch.where(total > 0, numerator / total.clamp(min=1e-30), v)
