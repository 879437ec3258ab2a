"""What the report says of masks: their source, tile counts, and pictures of the distinct planes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.pictures import Map, maps_of, svg
from refocus.report import Report, Site

N = 256


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(N, N).tril().bool())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def causal() -> Tensor:
    i = torch.arange(N)
    return i[None, :] <= i[:, None]


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    reach = (64 * (1 + torch.arange(4) // 2))[:, None, None]
    return attend(q, k, v, causal() & (torch.arange(N)[:, None] - torch.arange(N) < reach))


def site_of(model: Callable[..., Tensor], *more: Tensor) -> Site:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 4, N, 16).unbind(0)
    [site] = refocus.explain(model, q, k, v, *more, engine="tiled").sites
    return site


def test_sources() -> None:
    lengths = torch.tensor([N, 100])
    keep = torch.arange(N)[None] < lengths[:, None]
    chosen = torch.rand(4, 4) < 0.5
    noise = torch.rand(N, N) < 0.9

    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q, k, v, causal() & keep[:, None, None, :])

    def blocks(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        return attend(q, k, v, chosen.repeat_interleave(64, 0).repeat_interleave(64, 1))

    assert site_of(lambda q, k, v: attend(q, k, v, causal())).mask_source == "closed form"
    assert site_of(Held()).mask_source == "closed form, inferred from a constant"
    assert re.fullmatch(r"closed form; vectors \(\w+\)", site_of(padded, keep).mask_source)
    assert re.fullmatch(r"blocks \(\w+\)", site_of(blocks, chosen).mask_source)
    assert re.fullmatch(r"dense tensor \(\w+\)", site_of(attend, noise).mask_source)
    assert site_of(lambda q, k, v: (q @ k.mT).softmax(-1) @ v).mask_source == ""
    held = site_of(padded, keep).tiles
    assert held is not None and (held.empty, held.partial, held.full) == (6, 10, 0)
    assert held.maps == (Map("", ("+...", "++..", "+++.", "++++")),)


def test_distinct_planes() -> None:
    tiles = site_of(by_head).tiles
    assert tiles is not None
    assert tiles.maps == (
        Map("h=0..1", ("+...", "++..", ".++.", "..++")), Map("h=2..3", ("+...", "#+..", "+#+.", ".+#+")),
    )  # fmt: skip


def test_positions_are_named() -> None:
    state = torch.zeros(2, 3, 1, 1, dtype=torch.int8)
    state[1, 2] = 2
    assert [m.label for m in maps_of(state, ["b", "h"])] == ["b=0, h=0 and 4 more", "b=1, h=2"]
    assert [m.label for m in maps_of(state[1], ["h"])] == ["h=0..1", "h=2"]


def test_long_sequences_are_drawn_coarsely() -> None:
    def long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        return attend(q, k, v, i[None, :] <= i[:, None])

    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 1, 5000, 4).unbind(0)
    tiles = refocus.explain(long, q, k, v, engine="tiled").sites[0].tiles
    assert tiles is not None and tiles.shape == (64, 64) and tiles.empty == 79 * 78 // 2
    [plane] = tiles.maps
    assert plane.scale == 2 and len(plane.rows) == 40 and plane.rows[1].startswith("#+.")


def report() -> Report:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 4, N, 16).unbind(0)
    return refocus.explain(by_head, q, k, v, engine="tiled")


def test_pictures_in_the_page() -> None:
    found = report()
    assert Report.from_json(found.to_json()) == found
    page = found.to_html()
    assert page.count("<svg") == 2 and "h=0..1" in page and "<script" not in page and "http" not in page
    hostile = svg(Map("<b>&", ("+#", ".+")))
    assert ElementTree.fromstring(hostile).tag == "svg" and "<b>" not in hostile


def test_pictures_in_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    [path] = report().save_pictures(tmp_path / "maps")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 2000
