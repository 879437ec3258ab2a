"""Attention as published goes through the suite: recognised, exact on the portable engine, as sparse as in theory."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from refocus.codegen import flex
from refocus.codegen.heads import fit
from refocus.codegen.plan import Plan
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import TRUE
from refocus.report import Report
from refocus.testing import check
from refocus.tolerances import difference, magnitude
from tests.attended import Attended, attending, merged, tile_states
from tests.zoo import ENTRIES, NAMES, Entry, load

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SPARSE = [name for name in NAMES if load(name).expect.empty_share is not None]


def must_fuse(entry: Entry) -> bool:
    return entry.expect.declined is None and not entry.expect.open


FUSED = [name for name in NAMES if must_fuse(load(name))]
MASKED = [name for name in FUSED if load(name).allowed and not load(name).expect.regrouped]

# Larger and smaller than the structures of the masks, square and not, and none that divides all sizes.
BLOCKS = ((16, 16), (32, 16), (64, 64), (8, 24))


@cache
def outcome(name: str) -> tuple[Report, tuple[Attended, ...]]:
    """An entry's report, and what its regions ran on; once for all tests."""
    entry = load(name)
    module, inputs = entry.build()
    wanted = must_fuse(entry)
    sites = entry.expect.sites if wanted else None
    with attending() as calls:
        report = check(module, inputs, family=entry.expect.family, sites=sites, fused=wanted, lower=False).report
    return report, tuple(calls[: len(calls) // 2])  # each ran twice


def allowed_by_site(name: str) -> tuple[Tensor, ...]:
    """The entry's own masks, one for each site, shaped as the masks of its regions."""
    entry = load(name)
    assert entry.allowed is not None
    module, inputs = entry.build()
    found = entry.allowed(module, *inputs)
    masks = found if isinstance(found, tuple) else (found,)
    out = []
    for mask, call in zip(masks, outcome(name)[1], strict=True):
        shape = call.mask().shape
        if mask.dim() == 4 and len(shape) == 3:  # batch and heads in one axis
            mask = mask.expand(-1, shape[0] // mask.shape[0], -1, -1).flatten(0, 1)
        out.append(mask.expand(shape))
    return tuple(out)


def test_the_list_names_every_file() -> None:
    import pathlib

    import tests.zoo

    folder = pathlib.Path(next(iter(tests.zoo.__path__)))
    assert (
        sorted(ENTRIES)
        == list(ENTRIES)
        == sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "expect"))
    )


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).reference])
def test_eager_is_the_published_formula(name: str) -> None:
    entry = load(name)
    assert entry.reference is not None
    module, inputs = entry.build(torch.float64)
    with torch.no_grad():
        expected = entry.reference(module, *inputs)
        got = module(*inputs)
    # 1e-5: some modules compute their softmax in float32 whatever they are given.
    for mine, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert difference(mine, theirs) <= 1e-5 * magnitude(theirs)


