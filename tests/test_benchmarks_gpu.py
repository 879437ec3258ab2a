"""The GPU benchmark, without a GPU: cases run, results are kept and judged, time is shared out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkout
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import drive, page, targets
from benchmarks.gpu.case import Case
from benchmarks.gpu.drive import Deadline
from benchmarks.gpu.store import Store
from benchmarks.gpu.suites import SUITES, cases

CASES = cases(list(SUITES), [])


def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """A run on the CPU, kernels interpreted: what its file holds."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "results.json"
    command.main(["--tiny", "--device", "cpu", "--out", str(out), "--budget", "0.1", *arguments])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_cases_run_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["causal, backward, b=1 h=16 n=16384 d=128", "window, forward, b=2 h=8 n=16384 d=128"]
    data = tiny(tmp_path, monkeypatch, "--suite", "dense", "masks", "--only", *names)
    assert [key.split(":")[1].split(",")[0].strip() for key in data["cases"]] == ["causal", "window"]
    for entry in data["cases"].values():
        ran = {name for name, peer in entry["peers"].items() if "error" not in peer}
        assert {"eager", "torch.compile", "refocus"} <= ran
        own = entry["peers"]["refocus"]
        assert own["agrees"] and own["seconds"] > 0
        assert [(site["fused"], site["engine"]) for site in own["sites"]] == [(True, "triton")]
    backward, forward = data["cases"].values()
    assert "sdpa flash" in backward["peers"] and "flex mask" in forward["peers"]
    assert "does not support backward" in backward["peers"]["flex"]["error"]  # on CPUs
    assert data["bandwidth"] > 0


