"""Keys and values that a model copies together are read in place: rolled, gathered, routed, in windows that overlap."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from refocus.lift import op_name
from refocus.notation import notation
from refocus.testing import check, rewritten
from refocus.tolerances import difference
from tests.attended import attending
from tests.copied_keys import (
    GROUP,
    HEADS,
    TOKENS,
    WIDTH,
    Attend,
    clamped,
    halo,
    routed,
    shifted_heads,
    turned,
)  # fmt: skip
from tests.test_bands import Attention, graph_of

COPIES = ("unfold", "index", "gather", "flip", "expand")


@pytest.mark.parametrize("attend", [clamped, shifted_heads, halo, routed, turned], ids=lambda f: f.__name__)
def test_keys_are_read_where_they_lie(attend: Attend) -> None:
    report = check(Attention(attend), (torch.randn(2, TOKENS, 16),), lower=False, gradients=True).report
    assert [site.fused for site in report.sites] == [True]
    graph = graph_of(attend).gm.graph
    (call,) = (n for n in graph.nodes if "attend" in str(n.target))
    for operand in call.args[0]:
        assert op_name(operand) not in COPIES
        size = operand.meta["val"].numel()
        assert size <= 2 * HEADS * (TOKENS + GROUP) * WIDTH  # no token twice


def test_chosen_blocks_are_a_mask_over_tokens() -> None:
    """topk never chooses a block twice; and where tiles are blocks, those that were not chosen are not visited."""
    inputs = torch.randn(3, 1, 1, 512, WIDTH).unbind()
    attend = partial(routed, bias=torch.zeros(1), group=64)
    with attending() as calls:
        got = rewritten(attend, engine="tiled", require=True)(*inputs)
    assert difference(got, attend(*inputs)) < 1e-5
    assert notation(calls[0].region.mask) == "j//64 == t0[0,0,i//64,0] or j//64 == t0[0,0,i//64,1]"
    (visited,) = calls[0].visits(64, 64).values()
    assert int((visited == 2).sum()) == 2 * 512 // 64 and not (visited == 1).any()


def chosen_with_repeats(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Near miss: nothing says that the chosen groups differ, and one chosen twice counts twice."""
    q, k, v = (t.unflatten(2, (-1, GROUP)) for t in (q, k, v))
    chosen = (q.mean(3) @ k.mean(3).mT).topk(2, -1).indices // 2
    at = chosen[..., None, None].expand(*chosen.shape, GROUP, WIDTH)
    k, v = (t.unsqueeze(2).expand(*t.shape[:3], *t.shape[2:]).gather(3, at).flatten(3, 4) for t in (k, v))
    return ((q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v).flatten(2, 3)


def test_blocks_that_may_repeat_are_read_as_chosen() -> None:
    report = check(Attention(chosen_with_repeats), (torch.randn(2, TOKENS, 16),), lower=False, gradients=True).report
    assert [site.mask for site in report.sites] == [""]
