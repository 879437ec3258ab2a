"""Suite `scores`: what models add to scores or make of them, under a triangle or a window."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.case import BACKWARD, Case, Setting, Subject, Suite
from benchmarks.gpu.spelled import Spelling, subject

KINDS = ("alibi", "softcap", "relative", "sink")
WINDOW, DISTANCES = 1024, 127


def cases() -> tuple[Case, ...]:
    found = [Case("scores", kind, 8192, batch=2, work=work) for work in ("forward", BACKWARD) for kind in KINDS]
    return (*found, *(replace(case, tokens=2048, batch=8, rank=1) for case in found))


def build(case: Case, setting: Setting) -> Subject:
    triangle = Spelling(mask=lambda given: lambda b, h, q, k: k <= q, kept=0.5)
    if case.kind == "alibi":
        slopes = torch.exp2(-8 * torch.arange(1, case.heads + 1) / case.heads)
        score = lambda given: lambda s, b, h, q, k: s - given["slopes"][h] * (q - k)  # noqa: E731
        spelling = replace(triangle, score=score, tensors={"slopes": slopes})
    elif case.kind == "softcap":
        spelling = replace(triangle, score=lambda given: lambda s, b, h, q, k: 30.0 * torch.tanh(s / 30.0))
    elif case.kind == "relative":  # a learned bias for each head and clipped distance, with its gradient
        table = torch.randn(case.heads, DISTANCES + 1).to(case.torch_dtype)
        score = lambda given: lambda s, b, h, q, k: s + given["table"][h, torch.clamp(q - k, 0, DISTANCES)]  # noqa: E731
        spelling = replace(triangle, score=score, tensors={"table": table}, trained=("table",))
    else:  # one more logit for each head, over a window
        spelling = Spelling(
            mask=lambda given: lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
            tensors={"sink": torch.randn(case.heads).to(case.torch_dtype)},
            trained=("sink",),
            kept=min(1.0, WINDOW / case.tokens),
        )
    return subject(case, setting, spelling)


SUITE = Suite(
    "scores",
    "what models add to scores or make of them",
    cases(),
    build,
    limits={"tokens": 128, "batch": 1, "heads": 2, "width": 16},
    share=1.5,
)
