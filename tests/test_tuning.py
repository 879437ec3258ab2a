"""Tuning without a GPU: the space, what is pruned from it, what is chosen and kept, and that it is off by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refocus.codegen import operator, tuning
from refocus.codegen.aot import Resources
from refocus.codegen.plan import Plan
from refocus.codegen.tuning import MULTIPROCESSORS, Multiprocessor, fastest, pruned, recall, remember, space
from tests import region_cases as cases

DEFAULT = Plan("triton", "flash", 64, 64, 4, 2)
SMALL = Multiprocessor(registers=65536, shared=100_000, each=80_000, threads=2048)


def taken(registers: int = 128, spills: int = 0, shared: int = 40_000, unit: str = "mma") -> Resources:
    return Resources(registers, spills, shared, unit, "")


def test_the_space_is_small_and_starts_with_the_default() -> None:
    plans = space(DEFAULT)
    assert plans[0] == DEFAULT and len(set(plans)) == len(plans) <= 30
    assert {p.block_q for p in plans} == {p.block_k for p in plans} == {32, 64, 128}
    assert all(p.engine == "triton" and p.schedule == "flash" and not p.listed for p in plans)
    assert {p.block_k for p in space(Plan("triton", block_q=128, block_k=16))} == {16, 32}


def test_a_multiprocessor_holds_what_its_scarcest_part_allows() -> None:
    assert SMALL.programs(DEFAULT, taken()) == 2  # 40 of 100 kB
    assert SMALL.programs(DEFAULT, taken(shared=1000)) == 4  # 128 of its threads' registers
    assert SMALL.programs(DEFAULT, taken(registers=16, shared=1000)) == 16  # threads
    assert SMALL.programs(DEFAULT, taken(shared=90_000)) == 0  # of one program


def test_what_spills_or_does_not_fit_is_never_timed() -> None:
    plans = space(DEFAULT)
    spilled, huge, plain, broken, *rest = plans[1:]
    found = {spilled: taken(spills=8), huge: taken(shared=90_000), plain: taken(unit=""), broken: None}
    left = pruned(plans, lambda plan: found.get(plan, taken()), SMALL, most=100)
    assert left[0] == DEFAULT and set(left[1:]) == set(rest)


def test_of_the_rest_those_with_the_most_pairs_in_flight_are() -> None:
    left = pruned(space(DEFAULT), lambda plan: taken(), SMALL, most=4)
    assert left[0] == DEFAULT and len(left) == 4
    assert {p.block_q * p.block_k for p in left[1:]} == {2 * 64 * 64}


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    one, two, three = space(DEFAULT)[:3]
    assert fastest([one, two, three], {one: 1.0, two: 0.98, three: 1.2}.get) == one
    assert fastest([one, two, three], {one: 1.0, two: 0.9, three: 1.2}.get) == two
    assert fastest([one, two, three], {three: 1.2}.get) == three  # the others do not run
    assert fastest([one, two], {}.get) == one


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOCUS_CACHE", str(tmp_path))
    assert recall("k") is None
    remember("k", DEFAULT)
    monkeypatch.setattr(tuning, "_known", {})  # as another process
    assert recall("k") == DEFAULT
    (tmp_path / "k.plan.json").write_text("{")
    monkeypatch.setattr(tuning, "_known", {})
    assert recall("k") is None


def test_nothing_is_timed_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    region, tensors, _ = cases.causal()
    run = pytest.fail
    monkeypatch.setenv("REFOCUS_TUNE", "1")
    assert operator._tuned(region, DEFAULT, tensors, [], run) is DEFAULT
    assert not tuning.asked(torch.device("cpu"))


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refocus.codegen.tuning.interpreted", lambda: False)
    monkeypatch.delenv("REFOCUS_TUNE", raising=False)
    assert not tuning.asked(torch.device("cuda"))
    monkeypatch.setenv("REFOCUS_TUNE", "0")
    assert not tuning.asked(torch.device("cuda"))
    monkeypatch.setenv("REFOCUS_TUNE", "1")
    assert tuning.asked(torch.device("cuda"))


@pytest.mark.parametrize("target", MULTIPROCESSORS)
def test_first_calls_ask_the_device_once(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, the GPU played by numbers: compiled, pruned, timed, kept."""
    monkeypatch.setenv("REFOCUS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "asked", lambda device: True)
    monkeypatch.setattr(tuning, "target_of", lambda device: target)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "G")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("refocus.codegen.aot.compile_for", lambda kernel, target: taken(shared=20_000))
    timed: list[Plan] = []

    def time(call: object, device: torch.device) -> float:
        call()  # type: ignore[operator]
        return 1.0 if len(timed) == 1 else 0.5

    monkeypatch.setattr(tuning, "_time", time)
    region, tensors, _ = cases.causal(n=64)
    first = tuning.tuned(region, DEFAULT, tensors, [], timed.append)
    assert first != DEFAULT and 1 < len(timed) <= tuning.TIMED
    assert tuning.tuned(region, DEFAULT, tensors, [], timed.append) == first
    assert len(timed) <= tuning.TIMED
    other = Plan("triton", "windows", 64, 64)
    assert tuning.tuned(region, other, tensors, [], pytest.fail) is other
