"""The chunked kernels' numbers, under Triton's interpreter, and the text of their source.

As in tests/test_triton_flash.py, one child process (this file as a program) runs all numeric cases and prints how far
each is from the definition in float64 and from its gradients.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refocus.codegen import chunked, linear_form, linear_triton
from refocus.codegen.linear_form import LinearForm
from refocus.errors import EngineUnavailable
from refocus.tolerances import difference, magnitude
from tests.children import interpreted, settle
from tests.linear_cases import forms, recorded, tensors

# Relative to the largest number of each tensor; narrow ones round operands of products once more than results.
BOUND = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
FULL = {"sums": True, "initial": True, "final": True}
HEAD, CHANNEL = LinearForm(gate="head", **FULL), LinearForm(gate="channel", **FULL)  # type: ignore[arg-type]
DELTA = LinearForm(gate="head", erase=True, initial=True, final=True)
LOOKUP = replace(DELTA, lookup=True)
KINDS = {
    "head": HEAD, "channel": CHANNEL, "delta": DELTA, "lookup": LOOKUP,
    "delta by channel": replace(DELTA, gate="channel"), "lookup by channel": replace(LOOKUP, gate="channel"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the child process


def errors(
    form: LinearForm, chunk: int, given: Sequence[Tensor | None], missing: Sequence[int] = (), device: str = "cpu",
    engine: Any = linear_triton,
) -> dict[str, Any]:  # fmt: skip
    """[largest difference from the definition, largest allowed], by result and by gradient. `missing`: the results,
    by number, that nothing flows back into."""
    bound = max(BOUND[x.dtype] for x in given[:3] if x is not None)
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in given]
    q, k, v, *rest = leaves
    assert q is not None and k is not None and v is not None
    expected = linear_form.forward(form, q, k, v, *rest)
    given = [None if x is None else x.to(device) for x in given]
    got = engine.forward(form, chunk, *given)
    named = dict(zip(("out", "sums", "final"), zip(got, expected, strict=True)))
    dtype = given[2].dtype  # type: ignore[union-attr]
    assert got[0].dtype == dtype and got[0].is_contiguous()
    generator = torch.Generator().manual_seed(5)
    grads = [
        None if x is None or n in missing else torch.randn(x.shape, generator=generator) for n, x in enumerate(expected)
    ]
    grads[0] = None if grads[0] is None else grads[0].to(dtype)
    total = sum((x * g).sum() for x, g in zip(expected, grads) if x is not None and g is not None)
    wanted = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(total, wanted, materialize_grads=True))  # type: ignore[arg-type]
    grads = [None if x is None else x.to(device) for x in grads]
    flowed = engine.backward(form, chunk, *given, grads)
    for name, like, mine in zip(linear_triton.NAMES, given, flowed, strict=True):
        assert (like is None) == (mine is None)
        if like is not None:
            assert mine is not None and mine.dtype == like.dtype and mine.shape == like.shape
            named[f"grad of {name}"] = (mine, next(found))
    pairs = {name: pair for name, pair in named.items() if pair != (None, None)}
    return {name: _compared(name, *pair, bound) for name, pair in pairs.items()}


def _compared(name: str, mine: Tensor | None, theirs: Tensor | None, bound: float) -> list[float]:
    assert mine is not None and theirs is not None, name
    return [difference(mine.cpu(), theirs), bound * max(magnitude(theirs), 0.01)]


def _cases() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for form in forms():
        size: dict[str, Any] = {"share": 2, "length": 50, "d": 20, "e": 40} if form.final else {}
        out[f"{form}"] = errors(form, 32 if form.final else 16, tensors(form, **size))
        out[f"{form} one step"] = errors(form, 16, tensors(form, share=2, length=1, d=20, e=5))
    for name, form in KINDS.items():
        chunk = 32 if form.gate == "channel" else 64  # which is slow to interpret
        out[f"{name} tiles"] = errors(form, 16, tensors(form, heads=1, length=20, d=72, e=40))
        for dtype in (torch.float16, torch.bfloat16):
            out[f"{name} {dtype}"] = errors(form, chunk, tensors(form, heads=1, length=70, dtype=dtype))
            out[f"{name} tiles {dtype}"] = errors(form, 16, tensors(form, heads=1, length=20, d=72, e=70, dtype=dtype))
        out[f"{name} hardly forgets"] = errors(form, 32, tensors(form, heads=1, length=70, low=1 - 1e-4))
        out[f"{name} forgets half"] = errors(form, chunk, tensors(form, heads=1, length=70, low=0.5, high=0.5))
        out[f"{name} forgets nearly all"] = errors(form, chunk, tensors(form, heads=1, length=40, low=1e-30, high=0.9))
        reset = tensors(form, heads=1, length=40)
        assert reset[3] is not None
        reset[3][:, 7] = -math.inf
        reset[3][:, 20] = -1e9
        out[f"{name} forgets all"] = errors(form, 32, reset)
        at_once = tensors(form, heads=1, length=40)
        assert at_once[3] is not None
        at_once[3][:, ::3] = -60.0
        out[f"{name} forgets at once"] = errors(form, 32, at_once)
        out[f"{name} strides"] = errors(form, 16, _strided(form))
        out[f"{name} only out"] = errors(form, 16, tensors(form, length=20), missing=(1, 2))
        out[f"{name} only the state"] = errors(form, 16, tensors(form, length=20), missing=(0, 1))
    out["one value"] = errors(CHANNEL, 16, tensors(CHANNEL, heads=3, length=40, d=4, e=1))
    out["mixed dtypes"] = errors(HEAD, 16, [x if n != 2 or x is None else x.half() for n, x in enumerate(_mixed())])
    out["lookup mixed dtypes"] = _lookup_mixed()
    for name in ("lookup", "lookup by channel"):
        out[f"{name} beside tiled"] = _beside_tiled(KINDS[name])
    return out


def _beside_tiled(form: LinearForm) -> dict[str, Any]:
    """Allowed is twice the error of the engine that is made of plain operations, or what rounding alone gives."""
    given = tensors(form, heads=1, share=2, length=100)
    mine, other = (errors(form, 32, given, engine=engine) for engine in (linear_triton, chunked))
    least = 2e-7 / BOUND[torch.float32]
    return {name: [error, 2 * other[name][0] + least * allowed] for name, (error, allowed) in mine.items()}


def _lookup_mixed() -> dict[str, Any]:
    """What is looked up and taken away in float32, beside narrow operands: nothing of it is lost."""
    wide, narrow = tensors(LOOKUP, length=40), tensors(LOOKUP, length=40, dtype=torch.float16)
    found = errors(LOOKUP, 16, [*narrow[:3], *wide[3:]])
    exact = BOUND[torch.float32] / BOUND[torch.float16]
    return {
        name: [error, allowed * (exact if name in ("final", "grad of lookup", "grad of erase") else 1)]
        for name, (error, allowed) in found.items()
    }


def _mixed() -> list[Tensor | None]:
    """Whatever the dtypes, the result's is that of v; here everything can be told exactly in all of them."""
    return [None if x is None else (x * 16).round() / 16 for x in tensors(HEAD, length=20)]


