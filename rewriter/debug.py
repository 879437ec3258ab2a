"""Debug switches, read from the environment when used.

| variable | what it does |
|---|---|
| REFOCUS_DEBUG=1..4 | log to stderr: 1 what was declined or fell back, 2 each site, 3 regions and plans, 4 graphs |
| REFOCUS_DUMP=dir | write what every stage of every graph produced as text files |
| REFOCUS_CACHE=dir | where generated sources are kept (default: the user's cache directory) |
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

_count = itertools.count()


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