@pytest.mark.slow
def test_recurrences_run_by_their_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelled as a triangular system, as their authors do not, they must be the same function all the same."""
    names = [c.key for c in CASES if c.suite == "linear" and c.kind in ("delta", "lookup") and not c.trained]
    data = tiny(tmp_path, monkeypatch, "--suite", "linear", "--only", *names)
    assert set(data["cases"]) == set(names) and len(names) == 2
    for entry in data["cases"].values():
        assert entry["peers"]["refocus"]["agrees"] and entry["peers"]["eager"]["seconds"] > 0


# One case of each suite, the first with a gradient where there is one.
ONE = {name: next((c for c in suite.cases if c.trained), suite.cases[0]).key for name, suite in SUITES.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of those, and of some numbers: its worker starts once."""
    numbers = ["causal float32", "linear_attention float32"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        return tiny(
            tmp_path_factory.mktemp("ran"), monkeypatch, "--minutes", "60",
            "--suite", *SUITES, "numerics", "--only", *ONE.values(), *numbers,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_without_a_gpu(suite: str, ran: dict[str, Any]) -> None:
    assert ran["cases"].keys() == set(ONE.values())
    peers = ran["cases"][ONE[suite]]["peers"]
    assert peers["refocus"]["seconds"] > 0
    if suite != "models":  # several layers of half precision apart
        assert peers["refocus"]["agrees"]


@pytest.mark.slow
def test_numbers_are_checked(ran: dict[str, Any]) -> None:
    values = {key: entry["value"] for key, entry in ran["numerics"].items()}
    assert values["causal float32"] == "exact"
    assert values["linear_attention float32"].startswith("left: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_bare_checkout_is_enough() -> None:
    """A process that finds nothing installed imports the checkout."""
    names = ["refocus", "refocus.patterns", "refocus.codegen", "refocus.codegen.flash"]
    text = f"""
import importlib.util, sys
hidden = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "refocus" else hidden(name, *rest)
own = ("BuiltinImporter", "FrozenImporter", "PathFinder")
sys.meta_path[:] = [finder for finder in sys.meta_path if any(name in str(finder) for name in own)]
import benchmarks
importlib.util.find_spec = hidden
print(*[hidden(name).origin for name in {names!r}], sep="\\n")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=checkout.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == len(names) and all(Path(origin).is_relative_to(checkout.ROOT) for origin in found)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.key for case in CASES}) == len(CASES)
    assert [case.rank for case in CASES] == sorted(case.rank for case in CASES)
    text = page.README.read_text()
    assert all(f"| {name} |" in text for name in SUITES)


# ------------------------------------------------------------------------------------------------------------- results


def entry(case: Case, **seconds: float) -> dict[str, Any]:
    peers = {name.replace("_", " "): {"seconds": taken, "sites": []} for name, taken in seconds.items()}
    known = {"suite": case.suite, "kind": case.kind, "work": case.work, "sizes": case.sizes, "tokens": case.tokens}
    return known | {"width": case.width, "flops": 1e12, "bytes": 1e9, "against": "flex", "peers": peers, "source": "x"}


def data_of(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    where = {"gpu": "G", "torch": "2", "triton": "3", "cuda": "13"}
    return {"where": where, "bandwidth": 2e12, "numerics": {}, "cases": entries}


def verdict(data: dict[str, Any], start: str) -> targets.Verdict:
    return next(v for v in page.judged(data) if v.target.startswith(start))


def test_nothing_measured_is_not_met() -> None:
    assert {v.word for v in page.judged(data_of({}))} == {"not measured"}


def test_targets_are_ratios_of_what_was_measured() -> None:
    flexed = [c for c in CASES if c.suite in ("masks", "scores") and c.work == "forward"]
    good = {c.key: entry(c, refocus=1.0, flex=1.2, flex_mask=3.0) for c in flexed}
    assert verdict(data_of(good), "FlexAttention, forward").word == "met"
    assert verdict(data_of(good), "FlexAttention and its mask").found == "mean 4.20, least 4.20"
    assert verdict(data_of(good), "FlexAttention, backward").word == "not measured"
    some = {c.key: entry(c, refocus=1.0, flex=1.2) for c in flexed[:2]}
    assert verdict(data_of(some), "FlexAttention, forward").word == f"met (2 of {len(flexed)} measured)"
    slow = good | {flexed[3].key: entry(flexed[3], refocus=1.0, flex=0.9)}
    found = verdict(data_of(slow), "FlexAttention, forward")
    assert found.word == "not met" and found.worst.startswith(flexed[3].kind)


def test_the_best_of_pytorchs_kernels_counts() -> None:
    case = next(c for c in CASES if c.suite == "dense" and c.width == 128)
    data = data_of({case.key: entry(case, refocus=1.0, refocus_triton=1.4, sdpa_flash=1.1, sdpa_cudnn=0.98)})
    assert verdict(data, "dense and causal").found == "mean 0.98, least 0.98"
    assert verdict(data, "our own kernel").found == "mean 0.70, least 0.70"


def test_time_follows_the_tiles_or_not() -> None:
    widths = [c for c in CASES if c.kind.startswith("window of ")]

    def measured(*taken: float) -> targets.Verdict:
        entries = {c.key: entry(c, refocus=t) for c, t in zip(widths, taken, strict=True)}
        for e, tiles in zip(entries.values(), (10, 20, 40, 80)):
            e["peers"]["refocus"]["sites"] = [{"tiles": {"partial": tiles, "full": 0}}]
        return verdict(data_of(entries), "sparse")

    assert measured(1.0, 2.0, 4.0, 8.0).word == "met"
    assert measured(2.0, 2.5, 4.0, 8.0).word == "not met"


def test_decoding_is_held_against_a_copy() -> None:
    case = next(c for c in CASES if c.suite == "decode" and c.tokens == 65536)
    found = verdict(data_of({case.key: entry(case, refocus=1e-3)}), "decoding")
    assert found.found == "mean 0.50, least 0.50" and not found.met


def test_results_as_a_page(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.suite == "decode")
    data = data_of({case.key: entry(case, refocus=1e-3, flex=2e-3, sdpa_flash=1.5e-3)})
    data["numerics"] = {"a": {"value": "exact"}, "b": {"error": "CheckFailed: off"}}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    page.publish(data, readme)
    text = readme.read_text()
    assert f"| one query, forward | {case.sizes} | 1.000 | 2.000 | 1.500 | 1.50 | 1000 | 1000 | - | - |" in text
    assert "1 exact, 0 left alone, 1 wrong" in text and "- b: CheckFailed: off" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    with pytest.raises(ValueError, match="no place for 'gpu'"):
        page.insert("nothing", "gpu", "")


def test_what_failed_or_is_of_another_source_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "r.json")
    store.put("cases", "good", {"peers": {}})
    store.put("cases", "bad", {"peers": {}, "error": "crashed"})
    again = Store(tmp_path / "r.json")
    assert again.has("cases", "good") and not again.has("cases", "bad") and not again.has("cases", "none")
    again.source = "other"
    assert not again.has("cases", "good")


def test_what_is_wrong_is_told() -> None:
    case = CASES[0]
    bad = entry(case, refocus=1.0)
    bad["peers"]["refocus"] |= {"agrees": False}
    bad["peers"]["sdpa cudnn"] = {"error": "no"}  # a peer may fail
    failed = entry(case) | {"error": "timed out"}
    found = drive.wrong(data_of({"one": bad, "two": failed}) | {"numerics": {"n": {"error": "off"}}})
    assert found == ["numbers, n: off", "one: refocus differs from flex", "two: timed out"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # A third is for decode: what it has left over waits for the others.
        (100.0, ["decode 0", "decode 1", "decode 2", "decode 3", "dense 0", "dense 1", "decode 4", "decode 5"]),
        (60.0, ["decode 0", "decode 1", "decode 2", "dense 0", "dense 1"]),  # the end is kept for writing
    ],
)
def test_a_suite_that_used_its_share_goes_last(
    seconds: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("benchmarks.gpu.drive.time.monotonic", lambda: now)
    options = command.parse(["--suite", "dense", "decode"])
    pending = [Case("decode", str(n), 1) for n in range(6)] + [Case("dense", str(n), 1) for n in range(2)]
    drawn = []
    for task in drive.schedule(pending, options, Deadline(0.0, seconds)):
        drawn.append(f"{task.case.suite} {task.case.kind}")
        now += 10.0
    assert drawn == expected
