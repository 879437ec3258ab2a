"""Kernels compiled ahead of time, without a GPU: they compile, spill nothing, and use the matrix units.

A process that interprets Triton cannot compile, so a child process does it (this file as a program:
`python -m tests.test_triton_aot`), with a compile cache of its own, and prints what each kernel takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refocus.codegen import aot, flash_fit, triton_engine
from refocus.codegen.launch import Kernel
from tests import region_cases as cases
from tests.flash_cases import BINARY, MORE, UNARY, pointwise
from tests.region_cases import Case

HALF, SINGLE = torch.bfloat16, torch.float32


def compiled() -> dict[str, tuple[Case, tuple[str, ...]]]:
    """What is compiled, and for what."""
    nvidia = ("sm_80", "sm_90")
    return {
        "causal 64": (cases.causal(HALF, n=1024, d=64), (*nvidia, "gfx942")),
        "causal 128": (cases.causal(HALF, n=1024, d=128), nvidia),
        "window 64": (cases.window(HALF, n=1024, d=64, width=256), nvidia),
        "gqa 128": (cases.gqa(HALF, n=1024, d=128), nvidia),
        "symbolic 64": (cases.symbolic(HALF, n=1024, d=64), nvidia),
        "fills 64": (cases.empty_added(HALF, n=1024, d=64), nvidia),
        "documents 64": (cases.documents(HALF, n=1024, d=64), nvidia),
        "float32 64": (cases.causal(SINGLE, n=1024, d=64), ("sm_80",)),
    }


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


def child() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (case, targets) in compiled().items():
        kernel = triton_engine.emit(case[0], flash_fit.default_plan(case[0]))
        for target in targets:
            found = aot.compile_for(kernel, target)
            taken = [found.registers, found.spills, found.shared_bytes, found.matrix_unit, len(found.assembly)]
            out[f"{name} {target}"] = taken
    problems = {}
    everything = {name: make() for name, make in (*cases.CASES.items(), *MORE.items())}
    everything |= {op: pointwise(op) for op in (*UNARY, *BINARY)}
    for name, case in everything.items():
        plan = flash_fit.default_plan(case[0])
        try:
            for wide in (False, True):
                assert "tt.func" in read(triton_engine.emit(case[0], plan, wide))
        except Exception as problem:
            problems[name] = str(problem)
    return out | {"problems": problems}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.test_triton_aot"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


NAMES = [f"{name} {target}" for name, (_, targets) in compiled().items() for target in targets]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resources(results: dict[str, Any], name: str) -> None:
    registers, spills, shared, unit, length = results[name]
    target = name.split()[-1]
    assert spills == 0
    assert 0 < registers <= (512 if target == "gfx942" else 255)
    # What one block may have: 164 KiB on sm_80 and 228 KiB on sm_90, less what the system takes; 64 KiB on gfx942.
    assert 0 < shared <= {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[target]
    assert unit == ("" if "float32" in name else {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}[target])
    assert length > 1000


@pytest.mark.slow
def test_every_kernel_passes_the_front_end(results: dict[str, Any]) -> None:
    assert results["problems"] == {}


if __name__ == "__main__":
    print(json.dumps(child()))
