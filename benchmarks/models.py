"""The models that Refocus is measured on: published architectures, small, with random weights. Nothing is downloaded.

`build("hf/bert", tokens=128, attention="eager")` gives a module in eval mode and the keyword arguments of one call.
`attention` is "eager" (matmul, softmax, matmul as the library spells it out) or "default" (what a user gets, which is
`scaled_dot_product_attention` with a dense mask wherever the library has it). `tokens` is the length of the attended
sequence; images and audio are made as large as gives about that many tokens, and grids are rounded to what the
architecture can divide.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.torchvision_ops import has_timm, import_torchvision

import_torchvision()  # transformers imports it too, wherever it is installed

Attention = Literal["eager", "default"]
Call = tuple[nn.Module, dict[str, Any]]

VOCABULARY = 1000
ATTENTIONS: tuple[Attention, ...] = ("eager", "default")


@dataclass(frozen=True)
class Size:
    """Width of a model, number of heads and layers, and sequences in a batch (the last one is padded, if padding is
    something the model knows)."""

    hidden: int = 64
    heads: int = 4
    layers: int = 2
    batch: int = 2

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def inner(self) -> int:
        return 2 * self.hidden


TINY = Size()  # for recognition and tests: what is computed matters, not how long it takes
SMALL = Size(hidden=256, heads=4, layers=2, batch=1)  # for timing: heads of 64, as most published models have


@dataclass(frozen=True)
class Spec:
    """What one builder is asked for."""

    tokens: int
    attention: Attention
    size: Size

    @property
    def window(self) -> int:
        """Width of a sliding window, where the architecture has one: a quarter of the sequence."""
        return max(self.tokens // 4, 4)

    def grid(self, multiple: int = 1) -> int:
        """Side of a square grid of about `tokens` cells, divisible by `multiple`."""
        return max(round(self.tokens**0.5 / multiple), 1) * multiple


Builder = Callable[[Spec], Call]
MODELS: dict[str, Builder] = {}


def names(*, timm: bool | None = None) -> list[str]:
    """All names, in the order of the list; timm's only where it is installed (or as `timm` says)."""
    with_timm = has_timm() if timm is None else timm
    return [name for name in MODELS if with_timm or not name.startswith("timm/")]


def build(name: str, tokens: int = 128, attention: Attention = "eager", size: Size = TINY, seed: int = 0) -> Call:
    """The module, in eval mode, and the keyword arguments of one call. The same seed gives the same weights and inputs.

    Raises `KeyError` for a name that is not in `MODELS`.
    """
    torch.manual_seed(seed)
    module, inputs = MODELS[name](Spec(tokens, attention, size))
    wake(module)
    return module.eval(), inputs


def wake(module: nn.Module) -> None:
    """Give the weights the scale of a trained model, in place.

    As the libraries initialise them, weights are so small that every softmax is nearly uniform, and bias tables, layer
    scales and biases start as constants: a compiler could drop a whole term of the scores and nobody would see it.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.dim() >= 2 and parameter.numel():
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)


def _register(name: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return register


# ------------------------------------------------------------------------------------------------ inputs


def _ids(spec: Spec, length: int | None = None) -> Tensor:
    return torch.randint(3, VOCABULARY, (spec.size.batch, length or spec.tokens))


def _padding(spec: Spec, length: int | None = None) -> Tensor:
    """int64 [batch, length]: 1 for a token, 0 for padding; the last sequence is one eighth padding, at its end."""
    length = length or spec.tokens
    mask = torch.ones(spec.size.batch, length, dtype=torch.long)
    mask[-1, length - length // 8 :] = 0
    return mask


def _text(spec: Spec, **more: Any) -> dict[str, Any]:
    return {"input_ids": _ids(spec), "attention_mask": _padding(spec), **more}


def _image(spec: Spec, side: int) -> Tensor:
    return torch.randn(spec.size.batch, 3, side, side)


# ------------------------------------------------------------------------------------------------ transformers


def _hf(model_type: str, spec: Spec, config: dict[str, Any], class_name: str | None = None) -> nn.Module:
    """A transformers model of this type with random weights: the bare model, or the class named."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    chosen = {} if spec.attention == "default" else {"attn_implementation": "eager"}
    settings = CONFIG_MAPPING[model_type](**config)
    if class_name is None:
        return transformers.AutoModel.from_config(settings, **chosen)
    return getattr(transformers, class_name)._from_config(settings, **chosen)


def _encoder(name: str, config: Callable[[Spec], dict[str, Any]]) -> None:
    """A text encoder: token ids and a padding mask."""

    @_register(f"hf/{name}")
    def _(spec: Spec) -> Call:
        return _hf(name, spec, {"vocab_size": VOCABULARY, **config(spec)}), _text(spec)


def _decoder(name: str, config: Callable[[Spec], dict[str, Any]]) -> None:
    """A causal language model without its head: token ids and a padding mask, no key-value cache."""

    @_register(f"hf/{name}")
    def _(spec: Spec) -> Call:
        special = {"bos_token_id": 1, "eos_token_id": 2}
        return _hf(name, spec, {"vocab_size": VOCABULARY, **special, **config(spec)}), _text(spec, use_cache=False)


