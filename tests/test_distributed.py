"""An optimised model in two CPU processes, by data, by shards and by tensors in parallel: the same losses as eager."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
WAYS = ("ddp", "fsdp", "tp", "dtensor")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


def in_two_processes(tmp_path: Path, *command: str) -> list[Any]:
    """What each process wrote to its file, as JSON."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", *command, str(rank), "2", str(tmp_path / "meeting"), str(tmp_path / "out")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [worker.communicate(timeout=300)[0] for worker in workers]  # one may only tell that the other is gone
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(told)
    return [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Trained in every way by the same two processes."""
    return in_two_processes(tmp_path_factory.mktemp("trained"), "tests.distributed_worker", ",".join(WAYS))


@pytest.mark.parametrize("how", WAYS)
def test_two_processes_train_alike(how: str, trained: list[Any]) -> None:
    for process in trained:
        found = process[how]
        if how == "dtensor" and "refused" in found:
            pytest.skip(f"this torch does not run the eager model: {found['refused']}")
        assert found["sites"] == 2
        assert found["fused"] == pytest.approx(found["eager"], rel=1e-4)
        assert found["eager"][-1] != found["eager"][0]


def test_dtensors_are_attended_where_they_lie(tmp_path: Path) -> None:
    for found in in_two_processes(tmp_path, "tests.sharded_worker"):
        elsewhere = {name for name in found if name.endswith("elsewhere")}
        for name, one in found.items():
            assert max(one["errors"]) < (2e-2 if "bfloat16" in name else 1e-13), name
            assert bool(one["collectives"]) == (name in elsewhere), name  # those are cut where no attention can be
        assert found["gqa b"]["cut"] == "S(0)" and found["gqa h"]["cut"] == "S(1)"
        assert found["relative_table h"]["cut"] == "S(1)" and found["causal i"]["cut"] == "S(2)"
