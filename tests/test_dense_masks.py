"""Dense masks given at run time: their tiles are found once for each state of the tensor."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import refocus
from refocus import tile_grid
from refocus.identity import Identity
from refocus.tile_cache import TileCache

N = 256


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def tensors() -> list[Tensor]:
    return list(torch.randn(3, 2, 2, N, 16, generator=torch.Generator().manual_seed(0)).unbind(0))


def holes(*shape: int, seed: int = 0) -> Tensor:
    mask = torch.rand(*shape, N, N, generator=torch.Generator().manual_seed(seed)) < 0.9
    return (mask & torch.ones(N, N).tril().bool()) | torch.eye(N).bool()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors whose tiles were read, one entry a time."""
    seen: list[Any] = []
    real = tile_grid.reduce_tiles

    def counted(tensor: Tensor, how: Any) -> Any:
        if type(tensor) is Tensor and len(how) == 2:
            seen.append(tuple(tensor.shape))
        return real(tensor, how)

    monkeypatch.setattr(tile_grid, "reduce_tiles", counted)
    return seen


@pytest.mark.parametrize("engine", ["tiled", pytest.param("cpp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lead", [(), (2, 1)])
def test_read_once_until_it_changes(engine: str, lead: tuple[int, ...], reads: list[Tensor]) -> None:
    torch._dynamo.reset()
    fast = refocus.optimize(masked, engine=engine)
    inputs, mask = tensors(), holes(*lead)

    def agree() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fast(*inputs, mask), masked(*inputs, mask), atol=2e-6, rtol=1e-5)

    for _ in range(3):
        agree()
    assert len(reads) == 1
    mask[..., :70, 200:] = True  # in tiles that were empty
    agree()
    agree()
    assert len(reads) == 2
    mask = holes(*lead, seed=1)
    agree()
    assert len(reads) == 3
    mask = mask.clone()
    agree()
    assert len(reads) == 4


def test_layers_share_what_was_read(reads: list[Tensor]) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        for _ in range(3):
            v = masked(q, k, v, mask)
        return v

    torch._dynamo.reset()
    with torch.no_grad():
        refocus.optimize(layers, engine="tiled")(*tensors(), holes())
    assert len(reads) == 1


def ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.amin().clone(), tensor.amax().clone()


def test_nothing_is_kept_alive_and_nothing_taken_for_another() -> None:
    cache = TileCache(most=4)
    masks = [torch.zeros(64, 64)]
    alive = weakref.ref(masks[0])
    cache.ends(masks[0], "all", lambda: ends(masks[0]))
    masks.clear()
    gc.collect()
    assert alive() is None
    for k in range(20):  # new tensors take the place of old ones in memory
        other = torch.full((64, 64), float(k))
        assert float(cache.ends(other, "all", lambda t=other: ends(t))[1]) == k
        assert len(cache) <= 4


def test_how_it_is_read_and_laid_out_matters() -> None:
    cache = TileCache()
    mask = torch.arange(128.0 * 64).reshape(128, 64)
    rows = cache.ends(mask, "rows", lambda: (mask.amin(0), mask.amax(0)))
    columns = cache.ends(mask, "columns", lambda: (mask.amin(1), mask.amax(1)))
    turned = cache.ends(mask.t(), "rows", lambda: (mask.t().amin(0), mask.t().amax(0)))
    assert rows[0].shape == (64,) and columns[0].shape == (128,) and torch.equal(turned[0], columns[0])


def test_what_cannot_be_watched_has_no_identity() -> None:
    numpy = pytest.importorskip("numpy")
    with torch.inference_mode():
        assert Identity.of(torch.ones(9)) is None
    assert Identity.of(torch.from_numpy(numpy.ones(9))) is None
    lent = torch.ones(9)
    identity = Identity.of(lent)
    assert identity is not None and identity.holds(lent)
    lent.numpy()
    assert not identity.holds(lent)
    assert Identity.of(torch.empty(3, device="meta")) is None


def test_writes_are_noticed_in_inference_mode_too() -> None:
    mask = torch.ones(9)
    identity = Identity.of(mask)
    assert identity is not None
    with torch.inference_mode():
        mask[2] = 0
    assert not identity.holds(mask)
