"""The kernels of few queries, and of windows, compiled ahead of time, without a GPU: they compile and spill nothing.

As in tests/test_triton_aot.py, a child process (this file as a program) compiles, and prints what each kernel takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refocus import simplify as s
from refocus.codegen import aot, decode_call, triton_engine
from refocus.codegen.decode import MERGE, PARTS
from refocus.codegen.decode_fit import decode_plan
from refocus.codegen.launch import Kernel
from refocus.codegen.windows_fit import suits as windows_suit
from refocus.codegen.windows_fit import windows_plan
from refocus.ir import BOOL, TRUE, Axis, Const, Dot, Load, Operand, Region, Sym

ALL = ("sm_80", "sm_90", "gfx942")
NVIDIA = ALL[:2]


def cached(dtype: torch.dtype, d: int = 128, kv_heads: int = 8, queries: int = 1, padded: bool = False) -> Region:
    """32 heads of a cache of any length; `padded`: which keys count is read, so a row may be without one."""
    f = str(dtype).removeprefix("torch.")
    m = Sym("s0")
    b, h = Axis("b", Const(4)), Axis("h", Const(32))
    i, j, over, e = (Axis(n, z) for n, z in (("i", Const(queries)), ("j", m), ("d", Const(d)), ("e", Const(d))))
    hk = s.floordiv(h, 32 // kv_heads)
    dot = Dot((over,), Load("q", (b, h, i, over), f), Load("k", (b, hk, j, over), f), f)
    score = s.call("mul", dot, Const(d**-0.5, f), dtype=f)
    mask = s.le(s.add(j, queries), s.add(i, m))
    heads = (("q", 32, Const(queries)), ("k", kv_heads, m), ("v", kv_heads, m))
    operands = tuple(Operand(x, f, (Const(4), Const(n), length, Const(d))) for x, n, length in heads)
    if padded:
        mask = s.and_(mask, Load("keep", (b, j), BOOL))
        operands = (*operands, Operand("keep", "bool", (Const(4), m)))
    logits = s.where(mask, score, Const(float(torch.finfo(dtype).min), f))
    empty = "logits" if padded else "never"
    return Region((b, h), i, j, (e,), score, mask, logits, Load("v", (b, hk, j, e), f), operands, f, empty_row=empty)


def windowed(dtype: torch.dtype, n: int, d: int, shifted: bool = True, cut: bool = False) -> Region:
    """Windows of n tokens with a bias by head, and a shift mask by window, additive or `cut`."""
    f = str(dtype).removeprefix("torch.")
    b, w, h = Axis("b", Const(16)), Axis("w", Const(64)), Axis("h", Const(4))
    i, j, over, e = (Axis(x, Const(z)) for x, z in (("i", n), ("j", n), ("d", d), ("e", d)))
    at = (b, w, h)
    dot = Dot((over,), Load("q", (*at, i, over), f), Load("k", (*at, j, over), f), f)
    score = s.call("mul", dot, Const(d**-0.5, f), dtype=f)
    score = s.call("add", score, Load("bias", (h, i, j), f), dtype=f)
    mask, logits, empty = TRUE, score, "never"
    if cut:
        mask, empty = Load("shift", (w, i, j), BOOL), "logits"
        logits = s.where(mask, score, Const(float(torch.finfo(dtype).min), f))
    elif shifted:
        score = logits = s.call("add", score, Load("shift", (w, i, j), f), dtype=f)
    sizes = {"q": (16, 64, 4, n, d), "k": (16, 64, 4, n, d), "v": (16, 64, 4, n, d), "bias": (4, n, n)}
    sizes |= {"shift": (64, n, n)} if shifted or cut else {}
    operands = tuple(
        Operand(x, "bool" if cut and x == "shift" else f, tuple(Const(z) for z in shape)) for x, shape in sizes.items()
    )
    return Region(at, i, j, (e,), score, mask, logits, Load("v", (*at, j, e), f), operands, f, empty_row=empty)


def windows() -> dict[str, tuple[Region, tuple[str, ...]]]:
    """The same for windows."""
    half, single = torch.bfloat16, torch.float32
    return {
        "16": (windowed(half, 16, 32), ALL),
        "49": (windowed(half, 49, 32), ALL),
        "49 wide": (windowed(half, 49, 64), ALL),
        "64 narrow": (windowed(half, 64, 8, shifted=False), ALL),
        "49 cut": (windowed(half, 49, 32, cut=True), ALL),
        "64 cut": (windowed(half, 64, 64, cut=True), ALL),
        "16 float32": (windowed(single, 16, 32), ALL),
        "49 float32": (windowed(single, 49, 32), ALL),
        "49 wide float32": (windowed(single, 49, 64), ALL),
        "49 cut float32": (windowed(single, 49, 32, cut=True), ALL),
    }


def compiled() -> dict[str, tuple[Region, tuple[str, ...]]]:
    """What is compiled, and for what."""
    half, single = torch.bfloat16, torch.float32
    return {
        "decode 64": (cached(half, 64), ALL),
        "decode 128": (cached(half, 128), ALL),
        "decode 256": (cached(half, 256), NVIDIA),
        "decode 512": (cached(half, 512), NVIDIA),
        "decode 8 queries": (cached(half, 128, queries=8), ALL),
        "decode 64 rows 64": (cached(half, 64, kv_heads=2, queries=4), ALL),
        "decode 64 rows 128": (cached(half, 128, kv_heads=2, queries=4), ALL),
        "decode one key head": (cached(half, 128, kv_heads=1), NVIDIA),
        "decode padded": (cached(half, 128, padded=True), ALL),
        "decode float32": (cached(single, 128), NVIDIA),
    }


def kernels() -> Iterator[tuple[str, Kernel, str]]:
    """Name, kernel and target."""
    for name, (region, targets) in compiled().items():
        for kernel in decode_call.emit(region, decode_plan(region)):
            yield from ((f"{name} {kernel.name}", kernel, target) for target in targets)
    for name, (region, targets) in windows().items():
        plan = windows_plan(region)
        for saving in (False, True):
            assert windows_suit(region, {})
            kernel = triton_engine.emit(region, plan, saving=saving)
            what = f"windows {name}{' saving' if saving else ''}"
            yield from ((what, kernel, target) for target in targets)


def child() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, kernel, target in kernels():
        found = aot.compile_for(kernel, target)
        taken = [found.registers, found.spills, found.shared_bytes, found.matrix_unit, len(found.assembly)]
        out[f"{name} {target}"] = taken
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.test_triton_schedules_aot"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


NAMES = [
    *(f"{n} {kernel} {target}" for n, (_, on) in compiled().items() for kernel in (PARTS, MERGE) for target in on),
    *(
        f"windows {n}{saving} {target}"
        for n, (_, on) in windows().items()
        for saving in ("", " saving")
        for target in on
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resources(results: dict[str, Any], name: str) -> None:
    registers, spills, shared, unit, length = results[name]
    target = name.split()[-1]
    assert spills == 0
    assert 0 < registers <= (512 if target == "gfx942" else 255)
    # What one block may have: 164 KiB on sm_80 and 228 KiB on sm_90, less what the system takes; 64 KiB on gfx942.
    assert shared <= {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[target]
    if "decode_merge" not in name and "float32" not in name:
        assert unit in ("mma", "wgmma", "mfma")
    assert length > 1000


if __name__ == "__main__":
    print(json.dumps(child()))
