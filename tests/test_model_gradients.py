"""Every architecture of the models list, trained through the portable engine, against eager code in float64."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import models
from refocus.testing import check
from tests import wide_models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")]


def _marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.timm) if name.startswith("timm/") else name


@pytest.mark.parametrize("name", [_marked(name) for name in models.MODELS])
def test_gradients(name: str) -> None:
    module, inputs = wide_models.build(name, tokens=64)
    check(module, (), inputs, sites=models.sites(name), lower=False, gradients=True)