def _strided(form: LinearForm) -> list[Tensor | None]:
    """A decay that is the same at every step, and operands in other orders of their dimensions."""
    q, k, v, gate, erase, initial, lookup = tensors(form, share=2, length=36, d=16, e=24)
    assert q is not None and k is not None and v is not None and gate is not None and initial is not None
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k, v = k.mT.contiguous().mT, torch.stack([v, v], 3)[..., 1]
    gate = gate[:, :1].expand(gate.shape)
    erase = None if erase is None else erase[:1, :1].expand(erase.shape)
    lookup = None if lookup is None else lookup.mT.contiguous().mT
    return [q, k, v, gate, erase, initial.mT.contiguous().mT, lookup]


def _others() -> dict[str, Any]:
    """Segments, nothing to do, reruns."""
    from refocus.codegen import chunk_call

    out: dict[str, Any] = {"empty": {}, "reruns": {}}
    for name, form in KINDS.items():
        for what, size in (("heads", {"heads": 0}), ("steps", {"length": 0})):
            given = tensors(form, **size)  # type: ignore[arg-type]
            got = linear_triton.forward(form, 16, *given)  # type: ignore[arg-type]
            back = linear_triton.backward(form, 16, *given, got)  # type: ignore[arg-type]
            state = given[5] if form.final else None
            same = got[2] is None or state is None or torch.equal(got[2], state)
            shapes = [x is None or y is None or x.shape == y.shape for x, y in zip(given, back)]
            out["empty"][f"{name} {what}"] = [same, all(shapes)]
        given = tensors(form, share=2, length=40)
        twice = [linear_triton.backward(form, 16, *given, linear_triton.forward(form, 16, *given)) for _ in range(2)]  # type: ignore[arg-type]
        out["reruns"][name] = all(a is None or torch.equal(a, b) for a, b in zip(*twice))  # type: ignore[arg-type]
    chunk_call.segments_of = lambda *_: 3  # type: ignore[assignment]
    bare = LinearForm(strict=True)
    for name, form in (("none", replace(bare, **FULL)), ("bare", bare), ("head", HEAD), ("channel", CHANNEL)):  # type: ignore[arg-type]
        out[f"segments {name}"] = errors(form, 16, tensors(form, heads=1, length=100, d=20, e=40))
    return out


