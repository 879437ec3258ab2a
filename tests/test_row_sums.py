"""The log-sum-exp of each row as a second result of a region: its values, and gradients through both results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus import oracle, simplify
from refocus.codegen import choose, cpp, operator, schedules, sdpa
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.ir import Const, Output, Region, parse
from refocus.notation import notation
from refocus.testing import rewritten
from refocus.tolerances import difference, magnitude
from tests import region_cases as cases
from tests import test_row_results as results
from tests.backward_cases import BACKWARD
from tests.children import interpreted, settle
from tests.region_cases import Case

PLAN = Plan("tiled", block_q=32, block_k=16)
ALL = {**cases.CASES, **BACKWARD}
# Masks, sinks, rows without keys that are numbers and that are none, a gate, grouped and symbolic axes.
GENERATED = ("causal", "sinks", "empty_added", "emptied_bias", "dropout", "gqa", "symbolic")


def with_sums(case: Case) -> Case:
    region, tensors, sizes = case
    return replace(region, row_sums=True), tensors, sizes


def weighted(out: Tensor, rows: Tensor) -> Tensor:
    """A number that both results flow into, those of them that are numbers."""
    total = out.new_zeros((), dtype=torch.float64)
    for seed, part in enumerate((out, rows)):
        weight = torch.randn(part.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = total + torch.where(part.isfinite(), part.double() * weight, 0.0).sum()
    return total


def errors(case: Case, plan: Plan, dtype: torch.dtype) -> list[list[float]]:
    """[difference from the oracle, largest allowed], of the row sums and of every gradient."""
    region, tensors, sizes = with_sums(case)
    bounds = {torch.float64: 1e-11, torch.float32: 3e-5}
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    out, sums = operator.call_with_sums(region, plan, leaves, sizes)
    rows = sums.sum(0)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    expected = oracle.log_sums(region, wide, sizes)
    infinite = expected == -math.inf
    assert torch.equal(rows == -math.inf, infinite)
    kept = [t.where(~infinite, 0.0) for t in (rows, expected)]
    found = [[difference(*kept), bounds[dtype] * max(magnitude(kept[1]), 1.0)]]
    weighted(out, rows).backward()  # type: ignore[no-untyped-call]
    weighted(oracle.run(region, wide, sizes), expected).backward()  # type: ignore[no-untyped-call]
    for mine, theirs in ((a.grad, b.grad) for a, b in zip(leaves, wide) if a.requires_grad):
        assert mine is not None
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        found.append([difference(mine, theirs), bounds[mine.dtype] * max(magnitude(theirs), 1.0)])
    return found


@pytest.mark.parametrize("name", ALL)
def test_tiled(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for mine, bound in errors(ALL[name](dtype), PLAN, dtype):
            assert mine <= bound, dtype


@pytest.mark.parametrize("name", ["alibi", "empty_added", "sinks", "softcap"])
def test_gradcheck(name: str) -> None:
    region, tensors, sizes = with_sums(cases.CASES[name](torch.float64, n=9, d=3))  # type: ignore[call-arg]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    plan = Plan("tiled", block_q=4, block_k=4)

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, sums = operator.call_with_sums(region, plan, given, sizes)
        return out, sums.sum(0)

    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


def test_row_sums_that_are_no_result_take_no_gradient() -> None:
    region, tensors, sizes = cases.causal(n=9, d=3)
    leaves = [t.requires_grad_() for t in tensors]
    assert not operator.call_with_sums(region, PLAN, leaves, sizes)[1].requires_grad


def placed(region: Region) -> Region:
    """The same, its result stored heads last: (b, i, h, e)."""
    (b, h), i, (e,) = region.batch, region.query, region.value
    return replace(region, output=Output((b.size, i.size, h.size, e.size), (b, i, h, e)))


def of_placed(plan: Plan) -> list[list[float]]:
    """The gradients of a region whose result is put elsewhere, against those of one whose result is not."""
    region, tensors, sizes = with_sums(cases.causal(n=20))
    found = []
    for one in (region, placed(region)):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out, sums = operator.call_with_sums(one, plan, leaves, sizes)
        out = out if one is region else out.transpose(1, 2)
        weighted(out, sums.sum(0)).backward()  # type: ignore[no-untyped-call]
        found.append([t.grad for t in leaves])
    return [[difference(a, b), 1e-5] for a, b in zip(*found) if a is not None and b is not None]


def test_where_the_result_is_put_makes_no_difference() -> None:
    found = of_placed(PLAN)
    assert len(found) == 3 and all(mine <= bound for mine, bound in found)


def test_a_region_tells_what_it_yields() -> None:
    region = cases.causal()[0]
    assert "row_sums" not in repr(region) and "L[" not in notation(region)
    more = replace(region, row_sums=True)
    assert parse(repr(more)) == more != region == parse(repr(region))
    assert "L[b,h,i] = logsumexp_j(S | mask)" in " ".join(notation(more).split())


def test_engines_that_tell_no_row_sums_say_so() -> None:
    region = replace(cases.dense()[0], row_sums=True)
    for engine in (cpp, sdpa):
        assert "no log-sum-exp" in str(engine.supports(region))


def test_one_query_is_not_split_over_programs_that_tell_no_row_sums() -> None:
    region = cases.dense(n=4096)[0]  # type: ignore[call-arg]
    one = replace(region, query=replace(region.query, size=Const(1)))
    assert schedules.default_plan(one, {}).schedule == "decode"
    assert schedules.default_plan(replace(one, row_sums=True), {}).schedule != "decode"


def test_a_cpu_takes_it_where_few_tiles_are_left() -> None:
    region = cases.causal(n=2048)[0]  # type: ignore[call-arg]
    near = simplify.and_(region.mask, simplify.lt(region.query, simplify.add(region.key, 64)))
    found = [
        choose.plan_part(replace(region, mask=mask, row_sums=True), {}, torch.device("cpu"), None, False)
        for mask in (near, region.mask)
    ]
    assert isinstance(found[0], Chosen) and found[0].plan.engine == "tiled"
    assert isinstance(found[1], Leave) and found[1].reason.startswith("its log-sum-exp is read")


def of_model(function: results.Function) -> list[list[float]]:
    """The results and gradients of a model that reads them, against eager code."""
    leaves, again = ([t.detach().requires_grad_() for t in results.inputs()] for _ in range(2))
    got = rewritten(results.Attention(function), engine="triton", require=True)(*leaves)
    pairs = []
    for mine, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, function(*again)))):
        assert torch.equal(mine.isnan(), theirs.isnan())
        for part in (mine, theirs):
            part.where(part.abs() < 1e4, 0.0).square().sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        pairs.append((mine.nan_to_num(), theirs.nan_to_num()))
    pairs += [(a.grad, b.grad) for a, b in zip(leaves, again) if a.grad is not None and b.grad is not None]
    assert len(pairs) > len(leaves)
    return [[difference(a, b), 1e-4 * max(magnitude(b), 1.0)] for a, b in pairs]


MODELS = {f.__name__: f for f in (results.within_the_weights, results.rounded, results.no_number, results.rounds)}


def child() -> dict[str, Any]:
    settle()
    plan = Plan("triton", block_q=16, block_k=16)
    found: dict[str, Any] = {name: errors(ALL[name](), plan, torch.float32) for name in GENERATED}
    return found | {"placed": of_placed(plan)} | {name: of_model(model) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_row_sums")
    return found


@pytest.mark.parametrize("name", [*GENERATED, "placed", *MODELS])
def test_generated_kernels(name: str, generated: dict[str, Any]) -> None:
    assert generated[name] and all(mine <= bound for mine, bound in generated[name])


if __name__ == "__main__":
    print(json.dumps(child()))
