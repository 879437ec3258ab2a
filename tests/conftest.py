"""What every test gets: a kernel cache of its own, its share of the cores, seeded random numbers, clean compilers."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from benchmarks.torchvision_ops import has_timm, import_torchvision

# Read when refocus and transformers are first imported, and inherited by the processes that tests start.
_CACHE = tempfile.TemporaryDirectory(prefix="refocus-tests-")
os.environ["REFOCUS_CACHE"] = _CACHE.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import_torchvision()  # before anything imports transformers, which takes it wherever it is installed

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))


    _leave_guards_untimed()


def _leave_guards_untimed() -> None:
    """Dynamo times the guards of all that it compiles, for its log, after emptying the processor's caches: a tenth of
    what most tests take."""
    import torch._dynamo.guards as guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: collecting garbage, which tests of memory ask for, need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    _CACHE.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no GPU here")
    no_timm = pytest.mark.skip(reason="timm is not installed")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("timm") and not has_timm():
            item.add_marker(no_timm)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """The same random numbers whatever ran before; afterwards nothing compiled is left for the next test to meet."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
