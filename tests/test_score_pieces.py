"""Scores that are computed part by part - blocks of queries, blocks of keys, head by head - are one score."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refocus import simplify as s
from refocus.ir import Axis, Const
from refocus.testing import check

HEADS, TOKENS, BLOCK, WIDTH = 4, 24, 8, 8
STARTS = range(0, TOKENS, BLOCK)

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, attend: Spelling) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q / math.sqrt(WIDTH), k, v)


def blocks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q[:, :, i : i + BLOCK] @ k.mT for i in STARTS], 2).softmax(-1) @ v


def into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.new_empty(*q.shape[:3], TOKENS)
    for i in STARTS:
        scores[:, :, i : i + BLOCK] = torch.einsum("bhqd,bhkd->bhqk", q.narrow(2, i, BLOCK), k)
    return scores.softmax(-1) @ v


def blocks_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ block.mT for block in k.split(BLOCK, 2)], -1).softmax(-1) @ v


def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [torch.cat([a @ b.mT for b in k.chunk(3, 2)], -1) for a in q.chunk(3, 2)]
    return torch.cat(rows, -2).softmax(-1) @ v


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([q[:, h] @ k[:, h].mT for h in range(HEADS)], 1).softmax(-1) @ v


def weights_of_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([(q[:, :, i : i + BLOCK] @ k.mT).softmax(-1) for i in STARTS], 2) @ v


def weights_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([(a @ b.mT).softmax(-1) for a, b in zip(q.unbind(1), k.unbind(1))], 1) @ v


def every_second_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads read the keys of the odd ones."""
    scores = torch.stack([q[:, h] @ k[:, 2 * h + 1].mT for h in range(2)], 1)
    return scores.softmax(-1) @ v[:, :2]


def heads_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([q[:, HEADS - 1 - h] @ k[:, h].mT for h in range(HEADS)], 1).softmax(-1) @ v


@pytest.mark.parametrize(
    "attend",
    [
        blocks_of_queries, into_a_buffer, blocks_of_keys, tiles, head_by_head, weights_of_blocks, weights_of_heads,
        every_second_head, heads_backwards,
    ],
)  # fmt: skip
def test_parts_are_one_score(attend: Spelling) -> None:
    inputs = tuple(torch.randn(2, HEADS, TOKENS, WIDTH) for _ in range(3))
    [site] = check(Attention(attend), inputs, lower=False, gradients=True).report.sites
    assert site.notation.count("sum_d") == 1 and "where" not in site.notation


def another_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near miss: the last block of queries is the first one again."""
    starts = [*STARTS[:-1], 0]
    return torch.cat([q[:, :, i : i + BLOCK] @ k.mT for i in starts], 2).softmax(-1) @ v


def a_louder_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near miss: one block has a scale of its own."""
    scores = [q[:, :, i : i + BLOCK] @ k.mT * (2.0 if i else 1.0) for i in STARTS]
    return torch.cat(scores, 2).softmax(-1) @ v


def heads_out_of_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near miss: heads read the keys of others, in no regular order."""
    pairs = zip(range(HEADS), (1, 0, 3, 2))
    return torch.stack([q[:, h] @ k[:, other].mT for h, other in pairs], 1).softmax(-1) @ v


@pytest.mark.parametrize("attend", [another_block, a_louder_block, heads_out_of_order])
def test_parts_that_differ_stay_apart(attend: Spelling) -> None:
    inputs = tuple(torch.randn(2, HEADS, TOKENS, WIDTH) for _ in range(3))
    found = check(Attention(attend), inputs, lower=False, fused=False, gradients=True).report
    assert all("where" in site.notation for site in found.sites if site.recognized)


def test_what_is_no_other_number_is_the_last() -> None:
    head = Axis("h", Const(3))
    known = s.assume(s.and_(s.ne(head, 0), s.ne(head, 1)))
    assert s.under(head, known) == Const(2)
