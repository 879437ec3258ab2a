"""The generated backward, and the forward that saves for it, compiled ahead of time: no spills, and matrix units used.

As in tests/test_triton_aot.py, a child process (this file as a program) compiles, with a compile cache of its own.
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

from refocus.codegen import aot, flash_fit, triton_backward, triton_engine
from refocus.codegen.backward_fit import backward_plan
from refocus.codegen.launch import Kernel
from refocus.ir import Region
from tests import region_cases as cases
from tests.backward_cases import BACKWARD
from tests.region_cases import Case
from tests.test_gradients import wanted_of
from tests.test_triton_aot import read
from tests.test_triton_backward import ALL

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
        "bias 64": (cases.additive_bias(HALF, n=1024, d=64), nvidia),
        "gate 128": (BACKWARD["pair_gate"](HALF, n=1024, d=128), ("sm_90",)),  # type: ignore[call-arg]
        "dropout 64": (BACKWARD["dropout"](HALF, n=1024, d=64), nvidia),  # type: ignore[call-arg]
        "softcap 128": (cases.softcap(HALF, n=1024, d=128), ("sm_90",)),
        "documents 64": (cases.documents(HALF, n=1024, d=64), nvidia),
        "documents 128": (cases.documents(HALF, n=1024, d=128), nvidia),
        "float32 documents 64": (cases.documents(SINGLE, n=1024, d=64), ("sm_80",)),
        "buckets 64": (cases.t5_buckets(HALF, n=1024, d=64), nvidia),
        "buckets 128": (cases.t5_buckets(HALF, n=1024, d=128), nvidia),
        "cached table 64": (BACKWARD["cached_table"](HALF, n=1024, d=64), nvidia),  # type: ignore[call-arg]
        "emptied table 64": (BACKWARD["emptied_table"](HALF, n=1024, d=64), nvidia),  # type: ignore[call-arg]
        "float32 buckets 64": (cases.t5_buckets(SINGLE, n=1024, d=64), ("sm_80",)),
        "grid table 64": (BACKWARD["grid_table"](HALF, n=1024, d=64), nvidia),  # type: ignore[call-arg]
        "float32 64": (cases.causal(SINGLE, n=1024, d=64), nvidia),
        "float32 128": (cases.causal(SINGLE, n=1024, d=128), ("sm_80",)),
        "float32 fills 64": (cases.empty_added(SINGLE, n=1024, d=64), ("sm_80",)),
    }


def kernels_of(region: Region, wide: bool = False) -> list[Kernel]:
    """The forward that saves, and the backward's."""
    plan = flash_fit.default_plan(region)
    wanted = frozenset(o.name for o, want in zip(region.operands, wanted_of(region)) if want)
    return [
        triton_engine.emit(region, plan, wide, saving=True),
        *(
            triton_backward.emit(region, wanted, task, backward_plan(region, plan, task.loop), wide)
            for task in triton_backward.tasks(region, wanted)
        ),
    ]


def child() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, ((region, _, _), targets) in compiled().items():
        for target in targets:
            found = [(kernel.name, aot.compile_for(kernel, target)) for kernel in kernels_of(region)]
            out[f"{name} {target}"] = [
                [kernel, r.registers, r.spills, r.shared_bytes, r.matrix_unit] for kernel, r in found
            ]
    problems = {}
    for name, make in ALL.items():
        try:
            region = make()[0]
            for kernel in (*kernels_of(region), *kernels_of(region, wide=True)):
                assert "tt.func" in read(kernel)
        except Exception as problem:
            problems[name] = str(problem)
    return out | {"problems": problems}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.test_triton_backward_aot"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


NAMES = [f"{name} {target}" for name, (_, targets) in compiled().items() for target in targets]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resources(results: dict[str, Any], name: str) -> None:
    target = name.split()[-1]
    kernels = {"flash_forward", "queries_backward", "keys_backward"}
    kernels |= {"pairs_backward"} if name.startswith(("bias", "gate", "grid")) else set()
    kernels |= {"diagonals_backward"} if "buckets" in name or "ed table" in name else set()
    assert {kernel for kernel, *_ in results[name]} == kernels
    for kernel, registers, spills, shared, unit in results[name]:
        assert spills == 0 or target == "gfx942"  # the tables are for NVIDIA's registers
        assert 0 < registers <= (512 if target == "gfx942" else 255)
        # What one block may have: 164 KiB on sm_80 and 228 KiB on sm_90, less what the system takes; 64 KiB on gfx942.
        assert 0 < shared <= {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[target]
        units = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}
        if kernel == "diagonals_backward":  # its small square tiles have too few rows for warp groups
            units["sm_90"] = "mma"
        assert unit == ("" if "float32" in name else units[target])


@pytest.mark.slow
def test_every_kernel_passes_the_front_end(results: dict[str, Any]) -> None:
    assert results["problems"] == {}


if __name__ == "__main__":
    print(json.dumps(child()))
