"""Every kernel whose resources are kept under version control (tests/aot_resources.json), in groups.

What a group compiles: kernels of every schedule, at the widths and dtypes that models have, for the targets that they
are to be compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from refocus.codegen import decode_call, flash_fit, linear_triton, triton_backward, triton_engine
from refocus.codegen.backward_fit import backward_plan
from refocus.codegen.chunk_kernel import ChunkKernel
from refocus.codegen.decode import MERGE
from refocus.codegen.decode_fit import decode_plan
from refocus.codegen.launch import Kernel
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.windows_fit import windows_plan
from refocus.ir import Region
from tests import region_cases as cases
from tests import schedule_cases
from tests.backward_cases import BACKWARD
from tests.linear_cases import recorded, tensors
from tests.placed_cases import merged, rolled, windows_reversed
from tests.region_cases import Case
from tests.test_gradients import wanted_of

HALF, SINGLE, FLOAT16 = torch.bfloat16, torch.float32, torch.float16
NVIDIA, ALL = ("sm_80", "sm_90"), ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """One kernel of a case, for one target. `plain`: it has no products for matrix units."""

    case: str
    kernel: Kernel | ChunkKernel
    target: str
    plain: bool = False


def forward() -> Iterator[Compiled]:
    def kernels(region: Region) -> list[Kernel]:
        return [triton_engine.emit(region, flash_fit.default_plan(region))]

    yield from _of({
        "causal 64": (cases.causal(HALF, n=1024, d=64), ALL),
        "causal 128": (cases.causal(HALF, n=1024, d=128), ALL),
        "window 64": (cases.window(HALF, n=1024, d=64, width=256), NVIDIA),
        "gqa 128": (cases.gqa(HALF, n=1024, d=128), NVIDIA),
        "symbolic 64": (cases.symbolic(HALF, n=1024, d=64), NVIDIA),
        "fills 64": (cases.empty_added(HALF, n=1024, d=64), ALL),
        "documents 64": (cases.documents(HALF, n=1024, d=64), ALL),
        "pairwise 64": (cases.pairwise(HALF, n=1024, d=64), NVIDIA),
        "float32 64": (cases.causal(SINGLE, n=1024, d=64), ("sm_80",)),
    }, kernels)  # fmt: skip


def backward() -> Iterator[Compiled]:
    half: dict[str, Any] = {"dtype": HALF, "n": 1024}
    yield from _of({
        "causal 64": (cases.causal(**half, d=64), ALL),
        "causal 128": (cases.causal(**half, d=128), NVIDIA),
        "window 64": (cases.window(**half, d=64, width=256), NVIDIA),
        "gqa 128": (cases.gqa(**half, d=128), NVIDIA),
        "symbolic 64": (cases.symbolic(**half, d=64), NVIDIA),
        "fills 64": (cases.empty_added(**half, d=64), NVIDIA),
        "bias 64": (cases.additive_bias(**half, d=64), ALL),
        "gate 128": (_more("pair_gate", 128), ("sm_90",)),
        "pairwise 64": (cases.pairwise(**half, d=64), NVIDIA),
        "dropout 64": (_more("dropout", 64), NVIDIA),
        "softcap 128": (cases.softcap(**half, d=128), ("sm_90",)),
        "documents 64": (cases.documents(**half, d=64), ALL),
        "documents 128": (cases.documents(**half, d=128), NVIDIA),
        "buckets 64": (cases.t5_buckets(**half, d=64), ALL),
        "buckets 128": (cases.t5_buckets(**half, d=128), NVIDIA),
        "cached table 64": (_more("cached_table", 64), NVIDIA),
        "emptied table 64": (_more("emptied_table", 64), NVIDIA),
        "grid table 64": (_more("grid_table", 64), NVIDIA),
        "float32 documents 64": (cases.documents(SINGLE, n=1024, d=64), ("sm_80",)),
        "float32 buckets 64": (cases.t5_buckets(SINGLE, n=1024, d=64), ("sm_80",)),
        "float32 64": (cases.causal(SINGLE, n=1024, d=64), NVIDIA),
        "float32 128": (cases.causal(SINGLE, n=1024, d=128), ("sm_80",)),
        "float32 fills 64": (cases.empty_added(SINGLE, n=1024, d=64), ("sm_80",)),
    }, training)  # fmt: skip


def training(region: Region, wide: bool = False) -> list[Kernel]:
    """The forward that saves, and the backward's kernels."""
    plan = flash_fit.default_plan(region)
    wanted = frozenset(o.name for o, want in zip(region.operands, wanted_of(region)) if want)
    return [
        triton_engine.emit(region, plan, wide, saving=True),
        *(
            triton_backward.emit(region, wanted, task, backward_plan(region, plan, task.loop), wide)
            for task in triton_backward.tasks(region, wanted)
        ),
    ]


def decode() -> Iterator[Compiled]:
    for name, (region, targets) in schedule_cases.few_queries().items():
        for kernel in decode_call.emit(region, decode_plan(region)):
            for target in targets:
                merges = kernel.name == MERGE and name != "padded"  # which multiplies, to repair emptied rows
                yield Compiled(name, kernel, target, plain="float32" in name or merges)


