"""The windows schedule: its numbers under Triton's interpreter, the choice of it, and the text of its kernels.

One child process (this file as a program) interprets all numeric cases, as in tests/test_triton_flash.py.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refocus import oracle
from refocus import simplify as s
from refocus.codegen import flash_fit, schedules, triton_engine, windows, windows_fit
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.ir import BOOL, TRUE, Axis, Const, Dot, Expr, Load, Operand, Region, Sym
from refocus.tolerances import allowed_error, difference, magnitude
from tests import region_cases as cases
from tests.children import interpreted, settle
from tests.region_cases import Case, operand, randn

BATCH, WINDOWS, HEADS = 5, 4, 3


class Windowed:
    """Windows of several pictures, by head: q[b,w,h,i,d], k and v alike, with 7 x 7 tokens unless said otherwise."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, n: int = 49, m: int = 0, d: int = 8, batch: int = BATCH
    ) -> None:
        self.f, m = cases.name_of(dtype), m or n
        self.n, self.m, self.batch = n, m, batch
        self.b, self.w, self.h = Axis("b", Const(batch)), Axis("w", Const(WINDOWS)), Axis("h", Const(HEADS))
        self.i, self.j, self.d, self.e = (Axis(x, Const(z)) for x, z in (("i", n), ("j", m), ("d", d), ("e", d)))
        at = (self.b, self.w, self.h)
        self.tensors = {
            x: randn(seed, dtype, batch, WINDOWS, HEADS, length, d)
            for seed, (x, length) in enumerate((("q", n), ("k", m), ("v", m)))
        }
        dot = Dot((self.d,), Load("q", (*at, self.i, self.d), self.f), Load("k", (*at, self.j, self.d), self.f), self.f)
        self.score = cases.mul(dot, Const(d**-0.5, self.f))
        self.values = Load("v", (*at, self.j, self.e), self.f)

    def add_bias(self) -> None:
        self.tensors["bias"] = randn(4, torch.float32, HEADS, self.n, self.m).to(self.tensors["q"].dtype)
        self.score = cases.add(self.score, Load("bias", (self.h, self.i, self.j), self.f))

    def add_shift_mask(self) -> None:
        """-100 between tokens that were not neighbours, by window."""
        region = torch.arange(self.n)[None] * torch.arange(WINDOWS)[:, None] // 40
        self.tensors["shift"] = -100.0 * (region[:, :, None] != region[:, None, :]).to(self.tensors["q"].dtype)
        self.score = cases.add(self.score, Load("shift", (self.w, self.i, self.j), self.f))

    def case(self, mask: Expr = TRUE, **more: Any) -> Case:
        more.setdefault("empty_row", "never")
        more.setdefault("logits", s.where(mask, self.score, Const(-3e38, self.f)) if mask != TRUE else self.score)
        region = Region(
            (self.b, self.w, self.h), self.i, self.j, (self.e,), self.score, mask, more.pop("logits"), self.values,
            tuple(operand(n, t) for n, t in self.tensors.items()), self.f, **more,
        )  # fmt: skip
        return region, list(self.tensors.values()), []


def plain(dtype: torch.dtype = torch.float32) -> Case:
    return Windowed(dtype).case()


def swin(dtype: torch.dtype = torch.float32, **more: int) -> Case:
    made = Windowed(dtype, **more)
    made.add_bias()
    made.add_shift_mask()
    return made.case()


def bias() -> Case:
    made = Windowed(n=20, d=16)
    made.add_bias()
    return made.case()


def cut() -> Case:
    """A mask by window that leaves some rows without a key, which are made of their fills; and a sink."""
    made = Windowed(n=20)
    keep = randn(6, torch.float32, WINDOWS, 20, 20) > 0.5
    keep[1, 3] = False
    keep[2] = False
    made.tensors["keep"] = keep
    made.tensors["sink"] = randn(7, torch.float32, HEADS)
    mask = Load("keep", (made.w, made.i, made.j), BOOL)
    logits = cases.add(made.score, s.where(mask, Const(0.0, made.f), Const(-100.0, made.f)))
    sink = cases.add(Load("sink", (made.h,), made.f), Const(-100.0, made.f))
    return made.case(mask, logits=logits, extra=(sink,), empty_row="logits")


def cut_infinite() -> Case:
    made = Windowed(n=20)
    made.tensors["keep"] = torch.arange(BATCH)[:, None] > torch.arange(20)[None] - 1
    mask = Load("keep", (made.b, made.j), BOOL)
    return made.case(mask, logits=s.where(mask, made.score, Const(-math.inf, made.f)), empty_row="logits")


