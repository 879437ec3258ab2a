"""Attention as published, trained: gradients of every parameter and input against eager code in float64.

What comes out forward is checked in tests/test_zoo.py.
"""

from __future__ import annotations

import pytest
import torch

from refocus.testing import check, check_gradients
from tests.zoo import ENTRIES, load

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

FUSED = [n for n in ENTRIES if load(n).expect.declined is None and not load(n).expect.open]


@pytest.mark.parametrize("name", FUSED)
def test_gradients(name: str) -> None:
    check_gradients(*load(name).build(), lower=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gemma2", "mistral", "swin", "t5"])
def test_gradients_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check_gradients(*load(name).build(dtype), lower=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "mistral", "swin", "t5"])
def test_through_inductor(name: str) -> None:
    module, inputs = load(name).build()
    check(module, inputs, gradients=True)
