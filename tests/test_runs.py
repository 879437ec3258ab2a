"""Runs of tiles that move along with their queries: what they hold, and that they compute what the oracle does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refocus import grid as grids
from refocus import simplify as s
from refocus.codegen import tiled
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.codegen.runs import Column, Run, Tiled
from refocus.codegen.training_policy import choose_training
from refocus.grid import Grid, Term
from refocus.ir import TRUE, Axis, Const, Expr, Load
from refocus.masks import EMPTY, FULL, PARTIAL
from tests import region_cases as cases
from tests.region_cases import Case, Setting
from tests.test_gradients import backward, reference

Making = Callable[[Setting], Expr]
DEVICE = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- what runs hold


def runs_of(state: Tensor, queries: int, keys: int, kinds: tuple[int, ...] = ()) -> list[Run]:
    rows, columns = state.shape
    return Tiled(queries, keys, 8, 4, (0,) * rows, kinds or (0,) * columns).runs(state)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_every_tile_that_is_not_empty_is_in_one_column(density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(PARTIAL, FULL + 1, (7, 9), dtype=torch.int8, generator=generator)
    state[torch.rand(7, 9, generator=generator) >= density] = EMPTY
    found = torch.zeros(7 * 8 - 3, 9 * 4 - 1, dtype=torch.int8)
    rows = 0
    for run in runs_of(state, *found.shape):
        assert run.start == rows
        rows += run.queries
        for tile in range(run.tiles):
            for column in run.columns:
                first, start = run.start + tile * run.length, column.start + tile * column.step
                part = found[first : first + run.length, start : start + column.length]
                assert part.shape == (run.length, column.length) and not part.any()
                part.fill_(FULL)
                for begin, count in column.masked:
                    part[:, begin : begin + count] = PARTIAL
    assert rows == found.shape[0]
    wide = state.repeat_interleave(8, 0)[: found.shape[0]].repeat_interleave(4, 1)[:, : found.shape[1]]
    assert torch.equal(found, wide)


def band(tiles: int, first: int, last: int) -> Tensor:
    """Tiles of eight queries, and of four keys from first to last beside them."""
    ahead = torch.arange(2 * tiles) - 2 * torch.arange(tiles)[:, None]
    return torch.where((ahead >= first) & (ahead <= last), PARTIAL, EMPTY).to(torch.int8)


def test_a_band_is_one_run() -> None:
    found = runs_of(band(6, -2, 1), 48, 48)
    assert found == [
        Run(0, 1, 8, (Column(0, 0, 8, ((0, 8),)),)),
        Run(8, 5, 8, (Column(0, 8, 16, ((0, 16),)),)),
    ]
    assert found[1].overlaps and found[1].cut(3) == [
        Run(8, 3, 8, (Column(0, 8, 16, ((0, 16),)),)),
        Run(32, 2, 8, (Column(24, 8, 16, ((0, 16),)),)),
    ]


def test_other_kinds_of_keys_end_a_run() -> None:
    kinds = (1, *(0,) * 11)
    found = runs_of(band(6, -2, 1), 48, 48, kinds)
    assert [(run.start, run.tiles, len(run.columns)) for run in found] == [(0, 1, 2), (8, 1, 2), (16, 4, 1)]


def test_keys_that_all_attend_to_do_not_move() -> None:
    state = band(6, 0, 1)
    state[:, 0] = FULL
    (run,) = [run for run in runs_of(state, 48, 48) if run.tiles > 1]
    assert run.columns == (Column(0, 0, 4), Column(8, 8, 8, ((0, 8),)))


def test_a_short_tile_is_no_part_of_a_run() -> None:
    found = runs_of(torch.full((3, 2), FULL, dtype=torch.int8), 20, 8)
    assert [(run.tiles, run.length) for run in found] == [(2, 8), (1, 4)]


# ---------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    "terms",
    [
        (Term(-2, 5, 4), Term(-1, 7, 1)), (Term(-1, 5, 4), Term(-2, 9, 2)), (Term(-2, 4, 1), Term(-1, 6, 1)),
        (Term(-2, 3, 9), Term(-1, 5, 1)), (Term(-2, 2, 6), Term(-1, 14, 3)), (Term(-2, 2, 1), Term(-1, 9, 1)),
    ],
)  # fmt: skip
def test_windows_that_overlap(terms: tuple[Term, ...]) -> None:
    """They are read through a view, and what is added to a place through several of them adds up."""
    at = Grid(2, terms)
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(60, generator=generator)
    got = grids.read(source, [at], DEVICE, overlapping=True)
    places = at.tensor(DEVICE)
    assert torch.equal(got, source[places]) and got.data_ptr() == source[2:].data_ptr()
    assert grids.read(source, [at], DEVICE).data_ptr() != source[2:].data_ptr()  # nobody else gets such a view
    part = torch.randn(got.shape, generator=generator)
    sums, want = torch.zeros(60), torch.zeros(60)
    grids.add_at(sums, [at], part, DEVICE)
    torch.testing.assert_close(sums, want.index_put_((places,), part, accumulate=True))
    one = torch.ones(1, 1)
    sums, want = torch.zeros(60), torch.zeros(60)
    grids.add_at(sums, [at], one, DEVICE)
    torch.testing.assert_close(sums, want.index_put_((places,), one.expand(got.shape), accumulate=True))


# ---------------------------------------------------------------------------------------------------- results


def distance(setting: Setting) -> Expr:
    return s.sub(setting.i, setting.j)


def centred(setting: Setting) -> Expr:
    return s.and_(s.le(distance(setting), 20), s.le(-17, distance(setting)))


def with_global(setting: Setting) -> Expr:
    return s.or_(centred(setting), s.lt(setting.j, 5))


def dilated(setting: Setting) -> Expr:
    return s.and_(centred(setting), s.eq(s.mod(s.add(distance(setting), 300), 3), 0))


def blocks(setting: Setting) -> Expr:
    return s.eq(s.floordiv(setting.i, 16), s.floordiv(setting.j, 16))


def slid(setting: Setting) -> Expr:
    """A window that slides inward at both ends."""
    first = s.minimum(s.maximum(s.sub(setting.i, 10), 0), s.sub(setting.j.size, 21))
    return s.and_(s.le(first, setting.j), s.le(setting.j, s.add(first, 20)))


def case_of(mask: Making, dtype: torch.dtype, n: int, kv_heads: int) -> Case:
    setting = Setting(dtype, n, n, 16, 8, kv_heads)
    return setting.case(setting.score, mask(setting))


def bordered(n: int, d: int = 16) -> Case:
    """Keys 0 .. n + 18, of which the first and last nine are zeros that are not there; a bias by the offset."""
    setting = Setting(torch.float32, n, n, d, d)
    setting.tensors["bias"] = cases.randn(5, torch.float32, cases.H, 19)
    setting.j = j = type(setting.j)("j", Const(n + 18))
    inside = s.and_(s.le(9, j), s.lt(j, n + 9))
    at = s.minimum(s.maximum(s.sub(j, 9), 0), n - 1)

    def padded(value: Expr) -> Expr:
        loads = {x: Load(x.tensor, (setting.b, setting.h, at, x.index[3]), x.dtype) for x in value.loads}
        return s.where(inside, s.substitute(value, loads), Const(0.0, "float32"))

    dot = setting.score.args[0]  # type: ignore[attr-defined]
    dot = type(dot)(dot.over, dot.query, padded(dot.key), dot.dtype)
    setting.values = padded(setting.values)
    offset = s.sub(j, setting.i)
    near = s.minimum(s.maximum(offset, 0), 18)
    score = cases.add(dot, Load("bias", (setting.h, near), "float32"))
    return setting.case(score, s.and_(s.le(0, offset), s.le(offset, 18)))


CASES: dict[str, Callable[[], Case]] = {
    "centred": lambda: case_of(centred, torch.float32, 203, cases.H),
    "centred, grouped": lambda: case_of(centred, torch.float32, 200, 2),
    "centred, double": lambda: case_of(centred, torch.float64, 203, 1),
    "with global": lambda: case_of(with_global, torch.float32, 200, cases.H),
    "dilated": lambda: case_of(dilated, torch.float32, 203, cases.H),
    "blocks": lambda: case_of(blocks, torch.float32, 203, cases.H),
    "slid": lambda: case_of(slid, torch.float32, 203, 2),
    "bordered": lambda: bordered(203),
    "causal": lambda: cases.causal(n=203),
}


@pytest.mark.parametrize("one_by_one", [True, False], ids=["heads apart", "heads together"])
@pytest.mark.parametrize("name", CASES)
def test_runs_compute_what_the_oracle_does(name: str, one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "WORTH_A_CALL", 1 if one_by_one else 1 << 30)
    region, tensors, sizes = CASES[name]()
    plan = Plan("tiled", block_q=16, block_k=16)
    made = tiled.Tiles.of(region, plan, tensors, sizes)
    longest = max(run.tiles for run in made.runs(made.scope, float("inf")))
    assert longest > 4 or name == "causal"  # whose rows grow
    if name == "bordered":  # its loads are read through a function of the key, which no derivative is asked of
        result = tiled.run(region, plan, tensors, sizes)
        want, _ = reference(region, tensors, sizes, torch.zeros_like(result))
        torch.testing.assert_close(result.double(), want.detach(), rtol=1e-5, atol=1e-5)
        return
    grad = torch.randn(tiled.run(region, plan, tensors, sizes).shape, generator=torch.Generator().manual_seed(9))
    grad = grad.to(tensors[0].dtype)
    out, expected = reference(region, tensors, sizes, grad)
    close = {"rtol": 1e-5, "atol": 1e-5} if grad.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(tiled.run(region, plan, tensors, sizes).double(), out.detach(), **close)
    for got, want in zip(backward(region, plan, tensors, sizes, grad), expected, strict=True):
        assert want is not None
        torch.testing.assert_close(got.double(), want, **close)


def test_nan_outside_of_the_mask_stays_there() -> None:
    region, tensors, sizes = CASES["centred"]()
    tensors[1][:, :, 100] = float("nan")
    tensors[2][:, :, 100] = float("nan")
    out = tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
    reached = (torch.arange(203) - 100 <= 20) & (torch.arange(203) - 100 >= -17)
    assert out[:, :, reached].isnan().all()


class Calls(TorchDispatchMode):
    """How many products and gathers were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.bmm.default
        self.gathers += func is torch.ops.aten.index.Tensor and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_the_inside_of_a_border_is_read_in_place() -> None:
    """Twice as long is as many calls: only at the border is anything gathered."""
    calls = []
    for n in (400, 800):
        region, tensors, sizes = bordered(n)
        with Calls() as counted:
            tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
        calls.append((counted.products, counted.gathers))
    assert calls[0] == calls[1]


# ---------------------------------------------------------------------------------------------------- the policy


def chosen(mask: Making | None, n: int) -> Chosen | Leave:
    setting = Setting(torch.float32, n, n, 64, 64)
    return choose_training(setting.region(setting.score, TRUE if mask is None else mask(setting)), {})


def test_small_tiles_where_they_form_runs() -> None:
    for mask in (centred, slid):
        outcome = chosen(mask, 4096)
        assert isinstance(outcome, Chosen) and outcome.plan.block_q < 128
    assert isinstance(chosen(None, 4096), Leave)
    causal = chosen(lambda setting: s.le(setting.j, setting.i), 4096)  # forms none
    assert isinstance(causal, Chosen) and causal.plan.block_q == 128


def test_products_of_one_row_are_no_gain() -> None:
    """7 x 7 neighbours of each of 3136 tokens, read in place."""
    region = Setting(torch.float32, 1, 49, 64, 64).region(Setting(torch.float32, 1, 49, 64, 64).score)
    tokens = Axis("t", Const(3136))
    region = replace(region, batch=(tokens, *region.batch))
    assert isinstance(choose_training(region, {}, written=region), Leave)
