"""The chunked kernels compiled ahead of time, without a GPU: no spills, and products on the matrix units.

As in tests/test_triton_aot.py, child processes (this file as a program, with the name of a group) compile, with a
compile cache of their own, every kernel that a call takes forward and backward.
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

from refocus.codegen import aot, linear_triton
from refocus.codegen.linear_form import LinearForm
from tests.linear_cases import recorded, tensors

HALF, SINGLE, FLOAT16 = torch.bfloat16, torch.float32, torch.float16
FORMS = {
    "plain": LinearForm(sums=True),
    "head": LinearForm(gate="head", sums=True, initial=True, final=True),
    "channel": LinearForm(gate="channel", sums=True, initial=True, final=True),
    "delta": LinearForm(gate="head", erase=True, initial=True, final=True),
}
# (form, features and values, dtype) of each group
GROUPS: dict[str, list[tuple[str, int, torch.dtype]]] = {
    "narrow": [(form, 64, HALF) for form in FORMS],
    "narrow_wide": [(form, 128, HALF) for form in FORMS],
    "float32": [(form, 64, SINGLE) for form in FORMS],
    "float32_wide": [(form, 128, SINGLE) for form in FORMS],
    "float16": [(form, 64, FLOAT16) for form in ("head", "delta")],
    "float16_wide": [(form, 128, FLOAT16) for form in ("head", "delta")],
}
# No products of matrices, or, of float32, not on matrix units.
PLAIN = {"gate_sums", "gates_backward", "channel_gates_backward", "linear_step"}


def kernels(form: LinearForm, width: int, dtype: torch.dtype) -> list[Any]:
    """Those of a sequence, of a sequence that is cut into segments, and of a step."""
    from refocus.codegen import chunk_call

    sizes: dict[str, Any] = {"heads": 1, "d": width, "e": width, "dtype": dtype, "share": 2}
    chunk = linear_triton.default_chunk(*tensors(form, **sizes)[:3])  # type: ignore[arg-type]
    found = [*recorded(form, chunk, tensors(form, length=1024, **sizes))]
    found += recorded(form, chunk, tensors(form, length=1, **sizes))
    before, chunk_call.segments_of = chunk_call.segments_of, lambda *_: 4  # type: ignore[assignment]
    found += recorded(form, chunk, tensors(form, length=1024, **sizes))
    chunk_call.segments_of = before
    return list({kernel.source: kernel for kernel in found}.values())


def child(group: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, width, dtype in GROUPS[group]:
        for number, kernel in enumerate(kernels(FORMS[name], width, dtype)):
            for target in ("sm_80", "sm_90"):
                found = aot.compile_for(kernel, target)
                taken = [found.registers, found.spills, found.shared_bytes, found.matrix_unit]
                out[f"{name} {number} {kernel.name} {target}"] = taken
    return out


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_resources(group: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.test_linear_triton_aot", group]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, list[Any]] = json.loads(done.stdout)
    names = {name.split()[2] for name in results}
    assert {"chunk_states", "chunk_states_backward", "chunk_outputs", "linear_step", "values_backward"} <= names
    for name, (registers, spills, shared, unit) in results.items():
        _, _, kernel, target = name.split()
        assert spills == 0, name
        assert 0 < registers <= 255, name
        # What one block may have: 164 KiB on sm_80 and 228 KiB on sm_90, less what the system takes.
        assert shared <= {"sm_80": 166912, "sm_90": 232448}[target], name
        if kernel in PLAIN or group.startswith("float32"):
            assert unit == "", name
        else:
            assert unit in (("mma",) if target == "sm_80" else ("mma", "wgmma")), name
    if group.startswith("narrow"):
        fast = {name.split()[2] for name, taken in results.items() if taken[3] == "wgmma"}
        assert {"chunk_states", "chunk_outputs", "queries_backward", "keys_backward", "delta_states"} <= fast


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
