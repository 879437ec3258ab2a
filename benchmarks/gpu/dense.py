"""Suite `dense`: every pair, or a triangle; where PyTorch's own kernels are at their best."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.case import BACKWARD, Case, Setting, Subject, Suite
from benchmarks.gpu.spelled import Spelling, subject

TOKENS, CHANNELS = 16384, 2048  # of all sequences together, of all heads together


def case(kind: str, tokens: int, width: int, rank: int = 1) -> Case:
    """As FlashAttention's papers measure it: as many tokens and channels at every length."""
    heads = CHANNELS // width
    return Case("dense", kind, tokens, batch=max(1, TOKENS // tokens), heads=heads, width=width, rank=rank)


def cases() -> tuple[Case, ...]:
    found = [case(kind, n, 128, rank=0) for kind in ("causal", "dense") for n in (4096, 16384)]
    found += [case("causal", 32768, 128, rank=0)]
    found += [replace(case("causal", 4096, 128), heads=32, kv_heads=8, rank=0)]
    found += [replace(case("causal", n, d, rank=0), work=BACKWARD) for n, d in ((4096, 128), (16384, 128), (4096, 64))]
    found += [case("causal", n, d) for n, d in ((4096, 64), (16384, 64), (4096, 256), (16384, 256))]
    found += [case(kind, n, 128) for n in (1024, 2048, 8192) for kind in ("causal", "dense")]
    found += [replace(case("dense", 4096, 64), dtype="float16"), case("dense", 16384, 64), case("dense", 32768, 128)]
    found += [replace(case("dense", n, 128), work=BACKWARD) for n in (4096, 16384)]
    return tuple(found)


def build(case: Case, setting: Setting) -> Subject:
    causal = case.kind == "causal"
    mask = Spelling(mask=lambda given: lambda b, h, q, k: k <= q, kept=0.5 + 0.5 / case.tokens)
    return subject(case, setting, mask if causal else Spelling(), sdpa=True, causal=causal)


SUITE = Suite(
    "dense",
    "every pair, or a triangle",
    cases(),
    build,
    limits={"tokens": 64, "batch": 1, "heads": 4, "kv_heads": 2, "width": 16},
    share=2.0,
    engines=("triton",),
)
