"""Generated kernels that read keys in place: their numbers, forward and backward, under Triton's interpreter.

One child process (this file as a program) interprets all cases, as in tests/test_triton_flash.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refocus.codegen.backward_fit import supports_backward
from refocus.codegen.plan import Plan
from tests.copied_keys import CAPTURED
from tests.test_triton_backward import _errors, wanted_names
from tests.test_triton_flash import _error

SMALL = Plan("triton", block_q=16, block_k=16)
Errors = dict[str, list[list[float]]]


def child() -> Errors:
    import numpy

    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    out: Errors = {}
    for name, make in CAPTURED.items():
        case = make()
        trainable = supports_backward(case[0], wanted_names(case[0])) is None
        out[name] = [_error(case, SMALL), *(_errors(case, SMALL) if trainable else [])]
    return out


@pytest.fixture(scope="module")
def results() -> Errors:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_triton_in_place"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Errors = json.loads(done.stdout.splitlines()[-1])
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
