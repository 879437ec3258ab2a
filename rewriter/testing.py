"""Put your own attention through the suite that Refocus's published attentions go through.

    from refocus.testing import check

    def test_my_attention():
        check(MyAttention().eval(), (torch.randn(2, 128, 64),))

or, with `pytest_plugins = ["refocus.testing"]` in a conftest.py, through the fixture `refocus_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import refocus
from refocus.backend import compile_graph
from refocus.errors import RefocusError
from refocus.options import Options
from refocus.report import Report, Site, joined
from refocus.tolerances import allowed_error, difference, magnitude

try:
    import pytest
except ImportError:  # the fixture is for who uses pytest; `check` is for everyone
    pytest = None  # type: ignore[assignment]


class CheckFailed(AssertionError):
    """A user's attention did not come through; the message says at which step, and holds the report."""


@dataclass(frozen=True)
class Checked:
    """What `check` found. `errors` and `eager_error` are against the float64 oracle, relative to its magnitude; the
    largest over all outputs. `largest` holds the biggest single allocation of a run in bytes, where it was measured."""

    report: Report
    eager_error: float
    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"eager     error {self.eager_error:.2e}{_allocation(self.largest.get('eager'))}"]
        lines += [
            f"{name:<9} error {error:.2e}{_allocation(self.largest.get(name))}" for name, error in self.errors.items()
        ]
        return "\n".join((*lines, str(self.report)))


def check(
    module: nn.Module,
    inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    engines: Sequence[str] = ("tiled",),
    family: str | None = None,
    sites: int | None = None,
    fused: bool = True,
    rtol: float = 0.0,
    memory_share: float | None = None,
    lower: bool = True,
    gradients: bool = False,
) -> Checked:
    """Run the suite on one attention module, in its own dtype and on its own device.

    1. Compiled for the first engine, it is recognised: every site, of `family` if one is named, `sites` of them if a
       number is.
    2. Each engine of `engines` is forced by name. With `fused=True` a site that stays is a failure.
    3. Every output agrees with the eager code in float64, with at most 1.5 times the eager error in the module's own
       dtype plus that dtype's floor (`refocus.tolerances`), plus `rtol` of the largest magnitude.
    4. With `memory_share`, no single tensor of a fused run may be larger than this share of the largest one that the
       eager run makes: at a length where the scores are that largest one, it shows that they are never stored.

    5. With `gradients`, the same holds for the gradients of every parameter and floating input that requires one or can
       (of a sum of all outputs under fixed random weights); the engines must train.

    `lower=False` runs the rewritten graph as it is, not through Inductor: some seconds faster for each engine.

    With `fused=False`, sites may be left as they are, and the result must still be right: whether any is fused is for
    the caller to ask of the report. Raises `CheckFailed`.
    """
    kwargs = kwargs or {}
    module = module.eval()
    report = None if engines else refocus.explain(module, *_fresh(inputs), **_fresh(kwargs))
    if report is not None:
        _check_sites(report, family, sites, fused)
    with torch.no_grad():
        oracle = copy.deepcopy(module).to(torch.float64)
        expected = oracle(*_fresh(inputs, torch.float64), **_fresh(kwargs, torch.float64))
        measure = memory_share is not None
        eager, largest_eager = _run(module, inputs, kwargs, measure)
        eager_errors = _errors(eager, expected, "eager")
        errors: dict[str, float] = {}
        largest = {"eager": largest_eager} if measure else {}
        for engine in engines:
            # A fresh cache: Dynamo gives up on a forward that it has compiled too many times.
            torch._dynamo.reset()
            # What the compilation that is checked reports is what `refocus.explain` would compile once more to say.
            reports: list[Report] = []
            optimized = (refocus.optimize if lower else rewritten)(module, engine=engine, report=reports.append)
            _run(optimized, inputs, kwargs, False)
            compiled = joined(reports, len(reports))
            if report is None:
                report = compiled
                _check_sites(report, family, sites, fused)
            if fused:
                _check_fused(compiled, engine)
            got, bytes_ = _run(optimized, inputs, kwargs, measure)
            found = _errors(got, expected, engine)
            for (name, error, scale, dtype), (_, own, _, _) in zip(found, eager_errors):
                bound = allowed_error(dtype, own, scale) + rtol * scale
                if not error <= bound:
                    raise CheckFailed(
                        f"engine {engine!r}: {name} differs from the float64 result by {error:.3e}; "
                        f"the bound is {bound:.3e}, eager code itself differs by {own:.3e}\n{report}"
                    )
            errors[engine] = _relative(found)
            if memory_share is not None:
                largest[engine] = bytes_
                if bytes_ > memory_share * largest_eager:
                    raise CheckFailed(
                        f"engine {engine!r}: a tensor of {bytes_} bytes was made; eager code's largest has "
                        f"{largest_eager}, of which {memory_share:.0%} are allowed\n{report}"
                    )
    assert report is not None
    if gradients:
        try:
            backward = check_gradients(module, inputs, kwargs, engines=engines, fused=fused, rtol=rtol, lower=lower)
        except CheckFailed as problem:
            raise CheckFailed(f"{problem}\n{report}") from None
        errors |= {f"{name}, backward": error for name, error in backward.items()}
    return Checked(report, _relative(eager_errors), errors, largest)