def windows() -> Iterator[Compiled]:
    """Of inference, and those that save what the backward needs."""
    for name, (region, targets) in schedule_cases.windows().items():
        for saving in (False, True):
            kernel = triton_engine.emit(region, windows_plan(region), saving=saving)
            for target in targets:
                case = f"{name}, saving" if saving else name
                # gfx942 has units for float32, too.
                yield Compiled(case, kernel, target, plain="float32" in name and target != "gfx942")


def placed() -> Iterator[Compiled]:
    """Those that put their result where the model wants it, forward and backward."""
    half: dict[str, Any] = {"dtype": HALF, "n": 1024}

    def put(case: Case, where: Callable[[Region], Region]) -> Case:
        return where(case[0]), case[1], case[2]

    yield from _of({
        "merged 64": (put(cases.causal(**half, d=64), merged), ALL),
        "merged 128": (put(cases.causal(**half, d=128), merged), NVIDIA),
        "rolled 64": (put(cases.causal(**half, d=64), rolled), NVIDIA),
        "rolled 128": (put(cases.causal(**half, d=128), rolled), NVIDIA),
        "merged symbolic 64": (put(cases.symbolic(**half, d=64), merged), NVIDIA),
        "rolled fills 64": (put(cases.empty_added(**half, d=64), rolled), NVIDIA),
        "rolled bias 64": (put(cases.additive_bias(**half, d=64), rolled), NVIDIA),
        "rolled documents 64": (put(cases.documents(**half, d=64), rolled), NVIDIA),
        "float32 rolled 64": (put(cases.causal(SINGLE, n=1024, d=64), rolled), ("sm_80",)),
    }, training)  # fmt: skip
    for name, (region, targets) in schedule_cases.windows().items():
        side = {16: 4, 49: 7, 64: 8}[region.query.size.value]  # type: ignore[attr-defined]
        whole = windows_reversed(region, 8, side, side // 2)
        for saving in (False, True):
            kernel = triton_engine.emit(whole, windows_plan(whole), saving=saving)
            case = f"windows {name}, saving" if saving else f"windows {name}"
            yield from (Compiled(case, kernel, t, "float32" in name) for t in targets if t in NVIDIA)
    region, _ = schedule_cases.few_queries()["8 queries"]
    kernel = decode_call.emit(merged(region), decode_plan(region))[1]
    yield from (Compiled("decode 8 queries", kernel, target, True) for target in NVIDIA)


def _more(name: str, d: int) -> Case:
    make: Callable[..., Case] = BACKWARD[name]
    return make(HALF, n=1024, d=d)


def _of(
    chosen: dict[str, tuple[Case, tuple[str, ...]]], kernels: Callable[[Region], list[Kernel]]
) -> Iterator[Compiled]:
    for name, ((region, _, _), targets) in chosen.items():
        for kernel in kernels(region):
            for target in targets:
                yield Compiled(name, kernel, target, plain=name.startswith("float32"))


# ---------------------------------------------------------------------------------------------------- linear attention

FORMS = {
    "plain": LinearForm(sums=True),
    "head": LinearForm(gate="head", sums=True, initial=True, final=True),
    "channel": LinearForm(gate="channel", sums=True, initial=True, final=True),
    "delta": LinearForm(gate="head", erase=True, initial=True, final=True),
    "delta by channel": LinearForm(gate="channel", erase=True, initial=True, final=True),
    "lookup": LinearForm(gate="head", erase=True, initial=True, final=True, lookup=True),
    "lookup by channel": LinearForm(gate="channel", erase=True, initial=True, final=True, lookup=True),
}
# No products of matrices.
PLAIN = {"gate_sums", "gates_backward", "channel_gates_backward", "linear_step"}


def linear(
    width: int, dtype: torch.dtype, forms: tuple[str, ...] = tuple(FORMS), targets: tuple[str, ...] = NVIDIA
) -> Iterator[Compiled]:
    """All that a call takes, forward and backward: of so many features and values, by their form."""
    for name in forms:
        for target in targets:
            # Kernels ask which units there are when they are written.
            with patch.object(torch.version, "hip", "there" if target.startswith("gfx") else None):
                kernels = chunked(FORMS[name], width, dtype)
            for kernel in kernels:
                yield Compiled(name, kernel, target, plain=dtype == SINGLE or kernel.name in PLAIN)


def chunked(form: LinearForm, width: int, dtype: torch.dtype) -> list[ChunkKernel]:
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


GROUPS: dict[str, Callable[[], Iterator[Compiled]]] = {
    "forward": forward,
    "backward": backward,
    "decode": decode,
    "windows": windows,
    "placed": placed,
    "linear 64": partial(linear, 64, HALF, targets=ALL),
    "linear 128": partial(linear, 128, HALF),
    "linear float32 64": partial(linear, 64, SINGLE),
    "linear float32 128": partial(linear, 128, SINGLE),
    "linear float16 64": partial(linear, 64, FLOAT16, ("head", "delta", "lookup")),
    "linear float16 128": partial(linear, 128, FLOAT16, ("head", "delta", "lookup")),
}
