"""Attention as published goes through the suite: recognised, exact on the portable engine, as sparse as in theory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.testing import check
from refocus.tolerances import difference, magnitude
from tests.zoo import ENTRIES, Entry, load

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SPARSE = [name for name in ENTRIES if load(name).expect.empty_share is not None]


def must_fuse(entry: Entry) -> bool:
    return entry.expect.declined is None and not entry.expect.open


def tile_shares(allowed: Tensor, rows: int, columns: int) -> tuple[float, float]:
    """(empty, full) shares of the tiles of a dense mask (..., queries, keys); positions past the end do not count."""
    margin = (0, -allowed.shape[-1] % columns, 0, -allowed.shape[-2] % rows)

    def tiles(padding: bool) -> Tensor:
        return F.pad(allowed, margin, value=padding).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))

    kept, whole = tiles(False).any(-1).any(-2), tiles(True).all(-1).all(-2)
    return 1.0 - float(kept.float().mean()), float(whole.float().mean())


def test_the_list_names_every_file() -> None:
    import pathlib

    import tests.zoo

    folder = pathlib.Path(next(iter(tests.zoo.__path__)))
    assert (
        sorted(ENTRIES)
        == list(ENTRIES)
        == sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "expect"))
    )


@pytest.mark.parametrize("name", [name for name in ENTRIES if load(name).reference])
def test_eager_is_the_published_formula(name: str) -> None:
    entry = load(name)
    assert entry.reference is not None
    module, inputs = entry.build(torch.float64)
    with torch.no_grad():
        expected = entry.reference(module, *inputs)
        got = module(*inputs)
    # 1e-5: some modules compute their softmax in float32 whatever they are given.
    assert difference(got, expected) <= 1e-5 * magnitude(expected)


@pytest.mark.parametrize("name", SPARSE)
def test_share_of_empty_tiles_in_theory(name: str) -> None:
    entry = load(name)
    assert entry.allowed is not None and entry.expect.empty_share is not None
    module, inputs = entry.build()
    assert tile_shares(entry.allowed(module, *inputs), 16, 16)[0] == pytest.approx(entry.expect.empty_share, abs=1e-4)


@pytest.mark.parametrize("name", ENTRIES)
def test_recognised_and_exact(name: str) -> None:
    entry = load(name)
    module, inputs = entry.build()
    wanted = must_fuse(entry)
    sites = entry.expect.sites if wanted else None
    report = check(module, inputs, family=entry.expect.family, sites=sites, fused=wanted, lower=False).report
    if entry.expect.mask is not None and wanted:
        assert {site.mask for site in report.sites} == {entry.expect.mask}
    if entry.expect.declined is not None:
        assert not any(site.fused for site in report.sites)
        assert not report.sites or entry.expect.declined in report.sites[0].reason


# Where the predicate is known when compiling, and its axes are the model's own.
@pytest.mark.parametrize("name", [name for name in SPARSE if load(name).expect.mask is not None])
def test_tiles_are_those_of_theory(name: str) -> None:
    entry = load(name)
    module, inputs = entry.build()
    site = refocus.explain(module, *inputs, engine="tiled").sites[0]
    assert entry.allowed is not None and site.tiles is not None
    empty, full = tile_shares(entry.allowed(module, *inputs), *site.tiles.shape)
    assert site.tiles.empty_share == pytest.approx(empty)
    assert site.tiles.full / site.tiles.total == pytest.approx(full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gemma2", "gpt_oss", "longlora", "mistral", "swin", "t5"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    module, inputs = load(name).build(dtype)
    check(module, inputs, lower=False)


# The operator inside a compiled graph: aliases, writes and layouts around it.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "chunked", "kmax", "kv_cache", "longlora", "opt", "swin", "transformer_xl"])
def test_through_inductor(name: str) -> None:
    entry = load(name)
    module, inputs = entry.build()
    check(module, inputs, fused=must_fuse(entry))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bloom",
        "cait",
        "deberta",
        "gemma2",
        "gpt_oss",
        "kv_cache",
        "levit",
        "mistral",
        "moa",
        "perceiver",
        "swin",
    ],
)
def test_cpp_engine(name: str) -> None:
    """Where the engine does not take a region it says so, and the result is as exact."""
    module, inputs = load(name).build()
    report = refocus.explain(module, *inputs, engine="cpp")
    taken = all(site.fused for site in report.sites)
    assert taken or all(site.reason for site in report.left)
    check(module, inputs, engines=("cpp",), fused=taken)


def test_scores_are_never_stored() -> None:
    """At 1024 tokens the scores are eight times as large as any other tensor; one block of rows of them is allowed."""
    module, _ = load("mistral").build()
    x = torch.randn(1, 1024, 64, generator=torch.Generator().manual_seed(0))
    found = check(module, (x,), memory_share=0.25, lower=False)
    assert found.largest["eager"] == 4 * 1024 * 1024 * 4
