"""Suite `linear`: linear attention as papers spell it, and flash-linear-attention's own operators beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import BACKWARD, Case, Setting, Subject, Suite
from benchmarks.linear import HEADS, KINDS, gated, retention

FLA = "fla"


def delta(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The delta rule without a state: what is written at each step solves a triangular system."""
    rate, wide = gate[..., :1].neg(), torch.float32
    key, value = k.to(wide), v.to(wide)
    system = torch.eye(q.shape[2], device=q.device) + (rate * (key @ key.mT)).tril(-1)
    written = torch.linalg.solve_triangular(system, rate * value, upper=False)
    return ((q @ k.mT).tril().to(wide) @ written).to(v.dtype)


def lookup(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, erase: Tensor, lookup: Tensor) -> Tensor:
    """RWKV-7's recurrence without a state: what each step finds solves a triangular system, too."""
    sums, wide = gate.cumsum(2), torch.float32

    def scores(a: Tensor, until: Tensor, b: Tensor, diagonal: int) -> Tensor:
        keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(diagonal)
        between = (until[:, :, :, None] - sums[:, :, None]).masked_fill(~keep[..., None], float("-inf"))
        return torch.einsum("bhid,bhjd,bhijd->bhij", a.to(wide), b.to(wide), between.exp())

    before, value = sums - gate, v.to(wide)
    system = torch.eye(q.shape[2], device=q.device) + scores(lookup, before, erase, -1)
    found = torch.linalg.solve_triangular(system, scores(lookup, before, k, -1) @ value, upper=False)
    return (scores(q, sums, k, 0) @ value - scores(q, sums, erase, 0) @ found).to(v.dtype)


SPELLED: dict[str, Callable[..., Tensor]] = {**KINDS, "delta": delta, "lookup": lookup}
STEPS = ("delta", "lookup")  # spelled step by step, in the models that have them


def cases() -> tuple[Case, ...]:
    def case(kind: str, tokens: int, rank: int = 1) -> Case:
        # As many tokens in all at every length, up to 64k.
        batch = max(1, 65536 // tokens)
        return Case("linear", kind, tokens, batch=batch, heads=HEADS, width=128, dtype="bfloat16", rank=rank)

    found = [case(kind, n, rank=0) for kind in (retention.__name__, gated.__name__) for n in (4096, 16384)]
    found += [replace(c, work=BACKWARD) for c in found]
    found += [c for kind in STEPS for c in (case(kind, 4096), replace(case(kind, 4096), work=BACKWARD))]
    found += [case("normalised", 16384), case("retention", 65536), case("gated", 2048), case("channels", 4096)]
    found += [replace(case(kind, 16384), width=64) for kind in ("retention", "gated")]
    found += [case(kind, 262144, rank=2) for kind in ("retention", "gated")]
    return tuple(found)


def build(case: Case, setting: Setting) -> Subject:
    device, dtype = setting.device, case.torch_dtype

    # Step by step in memory, heads side by side: what projections give, and what both peers read without a copy.
    def random(width: int) -> Tensor:
        return torch.randn(case.batch, case.tokens, case.heads, width, device=device).transpose(1, 2)

    inputs = {name: (random(case.width) * case.width**-0.25).to(dtype) for name in "qkv"}
    if case.kind == "delta":
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    channels = case.width if case.kind in ("channels", "lookup") else 1
    inputs["gate"] = -0.1 * torch.rand(case.batch, case.heads, case.tokens, channels, device=device)
    if case.kind == "lookup":
        looked_up = torch.nn.functional.normalize(random(case.width), dim=-1)
        inputs |= {"erase": (looked_up * torch.rand_like(looked_up)).to(dtype), "lookup": looked_up.to(dtype)}
    inputs = {name: x.detach().requires_grad_(case.trained) for name, x in inputs.items()}
    pairs = case.batch * case.heads * case.tokens**2
    by_channel = dict.fromkeys(("channels", "lookup"), pairs * case.width)
    numbers = {"states": pairs / case.tokens * case.width**2, **by_channel}
    peers = {FLA: lambda: by_fla(case.kind)} if case.kind in OPERATORS else {}
    return Subject(
        SPELLED[case.kind],
        inputs,
        [x for x in inputs.values() if x.requires_grad],
        peers,
        own=operator(case, setting) if case.kind in STEPS else None,
        dense_bytes=4.0 * numbers.get(case.kind, pairs) * (6 if case.trained else 3),
        flops=4.0 * case.batch * case.heads * case.tokens * case.width**2,
        bytes=float(sum(x.nbytes for x in inputs.values())),
    )


def operator(case: Case, setting: Setting) -> Callable[..., Tensor]:
    """The operator that a loop over the steps is replaced with: thousands of steps are too long to be captured one by
    one."""
    from refocus.codegen import linear_operator, linear_triton
    from refocus.codegen.linear_form import LinearForm
    from refocus.codegen.plan import Plan

    form = LinearForm(gate="channel", erase=True, lookup=True) if case.kind == "lookup" else LinearForm(erase=True)

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **more: Tensor) -> Tensor:
        folded = [x.flatten(0, 1) for x in (q, k, v)]
        chunk = linear_triton.default_chunk(*folded)
        plan = Plan("triton", "chunked", chunk, chunk)
        if more:
            steps = gate, more["erase"], None, more["lookup"]
        else:
            steps = None, gate[..., 0].neg(), None, None
        rest = (None if x is None else x.flatten(0, 1) for x in steps)
        return linear_operator.call(form, plan, (*folded, *rest))[0].view(v.shape)

    return call


def _retention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v, scale=1.0)


def _gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=gate[..., 0], scale=1.0)


def _delta(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta=gate[..., 0].neg().to(q.dtype), scale=1.0)


def _lookup(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, erase: Tensor, lookup: Tensor) -> Any:
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

    return chunk_dplr_delta_rule(q, k, v, a=lookup, b=-erase, gk=gate, scale=1.0)


OPERATORS = {"retention": _retention, "gated": _gated, "delta": _delta, "lookup": _lookup}


def by_fla(kind: str) -> Callable[..., Tensor]:
    """flash-linear-attention's operator, in its own order of axes: (batch, step, head, feature)."""
    import fla  # noqa: F401  # says at once that it is not installed

    operator = OPERATORS[kind]

    def call(**given: Tensor) -> Tensor:
        out = operator(**{name: x.transpose(1, 2) for name, x in given.items()})
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.transpose(1, 2)

    return call


SUITE = Suite(
    "linear",
    "linear attention, in chunks",
    cases(),
    build,
    limits={"tokens": 96, "batch": 1, "width": 16},
    share=1.5,
)
