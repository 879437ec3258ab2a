"""Forms of linear attention and tensors for them, shared by the tests of the engines that compute them; and a module
for each of the spellings that are recognised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from refocus.codegen import linear_triton, triton_engine
from refocus.codegen.chunk_kernel import ChunkKernel
from refocus.codegen.linear_form import LinearForm

Function = Callable[..., Any]


class Module(nn.Module):
    """A function of tensors."""

    def __init__(self, function: Function, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.options)


def forms() -> list[LinearForm]:
    """Every causal form that the kernels know: with all that a state can have, and with nothing."""
    out = []
    for kind in ("sums", "erase", "lookup"):
        for gate, strict, full in product(("none", "head", "channel"), (False, True), (False, True)):
            more = {"erase": kind != "sums", "lookup": kind == "lookup", "sums": full and kind == "sums"}
            out.append(LinearForm(strict=strict, gate=gate, initial=full, final=full, **more))
    return out


def tensors(
    form: LinearForm,
    heads: int = 2,
    share: int = 1,
    length: int = 40,
    d: int = 16,
    e: int = 16,
    dtype: torch.dtype = torch.float32,
    low: float = 0.5,
    high: float = 1 - 1e-5,
) -> list[Tensor | None]:
    """q, k, v, gate, erase, initial, lookup. Decays lie between `low` and `high`; keys of all sorts are of unit length,
    as the delta rule wants them."""
    generator = torch.Generator().manual_seed(length + d)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = random(heads * share, length, d), random(heads, length, d), random(heads, length, e)
    gate = erase = initial = lookup = None
    if form.gate != "none":
        shape = (heads, length, d) if form.gate == "channel" else (heads, length)
        gate = (torch.rand(shape, generator=generator) * (high - low) + low).log()
    if form.lookup:
        erase, lookup = (torch.nn.functional.normalize(random(heads, length, d), dim=-1) for _ in range(2))
    elif form.erase:
        erase = torch.rand(heads, length, generator=generator)
    if form.initial:
        initial = random(heads, d, e)
    k = torch.nn.functional.normalize(k, dim=-1)
    given: list[Any] = [q, k, v, gate, erase, lookup]
    *given, lookup = (None if x is None else x.to(dtype) for x in given)
    return [*given, initial, lookup]


def recorded(form: LinearForm, chunk: int, given: Sequence[Tensor | None]) -> list[ChunkKernel]:
    """The kernels that a call takes forward and backward, without running them."""
    kernels: list[ChunkKernel] = []

    def record(kernel: ChunkKernel, *_: Any) -> None:
        kernels.append(kernel)

    with patch.object(ChunkKernel, "run", record), patch.object(triton_engine, "available", lambda _: None):
        results = linear_triton.forward(form, chunk, *given)  # type: ignore[arg-type]
        linear_triton.backward(form, chunk, *given, results)  # type: ignore[arg-type]
    return list({kernel.source: kernel for kernel in kernels}.values())
