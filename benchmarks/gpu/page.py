"""The results as a page: what targets are met, and a table for each suite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.suites import SUITES
from benchmarks.gpu.targets import Verdict, seconds, verdicts
from benchmarks.peers import REFOCUS

README = Path(__file__).parents[1] / "README.md"


def expected() -> list[dict[str, Any]]:
    """Every case as an entry that was not measured."""
    return [
        {
            "key": case.key, "suite": case.suite, "kind": case.kind, "work": case.work, "sizes": case.sizes,
            "tokens": case.tokens, "width": case.width,
        }
        for suite in SUITES.values()
        for case in suite.cases
    ]  # fmt: skip


def judged(data: dict[str, Any]) -> list[Verdict]:
    return verdicts(data, expected())


def targets(found: Iterable[Verdict]) -> list[str]:
    lines = ["| target | found | worst case | verdict |", "|---|---|---|---|"]
    return lines + [f"| {v.target} | {v.found} | {v.worst or '-'} | {v.word} |" for v in found]


def markdown(data: dict[str, Any]) -> str:
    """Targets, numbers, and times in milliseconds."""
    where = data["where"]
    lines = [
        f"{where['gpu']}, torch {where['torch']}, Triton {where['triton']}, CUDA {where['cuda']}. Medians of calls "
        "taken in turns in one process, by CUDA events, the cache flushed before each; random data. Times are in "
        "milliseconds; `over` is how many times faster Refocus is than the fastest other peer.",
        "",
        *targets(judged(data)),
        "",
        *numerics(data["numerics"]),
    ]
    if data["bandwidth"]:
        lines += ["", f"A large copy moves {data['bandwidth'] / 1e12:.2f} TB/s, reading and writing."]
    for name, suite in SUITES.items():
        entries = [data["cases"][case.key] for case in suite.cases if case.key in data["cases"]]
        if entries:
            lines += ["", f"### {name}: {suite.about}", "", *table(entries)]
    return "\n".join(lines) + "\n"


def numerics(found: dict[str, Any]) -> list[str]:
    """How many attentions are exact, and which are not."""
    wrong = {key: entry["error"] for key, entry in found.items() if entry.get("error")}
    exact = sum(entry.get("value") == "exact" for entry in found.values())
    left = len(found) - exact - len(wrong)
    text = f"Numerics against float64, forward and backward: {exact} exact, {left} left alone, {len(wrong)} wrong."
    return [text, *(f"- {key}: {error}" for key, error in wrong.items())]


def table(entries: list[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(name for e in entries for name, p in e.get("peers", {}).items() if "seconds" in p))
    peers.sort(key=lambda name: not name.startswith(REFOCUS))
    head = ["what", "sizes", *peers, "over", "TFLOP/s", "GB/s", "MiB", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    return lines + [row(e, peers) for e in entries]


def row(entry: dict[str, Any], peers: list[str]) -> str:
    """One case. What a rate counts is what any implementation must do, in a forward."""
    what = f"{entry['kind']}, {entry['work']}"
    if "peers" not in entry:
        return f"| {what} | {entry.get('sizes', '')} | {entry['error']} |"
    took = {name: seconds(entry, name) for name in peers}
    others = [t for name, t in took.items() if t is not None and not name.startswith(REFOCUS) and name != "flex mask"]
    own, cells = took.get(REFOCUS), [what, entry["sizes"]]
    cells += ["-" if took[name] is None else f"{took[name] * 1e3:.3f}" for name in peers]  # type: ignore[operator]
    cells.append(f"{min(others) / own:.2f}" if own and others else "-")
    rates = own and entry["work"] == "forward"
    cells.append(f"{entry['flops'] / own / 1e12:.0f}" if rates and entry["flops"] else "-")
    cells.append(f"{entry['bytes'] / own / 1e9:.0f}" if rates and entry["bytes"] else "-")
    mine = entry["peers"].get(REFOCUS, {})
    cells.append("-" if mine.get("memory") is None else f"{mine['memory'] / 2**20:.0f}")
    cells.append("-" if mine.get("difference") is None else f"{mine['difference']:.1e}")
    return "| " + " | ".join(cells) + " |"


def insert(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- name -->` and `<!-- /name -->`. Raises ValueError where they are missing."""
    before, start, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise ValueError(f"the page has no place for {name!r}")
    return f"{before}{start}\n{text.strip()}\n\n{end}{after}"


def publish(data: dict[str, Any], readme: Path = README) -> None:
    """Put the results into the README of the benchmarks."""
    readme.write_text(insert(readme.read_text(), "gpu", markdown(data)))
