"""Kernels without a GPU: compiled ahead of time they take no more than they may, and than they took; and the text of
every kernel that tests know passes Triton's front end.

What is compiled is in tests/aot_kernels.py, what it took in tests/aot_resources.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from refocus.codegen import aot, flash_fit, triton_engine
from refocus.codegen.launch import Kernel
from refocus.ir import Region
from tests import aot_resources
from tests import region_cases as cases
from tests.aot_kernels import GROUPS, training
from tests.aot_resources import Found, Taken, problems
from tests.children import output
from tests.flash_cases import BINARY, MORE, UNARY, pointwise
from tests.region_cases import Case
from tests.test_triton_backward import ALL


@cache
def changed() -> dict[str, Found]:
    """All groups, in one process. What is as it was when the table was written is not compiled again."""
    return aot_resources.in_child(*GROUPS)


def compare(group: str, found: Found) -> None:
    version, table = aot_resources.read()
    same = version == aot_resources.version()
    assert problems(found, table, same) + aot_resources.missing(found, table, group) == []


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_take_no_more_than_they_took(group: str) -> None:
    compare(group, changed()[group])


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_compiled_again_they_take_no_more(group: str) -> None:
    compare(group, aot_resources.in_child(group, changed=False)[group])


def test_table_is_within_the_limits() -> None:
    """Also without compiling anything: nothing beyond a limit was written down, and no group was forgotten."""
    _, table = aot_resources.read()
    assert problems(table, table, True) == []
    assert {name.split("/")[0] for name in table} == set(GROUPS)
    fast = {name.split("/")[2].split()[0] for name, taken in table.items() if taken.unit == "wgmma"}
    assert {"flash_forward", "queries_backward", "keys_backward", "pairs_backward"} <= fast
    assert {"chunk_states", "chunk_outputs", "delta_states"} <= fast


def test_page_shows_the_table() -> None:
    shown = aot_resources.markdown(*aot_resources.read())
    assert shown.strip() in aot_resources.README.read_text()


BEFORE = Taken(100, 0, 1024, "wgmma")


@pytest.mark.parametrize(
    ("taken", "same", "expected"),
    [
        (BEFORE, True, []),
        (replace(BEFORE, registers=110), True, []),
        (replace(BEFORE, registers=111), True, ["111 registers, 100 before"]),
        (replace(BEFORE, registers=111), False, []),
        (replace(BEFORE, registers=256), False, ["256 registers of 255"]),
        (replace(BEFORE, spills=4), False, ["spills 4 bytes"]),
        (replace(BEFORE, shared=1 << 18), False, ["262144 bytes of shared memory, of 232448"]),
        (replace(BEFORE, unit="mma"), True, ["products run on mma, wgmma before"]),
        (replace(BEFORE, unit=""), False, ["products run on plain arithmetic, not on wgmma"]),
        (replace(BEFORE, plain=True), False, ["products run on wgmma, and were to be exact"]),
    ],
)
def test_a_regression_is_told(taken: Taken, same: bool, expected: list[str]) -> None:
    name = "forward/causal 64/flash_forward sm_90"
    assert problems({name: taken}, {name: BEFORE}, same) == [f"{name}: {text}" for text in expected]


def test_what_is_as_it_was_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_for(kernel: Kernel, target: str) -> aot.Resources:
        compiled.append(aot.digest(kernel, target))
        return aot.Resources(100, 0, 1024, "wgmma", "")

    monkeypatch.setattr(aot, "compile_for", compile_for)
    known = aot_resources.compile_group("decode", {})
    digests = [taken.digest for taken in known.values()]
    assert compiled == digests and len(set(digests)) == len(known) > 20
    compiled.clear()
    targets = [name.split()[-1] for name in known]
    first = sorted(map(targets.index, set(targets)))
    name = list(known)[-1]
    assert aot_resources.compile_group("decode", known | {name: replace(known[name], digest="another")}) == known
    assert compiled == [digests[k] for k in (*first, -1)]


def test_what_comes_and_goes_is_told() -> None:
    assert "not in the table" in problems({"g/c/k sm_90": BEFORE}, {}, False)[0]
    assert aot_resources.missing({}, {"g/c/k sm_90": BEFORE, "h/c/k sm_90": BEFORE}, "g") == ["g/c/k sm_90"]


# ------------------------------------------------------------------------------------------------------- the front end


def read(kernel: Kernel) -> str:
    """Triton's own intermediate text of a kernel: its source passes the front end."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import ir, make_backend

    from refocus.codegen.launch import function_of

    signature, constants, attributes = aot._signature(kernel)
    target = GPUTarget(*aot.TARGETS["sm_90"])
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": kernel.plan.num_warps, "num_stages": kernel.plan.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(function_of(kernel), signature, constexprs=constants, attrs=attributes)
    functions = backend.get_codegen_implementation(options)
    return str(source.make_ir(target, options, functions, backend.get_module_map(), context))


def forward(region: Region) -> list[Kernel]:
    plan = flash_fit.default_plan(region)
    return [triton_engine.emit(region, plan, wide) for wide in (False, True)]


def backward(region: Region) -> list[Kernel]:
    return [*training(region), *training(region, wide=True)]


FRONT_END: dict[str, tuple[Callable[[Region], list[Kernel]], Callable[[], dict[str, Case]]]] = {
    "forward": (
        forward,
        lambda: (
            {name: make() for name, make in (*cases.CASES.items(), *MORE.items())}
            | {op: pointwise(op) for op in (*UNARY, *BINARY)}
        ),
    ),
    "backward": (backward, lambda: {name: make() for name, make in ALL.items()}),
}


def child(which: str) -> dict[str, str]:
    kernels, make = FRONT_END[which]
    found: dict[str, str] = {}
    for name, (region, _, _) in make().items():
        try:
            assert all("tt.func" in read(kernel) for kernel in kernels(region))
        except Exception as problem:  # told by the test
            found[name] = str(problem)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", FRONT_END)
def test_every_kernel_passes_the_front_end(which: str, tmp_path: Path) -> None:
    said = output("tests.test_triton_aot", which, interpreted=False, TRITON_CACHE_DIR=str(tmp_path))
    assert json.loads(said) == {}


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
