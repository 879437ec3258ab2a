"""The backend: rewrite a Dynamo graph, then hand it to Inductor.

Nothing here may break a model. Whatever goes wrong in our own stages, or in compiling what they made, falls back to
the original graph, once, with one warning; only what the caller asked for by name (an engine, `require`, `verify`)
is an error.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from refocus import debug
from refocus.assumptions import guarded
from refocus.errors import RefocusError, VerificationFailed
from refocus.index_checks import with_index_errors
from refocus.options import Options
from refocus.pipeline import Rewritten, rewrite
from refocus.report import Report
from refocus.tolerances import agree, difference, magnitude, tolerance

Compiled = Callable[..., Any]
Lower = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


class FallbackWarning(UserWarning):
    """Something of ours failed; the original graph runs instead."""


def refocus_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None) -> Compiled:
    """`torch.compile(model, backend="refocus", options={...})`; the options are those of `refocus.optimize`."""
    return compile_graph(gm, example_inputs, Options.of(options), inductor)


def inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    """Lower a graph with Inductor, as `torch.compile` alone would."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, lower: Lower) -> Compiled:
    """Rewrite and lower one graph; fall back to the graph as it was."""
    try:
        rewritten = rewrite(gm, options, example_inputs)
    except Exception as problem:  # our own defect must not stop the user's model
        if _is_meant(problem):
            raise
        _warn("rewriting a graph failed", problem)
        rewritten = Rewritten(gm, Report((), notes=(f"rewriting a graph failed: {problem!r}",)))
    compiled: Compiled | None = None
    if rewritten.gm is not gm:
        try:
            compiled = with_index_errors(rewritten.gm, lower(rewritten.gm, example_inputs))
        except Exception as problem:
            if _is_meant(problem):
                raise
            _warn("compiling the rewritten graph failed", problem)
            rewritten = Rewritten(gm, _unfused(rewritten.report, f"compiling it failed: {problem!r}"))
    if compiled is None:
        compiled = lower(gm, example_inputs)
    deliver(rewritten.report, options)  # not before: Dynamo may have asked to start over
    if rewritten.assumptions:
        compiled = guarded(compiled, rewritten.assumptions, example_inputs, lambda: _unassuming(gm, options, lower))
    if options.verify is not None and rewritten.gm is not gm:
        return _verified(gm, compiled, options.verify)
    return compiled


def _unassuming(gm: fx.GraphModule, options: Options, lower: Lower) -> Compiled:
    """The graph compiled again as a function: then the model's buffers are inputs like any other."""
    again = replace(options, verify=None, report=None, require=False)
    free = any(isinstance(n.meta.get("example_value"), torch.SymInt) for n in gm.graph.find_nodes(op="placeholder"))

    def backend(inner: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return compile_graph(inner, inputs, again, lower)

    return torch.compile(gm, backend=backend, dynamic=True if free else None)


def _is_meant(problem: Exception) -> bool:
    """Whether it is no failure of ours to work around: what the caller asked for, or Dynamo's way to start over."""
    return isinstance(problem, RefocusError | torch._dynamo.exc.RestartAnalysis)


def _unfused(report: Report, reason: str) -> Report:
    sites = (
        replace(site, fused=False, engine="", kernel_path=None, reason=reason) if site.fused else site
        for site in report.sites
    )
    return replace(report, sites=tuple(sites))


def _warn(what: str, problem: Exception) -> None:
    debug.log(1, f"{what}: {''.join(traceback.format_exception(problem))}")
    debug.dump("problem", repr(problem))
    first = str(problem).strip().splitlines()
    warnings.warn(
        f"{what}; the model runs without fused attention in this graph "
        f"({type(problem).__name__}: {first[0] if first else ''}). Set REFOCUS_DUMP=dir for every stage.",
        FallbackWarning,
        stacklevel=2,
    )


def deliver(report: Report, options: Options) -> None:
    """Hand a graph's report to whoever asked for it."""
    if options.report is None:
        return
    if callable(options.report):
        options.report(report)
        return
    path = Path(options.report)
    text = (
        report.to_json()
        if path.suffix == ".json"
        else report.to_html()
        if path.suffix in (".html", ".htm")
        else str(report) + "\n"
    )
    path.write_text(text)


def _verified(gm: fx.GraphModule, compiled: Compiled, when: str) -> Compiled:
    """Run eager code beside the compiled one, on the first call of each shape or on every call."""
    seen: set[Any] = set()

    def run(*inputs: Any) -> Any:
        signature = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        if when == "first" and signature in seen:
            return compiled(*inputs)
        seen.add(signature)
        copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = gm(*copies)
        got = compiled(*inputs)
        _compare(got, expected)
        return got

    return run


def _compare(got: Any, expected: Any) -> None:
    flat_got, flat_expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    for k, (a, b) in enumerate(zip(flat_got, flat_expected)):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not agree(a, b):
            raise VerificationFailed(
                f"output {k} of a compiled graph differs from eager code",
                expected=f"a difference of at most {tolerance(b.dtype).pairwise * magnitude(b):.3e}",
                got=f"{difference(a, b):.3e}",
                todo="report this model; until then leave verify out and name the site's engine, or do not fuse it",
            )