@pytest.mark.parametrize("name", SPARSE)
def test_share_of_empty_tiles_in_theory(name: str) -> None:
    entry = load(name)
    assert entry.allowed is not None and entry.expect.empty_share is not None
    module, inputs = entry.build()
    share = (tile_states(entry.allowed(module, *inputs), 16, 16) == 0).float().mean()
    assert float(share) == pytest.approx(entry.expect.empty_share, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_recognised_and_exact(name: str) -> None:
    entry = load(name)
    report, _ = outcome(name)
    if entry.expect.mask is not None and must_fuse(entry):
        expected = entry.expect.mask
        assert {site.mask for site in report.sites} == set([expected] if isinstance(expected, str) else expected)
    if entry.expect.declined is not None:
        assert not any(site.fused for site in report.sites)
        assert not report.sites or entry.expect.declined in report.sites[0].reason


@pytest.mark.parametrize("name", MASKED)
def test_mask_is_the_published_one(name: str) -> None:
    """Pair for pair, on the model's own axes: nothing of a mask may be lost, or stay behind in the scores."""
    for call, allowed in zip(outcome(name)[1], allowed_by_site(name), strict=True):
        assert torch.equal(call.mask(), allowed)


@pytest.mark.parametrize("name", FUSED)
def test_tiles_are_those_of_theory(name: str) -> None:
    """A tile is visited iff it holds an allowed pair, and full iff it holds no other, whatever the tile size."""
    for call in outcome(name)[1]:
        dense = call.mask()
        for rows, columns in BLOCKS:
            tiles, theory = call.tiles(rows, columns), tile_states(dense, rows, columns)
            axes = [dense.shape[k] if a in tiles.axes else 1 for k, a in enumerate(call.region.batch)]
            found = tiles.state.reshape(*axes, *theory.shape[-2:])
            assert torch.equal(found.expand_as(theory), theory), (rows, columns)


@pytest.mark.parametrize("name", FUSED)
def test_lists_of_the_cpp_engine_are_those_of_theory(name: str) -> None:
    for call in outcome(name)[1]:
        fitted = fit(call.region)
        if isinstance(fitted, str):  # one that it does not take
            continue
        pairs = flex.pairs_of(fitted)
        axes = (*call.region.batch, call.region.query, pairs.key)
        dense = evaluate(pairs.mask, arange_env(axes, call.numbers), call.tensors, call.numbers)
        dense = dense.expand([size_of(a.size, call.numbers) for a in axes])
        for rows, columns in BLOCKS:
            plan = Plan("cpp", block_q=rows, block_k=columns)
            lists = flex.lists_of(pairs, plan, call.tensors, call.numbers, torch.device("cpu"))
            theory = tile_states(dense, rows, columns)
            outer = prod(theory.shape[: len(fitted.outer)])
            theory = theory.reshape(outer, -1, *theory.shape[-2:])
            for state, count, index in ((1, *lists[:2]), (2, *lists[2:])):
                wanted = theory == state
                assert torch.equal(count.expand(wanted.shape[:-1]), wanted.sum(-1))
                found = torch.arange(wanted.shape[-1]) < count[..., None]
                listed = torch.zeros(found.shape, dtype=torch.bool).scatter(-1, index.long(), found)
                assert torch.equal(listed.expand_as(wanted), wanted), (rows, columns)


@pytest.mark.parametrize("name", [name for name in FUSED if load(name).allowed])
def test_empty_tiles_are_skipped_and_full_ones_need_no_mask(name: str) -> None:
    for call in outcome(name)[1]:
        dense = call.mask()
        rows, columns = min(32, dense.shape[-2]), min(32, dense.shape[-1])
        again = call.region.score == call.region.logits and not bool(dense.any(-1).all())  # rows without any key
        if call.region.mask == TRUE or again:
            continue
        taken = torch.zeros(dense.shape[:-2], dtype=torch.int64)
        for part, visited in call.visits(rows, columns).items():
            here = tuple(slice(first, last + 1) for first, last in part)
            taken[here] += 1
            assert torch.equal(visited, merged(tile_states(dense[here], rows, columns)))
        assert bool((taken == 1).all())


# Where the predicate is known when compiling, and its axes are the model's own.
@pytest.mark.parametrize("name", [name for name in SPARSE if load(name).expect.mask is not None])
def test_the_report_counts_the_tiles_of_theory(name: str) -> None:
    site = outcome(name)[0].sites[0]
    assert site.tiles is not None
    states = tile_states(allowed_by_site(name)[0], *site.tiles.shape)
    assert site.tiles.empty_share == pytest.approx(float((states == 0).float().mean()))
    assert site.tiles.full / site.tiles.total == pytest.approx(float((states == 2).float().mean()))


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
    report = check(module, inputs, engines=("cpp",), fused=False).report
    assert report.sites and all(site.reason for site in report.left)


def test_scores_are_never_stored() -> None:
    """At 1024 tokens the scores are eight times as large as any other tensor; one block of rows of them is allowed."""
    module, _ = load("mistral").build()
    x = torch.randn(1, 1024, 64, generator=torch.Generator().manual_seed(0))
    found = check(module, (x,), memory_share=0.25, lower=False)
    assert found.largest["eager"] == 4 * 1024 * 1024 * 4
