"""Keys and values that a model copies together are read in place: rolled, gathered, routed, in windows that overlap."""

from __future__ import annotations

import pytest
import torch

from refocus.lift import op_name
from refocus.testing import check
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
