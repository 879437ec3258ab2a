"""Loops whose single steps, taken together for one, have exponentially many terms: they are read, or left, in time."""

from __future__ import annotations

import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Module
from tests.loop_cases import inputs, outer, read, zero


def forgets_a_part(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What a state was is taken away and given back in part; the results are divided by what another state has."""
    state, sums, rows = zero(q, v), torch.zeros_like(q[:, :, 0]), []
    for t in range(q.shape[2]):
        before = state
        state = state + outer(k[:, :, t], v[:, :, t])
        state = state - before + before * (1 - 0.5 * g[:, :, t, :1, None].sigmoid())
        sums = sums + k[:, :, t]
        rows.append(read(q[:, :, t], state) / ((q[:, :, t] * sums).sum(-1, keepdim=True).abs() + 1))
    return torch.stack(rows[::-1], 2), state


def test_the_rest_of_a_graph_is_not_lost() -> None:
    """The steps in the wrong order are left; attention beside them is fused, and nothing fails on the way."""

    def both(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return *forgets_a_part(q, k, v, g), (q @ k.mT).softmax(-1) @ v

    given = [torch.cat([x] * 3, 2) for x in inputs(4)]
    report = check(Module(both), given, fused=False, lower=False).report
    assert any(site.fused and site.family == "softmax" for site in report.sites)
    assert not any("failed" in note for note in report.notes)
