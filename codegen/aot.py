"""Compiling a kernel ahead of time, for a GPU that need not be there, and reading what it would take of it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refocus.codegen.chunk_kernel import ChunkKernel
from refocus.codegen.interpreter import interpreted
from refocus.codegen.launch import Kernel, function_of
from refocus.errors import EngineUnavailable
from refocus.ir import Const, Expr
from refocus.polynomial import to_poly
from refocus.simplify import mul

# (backend, architecture, lanes in a warp), as `triton.backends.compiler.GPUTarget` takes them.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "int16": "i16",
    "int8": "i8", "uint8": "u8", "bool": "i1",
}  # fmt: skip
# A pointer, and a size or a stride that is a multiple of 16, as a launch on the GPU would describe them.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one program takes: `registers` for each thread, `spills` and `shared_bytes` in bytes.

    `matrix_unit`: "wgmma", "mma" or "mfma", whichever its dots compiled to; "" when they run on plain arithmetic.
    `assembly`: PTX or AMD assembly.
    """

    registers: int
    spills: int
    shared_bytes: int
    matrix_unit: str
    assembly: str

    @property
    def has_wgmma(self) -> bool:
        return self.matrix_unit == "wgmma"


def compile_for(kernel: Kernel | ChunkKernel, target: str) -> Resources:
    """Compile for one of `TARGETS`, with contiguous, aligned operands. Raises what Triton raises, and
    `EngineUnavailable` in a process that interprets kernels."""
    if interpreted():
        raise EngineUnavailable(
            "nothing can be compiled while Triton interprets kernels",
            todo="compile in a process where TRITON_INTERPRET was not set when Triton was imported",
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _arguments(kernel)
    source = ASTSource(function_of(kernel), signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=_options(kernel))
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(compiled.asm, int(compiled.metadata.shared))


def digest(kernel: Kernel | ChunkKernel, target: str) -> str:
    """Of all that the outcome of `compile_for` depends on, but the version of Triton."""
    given = (kernel.name, kernel.source, _arguments(kernel), _options(kernel), TARGETS[target])
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


_Arguments = tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]


def _arguments(kernel: Kernel | ChunkKernel) -> _Arguments:
    return _signature(kernel) if isinstance(kernel, Kernel) else _of_chunks(kernel)


def _options(kernel: Kernel | ChunkKernel) -> dict[str, int]:
    return {"num_warps": kernel.plan.num_warps, "num_stages": kernel.plan.num_stages}


def _signature(kernel: Kernel) -> _Arguments:
    """Argument types, the strides that are one, and which arguments are multiples of 16."""
    region = kernel.region
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    attributes: dict[tuple[int], Any] = {}
    for position, argument in enumerate(kernel.arguments):
        if argument.kind in ("tensor", "output", "saved"):
            dtype = argument.dtype or region.operands[argument.index].dtype
            signature[argument.name] = f"*{_TYPES[dtype]}"
            attributes[position,] = _ALIGNED
            continue
        if argument.kind == "list":
            signature[argument.name] = "*i32"
            attributes[position,] = _ALIGNED
            continue
        signature[argument.name] = "i32"
        if argument.kind == "stride":
            stride = list(_strides(region.operands[argument.index].shape))[argument.dim]
            if stride == Const(1):
                signature[argument.name], constants[argument.name] = "constexpr", 1
            elif all(factor % 16 == 0 for factor in to_poly(stride).values()):
                attributes[position,] = _ALIGNED
    return signature, constants, attributes


def _of_chunks(kernel: ChunkKernel) -> _Arguments:
    """As `_signature`: every stride is a multiple of 16, but the last, and so is the length."""
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    attributes: dict[tuple[int], Any] = {}
    for position, parameter in enumerate(kernel.parameters):
        if parameter.unit:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
            continue
        signature[parameter.name] = f"*{_TYPES[parameter.dtype]}" if parameter.kind == "pointer" else "i32"
        attributes[position,] = _ALIGNED
    return signature, constants, attributes


def _strides(shape: tuple[Expr, ...]) -> Iterator[Expr]:
    for dim in range(len(shape)):
        yield mul(1, *shape[dim + 1 :])


def _read_nvidia(assembly: Any, shared: int) -> Resources:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(assembly["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = assembly["ptx"]
    # Triton uses local memory for nothing but spills.
    spills = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    unit = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return Resources(_number(r"REG:(\d+)", usage), spills, shared, unit, ptx)


def _read_amd(assembly: Any, shared: int) -> Resources:
    text = assembly["amdgcn"]
    spills = 4 * (_number(r"\.vgpr_spill_count:\s*(\d+)", text) + _number(r"\.sgpr_spill_count:\s*(\d+)", text))
    unit = "mfma" if "v_mfma" in text else ""
    return Resources(_number(r"\.vgpr_count:\s*(\d+)", text), spills, shared, unit, text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
