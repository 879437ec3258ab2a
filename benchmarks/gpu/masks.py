"""Suite `masks`: patterns that leave most tiles empty, from positions, from documents and from selections."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import masks
from benchmarks.gpu.case import BACKWARD, Case, Setting, Subject, Suite
from benchmarks.gpu.spelled import Given, MaskMod, Spelling, subject

TOKENS = 16384
PATTERNS = (
    "window", "documents", "prefix", "dilated", "neighbours", "windows by head", "blocks", "window and sinks", "chunks",
)  # fmt: skip
BY_HEAD = ("windows by head", "blocks")
# Windows of these widths show whether time follows the tiles that are visited.
WIDTHS = (1024, 2048, 4096, 8192)


def cases() -> tuple[Case, ...]:
    def case(kind: str) -> Case:
        return Case("masks", kind, TOKENS, batch=2, heads=masks.HEADS, width=128)

    found = [case(kind) for kind in PATTERNS[:7]]
    found += [replace(case(kind), work=BACKWARD) for kind in PATTERNS[:7]]
    found += [case(f"window of {width}") for width in WIDTHS]
    found += [replace(case(kind), rank=1) for kind in PATTERNS[7:]]
    found += [replace(case(kind), rank=1, work=BACKWARD) for kind in PATTERNS[7:]]
    found += [replace(case(kind), rank=1, width=64) for kind in PATTERNS[:7]]
    return tuple(found)


def build(case: Case, setting: Setting) -> Subject:
    n = case.tokens
    words = case.kind.split(" of ")
    mask = masks.window(n, int(words[1])) if len(words) > 1 else masks.masks(n)[case.kind]()
    mod = mask.bound()
    some = torch.arange(0, n, max(1, n // 256))  # enough queries to say how many pairs are kept
    heads = torch.arange(masks.HEADS)[:, None, None]
    kept = mod(torch.zeros((), dtype=torch.long), heads, some[:, None], torch.arange(n))

    def bound(given: Given) -> MaskMod:
        return mask.bound(given)

    spelling = Spelling(mask=bound, tensors=mask.tensors, by_head=case.kind in BY_HEAD, kept=float(kept.float().mean()))
    return subject(case, setting, spelling)


SUITE = Suite(
    "masks",
    "patterns that leave most tiles empty",
    cases(),
    build,
    limits={"tokens": 128, "batch": 1, "width": 16},  # as many heads as the masks of heads have
    share=3.0,
)
