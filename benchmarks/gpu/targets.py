"""How good it is meant to be, each figure a ratio from one run, checked on the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.gpu.case import BACKWARD, FORWARD
from benchmarks.gpu.linear import FLA
from benchmarks.gpu.models import LONG, SHORT
from benchmarks.gpu.spelled import FLEX, FLEX_MASK, SDPA
from benchmarks.measure import geometric_mean
from benchmarks.peers import COMPILE, REFOCUS

Entries = list[dict[str, Any]]
OWN = f"{REFOCUS} triton"


@dataclass(frozen=True)
class Verdict:
    """`met`: None where nothing was measured. `measured`: how many of the cases that it takes; `worst`: which."""

    target: str
    found: str
    met: bool | None
    measured: int
    of: int
    worst: str = ""

    @property
    def word(self) -> str:
        if self.met is None:
            return "not measured"
        word = "met" if self.met else "not met"
        return word if self.measured == self.of else f"{word} ({self.measured} of {self.of} measured)"


def seconds(entry: dict[str, Any], peer: str) -> float | None:
    """What a peer took; None where it was not measured."""
    found: float | None = entry["peers"].get(peer, {}).get("seconds")
    return found


def ratio(entry: dict[str, Any], over: str, of: str = REFOCUS) -> float | None:
    """How many times faster `of` is than `over`."""
    mine, theirs = seconds(entry, of), seconds(entry, over)
    return None if mine is None or theirs is None else theirs / mine


def best_sdpa(entry: dict[str, Any], of: str = REFOCUS) -> float | None:
    """Against the fastest of PyTorch's kernels."""
    found = [r for name in entry["peers"] if name.startswith(SDPA) and (r := ratio(entry, name, of)) is not None]
    return min(found, default=None)


def with_mask(entry: dict[str, Any]) -> float | None:
    """Against FlexAttention and the making of its mask."""
    mine, theirs, making = seconds(entry, REFOCUS), seconds(entry, FLEX), seconds(entry, FLEX_MASK)
    return None if mine is None or theirs is None or making is None else (theirs + making) / mine


Measure = Callable[[dict[str, Any]], float | None]


def judge(target: str, entries: Entries, measure: Measure, least: float | None, mean: float | None = None) -> Verdict:
    """Every ratio is `least` at least, and their geometric mean is `mean`."""
    found = {f"{e['kind']}, {e['work']}, {e['sizes']}": r for e in entries if (r := measure(e)) is not None}
    if not found:
        return Verdict(target, "-", None, 0, len(entries))
    average, worst = geometric_mean(list(found.values())), min(found, key=found.__getitem__)
    met = (least is None or found[worst] >= least) and (mean is None or average >= mean)
    text = f"mean {average:.2f}, least {found[worst]:.2f}"
    return Verdict(target, text, met, len(found), len(entries), worst)


def proportional(entries: Entries) -> Verdict:
    """Time for each tile that is visited, by width of the window: how far from their mean."""
    target = "sparse: time proportional to visited tiles, within 15%"
    found: dict[str, float] = {}
    for entry in entries:
        took, sites = seconds(entry, REFOCUS), entry["peers"].get(REFOCUS, {}).get("sites") or [{}]
        tiles = sites[0].get("tiles")
        if took is not None and tiles:
            found[entry["kind"]] = took / (tiles["partial"] + tiles["full"])
    if len(found) < 2:
        return Verdict(target, "-", None, 0, len(entries))
    average = fmean(found.values())
    worst = max(found, key=lambda kind: abs(found[kind] / average - 1))
    away = abs(found[worst] / average - 1)
    return Verdict(target, f"at most {away:.0%} away", away <= 0.15, len(found), len(entries), worst)


def bandwidth(entries: Entries, copying: float | None) -> Verdict:
    """Keys and values are read as fast as memory gives them."""

    def share(entry: dict[str, Any]) -> float | None:
        took = seconds(entry, REFOCUS)
        return None if took is None or not copying else entry["bytes"] / took / copying

    return judge("decoding: 80% of the copy bandwidth at 64k keys", entries, share, 0.8)


def verdicts(data: dict[str, Any], expected: Iterable[dict[str, Any]]) -> list[Verdict]:
    """All targets. `expected`: an entry without peers for every case that there is, in place of one not measured."""
    known = data["cases"]
    entries = [{"peers": {}} | known.get(e["key"], {}) | e for e in expected]

    def of(*suites: str, **fields: Any) -> Entries:
        return [e for e in entries if e["suite"] in suites and all(e[k] == v for k, v in fields.items())]

    def flex(e: dict[str, Any]) -> float | None:
        return ratio(e, FLEX)

    def compiled(e: dict[str, Any]) -> float | None:
        return ratio(e, COMPILE)

    forward, backward = of("masks", "scores", work=FORWARD), of("masks", "scores", work=BACKWARD)
    dense = [e for e in of("dense", work=FORWARD, width=128) if e["tokens"] >= 4096]
    scalar = [e for e in of("linear") if e["kind"] in ("retention", "gated")]
    models = of("models")
    long = [e for e in models if e["tokens"] == LONG[e["kind"]]]
    short = [e for e in models if e["tokens"] == SHORT[e["kind"]]]
    return [
        judge("FlexAttention, forward: mean 1.15, never below 0.95", forward, flex, 0.95, 1.15),
        judge("FlexAttention, backward: mean 1.15, never below 0.95", backward, flex, 0.95, 1.15),
        judge("FlexAttention and its mask: mean 3", forward, with_mask, None, 3.0),
        judge("dense and causal, d = 128: 0.97 of the best SDPA", dense, best_sdpa, 0.97),
        judge("our own kernel: 0.75 of the best SDPA", dense, lambda e: best_sdpa(e, OWN), 0.75),
        proportional([e for e in of("masks", work=FORWARD) if e["kind"].startswith("window of ")]),
        judge("linear: flash-linear-attention on retention and scalar gates", scalar, lambda e: ratio(e, FLA), 1.0),
        bandwidth([e for e in of("decode") if e["tokens"] == 65536], data["bandwidth"]),
        judge("models, long: faster than torch.compile alone", long, compiled, 1.0),
        judge("models, short: 0.97 of torch.compile alone", short, compiled, 0.97),
    ]
