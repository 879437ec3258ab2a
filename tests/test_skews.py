"""Scores and weights of overlapping chunks, skewed so that columns count offsets, are one band over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refocus import simplify as s
from refocus.ir import Axis, Const
from refocus.pieces import tidy
from refocus.testing import check

HEADS, WIDTH, REACH, TOKENS = 2, 8, 4, 32
SPAN = 2 * REACH + 1

Scores = Callable[[Tensor, Tensor], Tensor]
Values = Callable[[Tensor, Tensor], Tensor]


def chunks(x: Tensor) -> Tensor:
    """Chunks of two reaches, each half of which is half of the next."""
    heads, tokens, width = x.shape
    return x.as_strided((heads, tokens // REACH - 1, 2 * REACH, width), (tokens * width, REACH * width, width, 1))


def diagonals(q: Tensor, k: Tensor) -> Tensor:
    """Products of each chunk with itself, with diagonals as columns: one row of padding, then rows one longer."""
    scores = F.pad(torch.einsum("hcxd,hcyd->hcxy", chunks(q), chunks(k)), (0, 0, 0, 1))
    return scores.view(*scores.shape[:2], 2 * REACH, SPAN)


def assigned(q: Tensor, k: Tensor) -> Tensor:
    """The parts that are right, written into a buffer slice by slice; what never was a score is masked in place."""
    skewed = diagonals(q, k)
    out = q.new_zeros(HEADS, TOKENS // REACH, REACH, SPAN)
    out[:, :-1, :, REACH:] = skewed[:, :, :REACH, : REACH + 1]
    out[:, -1, :, REACH:] = skewed[:, -1, REACH:, : REACH + 1]
    out[:, 1:, :, :REACH] = skewed[:, :, -(REACH + 1) : -1, REACH + 1 :]
    out[:, 0, 1:, 1:REACH] = skewed[:, 0, : REACH - 1, 1 - REACH :]
    out = out.view(HEADS, TOKENS, SPAN).transpose(0, 1)
    before = torch.ones(REACH, REACH + 1).tril().flip(0)[:, None]
    out[:REACH, :, : REACH + 1].masked_fill_(before == 1, -math.inf)
    out[-REACH:, :, -(REACH + 1) :].masked_fill_(before.flip(0, 2) == 1, -math.inf)
    return out.transpose(0, 1)


def concatenated(q: Tensor, k: Tensor) -> Tensor:
    """The same parts put side by side; positions say what is masked."""
    skewed = diagonals(q, k)
    after = torch.cat([skewed[:, :, :REACH, : REACH + 1], skewed[:, -1:, REACH:, : REACH + 1]], 1)
    first = F.pad(skewed[:, :1, : REACH - 1, 1 - REACH :], (1, 0, 1, 0))
    before = torch.cat([first, skewed[:, :, -(REACH + 1) : -1, REACH + 1 :]], 1)
    place = torch.arange(TOKENS)[:, None] + torch.arange(-REACH, REACH + 1)
    scores = torch.cat([before, after], -1).flatten(1, 2)
    return scores.masked_fill((place < 0) | (place >= TOKENS), -math.inf)


def strided(q: Tensor, k: Tensor) -> Tensor:
    """Each block of queries with three of keys, of which strides take a row's own diagonal band."""
    k = F.pad(k, (0, 0, REACH, REACH)).unfold(1, 3 * REACH, REACH)
    scores = q.unflatten(1, (-1, REACH)) @ k
    blocks = TOKENS // REACH
    rows = (3 * REACH**2 * blocks, 3 * REACH**2, 3 * REACH + 1, 1)
    scores = scores.contiguous().as_strided((HEADS, blocks, REACH, SPAN), rows).flatten(1, 2)
    place = torch.arange(TOKENS)[:, None] + torch.arange(SPAN)
    return scores.masked_fill((place < REACH) | (place >= TOKENS + REACH), -math.inf)