def child() -> dict[str, Any]:
    settle()
    return _cases() | _others()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = interpreted("tests.test_linear_triton")
    return found


WHAT = (
    "tiles", "torch.float16", "torch.bfloat16", "tiles torch.float16", "tiles torch.bfloat16", "hardly forgets",
    "forgets half", "forgets nearly all", "forgets all", "forgets at once", "strides", "only out", "only the state",
)  # fmt: skip
NAMES = [
    *(f"{form}{more}" for form in forms() for more in ("", " one step")),
    *(f"{name} {what}" for name in KINDS for what in WHAT),
    "one value",
    "mixed dtypes",
    "lookup mixed dtypes",
    *(f"{name} beside tiled" for name in ("lookup", "lookup by channel")),
    *(f"segments {name}" for name in ("none", "bare", "head", "channel")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_against_the_definition(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert len(found) >= 4
    for what, (error, allowed) in found.items():
        assert error <= allowed, what


@pytest.mark.slow
def test_nothing_to_do(results: dict[str, Any]) -> None:
    assert all(all(found) for found in results["empty"].values())


@pytest.mark.slow
def test_reruns_give_the_same_bits(results: dict[str, Any]) -> None:
    assert results["reruns"] == dict.fromkeys(KINDS, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("form", forms(), ids=str)
def test_on_a_gpu(form: LinearForm, dtype: torch.dtype) -> None:
    """Compiled kernels, whose scans are cut into segments."""
    given = tensors(form, heads=1, share=2, length=1100, d=72, e=128, dtype=dtype)
    chunk = linear_triton.default_chunk(*given[:3])  # type: ignore[arg-type]
    for what, (error, allowed) in errors(form, chunk, given, device="cuda").items():
        assert error <= allowed, what


# ----------------------------------------------------------------------------------------------------- the source

GOLDEN = """\
# Generated by refocus: linear attention in chunks, the results of every chunk.
#     S[c,t,d,e] = exp(gate[c,t]) * S[c,t-1,d,e] + k[c,t,d] * v[c,t,e]
#     O[b,t,e]   = sum_d q[b,t,d] * S[b//2,t,d,e]

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
D = tl.constexpr(64)
E = tl.constexpr(100)
BLOCK_D = tl.constexpr(64)
BLOCK_E = tl.constexpr(64)
SHARE = tl.constexpr(2)


@triton.jit
def chunk_outputs(
    q_ptr, k_ptr, v_ptr, cum_ptr, rest_ptr, states_ptr,
    out_ptr,
    q_stride_0, q_stride_1, q_stride_2, k_stride_0, k_stride_1, k_stride_2,
    v_stride_0, v_stride_1, v_stride_2,
    length,
):
    # One program: one chunk of one head, and a tile of its values.
    chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    key_head = head // SHARE
    place = key_head * chunks + chunk
    start = chunk.to(tl.int64) * CHUNK
    t = tl.arange(0, CHUNK)
    inside = t < length - start
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    q_base = q_ptr + head * q_stride_0 + start * q_stride_1
    v_base = v_ptr + key_head * v_stride_0 + start * v_stride_1
    k_base = k_ptr + key_head * k_stride_0 + start * k_stride_1
    cum = tl.load(cum_ptr + place * CHUNK + t)
    cum_rest = tl.load(rest_ptr + place * CHUNK + t)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    acc = tl.zeros([CHUNK, BLOCK_E], tl.float32)
    query = tl.load(q_base + t[:, None] * q_stride_1 + d[None, :] * q_stride_2, mask=inside[:, None], other=0.0)
    key = tl.load(k_base + t[:, None] * k_stride_1 + d[None, :] * k_stride_2, mask=inside[:, None], other=0.0)
    scores = tl.dot(query, tl.trans(key), scores)
    state = tl.load(states_ptr + place * D * E + d[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
    acc = tl.dot(query, state.to(tl.bfloat16), acc)
    acc = acc * tl.exp(cum)[:, None]
    seen = t[:, None] >= t[None, :]
    decay = tl.exp(tl.where(seen, (cum[:, None] - cum[None, :]) + (cum_rest[:, None] - cum_rest[None, :]), 0.0))
    scores = tl.where(seen, scores * decay, 0.0)
    value = tl.load(
        v_base + t[:, None] * v_stride_1 + e[None, :] * v_stride_2,
        mask=inside[:, None] & (e < E)[None, :],
        other=0.0,
    )
    acc = tl.dot(scores.to(tl.bfloat16), value, acc)
    out_base = out_ptr + (head * length + start) * E
    tl.store(out_base + t[:, None] * E + e[None, :], acc.to(tl.bfloat16), mask=inside[:, None] & (e < E)[None, :])
"""


def test_golden_source() -> None:
    form = LinearForm(gate="head", final=True)
    given = tensors(form, heads=2, share=2, length=100, d=64, e=100, dtype=torch.bfloat16)
    (source,) = [k.source for k in recorded(form, 64, given) if k.name == "chunk_outputs"]
    assert source == GOLDEN


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("form", forms(), ids=str)
def test_the_kernel_that_is_shown_is_one_that_runs(form: LinearForm, length: int) -> None:
    given = tensors(form, share=2, length=length, dtype=torch.bfloat16)
    ran = {kernel.path: kernel.name for kernel in recorded(form, 32, given)}
    shown = linear_triton.kernel_path(form, 32, *given)  # type: ignore[arg-type]
    assert ran[shown] == ("linear_step" if length == 1 else "chunk_outputs")


@pytest.mark.parametrize("form", forms(), ids=str)
def test_source_has_nothing_that_is_not_used(form: LinearForm) -> None:
    sizes: list[dict[str, Any]] = [{}, {"share": 2, "d": 80, "e": 100}, {"length": 1}]
    for size in sizes:
        for kernel in recorded(form, 32, tensors(form, **size)):
            names = [n for n in ast.walk(ast.parse(kernel.source)) if isinstance(n, ast.Name)]
            arguments = {p.name for p in kernel.parameters}
            loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
            assert {n.id for n in names if isinstance(n.ctx, ast.Store)} | arguments <= loaded, kernel.source
            lines = kernel.source.splitlines()
            assert len(lines) < 240 and all(len(line) <= 120 for line in lines)
            assert not any(word in kernel.source for word in ("atomic", "constexpr)", "exp(-"))


def test_exponents_are_differences_that_are_masked_first() -> None:
    """No decay is divided by, and none is computed for a pair that is not seen."""
    for form in KINDS.values():
        for kernel in recorded(form, 32, tensors(form)):
            assert "/ tl.exp" not in kernel.source
            for line in kernel.source.splitlines():
                if "cum[:, None] - cum[None, :]" in line or "cum_j[None, :] -" in line:
                    assert "tl.exp(tl.where(" in line


@pytest.mark.parametrize(
    ("form", "chunk", "size", "reason"),
    [
        (LinearForm(causal=False), 16, {}, "two products of matrices"),
        (LinearForm(), 24, {}, "chunks of 24"),
        (LinearForm(erase=True), 128, {}, "power of two from 16 to 64"),
        (LinearForm(), 16, {"d": 300}, "300 by 16"),
        (LinearForm(), 16, {"dtype": torch.float64}, "q is float64"),
    ],
)
def test_says_what_it_cannot_do(form: LinearForm, chunk: int, size: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineUnavailable, match=reason):
        linear_triton.forward(form, chunk, *tensors(form, **size))  # type: ignore[arg-type]


@pytest.mark.parametrize(("at", "reason"), [(4, "erase is float64"), (6, "lookup is float64")])
def test_says_which_operand_is_too_wide(at: int, reason: str) -> None:
    given = tensors(LOOKUP)
    given[at] = given[at].double()  # type: ignore[union-attr]
    with pytest.raises(EngineUnavailable, match=reason):
        linear_triton.forward(LOOKUP, 16, *given)  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(child()))
