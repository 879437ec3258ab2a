"""An optimised model in two CPU processes, by data, by shards and by tensors in parallel: the same losses as eager."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp"])
def test_two_processes_train_alike(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed_worker", how]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "meeting"), str(tmp_path / "out")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        text, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, text
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert found["sites"] == 2
        assert found["fused"] == pytest.approx(found["eager"], rel=1e-4)
        assert found["eager"][-1] != found["eager"][0]
