"""The shape of the repository: who may import whom, how long a file may be, and what the package is made of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rewriter": "refocus", "patterns": "refocus.patterns", "codegen": "refocus.codegen"}
LONGEST = 500

# From the bottom to the top: a module imports from its own layer and from those below it. Names are relative to
# `refocus`. A new module is given its layer here.
LAYERS: dict[str, tuple[str, ...]] = {
    "base": ("errors", "debug", "options", "tolerances", "pictures", "report", "inductor", "identity", "bits"),
    "ir": ("ir", "notation", "linear_ir"),
    "algebra": ("polynomial", "proofs", "division", "comparisons", "constants", "simplify", "steps", "progressions"),
    "meaning": (
        "counter", "dropout", "differentiate", "hoist", "intervals", "key_bounds", "grid", "operations", "evaluate",
        "oracle", "tile_cache", "tile_reads", "tiling", "tile_grid", "tile_rows", "refine", "masks", "lags", "infer",
        "infer_*", "assumptions",
    ),
    "lift": (
        "blank", "bodies", "capture", "functional", "strokes", "fold", "sizes", "lift", "lift_*", "equal_values",
        "equal_literals", "convolutions", "dead_code", "facts", "gathers", "native_layers", "held_numbers", "vmaps",
        "forwarded", "widths", "conversions", "chosen", "fused_sums", "composites", "pair_sums", "candidates",
    ),
    "patterns": ("patterns", "patterns.*"),
    "recognize": (
        "attention", "bands", "choices", "close_site", "closure", "empty_rows", "finite_rows", "joint", "lifted",
        "merge", "normal_form", "pieces", "piecewise", "products", "quotient", "recognize", "roles", "row_results",
        "row_sums", "running_softmax", "skews", "equal_sizes", "expand", "linear_candidates", "recognize_linear",
        "low_scores", "loops", "recognize_loops", "chunk_solutions", "close_linear", "factored", "held_values",
        "loop_steps", "recognize_chunk_loops", "recognize_chunked", "recognize_decoding", "blocked", "decays",
        "inverses", "decay_tables", "substeps", "added_states", "weighted", "recognize_pairwise", "following_steps",
        "cut_steps", "regroup",
    ),
    "codegen": ("codegen", "codegen.*"),
    "pipeline": (
        "mask_report", "sites", "splice", "output_chain", "training", "pipeline", "emit", "linear_sites",
        "splice_linear", "index_checks",
    ),
    "backend": ("backend",),
    "front": ("", "api", "__main__", "testing"),
}
# Code generation knows the region and nothing of where it came from.
HIDDEN_FROM_CODEGEN = ("lift", "patterns", "recognize")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The import name of a file in one of the package's folders, relative to `refocus` ("" for the package itself)."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [*FOLDERS[folder].split("."), *rest]
    return ".".join(part for part in parts[1:] if part != "__init__")


MODULES = {module_name(path): path for path in sources(*FOLDERS)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, *, when_loaded: bool = False) -> Iterator[str]:
    """Full dotted names of what a file imports; `from a import b` gives a.b. `when_loaded`: only what runs when the
    file is imported, so neither what is inside functions nor what is for type checkers."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (when_loaded and (lazy or typing)):
                yield child
                yield from walk(child)

    for node in walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the absolute name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The module of this package that a dotted name lies in, relative to `refocus`; None if it is none of ours."""
    if name.split(".")[0] != "refocus":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def layer(module: str) -> str:
    for name, globs in LAYERS.items():
        if any(fnmatchcase(module, glob) for glob in globs):
            return name
    pytest.fail(f"refocus.{module} has no layer: give it one in LAYERS")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    order = list(LAYERS)
    here = layer(module)
    for name in imported(MODULES[module]):
        target = own(name)
        if target is None or (target == "" and here == "front"):
            continue
        there = layer(target)
        assert order.index(there) <= order.index(here), f"refocus.{module} ({here}) imports {name} ({there})"
        if here == "codegen":
            assert there not in HIDDEN_FROM_CODEGEN, f"refocus.{module} imports {name} ({there})"


@pytest.mark.parametrize("module", MODULES)
def test_foreign_imports(module: str) -> None:
    for name in imported(MODULES[module]):
        if module.startswith("patterns"):
            assert name.split(".")[0] != "triton", f"refocus.{module} imports triton"
        if module.startswith("codegen"):
            assert not name.startswith("torch.fx"), f"refocus.{module} imports torch.fx"
        assert name.split(".")[0] not in ("rich", "matplotlib", "jinja2") or layer(module) in ("base", "front")


def test_no_import_cycles() -> None:
    graph = networkx.DiGraph()
    for module, path in MODULES.items():
        graph.add_node(module)
        for name in imported(path, when_loaded=True):
            target = own(name)
            # The package's own __init__ is loaded before any of its modules, whoever asks.
            if target is not None and target not in (module, ""):
                graph.add_edge(module, target)
    assert list(networkx.simple_cycles(graph)) == []


@pytest.mark.parametrize(
    "path", sources(*FOLDERS, "tests", "benchmarks", "examples"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_file(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{path}: {lines} lines; split it by concept"
    bare = [name for name in imported(path) if name.split(".")[0] in FOLDERS]
    assert not bare, f"{path} imports {bare} by a folder's name, not through `refocus`"


def test_every_folder_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {FOLDERS[p.parts[0]] + "".join(f".{q}" for q in p.parts[1:]) for p in _package_folders()}
    assert set(settings["packages"]) == packages
    assert settings["package-dir"] == {name: folder for folder, name in FOLDERS.items()}


def _package_folders() -> set[Path]:
    return {path.parent.relative_to(ROOT) for path in sources(*FOLDERS)}
