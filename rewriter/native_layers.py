"""PyTorch's own kernel for a whole encoder layer, taken apart.

In inference `torch.nn.TransformerEncoderLayer` calls one operation for all that it does. What it computes is written
out here in the operations of the layer's Python code, so that the attention in it can be seen. A graph in which nothing
is fused is not rewritten, and keeps the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def expansion_of(target: Any, args: tuple[Any, ...]) -> Callable[..., Tensor] | None:
    """What computes the same as an operation, where it is one of these kernels and no tensor is nested."""
    nested = any(isinstance(a, Tensor) and a.is_nested for a in args)
    return _encoder_layer if target in _KERNELS and not nested else None


_KERNELS = (torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default)


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """aten::_transformer_encoder_layer_fwd, argument by argument."""

    def first(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        heads = functional.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        scores = (query / math.sqrt(embed_dim // num_heads)) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(_over_scores(mask, mask_type), -math.inf)
        return functional.linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        # The kernel's own operation: which GELU it is depends on the device.
        hidden = torch._addmm_activation(ffn_bias_1, x.flatten(0, 1), ffn_weight_1.t(), use_gelu=use_gelu)
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2).view(x.shape)

    if norm_first:
        src = src + attend(first(src))
        return src + feed(second(src))
    src = first(src + attend(src))
    return second(src + feed(src))


def _over_scores(mask: Tensor, kind: int | None) -> Tensor:
    """True where a key is left out, along batch, heads, queries and keys. The kernel takes any number but zero so."""
    mask = mask.to(torch.bool)
    return mask[:, None, None, :] if kind == 1 else mask
