"""The operator `refocus::attend`: schema, shapes, dispatch, and what it refuses."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from refocus import errors, oracle
from refocus.codegen import operator, plan
from refocus.codegen.operator import attend, call
from refocus.codegen.plan import Plan
from refocus.ir import parse
from tests import region_cases as cases

PLAN = Plan("tiled", block_q=16, block_k=16)


@pytest.mark.parametrize("name", ["gqa", "symbolic", "windows_2d", "cross", "causal_bfloat16"])
def test_is_a_well_formed_operator(name: str) -> None:
    region, tensors, sizes = cases.CASES[name]()
    torch.library.opcheck(attend, (tensors, sizes, repr(region), repr(PLAN)))


@pytest.mark.parametrize("name", cases.CASES)
def test_reprs_rebuild_their_values(name: str) -> None:
    region, _, _ = cases.CASES[name]()
    assert parse(repr(region)) == region


def test_plans_rebuild_from_their_repr() -> None:
    for value in (PLAN, Plan("triton", "decode", 32, 128, 8, 3)):
        assert plan.parse(repr(value)) == value


def test_one_graph_serves_several_lengths() -> None:
    region, tensors, sizes = cases.symbolic()
    text, how = repr(region), repr(PLAN)
    frames = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=frames, fullgraph=True, dynamic=True)
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.refocus.attend([q * 1.0, k, v], [q.shape[2], k.shape[2]], text, how) + 1.0
        return out

    for n in (53, 21, 34):
        _, tensors, sizes = cases.symbolic(n=n)
        want = oracle.run(region, tensors, sizes).float() + 1.0
        torch.testing.assert_close(model(*tensors), want, rtol=0, atol=3e-6)
    assert frames.frame_count == 1


def test_gradients_are_refused_not_dropped() -> None:
    region, tensors, sizes = cases.causal()
    tensors[1].requires_grad_()
    with pytest.raises(errors.NeedsGradient, match="requires_grad on k"):
        call(region, PLAN, tensors, sizes)
    with torch.no_grad():
        assert not call(region, PLAN, tensors, sizes).requires_grad
    with torch.inference_mode():
        call(region, PLAN, tensors, sizes)


def test_misfits_are_named() -> None:
    region, tensors, sizes = cases.symbolic()
    with pytest.raises(errors.BadRegion, match=r"'k'[\s\S]*float32\[2, 2, 9, 16\][\s\S]*to do"):
        call(region, PLAN, tensors, [53, 9])
    with pytest.raises(errors.BadRegion, match="3 operands and 2 sizes"):
        call(region, PLAN, tensors, [53])
    with pytest.raises(errors.BadRegion, match="bfloat16"):
        call(region, PLAN, [tensors[0].bfloat16(), *tensors[1:]], sizes)


def test_unknown_engines_are_named() -> None:
    region, tensors, sizes = cases.dense()
    with pytest.raises(errors.EngineUnavailable, match="tiled"):
        call(region, Plan("abacus"), tensors, sizes)


def test_engine_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operator.ENGINES, "missing", "refocus.codegen.no_such_engine")
    with pytest.raises(errors.EngineUnavailable, match="no_such_engine"):
        operator.engine_named("missing")


def test_errors_read_well_and_travel() -> None:
    error = errors.RegionNotFused("left alone", expected="fused", got="dropout", todo="eval()", location="model.py:12")
    assert str(error) == "model.py:12: left alone\n  expected: fused\n  got: dropout\n  to do: eval()"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.RegionNotFused and str(copy) == str(error) and copy.location == "model.py:12"
