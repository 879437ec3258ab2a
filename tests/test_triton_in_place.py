"""Generated kernels that read keys in place: their numbers, forward and backward, under Triton's interpreter.

One child process (this file as a program) interprets all cases, as in tests/test_triton_flash.py.
"""

from __future__ import annotations

import json

import pytest

from refocus.codegen.backward_fit import supports_backward
from refocus.codegen.plan import Plan
from tests.children import interpreted, settle
from tests.copied_keys import CAPTURED
from tests.test_triton_backward import _errors, wanted_names
from tests.test_triton_flash import _error

SMALL = Plan("triton", block_q=16, block_k=16)
Errors = dict[str, list[list[float]]]


def child() -> Errors:
    settle()
    out: Errors = {}
    for name, make in CAPTURED.items():
        case = make()
        trainable = supports_backward(case[0], wanted_names(case[0])) is None
        out[name] = [_error(case, SMALL), *(_errors(case, SMALL) if trainable else [])]
    return out


@pytest.fixture(scope="module")
def results() -> Errors:
    found: Errors = interpreted("tests.test_triton_in_place")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURED)
def test_against_the_oracle(results: Errors, name: str) -> None:
    for error, allowed in results[name]:
        assert error <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shifted_heads_keys", "halo_keys", "routed_keys", "turned_keys", "in_rows_keys"])
def test_gradients_were_among_them(results: Errors, name: str) -> None:
    assert len(results[name]) > 4


if __name__ == "__main__":
    print(json.dumps(child()))
