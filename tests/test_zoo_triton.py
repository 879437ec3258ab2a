"""Attention as published, and whole models, on generated kernels, forward and backward, under Triton's interpreter.

Child processes (this file as a program, with the names of entries or models) interpret them and print a line for each:
what went wrong, "" where nothing did. Interpreted kernels are slow: few entries are run unless exhaustive tests are.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import pytest

from benchmarks import models
from tests import wide_models
from tests.children import output, settle
from tests.zoo import ENTRIES, load

# A triangle, documents within a window, tables by distance, a product of a column and a row, weights of pairs.
FEW = ("causal", "document_window", "t5", "sccan", "relu_attention")
FUSED = [n for n in ENTRIES if load(n).expect.declined is None and not load(n).expect.open]


def child(names: list[str]) -> None:
    """Forward and gradients against eager code in float64; or why the engine leaves a site."""
    import refocus
    from refocus.testing import check

    settle()
    for name in names:
        module, args, kwargs = _built(name)
        try:
            report = refocus.explain(module, *args, engine="triton", **kwargs)
            found = "; ".join(sorted({site.reason for site in report.sites if not site.fused}))
            if not found:
                check(module, args, kwargs, engines=("triton",), lower=False, gradients=True)
        except Exception as problem:  # told by the test
            found = f"{type(problem).__name__}: {problem}"
        print(json.dumps([name, found]), flush=True)


def _built(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if name in models.MODELS:
        module, inputs = wide_models.build(name, tokens=24)
        return module, (), inputs
    return *load(name).build(), {}


@cache
def wrong(*names: str) -> dict[str, str]:
    return dict(json.loads(line) for line in output("tests.test_zoo_triton", *names, interpreted=True).splitlines())


@pytest.mark.parametrize("name", FEW)
def test_a_few_are_exact(name: str) -> None:
    assert wrong(*FEW)[name] == ""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FUSED if name not in FEW])
def test_is_exact_or_says_why_not(name: str) -> None:
    assert wrong(name)[name] == LEFT.get(name, "")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
def test_models_are_exact(name: str) -> None:
    assert wrong(name)[name] == ""


# Entries that the engine does not take, and why.
LEFT: dict[str, str] = dict.fromkeys(
    (
        "efficient_attention", "efficient_attention:quadratic", "efficientvit", "efficientvit:quadratic", "flowformer",
        "linear_attention", "linear_attention:quadratic", "norm_attention:bidirectional", "performer",
    ),
    "the triton engine does not take it: without an order the form is two products of matrices",
)  # fmt: skip


if __name__ == "__main__":
    child(sys.argv[1:])
