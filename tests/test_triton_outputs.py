"""Generated kernels put results where `Region.output` says: what they compute is the same to the bit.

One child process (this file as a program) interprets all kernels, as in tests/test_triton_flash.py. What the kernels
compute is compared with an oracle there; here it is compared with what they compute when they do not place it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus.codegen import decode_call, operator, placing, triton_backward, triton_engine, windows_fit
from refocus.codegen.decode_fit import decode_plan
from refocus.codegen.plan import Plan
from refocus.ir import Region
from refocus.tolerances import difference, magnitude
from tests import region_cases as cases
from tests.backward_cases import BACKWARD
from tests.flash_cases import MORE
from tests.placed_cases import PLACED, merged, rolled, values_apart, windows_reversed
from tests.region_cases import Case
from tests.test_gradients import wanted_of
from tests.test_triton_backward import BOUND
from tests.test_triton_decode import FEW
from tests.test_triton_windows import MANY, Windowed, swin

SMALL = Plan("triton", block_q=16, block_k=16)
# Every kind of kernel: sums of queries and keys, of shared pairs, of diagonals, of queries in part; rows without a key;
# logits without a value; one query, one head, no batch, several value axes or none, sizes that are symbols.
ALL: dict[str, Callable[..., Case]] = {**cases.CASES, **MORE, **BACKWARD}
SHORT = ("causal", "gqa", "sinks", "additive_bias", "t5_buckets", "read_buckets", "emptied_bias", "symbolic")
TRAINED: dict[str, Callable[[], Case]] = {name: partial(ALL[name], n=20) for name in SHORT} | {
    name: ALL[name] for name in ("one_query", "one_head", "no_batch", "two_axes", "no_value_axis", "several_batches")
}
# The cheap ones, whose axes are of all kinds.
EVERYWHERE = ("one_head", "no_batch", "two_axes", "several_batches")
DECODED = ("sinks", "symbolic_many")


# ------------------------------------------------------------------------------------------------ the child process


def _numbers(region: Region, sizes: Sequence[int]) -> dict[Any, int]:
    return dict(zip(region.syms, sizes, strict=True))


def _outputs(region: Region, everywhere: bool) -> dict[str, Region]:
    names = PLACED if everywhere else ("rolled",)
    return {name: PLACED[name](region) for name in names if region.batch or name not in ("merged", "rolled")}


def _same(region: Region, bare: Tensor, got: Tensor, sizes: Sequence[int]) -> bool:
    """Whether a result is the bare one, moved."""
    return got.is_contiguous() and torch.equal(got, placing.put(region, bare, bare, _numbers(region, sizes)))


def _trained(case: Case, plan: Plan, everywhere: bool = False) -> dict[str, bool]:
    """For each output: result, row sums and gradients."""
    region, tensors, sizes = case
    needs = wanted_of(region)
    out, sums = triton_engine.run_saving(region, plan, tensors, sizes)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    want = triton_backward.run_backward(region, plan, grad, tensors, out, sums, sizes, needs)
    found = {}
    for name, placed in _outputs(region, everywhere).items():
        got, same_sums = triton_engine.run_saving(placed, plan, tensors, sizes)
        moved = placing.put(placed, grad, grad, _numbers(region, sizes))
        back = triton_backward.run_backward(placed, plan, moved, tensors, got, same_sums, sizes, needs)
        found[name] = _same(placed, out, got, sizes) and torch.equal(sums, same_sums)
        found[f"{name}, gradients"] = len(back) == len(want) and all(map(_near, back, want))
    return found


def _near(a: Tensor, b: Tensor) -> bool:
    """Delta is summed by torch, whose order may follow the memory."""
    return a.shape == b.shape and difference(a, b.double()) <= BOUND[b.dtype] * max(magnitude(b), 1.0)


def _decoded(case: Case) -> dict[str, bool]:
    region, tensors, sizes = case
    plan, found = decode_plan(region), {}
    for parts in (1, 3):
        bare = decode_call.run(region, plan, tensors, sizes, parts)
        for name, placed in _outputs(region, parts == 3).items():
            got = decode_call.run(placed, plan, tensors, sizes, parts)
            found[f"{name}, {parts} parts"] = _same(placed, bare, got, sizes)
    return found


def _windows(case: Case, put: Callable[[Region], Region]) -> dict[str, bool]:
    region, tensors, sizes = case
    plan, placed = windows_fit.windows_plan(region), put(region)
    out, sums = triton_engine.run_saving(region, plan, tensors, sizes)
    got, same_sums = triton_engine.run_saving(placed, plan, tensors, sizes)
    again = triton_engine.run(placed, plan, tensors, sizes)
    return {
        "saving": _same(placed, out, got, sizes) and torch.equal(sums, same_sums),
        "not saving": _same(placed, out, again, sizes),
    }


def _apart() -> dict[str, bool]:
    """Values that are not next to one another are moved by the operator, forth and back."""
    region, tensors, sizes = cases.causal(n=20)
    placed, found = values_apart(region), []
    for one in (region, placed):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = operator.call_saving(one, SMALL, leaves, sizes)
        (out if one is region else out.mT).square().sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves if t.grad is not None)])
    (bare, *want), (got, *back) = found
    called = operator.call(placed, SMALL, tensors, sizes)
    return {
        "result": _same(placed, bare, got, sizes) and torch.equal(called, got),
        "gradients": len(back) == 3 and all(map(_near, back, want)),
    }


def _no_sizes() -> dict[str, bool]:
    region, (q, k, v), _ = cases.symbolic()
    placed, found = merged(region), {}
    for name, parts in (("queries", [q[:, :, :0], k, v]), ("keys", [q, k[:, :, :0], v[:, :, :0]])):
        sizes = [parts[0].shape[2], parts[1].shape[2]]
        out, _ = triton_engine.run_saving(placed, SMALL, parts, sizes)
        found[name] = list(out.shape) == [2, sizes[0], 64] and not out.any()
    return found


def _graphs() -> dict[str, Any]:
    """What is left after the attention in graphs that were rewritten for this engine; raises where numbers differ."""
    from refocus.testing import check
    from tests import test_outputs as graphs

    out: dict[str, Any] = {}
    for run, shape in graphs.PLACED:
        x = torch.randn(shape)
        done = check(graphs.Module(run), (x,), engines=("triton",), lower=False, gradients=True)
        kernels = [Path(str(site.kernel_path)).read_text() for site in done.report.sites]
        out[graphs._name(run)] = graphs.graph_of(run, x, "triton"), ["put at" in k for k in kernels]
    x = torch.randn(graphs.TOKENS)
    check(graphs.Module(_transposed), (x,), engines=("triton",), lower=False, gradients=True)
    out["transposed"] = graphs.graph_of(_transposed, x, "triton")
    return out


def _transposed(x: Tensor) -> Tensor:
    """Heads merged, then tokens innermost."""
    from tests.test_outputs import attend

    return attend(x).transpose(1, 2).flatten(2).mT.contiguous().relu()


def child() -> dict[str, Any]:
    import numpy

    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out: dict[str, Any] = {n: _trained(make(), SMALL, n in EVERYWHERE) for n, make in TRAINED.items()}
    out["bfloat16"] = _trained(cases.causal(torch.bfloat16, n=20), SMALL)
    out["listed"] = _trained(cases.documents(n=40), replace(SMALL, listed=True))
    out |= {f"{n}, decoded": _decoded(FEW[n]()) for n in DECODED}
    out |= {f"{n}, windows": _windows(MANY[n](), rolled) for n in ("cut", "closed")}
    out["windows put together"] = _windows(swin(), lambda region: windows_reversed(region, 2, 7, 3))
    out["odd windows"] = _windows(Windowed(n=25, d=12).case(), lambda region: windows_reversed(region, 4, 5, 2))
    return out | {"apart": _apart(), "no sizes": _no_sizes(), "graphs": _graphs()}


NAMES = [
    *TRAINED, "bfloat16", "listed", *(f"{n}, decoded" for n in DECODED), "cut, windows",
    "closed, windows", "windows put together", "odd windows", "apart", "no sizes",
]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_triton_outputs"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_elsewhere(results: dict[str, Any], name: str) -> None:
    assert results[name]
    assert [what for what, same in results[name].items() if not same] == []


@pytest.mark.slow
def test_nothing_is_moved_after_the_attention(results: dict[str, Any]) -> None:
    graphs = dict(results["graphs"])
    assert graphs.pop("transposed")[-1] == "relu" and "contiguous" in results["graphs"]["transposed"]
    assert set(map(json.dumps, graphs.values())) == {json.dumps([["relu"], [True]])}


if __name__ == "__main__":
    print(json.dumps(child()))
