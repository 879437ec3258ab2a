"""One model run three ways, side by side in one process: eager, `torch.compile` alone, and Refocus."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.measure import floats, largest_difference, peak_memory, time_peers

EAGER, COMPILE, REFOCUS = "eager", "torch.compile", "refocus"


@dataclass(frozen=True)
class Row:
    """What one peer needed. `seconds`: median of one call; `first`: the first call, which compiles; `memory`: bytes at
    the worst moment of a call beyond the model and its inputs (None where it cannot be told); `difference`: largest
    absolute difference from the eager output, and `scale`: largest absolute value of the eager output."""

    peer: str
    seconds: float
    fastest: float
    first: float
    memory: int | None
    difference: float
    scale: float


def compare(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    engine: str | None = None,
    repeats: int = 7,
    at_least: float = 0.0,
    budget: float = 60.0,
    memory: bool = True,
    on_step: Callable[[str, str], None] = lambda peer, step: None,
) -> dict[str, Row]:
    """Run every peer without gradients on the same weights and inputs. `on_step(peer, step)` is told of each step:
    `step` is "compile" (the first call), "time" or "memory"."""
    import refocus

    device = next(model.parameters()).device
    peers: dict[str, Callable[..., Any]] = {
        EAGER: model,
        COMPILE: torch.compile(model),
        REFOCUS: refocus.optimize(model, engine=engine),
    }
    with torch.no_grad():
        first: dict[str, float] = {}
        differences: dict[str, float] = {}
        reference: Any = None
        scale = 0.0
        for name, peer in peers.items():
            on_step(name, "compile")
            began = time.perf_counter()
            output = peer(**inputs)
            first[name] = time.perf_counter() - began
            if name == EAGER:
                reference = output
                scale = max((t.abs().max().item() for t in floats(output) if t.numel()), default=0.0)
            differences[name] = largest_difference(output, reference)
        del output, reference
        calls = {name: (lambda peer=peer: peer(**inputs)) for name, peer in peers.items()}
        timings = time_peers(
            calls,
            device=device,
            repeats=repeats,
            warmup=1,
            at_least=at_least,
            budget=budget,
            on_call=lambda name: on_step(name, "time"),
        )
        peaks: dict[str, int | None] = dict.fromkeys(peers)
        if memory:
            for name, call in calls.items():
                on_step(name, "memory")
                peaks[name] = peak_memory(call, device=device)
    return {
        name: Row(
            name,
            seconds=timings[name].median,
            fastest=timings[name].fastest,
            first=first[name],
            memory=peaks[name],
            difference=differences[name],
            scale=scale,
        )
        for name in peers
    }