def _modern(spec: Spec, **more: Any) -> dict[str, Any]:
    """The settings that Llama and its descendants share: grouped heads, rotary positions, gated MLP."""
    size = spec.size
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.head,
        "intermediate_size": size.inner,
        "max_position_embeddings": spec.tokens,
        "pad_token_id": 0,
        **more,
    }


def _vision(spec: Spec, side: int, patch: int) -> dict[str, Any]:
    size = spec.size
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "image_size": side,
        "patch_size": patch,
    }


_encoder(
    "bert",
    lambda s: {
        "hidden_size": s.size.hidden,
        "num_hidden_layers": s.size.layers,
        "num_attention_heads": s.size.heads,
        "intermediate_size": s.size.inner,
        "max_position_embeddings": s.tokens,
    },
)
_encoder(
    "distilbert",
    lambda s: {
        "dim": s.size.hidden,
        "n_layers": s.size.layers,
        "n_heads": s.size.heads,
        "hidden_dim": s.size.inner,
        "max_position_embeddings": s.tokens,
    },
)
_decoder(
    "gpt2",
    lambda s: {
        "n_embd": s.size.hidden,
        "n_layer": s.size.layers,
        "n_head": s.size.heads,
        "n_inner": s.size.inner,
        "n_positions": s.tokens,
    },
)
_decoder(
    "gpt_neo",
    lambda s: {
        "hidden_size": s.size.hidden,
        "num_layers": s.size.layers,
        "num_heads": s.size.heads,
        "intermediate_size": s.size.inner,
        "attention_types": [[["global", "local"], s.size.layers // 2]],
        "window_size": s.window,
        "max_position_embeddings": s.tokens,
    },
)
_decoder(
    "gptj",
    lambda s: {
        "n_embd": s.size.hidden,
        "n_layer": s.size.layers,
        "n_head": s.size.heads,
        "n_inner": s.size.inner,
        "rotary_dim": s.size.head // 2,
        "n_positions": s.tokens,
    },
)
_decoder(
    "opt",
    lambda s: {
        "hidden_size": s.size.hidden,
        "word_embed_proj_dim": s.size.hidden,
        "num_hidden_layers": s.size.layers,
        "num_attention_heads": s.size.heads,
        "ffn_dim": s.size.inner,
        "max_position_embeddings": s.tokens,
    },
)
_decoder("bloom", lambda s: {"hidden_size": s.size.hidden, "n_layer": s.size.layers, "n_head": s.size.heads})
_decoder(
    "mpt",
    lambda s: {
        "d_model": s.size.hidden,
        "n_layers": s.size.layers,
        "n_heads": s.size.heads,
        "max_seq_len": s.tokens,
    },
)
_decoder(
    "falcon",
    lambda s: {
        "hidden_size": s.size.hidden,
        "num_hidden_layers": s.size.layers,
        "num_attention_heads": s.size.heads,
        "ffn_hidden_size": s.size.inner,
        "max_position_embeddings": s.tokens,
    },
)
for _name in ("llama", "qwen2", "qwen3"):
    _decoder(_name, _modern)
_decoder("mistral", lambda s: _modern(s, sliding_window=s.window))
_decoder("gemma2", lambda s: _modern(s, sliding_window=s.window, query_pre_attn_scalar=s.size.head))
_decoder("gpt_oss", lambda s: _modern(s, sliding_window=s.window, num_local_experts=2, num_experts_per_tok=1))
_decoder("phi3", lambda s: _modern(s, original_max_position_embeddings=s.tokens))


@_register("hf/t5")
def _t5(spec: Spec) -> Call:
    size = spec.size
    config = {
        "vocab_size": VOCABULARY,
        "d_model": size.hidden,
        "d_kv": size.head,
        "d_ff": size.inner,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "decoder_start_token_id": 0,
    }
    return _hf("t5", spec, config), _text(spec, decoder_input_ids=_ids(spec), use_cache=False)


def _seq2seq(spec: Spec) -> dict[str, Any]:
    size = spec.size
    return {
        "vocab_size": VOCABULARY,
        "d_model": size.hidden,
        "encoder_layers": size.layers,
        "decoder_layers": size.layers,
        "encoder_attention_heads": size.heads,
        "decoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.inner,
        "decoder_ffn_dim": size.inner,
    }


@_register("hf/bart")
def _bart(spec: Spec) -> Call:
    model = _hf("bart", spec, {**_seq2seq(spec), "max_position_embeddings": spec.tokens})
    return model, _text(spec, decoder_input_ids=_ids(spec), use_cache=False)


@_register("hf/whisper")
def _whisper(spec: Spec) -> Call:
    """Two frames make one encoder token; the decoder writes a quarter as many tokens as the encoder reads."""
    written = max(spec.tokens // 4, 8)
    config = {
        **_seq2seq(spec),
        "max_source_positions": spec.tokens,
        "max_target_positions": written,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    frames = torch.randn(spec.size.batch, 80, 2 * spec.tokens)
    inputs = {"input_features": frames, "decoder_input_ids": _ids(spec, written), "use_cache": False}
    return _hf("whisper", spec, config), inputs


@_register("hf/wav2vec2")
def _wav2vec2(spec: Spec) -> Call:
    """320 samples make one token; the convolutions have few channels, as attention is what is looked at here."""
    size = spec.size
    config = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "conv_dim": (32,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "layerdrop": 0.0,
    }
    return _hf("wav2vec2", spec, config), {"input_values": torch.randn(size.batch, 320 * spec.tokens + 80)}


def _patches(name: str, patch: int, **more: Any) -> None:
    """A vision transformer on a square image of about `tokens` patches."""

    @_register(f"hf/{name}")
    def _(spec: Spec) -> Call:
        side = spec.grid() * patch
        return _hf(name, spec, {**_vision(spec, side, patch), **more}), {"pixel_values": _image(spec, side)}


_patches("vit", 8)
_patches("deit", 8)
_patches("beit", 8, use_relative_position_bias=True)


@_register("hf/clip")
def _clip(spec: Spec) -> Call:
    size, side = spec.size, spec.grid() * 8
    vision = {**_vision(spec, side, 8), "projection_dim": size.hidden}
    text = {key: vision[key] for key in vision if key not in ("image_size", "patch_size")}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": spec.tokens, "bos_token_id": 1, "eos_token_id": 2}
    config = {"text_config": text, "vision_config": vision, "projection_dim": size.hidden}
    return _hf("clip", spec, config), {**_text(spec), "pixel_values": _image(spec, side)}


@_register("hf/swinv2")
def _swinv2(spec: Spec) -> Call:
    """Two stages of two blocks (plain and shifted windows of 4 x 4); the second has a quarter of the tokens."""
    size, side = spec.size, spec.grid(multiple=8) * 4
    config = {
        "image_size": side,
        "patch_size": 4,
        "embed_dim": size.hidden // 2,
        "depths": [2, 2],
        "num_heads": [size.heads // 2, size.heads],
        "window_size": 4,
    }
    return _hf("swinv2", spec, config), {"pixel_values": _image(spec, side)}


@_register("hf/detr")
def _detr(spec: Spec) -> Call:
    """A two-stage ResNet with stride 8 in front, so that an image of moderate size gives many tokens."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    backbone = CONFIG_MAPPING["resnet"](
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        "num_queries": max(spec.tokens // 4, 16),
        **{key: value for key, value in _seq2seq(spec).items() if key != "vocab_size"},
    }
    return _hf("detr", spec, config, "DetrModel"), {"pixel_values": _image(spec, spec.grid() * 8)}


# ------------------------------------------------------------------------------------------------ timm


def _timm(name: str, architecture: str, patch: int) -> None:
    """A timm vision transformer, cut to `layers` blocks, on a square image of about `tokens` patches."""

    @_register(f"timm/{name}")
    def _(spec: Spec) -> Call:
        if not has_timm():
            raise ModuleNotFoundError(f"timm/{name} needs timm, which is not installed")
        import timm

        size, side = spec.size, spec.grid() * patch
        timm.layers.set_fused_attn(spec.attention == "default")
        model = timm.create_model(
            architecture,
            pretrained=False,
            num_classes=10,
            img_size=side,
            depth=size.layers,
            embed_dim=size.hidden,
            num_heads=size.heads,
        )
        return model, {"x": _image(spec, side)}


_timm("vit", "vit_tiny_patch16_224", 16)
_timm("cait", "cait_xxs24_224", 16)
_timm("beit", "beit_base_patch16_224", 16)
_timm("eva02", "eva02_tiny_patch14_224", 14)


# ------------------------------------------------------------------------------------------------ as a registry

_SITES_PER_LAYER = {"hf/t5": 3, "hf/bart": 3, "hf/whisper": 3, "hf/clip": 2, "hf/detr": 3}


def sites(name: str, size: Size = TINY) -> int:
    """How many attention sites the architecture has: what a census of a capture must come to.

    An encoder-decoder has three a layer (self, self, cross) and CLIP two towers. Swin's four blocks do not depend on
    the size, and CaiT ends with two layers of class attention.
    """
    if name == "hf/swinv2":
        return 4
    if name == "timm/cait":
        return size.layers + 2
    return _SITES_PER_LAYER.get(name, 1) * size.layers


def _entry(name: str, attention: Attention) -> Callable[[], Call]:
    return lambda: build(name, attention=attention)


# name -> () -> (module, kwargs): every model in both spellings, as `benchmarks.recognition` wants a registry.
REGISTRY: dict[str, Callable[[], Call]] = {
    f"{name}:{attention}": _entry(name, attention) for name in MODELS for attention in ATTENTIONS
}
SITES: dict[str, int] = {entry: sites(entry.split(":")[0]) for entry in REGISTRY}