def check_gradients(
    module: nn.Module,
    inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    engines: Sequence[str] = ("tiled",),
    fused: bool = True,
    rtol: float = 0.0,
    lower: bool = True,
) -> dict[str, float]:
    """Step 5 of `check` alone: relative errors of the gradients by engine."""
    kwargs = kwargs or {}
    module = module.eval()
    wide = copy.deepcopy(module).to(torch.float64)
    expected = _gradients(wide, wide, _fresh(inputs, torch.float64), _fresh(kwargs, torch.float64))
    eager = _errors(_gradients(module, module, inputs, kwargs), expected, "eager")
    errors: dict[str, float] = {}
    largest = max((scale for _, _, scale, _ in eager), default=0.0)
    for engine in engines:
        torch._dynamo.reset()
        reports: list[Report] = []
        make = refocus.optimize if lower else rewritten
        optimized = make(module, engine=engine, require=fused, report=reports.append)
        found = _errors(_gradients(optimized, module, inputs, kwargs), expected, engine)
        _check_sites(joined(reports, len(reports)), None, None, fused)
        for (name, error, scale, dtype), (_, own, _, _) in zip(found, eager):
            # What cancels (a bias of all keys) carries the error of its terms: the floor is that of the largest.
            bound = allowed_error(dtype, own, largest) + rtol * scale
            if not error <= bound:
                raise CheckFailed(
                    f"engine {engine!r}: the gradient{_place(name)} differs from the float64 one by {error:.3e}; "
                    f"the bound is {bound:.3e}, eager code itself differs by {own:.3e}"
                )
        errors[engine] = max((error / largest for _, error, _, _ in found), default=0.0) if largest else 0.0
    return errors


def _place(name: str) -> str:
    """" of x" out of "the output[' of x']"."""
    return name.removeprefix("the output").strip("[]'\"")