def cut_zero() -> Case:
    made = Windowed(n=20)
    made.tensors["keep"] = torch.arange(BATCH)[:, None] > torch.arange(20)[None] - 1
    return made.case(Load("keep", (made.b, made.j), BOOL), empty_row="zero")


def closed() -> Case:
    """A mask of indices, and a gate; the maxima of products alone."""
    made = Windowed(n=20, m=23)
    gate = cases.call("sigmoid", made.score)
    return made.case(s.le(made.j, s.add(made.i, 2)), gate=gate)


def one_of_each() -> Case:
    """One query, one key."""
    return Windowed(n=1, m=1).case()


def several_tiles() -> Case:
    """More queries than a tile has, and a bias."""
    made = Windowed(n=70, m=30, batch=2)
    made.add_bias()
    return made.case()


def rolled() -> Case:
    """Windows of a rolled picture, read in place."""
    return cases.windows_2d()


MANY: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        plain, swin, bias, cut, cut_infinite, cut_zero, closed, one_of_each, several_tiles, rolled, cases.gqa,
        cases.sinks, cases.alibi, cases.dropout,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the child process


def _errors(case: Case) -> list[list[float]]:
    """[largest difference from the oracle, largest allowed]: one program for all windows, several, wide addresses, and
    the engine's own choice."""
    from refocus.codegen.launch import launch

    region, tensors, sizes = case
    plan = replace(windows_fit.windows_plan(region), block_q=16)
    tiles, _ = windows_fit.grid(region, plan, sizes, 1)
    got = [
        launch(triton_engine.emit(region, plan, wide), tensors, sizes, (tiles, sharing))[0]
        for sharing, wide in ((1, True), (3, False))
    ]
    got.append(triton_engine.run(region, windows_fit.windows_plan(region), tensors, sizes))
    exact = oracle.run(region, tensors, sizes)
    plain = oracle.run(region, tensors, sizes, torch.float32).to(got[0].dtype)
    allowed = allowed_error(got[0].dtype, difference(plain, exact), magnitude(exact))
    return [[difference(x, exact), allowed] for x in got]


def _same_sums(case: Case) -> list[list[float]]:
    """The row sums that the backward needs are those of the flash schedule."""
    region, tensors, sizes = case
    _, want = triton_engine.run_saving(region, flash_fit.default_plan(region), tensors, sizes)
    _, got = triton_engine.run_saving(region, windows_fit.windows_plan(region), tensors, sizes)
    return [[difference(got, want.double()), 1e-5 * magnitude(want)]]


def _gradients() -> list[list[float]]:
    """Forward by windows, backward by flash: as autograd through eager code."""
    from refocus.codegen import operator

    region, (q, k, v, bias, shift), _ = swin(n=20, batch=2)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, bias)]
    out = operator.call_saving(region, windows_fit.windows_plan(region), [*leaves, shift])
    weight = randn(9, torch.float32, *out.shape)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    eager = [t.detach().double().requires_grad_() for t in leaves]
    scores = eager[0] @ eager[1].mT * 8**-0.5 + eager[3] + shift[:, None].double()
    want = torch.autograd.grad(((scores.softmax(-1) @ eager[2]) * weight).sum(), eager)
    return [[difference(a, b), 1e-5 * magnitude(b)] for a, b in zip(got, want)]


def _model() -> dict[str, Any]:
    """Swin, its windows read in place: 16 of them, 8 pictures and 2 heads, plain and shifted."""
    import transformers

    from refocus.testing import check

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=56, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=7, drop_path_rate=0.0
    )
    model = transformers.SwinModel._from_config(config, attn_implementation="eager")
    # Raises where numbers differ.
    done = check(model, (torch.randn(8, 3, 56, 56),), engines=("triton",), sites=2, lower=False)
    return {"kernels": [Path(str(site.kernel_path)).read_text() for site in done.report.sites]}


def child() -> dict[str, Any]:
    settle()
    out: dict[str, Any] = {name: _errors(case()) for name, case in MANY.items()}
    for dtype in (torch.float16, torch.bfloat16):
        out[f"swin_{dtype}"] = _errors(swin(dtype))
    out["sums"] = [e for name in ("swin", "cut_zero", "cut") for e in _same_sums(MANY[name]())]
    return out | {"gradients": _gradients(), "model": _model()}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_triton_windows")
    return found


