"""DARE: one target item asks a history, its parts with embeddings and scales of their own; d_qk is not d_v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class DecoupledEmbeddings(nn.Module):
    """Small embeddings decide the weights, wide ones are what is weighted."""

    def __init__(self, items: int = 50, times: int = 20, narrow: int = 8, wide: int = 24) -> None:
        super().__init__()
        self.item, self.time = nn.Embedding(items, narrow), nn.Embedding(times, narrow // 2)
        self.representation = nn.Embedding(items, wide)

    def forward(self, target: Tensor, when: Tensor, history: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        q_item, q_time = self.item(target).unsqueeze(1), self.time(when).unsqueeze(1)
        k_item, k_time = self.item(history), self.time(times)
        scores = (q_item * k_item).sum(-1) / k_item.shape[-1] ** 0.5
        scores = scores + (q_time * k_time).sum(-1) / k_time.shape[-1] ** 0.5
        paddings = torch.ones_like(scores) * (-(2**32) + 1)
        scores = torch.where(mask, scores, paddings)
        weights = scores.softmax(dim=-1).unsqueeze(1)
        return torch.matmul(weights, self.representation(history)).squeeze(1)


class Letters(DecoupledEmbeddings):
    """Both parts as one product of concatenated embeddings."""

    def forward(self, target: Tensor, when: Tensor, history: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        a, b = self.item.embedding_dim, self.time.embedding_dim
        q = torch.cat((self.item(target) * a**-0.5, self.time(when) * b**-0.5), -1)
        k = torch.cat((self.item(history), self.time(times)), -1)
        scores = torch.einsum("bd,bjd->bj", q, k).masked_fill(~mask, -(2.0**32) + 1)
        return torch.einsum("bj,bje->be", scores.softmax(-1), self.representation(history))


def _inputs() -> tuple[Tensor, ...]:
    mask = torch.arange(30)[None, :] < torch.tensor([30, 12, 1, 0])[:, None]
    sizes = ((50, (4,)), (20, (4,)), (50, (4, 30)), (20, (4, 30)))
    return (*(torch.randint(0, top, shape) for top, shape in sizes), mask)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DecoupledEmbeddings(), _inputs()


VARIANTS = {"letters": Variant(lambda: (Letters(), _inputs()))}


def reference(
    module: DecoupledEmbeddings, target: Tensor, when: Tensor, history: Tensor, times: Tensor, mask: Tensor
) -> Tensor:
    out = []
    for s in range(target.shape[0]):
        kept = torch.nonzero(mask[s]).flatten() if mask[s].any() else torch.arange(mask.shape[1])
        scores = module.item(history[s, kept]) @ module.item(target[s]) / module.item.embedding_dim**0.5
        scores = scores + module.time(times[s, kept]) @ module.time(when[s]) / module.time.embedding_dim**0.5
        if not mask[s].any():  # a history of nothing: all fills are equal
            scores = torch.zeros_like(scores)
        out.append(scores.softmax(0) @ module.representation(history[s, kept]))
    return torch.stack(out)
