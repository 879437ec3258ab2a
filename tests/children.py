"""Child processes of tests: a file of tests as a program, which prints what it found as JSON.

Triton decides when it is imported whether it interprets kernels, and for good: what interprets runs in a process of its
own, all cases of a file in one, since each has to import torch first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class ChildFailed(Exception):
    """What the child said before it ended."""


def output(module: str, *arguments: str, interpreted: bool, **environment: str) -> str:
    """What a module prints as a program, in one thread."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = {**inherited, **({"TRITON_INTERPRET": "1"} if interpreted else {}), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=given, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if ended.returncode:
        raise ChildFailed(ended.stderr)
    return ended.stdout


def interpreted(module: str, *arguments: str) -> Any:
    """What a file of tests finds where Triton interprets kernels: the last line that it prints."""
    return json.loads(output(module, *arguments, interpreted=True).splitlines()[-1])


def settle() -> None:
    """At the start of a child that interprets: one thread, and no word of what is not finite."""
    import numpy
    import torch

    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
