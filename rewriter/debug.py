"""Debug switches, read from the environment when used.

| variable | what it does |
|---|---|
| REFOCUS_DEBUG=1..4 | log to stderr: 1 what was declined or fell back, 2 each site, 3 regions and plans, 4 graphs |
| REFOCUS_DUMP=dir | write what every stage of every graph produced as text files |
| REFOCUS_CACHE=dir | where generated sources are kept (default: the user's cache directory) |
| REFOCUS_DISABLE=rule,.. | leave out parts of the compiler, of those in `RULES`: to find the one at fault |
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from refocus.errors import UnknownOption

_count = itertools.count()

# What REFOCUS_DISABLE may name, and what it leaves out.
RULES = {
    "softmax": "the family: its sites are seen, and left as they are",
    "linear": "the family",
    "pairwise": "the family",
    "triton": "the engine: nothing is planned for it",
    "cpp": "the engine",
    "tiled": "the engine",
    "sdpa": "the engine",
    "training": "regions that a gradient will flow through are left",
    "closed-forms": "constant masks and buffers are loaded, whatever rule their values follow",
    "refined-tiles": "tiles that intervals leave open are visited, without a look at their pairs",
    "tile-lists": "kernels loop between bounds, never over lists of tiles",
    "readings": "keys that are copied together are read as the model copies them",
}


def disabled(rule: str) -> bool:
    """Whether REFOCUS_DISABLE names a rule. Raises UnknownOption for names that are none."""
    text = os.environ.get("REFOCUS_DISABLE")
    if not text:
        return False
    names = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(names - set(RULES))
    if unknown:
        raise UnknownOption(
            "REFOCUS_DISABLE names a rule that does not exist",
            expected=", ".join(RULES),
            got=", ".join(unknown),
            todo="name some of these rules, separated by commas",
        )
    return rule in names


def off(rule: str) -> str:
    """The reason that something is left, where a rule is disabled."""
    return f"REFOCUS_DISABLE names {rule!r}"


def level() -> int:
    """The value of REFOCUS_DEBUG, 0 when unset or not a number."""
    text = os.environ.get("REFOCUS_DEBUG", "0")
    return int(text) if text.isdigit() else 0


def log(at: int, message: str) -> None:
    """Print to stderr when REFOCUS_DEBUG is at least `at`."""
    if level() >= at:
        print(f"refocus: {message}", file=sys.stderr)


def dump(stage: str, value: Any) -> None:
    """Write one stage's result under REFOCUS_DUMP (numbered in order), and log it at level 4."""
    directory = os.environ.get("REFOCUS_DUMP")
    if not directory and level() < 4:
        return
    text = _text(value)
    log(4, f"{stage}\n{text}")
    if directory:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{next(_count):03d}_{os.getpid()}_{stage}.txt").write_text(text)


def _text(value: Any) -> str:
    if hasattr(value, "print_readable"):
        return str(value.print_readable(print_output=False))
    if isinstance(value, list):
        return "\n\n".join(_text(v) for v in value)
    return str(value)
