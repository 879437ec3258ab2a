"""Attention as published: small eager modules, each in the words of its reference implementation.

An entry is a file of this folder, named in `ENTRIES`, with

    EXPECT     an `Expect`: what the compiler should make of it
    make       () -> (module, inputs), in float32
    allowed    (module, *inputs) -> bool tensor (..., queries, keys): which pairs the mask keeps; written afresh, not
               taken from the module; absent where the sites' own axes are not the model's
    reference  (module, *inputs) -> output, as a plain formula over all pairs; where the spelling is tricky
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

ENTRIES = (
    "agent",
    "alphafold",
    "bert",
    "bloom",
    "cait",
    "chunked",
    "criss_cross",
    "cswin",
    "deberta",
    "documents",
    "gat",
    "gemma2",
    "gpt2",
    "gpt_neo",
    "gpt_oss",
    "halonet",
    "hand_softmax",
    "kmax",
    "kv_cache",
    "levit",
    "linear_attention",
    "linformer",
    "log_probabilities",
    "longlora",
    "map_head",
    "mistral",
    "moa",
    "multihead",
    "music_transformer",
    "mvpa",
    "natten",
    "opt",
    "perceiver",
    "phi3_small",
    "prefix_lm",
    "pvt",
    "qwen3",
    "sdpa_bool",
    "sdpa_float",
    "sparse_transformer",
    "stable_diffusion",
    "starcoder",
    "swin",
    "swinv2",
    "t5",
    "timesformer",
    "transformer_xl",
    "xcit",
)


@dataclass(frozen=True)
class Entry:
    """One entry, loaded."""

    name: str
    expect: Expect
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    allowed: Callable[..., Tensor] | None
    reference: Callable[..., Tensor] | None

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module in evaluation mode and its inputs, equal for every call; weights so wide that rows are peaked."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, inputs = self.make()
            with torch.no_grad():
                for weight in module.parameters():
                    if weight.ndim == 2:
                        weight.normal_(std=1.5 / math.sqrt(weight.shape[1]))
        return module.to(dtype).eval(), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def load(name: str) -> Entry:
    module = importlib.import_module(f"{__name__}.{name}")
    return Entry(name, module.EXPECT, module.make, getattr(module, "allowed", None), getattr(module, "reference", None))
