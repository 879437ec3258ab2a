"""Reports are plain data: they survive JSON, and read well as text and as a page."""

from __future__ import annotations

import html.parser
import io
import json
from dataclasses import replace

import pytest

from refocus.report import Cost, Report, Site, Tiles

FUSED = Site(
    "layers.0.attn",
    "model.py:12",
    recognized=True,
    fused=True,
    family="softmax",
    notation="S[b,h,i,j] = sum_d Q[b,h,i,d] * K[b,h,j,d]\nO[b,h,i,e] = softmax_j(S | mask) . V[b,h,j,e]",
    mask="j <= i",
    tiles=Tiles((64, 64), 6, 4, 6, picture=("+...", "#+..", "##+.", "###+")),
    engine="tiled",
    kernel_path="/cache/flash_ab12.py",
    before=Cost(2_000_000_000, 3 * 2**20),
    after=Cost(1_000_000_000, 2**20),
)
LEFT = Site("head", "model.py:40", False, False, reason="the probabilities are an <output>", blame="softmax")
REPORT = Report((FUSED, replace(FUSED, name="layers.1.attn"), LEFT), graphs=2, seconds=0.25)


def test_json_round_trip() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT
    assert Report.from_dict(json.loads(REPORT.to_json(indent=None))) == REPORT


def test_json_names_every_field() -> None:
    site = json.loads(REPORT.to_json())["sites"][0]
    assert site["tiles"]["shape"] == [64, 64]
    assert site["before"] == {"flops": 2_000_000_000, "bytes": 3 * 2**20}
    assert set(site) >= {
        "recognized",
        "fused",
        "reason",
        "family",
        "notation",
        "mask",
        "engine",
        "kernel_path",
        "location",
    }


def test_text_says_what_happened_and_why() -> None:
    text = str(REPORT)
    assert text.splitlines()[0] == "3 attention sites: 2 recognised, 2 fused, 1 left as they are (2 graphs, 0.25 s)"
    for part in (
        "model.py:12",
        "j <= i",
        "6 empty (38%)",
        "2 GFLOP, 3 MiB  ->  1 GFLOP, 1 MiB",
        "/cache/flash_ab12.py",
    ):
        assert part in text
    assert "the probabilities are an <output>" in text


def test_equal_layers_are_one_block() -> None:
    text = str(REPORT)
    assert "layers.0.attn .. layers.1.attn (2 equal sites)" in text
    assert text.count("softmax_j(S | mask)") == 1


def test_lines_after_the_first_keep_their_column() -> None:
    lines = str(Report((FUSED,))).splitlines()
    first = next(line for line in lines if "S[b,h,i,j]" in line)
    second = next(line for line in lines if "O[b,h,i,e]" in line)
    assert first.index("S[b") == second.index("O[b")


def test_no_sites() -> None:
    assert "No attention was found" in str(Report(()))
    assert Report.from_json(Report(()).to_json()) == Report(())


def test_shares() -> None:
    assert Tiles((64, 64), 6, 4, 6).empty_share == 6 / 16
    assert Tiles((64, 64), 0, 0, 0).empty_share == 0.0
    assert REPORT.fused == REPORT.sites[:2] and REPORT.left == (LEFT,)
    assert [site.state for site in REPORT.sites] == ["fused", "fused", "left alone"]
    assert replace(FUSED, fused=False).state == "recognised"


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Cost(0, 0), "0 FLOP, 0 B"),
        (Cost(999, 1023), "999 FLOP, 1023 B"),
        (Cost(999_999, 1_048_575), "1000 kFLOP, 1024 KiB"),
        (Cost(1_234_567, 1536), "1.23 MFLOP, 1.5 KiB"),
        (Cost(10**20, 10**15), "100000 PFLOP, 909 TiB"),
    ],
)
def test_quantities(cost: Cost, text: str) -> None:
    assert str(cost) == text


def test_page_is_well_formed_and_escaped() -> None:
    page = REPORT.to_html("a <title>")
    assert "an &lt;output&gt;" in page and "a &lt;title&gt;" in page and "<output>" not in page
    open_tags: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(page)
    assert not open_tags
    assert "http" not in page


def test_rich_rendering() -> None:
    console = pytest.importorskip("rich.console").Console(width=100, record=True, file=io.StringIO())
    console.print(REPORT)
    text = console.export_text()
    assert "layers.0.attn .. layers.1.attn (2 equal sites)" in text and "[b,h,i,e]" in text
