"""The command line: `python -m refocus explain FILE.py:make` and `python -m refocus emit FILE.py:make`.

`make` is a function of no arguments that returns `(model, args, kwargs)`, or `(model, args)`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import refocus
from refocus.emit import emit_kernels
from refocus.errors import CannotExplain, RefocusError
from refocus.report import Report

EXPECTED = "FILE.py:make, where make() returns (model, args, kwargs)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 where nothing was found, 2 for a mistake of the caller."""
    options = _parser().parse_args(argv)
    try:
        status: int = options.run(options)
        return status
    except RefocusError as mistake:
        if os.environ.get("REFOCUS_DEBUG"):
            raise
        print(f"refocus: {mistake}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="refocus", description="Turn eager attention into generated, fused kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="what each attention of a model is, and what becomes of it")
    explain.add_argument("target", metavar="FILE.py:make", help="a function that returns (model, args, kwargs)")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--plain", action="store_true", help="print without colour and frames")
    explain.add_argument("--html", metavar="OUT", help="also write the report as a page")
    explain.add_argument("--pictures", metavar="DIR", help="also draw the tile map of each mask as a PNG")
    explain.add_argument("--engine", help="force every recognised site through this engine")
    explain.add_argument("--training", action="store_true", help="as in a call that gradients will be asked of")
    explain.set_defaults(run=_explain)
    emit = commands.add_parser("emit", help="the generated Triton kernels of a model; needs no GPU")
    emit.add_argument("target", metavar="FILE.py:make", help="a function that returns (model, args, kwargs)")
    emit.add_argument("--paths", action="store_true", help="print the files' paths only")
    emit.set_defaults(run=_emit)
    return parser


def _explain(options: argparse.Namespace) -> int:
    report = _report(options.target, options.engine, options.training)
    if options.json:
        print(report.to_json())
    elif options.plain or not _print_rich(report):
        print(report)
    if options.html:
        try:
            Path(options.html).write_text(report.to_html(f"Refocus: {options.target}"), encoding="utf-8")
        except OSError as problem:
            raise CannotExplain(
                f"the page {options.html!r} cannot be written", got=problem, todo="name a file in a writable folder"
            ) from problem
    if options.pictures:
        try:
            report.save_pictures(options.pictures)
        except ImportError as problem:
            raise CannotExplain(
                "pictures need matplotlib", got=problem, todo="install it: pip install 'refocus[report]'"
            ) from problem
        except OSError as problem:
            raise CannotExplain(
                f"no picture can be written to {options.pictures!r}", got=problem, todo="name a writable folder"
            ) from problem
    return 0 if report.sites else 1


def _emit(options: argparse.Namespace) -> int:
    model, args, kwargs = load(options.target)
    kernels = emit_kernels(model, *args, **kwargs)
    paths = list(dict.fromkeys(kernel.path for kernel in kernels if kernel.path is not None))
    for path in paths:
        print(path if options.paths else f"# {path}\n{path.read_text(encoding='utf-8')}")
    for kernel in kernels:
        if kernel.path is None:
            print(f"refocus: the attention at {kernel.location} has no kernel: {kernel.reason}", file=sys.stderr)
    return 0 if paths else 1


def _report(target: str, engine: str | None, training: bool) -> Report:
    model, args, kwargs = load(target)
    return refocus.explain(model, *args, engine=engine, gradients=training, **kwargs)


def load(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) made by FILE.py:function. Raises `CannotExplain` with what to do."""
    file, _, name = target.rpartition(":")
    if not file or not name:
        raise CannotExplain("a file and a function are needed", expected=EXPECTED, got=target)
    path = Path(file)
    if not path.is_file():
        raise CannotExplain("the file does not exist", expected=EXPECTED, got=file, todo="check the path")
    made = _call(_function(path, name), path, name)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise CannotExplain(f"{name} returned something else", expected="(model, args, kwargs)", got=_shape(made))
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise CannotExplain(
            f"{name} returned something else", expected="(model, args as a tuple, kwargs as a dict)", got=_shape(made)
        )
    return model, tuple(args), kwargs


def _function(path: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CannotExplain("the file is not a Python source file", expected=EXPECTED, got=str(path))
    module = importlib.util.module_from_spec(spec)
    # As when Python runs a file: its neighbours can be imported, and its classes be found by their module's name.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise CannotExplain(
            "the file cannot be imported",
            got=_said(problem),
            todo=f"make `python {path}` run first",
            location=str(path),
        ) from problem
    function: Any = getattr(module, name, None)
    if not callable(function):
        here = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == path.stem]
        raise CannotExplain(
            f"there is no function {name!r}",
            got=", ".join(here) or "no functions at all",
            location=str(path),
            expected=EXPECTED,
        )
    made: Callable[[], Any] = function
    return made


def _call(function: Callable[[], Any], path: Path, name: str) -> Any:
    try:
        return function()
    except Exception as problem:
        raise CannotExplain(
            f"{name}() failed", got=_said(problem), todo="it is called without arguments", location=str(path)
        ) from problem


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"


def _shape(value: Any) -> str:
    """What a wrong return value is, in a few words."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _print_rich(report: Report) -> bool:
    """Print in colour if that is possible here; whether it was."""
    try:
        import rich
    except ImportError:
        return False
    if not sys.stdout.isatty():
        return False
    rich.print(report)
    return True


if __name__ == "__main__":
    sys.exit(main())
