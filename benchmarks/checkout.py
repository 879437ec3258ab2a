"""Benchmarks run from a bare checkout, too: where Refocus is not installed, the checkout's own is imported.

Three folders are one import namespace (pyproject.toml), which installing sets up; on a machine that is lent for an
hour and reaches no package index, this does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"refocus": "rewriter", "refocus.patterns": "patterns", "refocus.codegen": "codegen"}


class Checkout:
    """Finds the three packages in their folders."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in FOLDERS:
            return None
        folder = ROOT / FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def import_refocus() -> None:
    """Make `import refocus` work, if it does not."""
    if importlib.util.find_spec("refocus") is None:
        sys.meta_path.append(Checkout)  # type: ignore[arg-type]