NAMES = [*MANY, *(f"swin_{d}" for d in (torch.float16, torch.bfloat16)), "sums", "gradients"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(results: dict[str, Any], name: str) -> None:
    for error, allowed in results[name]:
        assert error <= allowed


@pytest.mark.slow
def test_windows_of_a_model(results: dict[str, Any]) -> None:
    kernels = results["model"]["kernels"]
    assert len(kernels) == 2
    for kernel in kernels:
        before, within = kernel.split("in range(tl.program_id(1), 128, tl.num_programs(1)):")
        # The table of relative positions is gathered once for all windows and pictures.
        assert "tl.load(" in before and "query = tl.load(" in within


# ----------------------------------------------------------------------------------------------------- the choice


def test_many_small_attentions_are_windows() -> None:
    big, _, _ = swin(batch=32)
    plan = schedules.default_plan(big, {})
    assert (plan.schedule, plan.block_q, plan.block_k) == ("windows", 64, 64)
    assert schedules.default_plan(big, {}, trained=True).schedule == "windows"


def test_few_or_large_ones_are_not() -> None:
    assert schedules.default_plan(swin()[0], {}).schedule == "flash"  # 60 of them
    assert schedules.default_plan(Windowed(n=65, batch=32).case()[0], {}).schedule == "flash"
    assert schedules.default_plan(Windowed(d=80, batch=32).case()[0], {}).schedule == "flash"
    assert schedules.default_plan(cases.symbolic()[0], {Sym("s0"): 49, Sym("s1"): 49}).schedule == "flash"


def test_a_batch_of_unknown_size_is_counted_by_its_hint() -> None:
    region, _, _ = swin()
    n = Sym("s0")
    b = Axis("b", n)
    parts: dict[Expr, Expr] = {region.batch[0]: b}
    changed = replace(
        region, batch=(b, *region.batch[1:]), score=s.substitute(region.score, parts),
        logits=s.substitute(region.logits, parts), values=s.substitute(region.values, parts),
        operands=tuple(Operand(o.name, o.dtype, (n, *o.shape[1:]) if o.name in "qkv" else o.shape)
                       for o in region.operands),
    )  # fmt: skip
    assert schedules.default_plan(changed, {n: 64}).schedule == "windows"
    assert schedules.default_plan(changed, {n: 4}).schedule == "flash"
    assert windows_fit.grid(changed, Plan("triton", "windows"), [64], 132) == (12, 64)


@pytest.mark.parametrize(
    ("batch", "moving"),
    [
        (8, "b"),  # enough pictures share the bias and the mask
        (2, "bw"),  # the bias alone
        (1, "bw"),
    ],
)
def test_what_is_shared(batch: int, moving: str) -> None:
    region, _, _ = swin(batch=batch)
    assert "".join(a.name for a in windows_fit.members(region)) == moving


def test_without_anything_to_share_all_windows_are_alike() -> None:
    region, _, _ = plain()
    assert windows_fit.members(region) == region.batch


@pytest.mark.parametrize(("multiprocessors", "grid"), [(1, (12, 2)), (132, (12, 5))])
def test_programs_fit_the_device(multiprocessors: int, grid: tuple[int, int]) -> None:
    region, _, _ = swin()
    assert windows_fit.grid(region, windows_fit.windows_plan(region), [], multiprocessors) == grid


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan("triton", "windows", 64, 32), "fit into a tile of 32"),
        (Plan("triton", "windows", 64, 64, listed=True), "listed"),
    ],
)
def test_says_what_it_cannot_do(plan: Plan, reason: str) -> None:
    with pytest.raises(EngineUnavailable, match=reason):
        triton_engine.emit(swin()[0], plan)


def test_a_smaller_plan_still_holds_all_keys() -> None:
    region, _, _ = swin(batch=32)
    plan: Plan | None = windows_fit.windows_plan(region)
    while plan is not None:
        assert windows_fit.supports(region, plan) is None
        last, plan = plan, triton_engine.smaller(plan)
    assert last.block_q == 16


# ----------------------------------------------------------------------------------------------------- the source


@pytest.mark.parametrize("name", MANY)
def test_source_is_short(name: str) -> None:
    region = MANY[name]()[0]
    text = windows.write(region, windows_fit.windows_plan(region)).text
    ast.parse(text)
    assert len(text.splitlines()) < 110


def test_what_is_shared_is_loaded_before_the_loop() -> None:
    before, within = _halves(swin(batch=8)[0])
    assert "bias = tl.load(" in before and "shift_2 = tl.load(" in before
    assert "query = tl.load(" in within and "key = tl.load(" in within


def test_what_is_not_shared_is_loaded_in_it() -> None:
    before, within = _halves(swin(batch=2)[0])
    assert "bias = tl.load(" in before
    assert "shift_2 = tl.load(" in within


def _halves(region: Region) -> list[str]:
    text = windows.write(region, windows_fit.windows_plan(region)).text
    halves = text.split("in range(tl.program_id(1), ")
    assert len(halves) == 2
    return halves


if __name__ == "__main__":
    from benchmarks.torchvision_ops import import_torchvision

    import_torchvision()  # before transformers is imported
    print(json.dumps(child()))
