"""The generated kernels of a model, without running one: for reading, on a machine with or without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from refocus.assumptions import model_buffers
from refocus.attention import Left
from refocus.capture import CaptureFailed, capture
from refocus.codegen.choose import default_plan, unsupported
from refocus.codegen.triton_engine import emit
from refocus.errors import CannotExplain
from refocus.facts import gather_facts
from refocus.recognize import recognize
from refocus.sites import location_of, numbers_of


@dataclass(frozen=True)
class Emitted:
    """One region's kernel: the file it is saved in, or None and the reason. `location`: the user's "file:line"."""

    location: str
    path: Path | None
    reason: str = ""


def emit_kernels(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Emitted, ...]:
    """The Triton kernel of every attention site of a model run on these inputs; equal sites share a file.

    The model runs once, eagerly and unchanged, under `torch.no_grad()`. Raises CannotExplain if it does not run.
    """
    found: list[Emitted] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            found.extend(_of_graph(capture(gm), example_inputs))
        except CaptureFailed as problem:
            found.append(Emitted("", None, str(problem)))
        return gm.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    try:
        with torch.no_grad():
            torch.compile(run, backend=backend, dynamic=False)(*args, **kwargs)
    except Exception as problem:
        raise CannotExplain(
            "the model does not run on these inputs",
            got=f"{type(problem).__name__}: {problem}",
            todo="call model(*args, **kwargs) with the same arguments first",
        ) from problem
    return tuple(found)


def _of_graph(traced: fx.GraphModule, inputs: Sequence[Any]) -> list[Emitted]:
    out: list[Emitted] = []
    buffers = model_buffers(traced.graph.find_nodes(op="placeholder"), inputs)
    for site in recognize(gather_facts(traced, buffers)):
        where = location_of(site.root)
        if isinstance(site, Left):
            out.append(Emitted(where, None, site.declined.reason))
            continue
        for part in site.parts:
            reason = unsupported("triton", part.region)
            if reason is None:
                plan = default_plan("triton", part.region, numbers_of(site))
                out.append(Emitted(where, Path(emit(part.region, plan).path)))
            else:
                out.append(Emitted(where, None, f"the triton engine does not take it: {reason}"))
    return out
