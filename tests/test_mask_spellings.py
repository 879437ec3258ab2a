"""Masks made in ways that no published entry uses: the structure is found, no pair lost, no tile visited in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.testing import check, rewritten
from tests.attended import attending, tile_states

N, SIDE = 96, 8
Maker = Callable[..., Tensor]


class Masked(nn.Module):
    def __init__(self, make: Maker) -> None:
        super().__init__()
        self.make = make

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *read: Tensor) -> Tensor:
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        return scores.masked_fill(~self.make(*read), float("-inf")).softmax(-1) @ v


def tokens() -> Tensor:
    return torch.arange(N)


def grid() -> Tensor:
    return torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))


def itself() -> Tensor:
    return torch.eye(N, dtype=torch.bool)


def loop() -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.bool)
    for start in range(0, N, 24):
        mask[start : start + 24, max(0, start - 24) : start + 24] = True
    return mask


def kron() -> Tensor:
    return torch.kron(torch.eye(6), torch.ones(16, 16)).bool() | itself()


def block_diag() -> Tensor:
    return torch.block_diag(*[torch.ones(24, 24, dtype=torch.bool)] * 4)


def euclidean() -> Tensor:
    return torch.cdist(grid().float(), grid().float()) <= 2.5


def maximum_of_distances() -> Tensor:
    return (grid()[:, None] - grid()[None]).abs().amax(-1) <= 1


def last_of_blocks() -> Tensor:
    """A block of keys is seen once its last token is."""
    last = nn.functional.pad(tokens()[1:], (1, 0)).view(-1, 3).max(-1)[0].repeat_interleave(3)
    return (tokens()[:, None] >= last) | itself()


def between_triangles() -> Tensor:
    ones = torch.ones(N, N, dtype=torch.bool)
    return torch.tril(ones) & ~torch.tril(ones, -17)


def bits() -> Tensor:
    return (tokens()[:, None] ^ tokens()) < 16


def cleared_bits() -> Tensor:
    return (tokens()[:, None] & ~15) == (tokens() & ~15)


def shifted_bits() -> Tensor:
    return (tokens()[:, None] >> 4) >= (tokens() >> 4)


def rows_of_differences() -> Tensor:
    line = torch.zeros(2 * N - 1, dtype=torch.bool)
    line[N - 1 : N + 11] = True
    return line[tokens()[:, None] - tokens() + N - 1]


def rolled_rows() -> Tensor:
    return torch.stack([torch.roll(tokens() < 8, k) for k in range(N)])


def stacked_rows() -> Tensor:
    return torch.stack([tokens() <= k for k in range(N)])


def joined_rows() -> Tensor:
    return torch.cat([((tokens() <= k) & (tokens() > k - 9))[None] for k in range(N)])


def diagonals() -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.bool)
    for back in range(6):
        mask[tokens()[back:], tokens()[: N - back]] = True
    return mask


def pooled() -> Tensor:
    return nn.functional.max_pool2d(torch.eye(N)[None, None], (1, 7), 1, (0, 3))[0, 0] > 0


def enlarged() -> Tensor:
    return nn.functional.interpolate(torch.eye(6)[None, None], scale_factor=16, mode="nearest")[0, 0] > 0


def buckets(starts: Tensor) -> Tensor:
    ids = torch.bucketize(tokens(), starts, right=True)
    return ids[:, None] == ids


def searched(starts: Tensor) -> Tensor:
    ids = torch.searchsorted(starts, tokens(), right=True)
    return (ids[:, None] == ids).tril()


def counted(ends: Tensor) -> Tensor:
    ids = ends.cumsum(-1)
    return (ids[:, None] == ids).tril()


def as_long_as_all_are(kept: Tensor) -> Tensor:
    return kept.cumprod(-1).bool()[None] | itself()


def product(kept: Tensor) -> Tensor:
    return torch.outer(kept, kept).bool() | itself()


def scattered(chosen: Tensor) -> Tensor:
    mask = torch.zeros(N // 16, N // 16, dtype=torch.bool).scatter_(1, chosen, True)
    return mask[:, None, :, None].expand(-1, 16, -1, 16).reshape(N, N)


STARTS, KEPT = torch.tensor([10, 37, 50]), torch.arange(N) < 50
ENDS, CHOSEN = (torch.arange(N) % 31 == 30).long(), torch.tensor([[0, 3], [1, 1], [2, 5], [3, 0], [4, 4], [5, 1]])
# What it is read as: in the names of the region's own axes.
SPELLINGS: list[tuple[Maker, tuple[Tensor, ...], str]] = [
    (loop, (), "i//24 - j//24 < 2 and j//24 <= i//24"),
    (kron, (), "i == j or i//16 == j//16"),
    (block_diag, (), "i < 24 and j < 24"),
    (euclidean, (), "abs(i//8 - j//8) < 2 and abs(i%8 - j%8) < 3"),
    (maximum_of_distances, (), "i//8 - j//8 < 2"),
    (last_of_blocks, (), "3*(j//3)"),
    (between_triangles, (), "i - j < 17 and j <= i"),
    (bits, (), "i//16 == j//16"),
    (cleared_bits, (), "i//16 == j//16"),
    (shifted_bits, (), "j//16 <= i//16"),
    (rows_of_differences, (), "i - j < 12 and j <= i"),
    (rolled_rows, (), "i <= j and j - i < 8 or i - j >= 89"),
    (stacked_rows, (), "j <= i"),
    (joined_rows, (), "i - j < 9 and j <= i"),
    (diagonals, (), "i == j or i == j + 1 or i == j + 2"),
    (pooled, (), "i - j < 4 and j - i < 4"),
    (enlarged, (), "i//16 == j//16"),
    (buckets, (STARTS,), "t0[i] == t0[j]"),
    (searched, (STARTS,), "t0[i] == t0[j] and j <= i"),
    (counted, (ENDS,), "t0[i] == t0[j] and j <= i"),
    (as_long_as_all_are, (KEPT.long(),), "i == j or t0[j] != 0"),
    (product, (KEPT,), "t0[i] and t0[j] or i == j"),
    (scattered, (CHOSEN,), "t0[i//16,j//16]"),
]


@pytest.mark.parametrize(("make", "read", "form"), SPELLINGS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_structure_is_found_and_no_tile_visited_in_vain(make: Maker, read: tuple[Tensor, ...], form: str) -> None:
    n = SIDE * SIDE if make in (euclidean, maximum_of_distances) else N
    qkv = torch.randn(3, 2, 2, n, 16, generator=torch.Generator().manual_seed(0)).unbind()
    with attending() as calls:
        (site,) = check(Masked(make), (*qkv, *read), sites=1, lower=False).report.sites
    assert form in str(site.mask)
    dense = calls[0].mask()
    assert torch.equal(dense, make(*read).expand(dense.shape))
    for blocks in ((16, 16), (32, 16), (8, 24)):
        state = calls[0].tiles(*blocks).state
        theory = tile_states(dense, *blocks)
        assert torch.equal(state.expand_as(theory), theory), blocks


# ------------------------------------------------------------------------------------------------------- bad input


def given(mask: Tensor) -> Tensor:
    return mask


def causal_too(mask: Tensor) -> Tensor:
    return mask.logical_not().logical_not() & torch.ones(N, N).tril().bool() if mask.dtype == torch.bool else mask


QKV = torch.randn(3, 2, 2, N, 16, generator=torch.Generator().manual_seed(0)).unbind()
BAD = {
    "too few keys": torch.ones(N, N - 1, dtype=torch.bool),
    "too many batch positions": torch.ones(3, 1, N, N, dtype=torch.bool),
    "floats": torch.ones(N, N),
    "another device": torch.ones(N, N, dtype=torch.bool, device="meta"),
}


@pytest.mark.parametrize("make", [given, causal_too])
@pytest.mark.parametrize("name", BAD)
def test_a_mask_that_does_not_fit_fails_as_in_eager_code(make: Maker, name: str) -> None:
    fails_alike(refocus.optimize(Masked(make), engine="tiled"), Masked(make), BAD[name])


def test_a_mask_that_stops_fitting_fails_as_in_eager_code() -> None:
    model = refocus.optimize(Masked(given), engine="tiled")
    with torch.no_grad():
        model(*QKV, torch.ones(N, N, dtype=torch.bool).tril())
    for mask in BAD.values():
        fails_alike(model, Masked(given), mask)


def fails_alike(model: Callable[..., Tensor], eager: nn.Module, mask: Tensor) -> None:
    said: list[tuple[type[Exception], str]] = []
    for run in (eager, model):
        try:
            with torch.no_grad():
                run(*QKV, mask)
        except Exception as problem:
            said.append((type(problem), str(problem)))
    assert len(said) == 2 and said[0] == said[1]


@pytest.mark.parametrize("engine", ["tiled", "cpp"])
def test_a_dense_mask_that_is_written_to_between_calls_is_read_again(engine: str) -> None:
    module, qkv = rewritten(Masked(given), engine=engine), QKV
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(0)).lt(0.1) | itself()
    other = mask.clone()
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: mask[:, 40:].zero_(),  # whole tiles become empty
            lambda: mask.logical_or_(itself()),
            lambda: mask[5].fill_(True),
            lambda: mask.view(torch.uint8)[17:40].fill_(1),
            lambda: mask.copy_(other),
            lambda: mask.data.copy_(itself()),
        ):
            change()
            expected = Masked(given)(*qkv, mask)
            torch.testing.assert_close(module(*qkv, mask), expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("adds", [True, False], ids=["added", "filled"])
def test_a_fill_that_only_a_wider_dtype_holds(dtype: torch.dtype, fill: float, adds: bool) -> None:
    """A mask made in float32 may be infinite in the dtype of the scores: rows without keys are then no numbers."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = torch.ones(24, 24, dtype=torch.bool).tril(-1)  # nothing is left of the first row
        if adds:
            bias = torch.where(past, 0.0, fill).to(q.dtype)
            return (q @ k.mT + bias).softmax(-1) @ v
        return (q @ k.mT).float().masked_fill(~past, fill).to(q.dtype).softmax(-1) @ v

    inputs = [torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3)]
    found: list[refocus.Report] = []
    got, expected = rewritten(function, engine="tiled", report=found.append)(*inputs), function(*inputs)
    assert [site.fused for site in found[0].sites] == [True]
    assert torch.equal(got.isnan(), expected.isnan())
    assert (got - expected)[:, 1:].abs().max() < 0.05