def unmasked(q: Tensor, k: Tensor) -> Tensor:
    """Near miss: what wraps around in a chunk takes part."""
    skewed = diagonals(q, k)
    out = q.new_zeros(HEADS, TOKENS // REACH, REACH, SPAN)
    out[:, :-1, :, REACH:] = skewed[:, :, :REACH, : REACH + 1]
    out[:, -1, :, REACH:] = skewed[:, -1, REACH:, : REACH + 1]
    out[:, 1:, :, :REACH] = skewed[:, :, -(REACH + 1) : -1, REACH + 1 :]
    return out.flatten(1, 2)


def mixed(q: Tensor, k: Tensor) -> Tensor:
    """Near miss: the last block is that of twice the queries."""
    scores = assigned(q, k).unflatten(1, (-1, REACH)).clone()
    scores[:, -1] = scores[:, -1] * 2
    return scores.flatten(1, 2)


def padded_and_seen(p: Tensor, v: Tensor) -> Tensor:
    """Weights with zeros after each row, seen in rows one shorter: they stand above their keys."""
    v = F.pad(v, (0, 0, REACH, REACH), value=-1.0).unfold(1, 3 * REACH, REACH)
    p = F.pad(p.unflatten(1, (-1, REACH)), (0, REACH + 1)).flatten(2)[..., :-REACH]
    p = p.unflatten(-1, (REACH, 3 * REACH + 1))[..., :-1]
    return torch.einsum("hcxy,hcdy->hcxd", p, v).flatten(1, 2)


def written(p: Tensor, v: Tensor) -> Tensor:
    """The zeros are those of a buffer."""
    v = F.pad(v, (0, 0, REACH, REACH)).unfold(1, 3 * REACH, REACH).mT
    p = p.unflatten(1, (-1, REACH))
    wide = p.new_zeros(*p.shape[:-1], 3 * REACH + 1)
    wide[..., :SPAN] = p
    skewed = wide.flatten(2)[..., : 3 * REACH**2].unflatten(-1, (REACH, 3 * REACH))
    return (skewed @ v).flatten(1, 2)


def gathered(p: Tensor, v: Tensor) -> Tensor:
    """No skew: every query's own copy of its values."""
    v = F.pad(v, (0, 0, REACH, REACH)).unfold(1, SPAN, 1)
    return torch.einsum("hno,hndo->hnd", p, v)


def ones_beside(p: Tensor, v: Tensor) -> Tensor:
    """Near miss: what stands beside the weights is not zero."""
    v = F.pad(v, (0, 0, REACH, REACH)).unfold(1, 3 * REACH, REACH)
    p = F.pad(p.unflatten(1, (-1, REACH)), (0, REACH + 1), value=1.0).flatten(2)[..., :-REACH]
    p = p.unflatten(-1, (REACH, 3 * REACH + 1))[..., :-1]
    return torch.einsum("hcxy,hcdy->hcxd", p, v).flatten(1, 2)


def cut_off(p: Tensor, v: Tensor) -> Tensor:
    """Near miss: a chunk of values too short for the last columns of the last rows, which are lost."""
    v = F.pad(v, (0, 0, REACH, REACH)).unfold(1, 3 * REACH, REACH)[..., : 3 * REACH - 2]
    p = F.pad(p.unflatten(1, (-1, REACH)), (0, REACH + 1)).flatten(2)[..., :-REACH]
    p = p.unflatten(-1, (REACH, 3 * REACH + 1))[..., : 3 * REACH - 2]
    return torch.einsum("hcxy,hcdy->hcxd", p, v).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, scores: Scores, values: Values, padded: bool = False) -> None:
        super().__init__()
        self.scores, self.values, self.padded = scores, values, padded
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(1, 2, 0, 3))
        scores = self.scores(q, k) / math.sqrt(WIDTH)
        if self.padded:  # a mask of tokens goes the same way, multiplied with ones
            gone = torch.arange(TOKENS) >= TOKENS - 3
            fill = torch.zeros(TOKENS).masked_fill(gone, -1e9).to(x.dtype).expand(HEADS, TOKENS).unsqueeze(-1)
            fill = fill.contiguous() + 0 * x[0, 0]
            scores = scores + self.scores(torch.ones_like(fill), fill)
        return self.values(scores.softmax(-1), v)


BAND = "i - j < 5 and j - i < 5"
SPELLINGS = [
    (assigned, padded_and_seen),
    (assigned, written),
    (assigned, gathered),
    (concatenated, padded_and_seen),
    (strided, written),
]


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("scores", "values"), SPELLINGS, ids=_name)
def test_a_skewed_window_is_a_band(scores: Scores, values: Values) -> None:
    found = check(Attention(scores, values), (torch.randn(TOKENS, HEADS * WIDTH),), lower=False, gradients=True)
    assert [site.mask for site in found.report.sites] == [BAND]


def test_a_mask_may_go_the_way_of_the_keys() -> None:
    module = Attention(assigned, padded_and_seen, padded=True)
    found = check(module, (torch.randn(TOKENS, HEADS * WIDTH),), lower=False, gradients=True)
    [site] = found.report.sites
    assert site.mask == BAND
    assert site.notation.count("sum_d") == 1  # ones times the mask is the mask


@pytest.mark.parametrize(("scores", "values"), [(assigned, ones_beside), (assigned, cut_off)], ids=_name)
def test_near_misses_are_left_alone(scores: Scores, values: Values) -> None:
    found = check(Attention(scores, values), (torch.randn(TOKENS, HEADS * WIDTH),), lower=False, fused=False)
    assert found.report.sites and not any(site.fused for site in found.report.sites)


def test_scores_that_are_not_masked_at_the_ends_are_no_band() -> None:
    found = check(Attention(unmasked, gathered), (torch.randn(TOKENS, HEADS * WIDTH),), lower=False)
    assert BAND not in {site.mask for site in found.report.sites}


def test_a_predicate_loses_what_the_rest_of_it_says() -> None:
    a, b = Axis("a", Const(9)), Axis("b", Const(32))
    assert tidy(s.and_(s.ge(b, 28), s.ge(a, 4), s.ge(s.add(a, b), 36))) == s.ge(s.add(a, b), 36)


def test_a_remainder_that_is_small_in_one_round_only_is_a_range() -> None:
    i, y = Axis("i", Const(4)), Axis("y", Const(12))
    inside = s.le(s.mod(s.add(s.mul(13, i), y), 14), 8)
    assert inside == s.and_(s.le(i, y), s.le(y, s.add(i, 8)))
    for row in range(4):
        for column in range(12):
            at = s.substitute(inside, {i: Const(row), y: Const(column)})
            assert at == Const((13 * row + column) % 14 <= 8, "bool")
