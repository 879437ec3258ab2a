"""Suite `models`: whole models with random weights, a forward and a training step, at a long and at a short size."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks import models
from benchmarks.gpu.case import FORWARD, STEP, Case, Setting, Subject, Suite
from benchmarks.torchvision_ops import import_torchvision

LONG = {"mistral": 16384, "gemma2": 8192, "gpt_oss": 8192, "deberta": 4096, "swin": 512}
SHORT = {"mistral": 512, "gemma2": 512, "gpt_oss": 512, "deberta": 512, "swin": 224}
LAYERS = 4


def cases() -> tuple[Case, ...]:
    return tuple(
        Case("models", kind, sizes[kind], work, heads=8, width=64 if kind != "gemma2" else 128)
        for work in (FORWARD, STEP)
        for sizes in (LONG, SHORT)
        for kind in sizes
    )


def build(case: Case, setting: Setting) -> Subject:
    """`tokens` are pixels a side for Swin."""
    model, inputs = BUILDERS.get(case.kind, published)(case, setting)
    model = model.eval().to(setting.device, case.torch_dtype).requires_grad_(case.trained)
    given = {
        name: x.to(setting.device, case.torch_dtype if x.is_floating_point() else None) if hasattr(x, "to") else x
        for name, x in inputs.items()
    }
    return Subject(model, given, list(model.parameters()) if case.trained else ())


def mistral(case: Case, setting: Setting) -> models.Call:
    """The demo's."""
    from examples.quickstart import build as demo

    return demo(case.tokens, layers=1 if setting.tiny else LAYERS, window=64 if setting.tiny else 256)


def published(case: Case, setting: Setting) -> models.Call:
    """As the list of published models has it."""
    size = models.Size(case.heads * case.width, case.heads, 2 if setting.tiny else LAYERS, 1)
    model, inputs = models.build(f"hf/{case.kind}", case.tokens, "eager", size)
    inputs.pop("attention_mask", None)  # one sequence, without padding
    return model, inputs


def deberta(case: Case, setting: Setting) -> models.Call:
    """DeBERTa v3's attention: content to position and position to content."""
    import torch
    import transformers

    import_torchvision()
    config = transformers.DebertaV2Config(
        vocab_size=models.VOCABULARY,
        hidden_size=case.heads * case.width,
        num_hidden_layers=1 if setting.tiny else LAYERS,
        num_attention_heads=case.heads,
        intermediate_size=2 * case.heads * case.width,
        max_position_embeddings=case.tokens,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    torch.manual_seed(0)
    model = transformers.DebertaV2Model(config)
    models.wake(model)
    return model, {"input_ids": torch.randint(3, models.VOCABULARY, (1, case.tokens))}


def swin(case: Case, setting: Setting) -> models.Call:
    """timm's Swin-T, and a smaller one where there is no GPU."""
    import torch

    import_torchvision()
    import timm

    timm.layers.set_fused_attn(False)
    small: dict[str, Any] = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)} if setting.tiny else {}
    batch, side = (1, 56) if setting.tiny else (16, case.tokens)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, num_classes=10, img_size=side, **small
    )
    return model, {"x": torch.randn(batch, 3, side, side)}


BUILDERS = {"mistral": mistral, "deberta": deberta, "swin": swin}

SUITE = Suite(
    "models",
    "whole models",
    cases(),
    build,
    limits={"tokens": 64, "heads": 4, "width": 16},
    share=3.0,
    whole=True,
)
