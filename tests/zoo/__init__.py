"""Attention as published: small eager modules, each in the words of its reference implementation.

An entry is a file of this folder, named in `ENTRIES`, with

    EXPECT     an `Expect`: what the compiler should make of it
    make       () -> (module, inputs), in float32
    allowed    (module, *inputs) -> bool tensor (..., queries, keys): which pairs the mask keeps; written afresh, not
               taken from the module; absent where the sites' own axes are not the model's
    reference  (module, *inputs) -> output(s), as a plain formula over all pairs; where the spelling is tricky
    VARIANTS   other spellings or sizes by name; "entry:name" goes through the same suite, with the same `allowed` and
               `reference`
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

ENTRIES = (
    "aft",
    "agent",
    "alphafold",
    "att_swin_unet",
    "attention_sink",
    "axial_deeplab",
    "base_conv",
    "based",
    "bert",
    "biformer",
    "bigbird",
    "block_diagonal",
    "bloom",
    "cait",
    "catanet",
    "causal",
    "chunked",
    "clear",
    "colorize_diffusion",
    "combiner",
    "compass",
    "concentric",
    "convit",
    "core_context",
    "craft",
    "criss_cross",
    "criss_cross_mask",
    "croc",
    "cross_stripes",
    "crossformer",
    "crossvit",
    "cswin",
    "dare",
    "davit",
    "dcal",
    "deberta",
    "deformable_3d",
    "delta_net",
    "dilated_window",
    "ditctrl",
    "document_window",
    "documents",
    "dreamvla",
    "ee_mllm",
    "efficient_attention",
    "efficientvit",
    "fcaformer",
    "fit",
    "flowformer",
    "freeswim",
    "frozen_in_time",
    "gat",
    "gated_attention_unit",
    "gated_delta_net",
    "gemma2",
    "gla",
    "gpt2",
    "gpt_neo",
    "gpt_oss",
    "grid_attention",
    "halonet",
    "hand_softmax",
    "hat",
    "hedgehog",
    "hilo",
    "hip",
    "hstu",
    "hyper_attention",
    "ip_adapter",
    "jagged",
    "kernel_attention",
    "kmax",
    "kv_cache",
    "lamamba",
    "levit",
    "lightning",
    "linear_attention",
    "linformer",
    "local_attention",
    "log_probabilities",
    "long_heads",
    "longformer",
    "longlora",
    "lookup_vit",
    "mamba2",
    "map_head",
    "maxvit",
    "medseg_factory",
    "medvit",
    "meta_tokens",
    "mistral",
    "moa",
    "multihead",
    "music_transformer",
    "mvpa",
    "natten",
    "neighborhood",
    "norm_attention",
    "opt",
    "overlock",
    "partcrafter",
    "perceiver",
    "performer",
    "phi3_small",
    "pine",
    "prefix_lm",
    "prime_composer",
    "pvt",
    "qihoo",
    "qwen3",
    "razor",
    "recycled",
    "reformer",
    "reformer_local",
    "relu_attention",
    "retention",
    "routing_transformer",
    "saisa",
    "sccan",
    "sdpa_bool",
    "sdpa_float",
    "seer",
    "shared_scores",
    "sinklora",
    "sliding_chunks",
    "sparse_transformer",
    "sparsifier",
    "stable_diffusion",
    "starcoder",
    "structured_diffusion",
    "swin",
    "swin_masked",
    "swinv2",
    "t5",
    "tidal_decode",
    "timesformer",
    "titans",
    "token_select",
    "transformer_xl",
    "transnext",
    "transnormer",
    "transnormer_llm",
    "tree_mask",
    "union_of_experts",
    "video_ccam",
    "video_factory",
    "visctrl",
    "vsa",
    "xcit",
    "zero_i2v",
)


@dataclass(frozen=True)
class Entry:
    """One entry, loaded."""

    name: str
    expect: Expect
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    allowed: Callable[..., Tensor] | None
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None

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
    """An entry, or a variant of one: "natten" or "clear:pooled"."""
    file, _, variant = name.partition(":")
    module = importlib.import_module(f"{__name__}.{file}")
    allowed, reference = (getattr(module, field, None) for field in ("allowed", "reference"))
    chosen: Variant = module.VARIANTS[variant] if variant else Variant(module.make)
    return Entry(name, chosen.expect or module.EXPECT, chosen.make, allowed, reference)


def spellings(file: str) -> list[str]:
    """The names of an entry and of its variants."""
    module = importlib.import_module(f"{__name__}.{file}")
    return [file, *(f"{file}:{variant}" for variant in getattr(module, "VARIANTS", {}))]


NAMES = tuple(name for file in ENTRIES for name in spellings(file))
