"""Closed forms of constant masks: found, right on every element, and never believed when a single one is off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refocus import bits, infer
from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate
from refocus.infer_sets import set_form
from refocus.ir import Axis, Const, Expr
from refocus.notation import notation
from tests.constant_masks import masks, soft

SMALL = masks(64)
LARGE = masks()


def values(form: Expr, like: Tensor) -> Tensor:
    axes = infer.axes_of(like)
    return evaluate(form, arange_env(axes, {}), {}, {}).expand(like.shape).to(like.dtype)


@pytest.mark.parametrize("name", LARGE)
def test_found(name: str) -> None:
    make, piece = LARGE[name]
    mask = make()
    form = infer.closed_form(mask)
    assert form is not None and torch.equal(values(form, mask), mask)
    assert not form.loads and piece in notation(form)


@pytest.mark.parametrize("name", soft())
def test_left_in_memory(name: str) -> None:
    assert infer.closed_form(soft()[name]()) is None


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SMALL)), st.data())
def test_a_flipped_element_survives(name: str, data: st.DataObject) -> None:
    mask = SMALL[name][0]().clone()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in mask.shape)
    other = mask.reshape(-1)[mask.reshape(-1) != mask[at]]
    if not other.numel():
        return
    mask[at] = other[0]
    form = infer.closed_form(mask)
    assert form is None or torch.equal(values(form, mask), mask)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_random_matrices_are_never_mistaken(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = float(torch.rand((), generator=generator))
    mask = torch.rand(height, width, generator=generator) < share
    form = infer.closed_form(mask)
    assert form is None or torch.equal(values(form, mask), mask)


def test_the_proof_sees_each_element() -> None:
    mask = torch.ones(70, 3001).tril().bool()
    form = infer.closed_form(mask)
    assert form is not None
    for at in ((0, 0), (69, 3000), (0, 3000), (33, 34), (69, 69)):
        mask[at] ^= True
        assert not infer.agrees(form, infer.axes_of(mask), mask)
        mask[at] ^= True
    assert infer.agrees(form, infer.axes_of(mask), mask)


@given(st.integers(0, 2**90), st.integers(0, 2**90), st.integers(-50, 50))
@settings(deadline=None)
def test_sets(on: int, mixed: int, origin: int) -> None:
    off = mixed & ~on
    x = Axis("x", Const(1000))
    form = set_form(on, off, s.sub(x, origin), origin)
    if form is not None:
        held = evaluate(form, {x: torch.arange(91)}, {}, {}).expand(91).tolist()
        assert all(held[k] for k in range(91) if on >> k & 1)
        assert not any(held[k] for k in range(91) if off >> k & 1)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 1000))
@settings(deadline=None)
def test_bits(width: int, height: int, seed: int) -> None:
    mask = torch.rand(height, 2 * width, generator=torch.Generator().manual_seed(seed)) < 0.4
    for block in (mask[:, :width], mask[:, ::2], mask.t()):
        rows = bits.pack(block)
        assert [[row >> k & 1 for k in range(block.shape[1])] for row in rows] == block.int().tolist()
    row = bits.pack(mask)[0]
    assert sum(1 << k for a, b in bits.runs(row) for k in range(a, b)) == row
    assert bits.every(row, 1, 3, 4) == sum((row >> (1 + 3 * k) & 1) << k for k in range(4))
    assert bits.smear(row, 3) == row | row >> 1 | row >> 2


def test_caches_and_weights_are_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(infer, "_read", refuse)
    assert infer.closed_form(torch.zeros(2, 4, 300, 64)) is None
    assert infer.closed_form(torch.randn(300, 300)) is None


def test_positions_and_single_numbers() -> None:
    def shown(tensor: Tensor) -> str | None:
        form = infer.constant_form(tensor)
        return None if form is None else notation(form)

    assert shown(torch.arange(5, 50, 3)) == "3*dim0 + 5"
    assert shown(torch.arange(6).reshape(2, 3)) == "3*dim0 + dim1"
    assert shown(torch.tensor([0, 1, 2, 4])) is None
    assert shown(torch.full((3, 4), 2.5)) == "2.5"
    assert shown(torch.tensor(True)) == "true"