def _gradients(call: Callable[..., Any], module: nn.Module, inputs: Any, kwargs: Any) -> dict[str, Tensor]:
    """The gradients of parameters by name and of floating inputs by place; zeros where no gradient reaches one (it may
    come as a zero through a comparison, or not at all). What flows back into each output is drawn with a seed of its
    own, in float64."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().clone().requires_grad_()
        return _fresh(x)

    args, named = pytree.tree_map(leaf, (tuple(inputs), dict(kwargs)))
    leaves = {f" of input {k}": x for k, x in enumerate(pytree.tree_leaves((args, named))) if isinstance(x, Tensor)}
    leaves |= {f" of {name}": p for name, p in module.named_parameters()}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    total: Tensor | None = None
    for k, out in enumerate(pytree.tree_leaves(call(*args, **named))):
        if isinstance(out, Tensor) and out.requires_grad:
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            part = (out * weight.to(out.device, out.dtype)).sum()
            total = part if total is None else total + part
    if total is None:
        return {}
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads))


def rewritten(
    module: Callable[..., Any],
    *,
    engine: str | None = None,
    require: bool = False,
    dynamic: bool = False,
    report: Callable[[Report], None] | None = None,
) -> Callable[..., Any]:
    """As `refocus.optimize`, but the rewritten graph runs eagerly, op by op: what the rewrite alone does."""
    options = Options.of({"engine": engine, "require": require, "report": report})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, options, lambda graph, _: graph.forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    compiled = torch.compile(call, backend=backend, dynamic=dynamic)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as problem:
            if isinstance(problem.inner_exception, RefocusError):
                raise problem.inner_exception from None
            raise

    return run


def _check_sites(report: Report, family: str | None, sites: int | None, fused: bool) -> None:
    if sites is not None and len(report.sites) != sites:
        raise CheckFailed(f"{sites} attention sites were expected, {len(report.sites)} were found\n{report}")
    if not fused:
        return
    if not report.sites:
        raise CheckFailed(f"no attention was found\n{report}")
    for site in report.sites:
        if not site.recognized:
            raise CheckFailed(f"{_named(site)} was not recognised: {site.reason}\n{report}")
        if family is not None and site.family != family:
            raise CheckFailed(f"{_named(site)} is of the family {site.family!r}, not {family!r}\n{report}")


def _check_fused(report: Report, engine: str) -> None:
    if report.left:
        site = report.left[0]
        raise CheckFailed(f"engine {engine!r}: {_named(site)} was not fused: {site.reason}\n{report}")


def _named(site: Site) -> str:
    return f"{site.name} ({site.location})"


def _fresh(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy, since a model may write to its inputs; floating tensors in `dtype` if one is given."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.copy(leaf)
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, tree)


def _run(call: Callable[..., Any], inputs: Any, kwargs: Any, measure: bool) -> tuple[Any, int]:
    """(result, bytes of the largest single allocation or 0)."""
    inputs, kwargs = _fresh(inputs), _fresh(kwargs)
    if not measure:
        return call(*inputs, **kwargs), 0
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as trace:
        result = call(*inputs, **kwargs)
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    return result, max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)


def _errors(got: Any, expected: Any, who: str) -> list[tuple[str, float, float, torch.dtype]]:
    """(name, error, magnitude, dtype of the result) of every tensor; anything else must be equal."""
    flat_got, tree = pytree.tree_flatten_with_path(got)
    flat_expected, tree_expected = pytree.tree_flatten_with_path(expected)
    if tree != tree_expected:
        raise CheckFailed(f"{who} returned another structure than the model in float64: {tree} for {tree_expected}")
    out: list[tuple[str, float, float, torch.dtype]] = []
    for (path, mine), (_, theirs) in zip(flat_got, flat_expected):
        name = f"the output{pytree.keystr(path)}"
        if isinstance(mine, Tensor):
            out.append((name, difference(mine, theirs), magnitude(theirs), mine.dtype))
        elif mine != theirs:
            raise CheckFailed(f"{who}: {name} is {mine!r}, in float64 it is {theirs!r}")
    return out


def _relative(errors: list[tuple[str, float, float, torch.dtype]]) -> float:
    return max((error / scale if scale else error for _, error, scale, _ in errors), default=0.0)


def _allocation(size: int | None) -> str:
    return "" if size is None else f", largest tensor {size} bytes"


if pytest is not None:

    @pytest.fixture
    def refocus_check() -> Callable[..., Checked]:
        """`refocus.testing.check` as a fixture."""
        return check
