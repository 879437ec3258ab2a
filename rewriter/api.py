"""The two calls most people need: `optimize` and `explain`."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import fx

from refocus.backend import compile_graph, inductor
from refocus.errors import CannotExplain, RefocusError, UnknownOption
from refocus.options import Options
from refocus.report import Report, joined

Model = TypeVar("Model", bound=Callable[..., Any])


def optimize(
    model: Model,
    *,
    engine: str | None = None,
    verify: str | None = None,
    require: bool = False,
    dynamic: bool | None = None,
    report: Callable[[Report], None] | str | PathLike[str] | None = None,
) -> Model:
    """A model that computes the same with its attention fused.

    The result shares parameters, buffers and submodules with `model`, which itself stays as it was; `state_dict`
    keys, hooks, methods and signature are the same. A plain function is accepted too. Graphs are compiled on first
    use, by Inductor, with regions replaced.

    engine    run every recognised region through "triton", "cpp", "tiled" or "sdpa"; None lets the plan choose, which
              may leave a region as it is where that is faster
    verify    "first": compare with eager code on the first call of each shape; "always": on every call
    require   raise RegionNotFused if any attention is left alone
    dynamic   as in `torch.compile`: True compiles for all sequence lengths at once
    report    called with the Report of each graph, or a path to write it to (.json, .html, or text)

    Raises UnknownOption now; EngineUnavailable, RegionNotFused or VerificationFailed on a call.
    """
    options = Options.of({"engine": engine, "verify": verify, "require": require, "report": report})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, options, inductor)

    if isinstance(model, torch.nn.Module):
        twin = _twin(model)
        compiled = torch.compile(_entry(twin._call_impl), backend=backend, dynamic=dynamic)
        twin._compiled_call_impl = _plain_errors(compiled, twin._call_impl)  # type: ignore[assignment]
        return twin
    if not callable(model):
        raise UnknownOption(
            "optimize takes a module or a function",
            expected="a callable",
            got=type(model).__name__,
            todo="pass the model",
        )
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    return functools.wraps(model)(_plain_errors(compiled, model))  # type: ignore[return-value]


def _twin(model: Model) -> Model:
    """Another module with the same attributes."""
    if "__new__" not in {name for cls in type(model).__mro__[:-1] for name in vars(cls)}:
        return copy.copy(model)
    twin: Model = object.__new__(type(model))  # fully_shard's classes would call `__init__`, without arguments
    twin.__dict__.update(model.__dict__)
    return twin


def _plain_errors(compiled: Callable[..., Any], model: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo wraps what a backend raises; our own errors are for the caller to see. So are the model's: Dynamo words
    them anew where it tries an operation out on shapes alone, and then the model itself is asked what it says."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as problem:
            if isinstance(problem.inner_exception, RefocusError):
                raise problem.inner_exception from None
            raise
        except torch._dynamo.exc.TorchRuntimeError as problem:
            tried = problem
        model(*args, **kwargs)
        raise tried  # nothing is wrong with the inputs

    return call


def explain(
    model: Callable[..., Any], *args: Any, engine: str | None = None, gradients: bool = False, **kwargs: Any
) -> Report:
    """Every attention site of a model run on these inputs: what it computes, how it would be run, or why it is left.

    The model is captured and rewritten but not lowered: it runs once, eagerly, under `torch.no_grad()`, or with
    `gradients` as in training, where parameters and inputs that require a gradient will get one. `engine` is as in
    `optimize`. Raises CannotExplain if the model does not run on these inputs.
    """
    found: list[Report] = []
    options = Options.of({"engine": engine, "report": found.append})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def unlowered(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return gm.forward

        return compile_graph(gm, example_inputs, options, unlowered)

    target = model._call_impl if isinstance(model, torch.nn.Module) else model
    # A cache of its own: what was compiled for other calls of this model neither answers here nor is thrown away.
    run = torch.compile(_entry(target), backend=backend, dynamic=False)
    try:
        with torch.set_grad_enabled(gradients), torch._dynamo.config.patch(recompile_limit=64):
            run(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as problem:
        if isinstance(problem.inner_exception, RefocusError):
            raise problem.inner_exception from None
        raise CannotExplain(
            "the model could not be captured", got=problem, todo="run the model once without refocus"
        ) from problem
    except RefocusError:
        raise
    except Exception as problem:
        raise CannotExplain(
            "the model does not run on these inputs",
            expected="inputs that the model itself accepts",
            got=f"{type(problem).__name__}: {problem}",
            todo="call model(*args, **kwargs) with the same arguments first",
        ) from problem
    return joined(found, len(found))


def _entry(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `target`, for Dynamo to start from.

    Starting in a module's own `__call__`, which lies inside torch, Dynamo would pass over it and over containers, and
    compile their parts one by one. What it has compiled it keeps by code object, and gives up on one after a few
    models; so every entry has a code object of its own."""

    def entry(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    code = entry.__code__.replace(co_name=f"entry_{next(_entries)}")
    return types.FunctionType(code, entry.__globals__, code.co_name, entry.__defaults__, entry.__closure__)


_entries = itertools.count()
