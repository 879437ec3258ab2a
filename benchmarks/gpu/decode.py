"""Suite `decode`: one new token for each sequence, eight query heads to a key head; keys and values are read once."""

from __future__ import annotations

from benchmarks.gpu.case import Case, Setting, Subject, Suite
from benchmarks.gpu.spelled import Spelling, subject

SIZES = ((4096, 1), (65536, 1), (65536, 8), (262144, 1), (4096, 64), (16384, 64), (65536, 32))
MORE = ((16384, 1), (4096, 8), (16384, 8), (262144, 8))


def cases() -> tuple[Case, ...]:
    return tuple(
        Case("decode", "one query", keys, queries=1, batch=batch, heads=32, kv_heads=4, rank=rank)
        for rank, sizes in enumerate((SIZES, MORE))
        for keys, batch in sizes
    )


def build(case: Case, setting: Setting) -> Subject:
    return subject(case, setting, Spelling(), sdpa=True)


SUITE = Suite(
    "decode",
    "one query, many keys",
    cases(),
    build,
    limits={"tokens": 128, "batch": 2, "heads": 8, "kv_heads": 1, "width": 16},
    share=1.0,
)
