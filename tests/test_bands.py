"""Keys gathered at offsets from the query are read over tokens, under a mask, and no copy of them is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

import refocus
from refocus.options import Options
from refocus.pipeline import Rewritten, rewrite
from refocus.testing import check, rewritten
from refocus.tolerances import difference
from tests.copied_keys import (
    HEADS,
    TOKENS,
    WIDTH,
    WINDOW,
    Attend,
    around,
    clamped,
    columns,
    dilated,
    in_rows,
    inward,
    other_values,
    scaled_keys,
    slices_stacked,
    strided,
    tensors,
    unfolded,
    unfolded_and_masked,
)  # fmt: skip

BANDS: dict[Attend, str] = {
    unfolded: "i <= j and j - i < 7",
    unfolded_and_masked: "i <= j and j < 51 and j - i < 7 and j >= 3",
    slices_stacked: "i <= j and j - i < 7",
    inward: "j - min(44, max(i, 3)) < 4 and min(44, max(i, 3)) - j < 4",
    around: "(j - i) % 48 < 7",
    dilated: "(j - i) % 3 == 0 and i <= j and j - i < 19",
    strided: "i <= j and j - i < 7",
    columns: "i//6 <= j//8 and j//8 - i//6 < 3 and i%6 <= j%8 and j%8 - i%6 < 3",
    in_rows: "i//6 <= j//8 and j//8 - i//6 < 3 and i%6 <= j%8 and j%8 - i%6 < 3",
}
OFFSETS = (clamped, other_values, scaled_keys)


class Attention(torch.nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.qkv = attend, torch.nn.Linear(16, 3 * HEADS * WIDTH)
        self.bias = torch.nn.Parameter(torch.randn(HEADS, WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind()
        return self.attend(q, k, v, self.bias)


@pytest.mark.parametrize("attend", BANDS, ids=lambda f: f.__name__)
def test_offsets_become_tokens(attend: Attend) -> None:
    report = check(Attention(attend), (torch.randn(2, TOKENS, 16),), lower=False, gradients=True).report
    assert [site.mask for site in report.sites] == [BANDS[attend]]


@pytest.mark.parametrize("attend", OFFSETS, ids=lambda f: f.__name__)
def test_near_misses_are_read_as_they_are(attend: Attend) -> None:
    report = check(Attention(attend), (torch.randn(2, TOKENS, 16),), lower=False, gradients=True).report
    assert [site.mask for site in report.sites] == [""]


def graph_of(attend: Attend) -> Rewritten:
    found: list[Rewritten] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(rewrite(gm, Options(engine="tiled"), inputs))
        return gm.forward

    torch.compile(attend, backend=backend, dynamic=False)(*tensors())
    return found[0]


COPIES = ("unfold", "im2col", "as_strided", "index", "stack", "roll", "gather", "index_select", "slice")


@pytest.mark.parametrize("attend", BANDS, ids=lambda f: f.__name__)
def test_nothing_of_the_copies_is_left(attend: Attend) -> None:
    names = [str(n.target).split(".")[1] for n in graph_of(attend).gm.graph.nodes if "aten" in str(n.target)]
    border = {"index"} if attend is columns else set()  # zeros around the image, as long as the image
    assert not set(names) & (set(COPIES) - border)


@pytest.mark.parametrize("attend", [unfolded, inward])
def test_no_copy_of_the_keys_is_made(attend: Attend) -> None:
    """The largest tensor is what the projection gives, 3 times the keys; in eager code it is the copies, 7 times."""
    tokens = 960
    found = check(Attention(attend), (torch.randn(2, tokens, 16),), lower=False, memory_share=0.5)
    assert found.largest["tiled"] <= 3 * 2 * HEADS * tokens * WIDTH * 4 < found.largest["eager"]


def looking_around(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Buckets of eight queries, and the keys of the bucket before with their own: shifted parts beside one another."""

    def around(t: Tensor) -> Tensor:
        padded = F.pad(t, (0, 0, 0, 0, 1, 0), value=-1.0)
        return torch.cat([padded[:, :, :-1], padded[:, :, 1:]], 3)

    q, k, v = (t.unflatten(2, (-1, 8)) for t in (q, k, v))
    place = torch.arange(TOKENS).view(1, 1, -1, 8, 1)
    i, j = place, around(place.float()).mT
    scores = (q @ around(k).mT).masked_fill((j < 0) | (j > i), float("-inf"))
    return (scores.softmax(-1) @ around(v)).flatten(2, 3) + bias.mean()


def uneven(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Parts of one tensor that do not follow one another in equal steps."""
    q, k, v = (t.unflatten(2, (-1, 8)) for t in (q, k, v))
    k, v = (torch.cat([t[:, :, :3], t[:, :, 1:4], t[:, :, 3:]], 3) for t in (k, v))
    return ((q[:, :, :3] @ k.mT).softmax(-1) @ v).flatten(2, 3) + bias.mean()


def test_shifted_parts_beside_one_another_are_one_tensor() -> None:
    check(Attention(looking_around), (torch.randn(2, TOKENS, 16),), sites=1, lower=False, gradients=True)
    names = [str(n.target).split(".")[1] for n in graph_of(looking_around).gm.graph.nodes if "aten" in str(n.target)]
    assert "cat" not in names
    check(Attention(uneven), (torch.randn(2, TOKENS, 16),), sites=1, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(5, 40), window=st.integers(2, 6), dilation=st.integers(1, 3), stride=st.integers(1, 3),
    left=st.integers(0, 6), right=st.integers(0, 6),
)  # fmt: skip
def test_any_window(tokens: int, window: int, dilation: int, stride: int, left: int, right: int) -> None:
    """Strides between queries, dilation, and zeros on either side."""
    reach = (window - 1) * dilation + 1
    count = (tokens + left + right - reach) // stride + 1
    if count < 1:
        return

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, left, right)).unfold(1, reach, stride)[..., ::dilation] for t in (k, v))
        weights = torch.einsum("hnd,hndw->hnw", q, k).softmax(-1)
        return torch.einsum("hnw,hndw->hnd", weights, v)

    k, v = torch.randn(2, 2, tokens, 4).unbind()
    q = torch.randn(2, count, 4)
    torch._dynamo.reset()
    assert difference(rewritten(attend, engine="tiled", require=True)(q, k, v), attend(q, k, v)) < 1e-5


def test_the_plan_keeps_blocks_that_share_their_keys() -> None:
    """A block of queries with its halo is dense over its offsets; a mask over tokens would visit more."""
    size = 64

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 0, 0, 4, 4, 4, 4)).unfold(0, 16, 8).unfold(1, 16, 8).flatten(0, 1) for t in (k, v))
        q = q.unflatten(1, (size // 8, 8)).unflatten(0, (size // 8, 8)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        scores = torch.einsum("gihd,ghdyx->ghiyx", q, k).flatten(3)
        return torch.einsum("ghij,ghdj->gihd", scores.softmax(-1), v.flatten(3))

    inputs = torch.randn(3, size, size, 2, 8).unbind()
    report = refocus.explain(blocks, *inputs, engine="tiled")
    assert [site.mask for site in report.sites] == [""]
    assert difference(rewritten(blocks, engine="tiled", require=True)(*inputs), blocks(*inputs)) < 1e-5
