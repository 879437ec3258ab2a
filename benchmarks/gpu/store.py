"""Results in a file, written after each: a run that is stopped leaves what it measured, and the next goes on."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Store:
    """`where`: what was measured on; `numerics`, `cases`: by key; `bandwidth`: bytes a second of a large copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"where": where(), "bandwidth": None, "numerics": {}, "cases": {}}
        if path.exists():
            self.data |= {"numerics": {}, "cases": {}} | json.loads(path.read_text())
        self.source = source()

    def has(self, kind: str, key: str) -> bool:
        """Whether this was measured, without failing, by the code as it is now."""
        entry = self.data[kind].get(key)
        return entry is not None and not entry.get("error") and entry["source"] == self.source

    def put(self, kind: str, key: str, entry: dict[str, Any]) -> None:
        self.data[kind][key] = {**entry, "source": self.source}
        self.save()

    def save(self) -> None:
        """Written beside it and then moved, so that a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


def default_path(tiny: bool) -> Path:
    """benchmarks/results/<device>-<date>.json"""
    name = "tiny" if tiny else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{datetime.date.today().isoformat()}.json"


def where() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    found: dict[str, Any] = {**machine(), "cuda": torch.version.cuda or torch.version.hip}
    for package in ("triton", "transformers", "timm", "flash-linear-attention"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def source() -> str:
    """A hash of the compiler's text: what another text measured is measured again."""
    digest = hashlib.sha256()
    for folder in ("rewriter", "patterns", "codegen"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
