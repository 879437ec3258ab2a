"""The source cache: what is written where, by whom, and what happens when it cannot be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from refocus.codegen import cache, launch, triton_engine
from refocus.codegen.plan import Plan
from refocus.errors import CacheWarning, EngineUnavailable
from tests import region_cases as cases

SOURCE = "answer = 42\n"
KEY = "0123abcd"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "one" / "two"
    monkeypatch.setenv("REFOCUS_CACHE", str(chosen))
    return chosen


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


def test_saves_and_loads(folder: Path) -> None:
    path = cache.save(SOURCE, KEY)
    assert path == folder / f"{KEY}.py"
    assert path.read_text().splitlines()[1:] == ["answer = 42"]
    module = cache.load_module(path)
    assert module.answer == 42
    assert module.__file__ == str(path)
    assert cache.load_module(path) is module


def test_only_we_can_read_it(folder: Path) -> None:
    path = cache.save(SOURCE, KEY)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_left_behind(folder: Path) -> None:
    cache.save(SOURCE, KEY)
    cache.save("answer = 43\n", KEY)
    assert [p.name for p in folder.iterdir()] == [f"{KEY}.py"]


def test_the_same_content_is_not_written_again(folder: Path) -> None:
    path = cache.save(SOURCE, KEY)
    os.utime(path, (1, 1))
    cache.save(SOURCE, KEY)
    assert path.stat().st_mtime == 1


def test_other_content_of_ours_is_replaced_silently(folder: Path) -> None:
    path = cache.save("answer = 41\n", KEY)
    assert cache.load_module(path).answer == 41
    assert cache.load_module(cache.save(SOURCE, KEY)).answer == 42


BROKEN = ["", "answer = 1\n", "# refocus sha256 0\nanswer = 1\n", "# refocus sha", "\xff\xfe"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_written_again_with_one_warning(folder: Path, broken: str) -> None:
    path = cache.save(SOURCE, KEY)
    good = path.read_bytes()
    path.write_bytes(broken.encode("latin-1"))
    with pytest.warns(CacheWarning, match="broken") as caught:
        assert cache.save(SOURCE, KEY) == path
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert path.read_bytes() == good
    cache.save(SOURCE, KEY)


def test_a_truncated_file_is_broken(folder: Path) -> None:
    path = cache.save(SOURCE * 100, KEY)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(CacheWarning):
        cache.save(SOURCE * 100, KEY)
    assert cache.load_module(path).answer == 42


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFOCUS_CACHE", str(tmp_path / "file" / "cache"))
    path = cache.save(SOURCE, KEY)
    assert tmp_path not in path.parents
    assert cache.load_module(path).answer == 42
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    path = cache.save(SOURCE, KEY)
    assert path.parent != folder and path.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_someone_else(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    assert cache.save(SOURCE, KEY).parent != folder


def test_a_directory_open_to_others_is_closed(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache.save(SOURCE, KEY).parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFOCUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "refocus"


@pytest.mark.parametrize("key", ["", "../x", "a/b", "a.b", "x\n", "k" * 129])
def test_keys_are_file_names(folder: Path, key: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        cache.save(SOURCE, key)


WRITER = """
import sys
from refocus.codegen import cache
for n in range(60):
    text = "answer = 42\\n" * (1 + n % 3) * 400
    assert cache.load_module(cache.save(text, "shared")).answer == 42
"""


def test_two_processes_at_once(folder: Path) -> None:
    # Each finds the other's file where its own was; none may ever see half of one.
    command = [sys.executable, "-W", "error", "-c", WRITER]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        _, problems = writer.communicate(timeout=300)
        assert writer.returncode == 0, problems.decode()
    assert [p.name for p in folder.iterdir()] == ["shared.py"]


def test_keys_depend_on_region_plan_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    region, plan = cases.causal()[0], Plan("triton")
    other, smaller = cases.dense()[0], Plan("triton", block_q=32)
    keys = {cache.key_of(region, plan), cache.key_of(other, plan), cache.key_of(region, smaller)}
    assert len(keys) == 3
    assert cache.key_of(region, plan) == cache.key_of(cases.causal()[0], Plan("triton"))
    monkeypatch.setattr(cache, "_versions", lambda: ("refocus 999",))
    assert cache.key_of(region, plan) not in keys


def test_kernels_are_files(folder: Path) -> None:
    triton_engine.emit.cache_clear()
    kernel = triton_engine.emit(cases.gqa()[0], Plan("triton"))
    assert kernel.path.parent == folder
    assert kernel.path.read_text().endswith(kernel.source)
    assert f"def {kernel.name}(" in kernel.source
    triton_engine.emit.cache_clear()


def test_equal_regions_share_a_kernel() -> None:
    assert triton_engine.emit(cases.gqa()[0], Plan("triton")) is triton_engine.emit(cases.gqa()[0], Plan("triton"))


def test_what_cannot_be_emitted_says_why() -> None:
    region = cases.causal()[0]
    with pytest.raises(EngineUnavailable, match="no schedule 'abacus'"):
        triton_engine.emit(region, Plan("triton", "abacus"))
    with pytest.raises(EngineUnavailable, match="float64"):
        triton_engine.emit(cases.causal(cases.torch.float64)[0], Plan("triton"))


def test_a_kernel_file_that_is_gone_is_written_again(folder: Path) -> None:
    triton_engine.emit.cache_clear()
    kernel = triton_engine.emit(cases.gqa()[0], Plan("triton"))
    kernel.path.unlink()
    assert launch.function_of(kernel) is not None
    assert kernel.path.exists()
    triton_engine.emit.cache_clear()


@pytest.mark.parametrize("block", [8, 48])
def test_tiles_are_powers_of_two(block: int) -> None:
    with pytest.raises(EngineUnavailable, match="powers of two"):
        triton_engine.emit(cases.gqa()[0], Plan("triton", block_q=block))


def test_a_smaller_plan_ends() -> None:
    plan: Plan | None = Plan("triton", block_q=128, block_k=64, num_stages=3)
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = triton_engine.smaller(plan)
    assert (seen[-1].block_q, seen[-1].block_k, seen[-1].num_stages) == (16, 16, 1)
