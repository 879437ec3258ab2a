"""Softmax attention spelled three ways: eagerly, by FlexAttention, and by PyTorch's fused kernels.

A `Spelling` is a function of scores and a mask in FlexAttention's own form, which broadcasts just as well over whole
tensors: so the eager spelling, which Refocus reads, and FlexAttention's are made of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.case import Case, Setting, Subject

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Given = Mapping[str, Tensor]
FLEX, FLEX_MASK, SDPA = "flex", "flex mask", "sdpa"


@dataclass(frozen=True)
class Spelling:
    """`score` and `mask` make their functions of the tensors by name; `trained`: those that gradients are asked for.
    A tensor named "sink" is one more logit for each head, without a value. `by_head`: heads differ in their masks;
    `kept`: the share of pairs that the mask keeps."""

    score: Callable[[Given], ScoreMod] | None = None
    mask: Callable[[Given], MaskMod] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    by_head: bool = False
    kept: float = 1.0


def eager(spelling: Spelling, scale: float) -> Callable[..., Tensor]:
    """The attention as a model would spell it, over all pairs."""

    def call(q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> Tensor:
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        head = torch.arange(q.shape[1], device=q.device)[:, None, None]
        row = torch.arange(q.shape[2], device=q.device)[:, None]
        column = torch.arange(k.shape[2], device=q.device)
        scores = q @ k.mT * scale
        if spelling.score is not None:
            scores = spelling.score(given)(scores, batch, head, row, column)
        if spelling.mask is not None:
            scores = scores.masked_fill(~spelling.mask(given)(batch, head, row, column), float("-inf"))
        if "sink" in given:
            sink = given["sink"][None, :, None, None].expand(*scores.shape[:3], 1)
            return torch.cat((scores, sink.to(scores.dtype)), -1).softmax(-1)[..., :-1].to(v.dtype) @ v
        return scores.softmax(-1).to(v.dtype) @ v

    return call


def subject(case: Case, setting: Setting, spelling: Spelling, *, sdpa: bool = False, causal: bool = False) -> Subject:
    """The eager spelling and its peers: FlexAttention always, with `sdpa` PyTorch's kernels, one by one."""
    queries, kv_heads = case.queries or case.tokens, case.kv_heads or case.heads
    device, dtype, trained = setting.device, case.torch_dtype, case.trained
    shapes = {"q": (case.heads, queries), "k": (kv_heads, case.tokens), "v": (kv_heads, case.tokens)}
    inputs = {
        name: torch.randn(case.batch, *shape, case.width, device=device, dtype=dtype).requires_grad_(trained)
        for name, shape in shapes.items()
    }
    for name, x in spelling.tensors.items():
        x = x.to(device)
        inputs[name] = x.requires_grad_() if trained and name in spelling.trained else x
    pairs = case.batch * case.heads * queries * case.tokens
    peers: dict[str, Callable[[], Callable[..., Any]]] = {FLEX: lambda: flex(case, setting, spelling, inputs)}
    alone: dict[str, Callable[[], Callable[[], Any]]] = {}
    if spelling.mask is not None and not trained:
        alone[FLEX_MASK] = lambda: block_mask(case, setting, spelling, inputs)
    if sdpa:
        peers |= {f"{SDPA} {name}": (lambda name=name: fused(name, causal)) for name in BACKENDS}
    read = sum(inputs[name].numel() for name in "qkv") + inputs["q"].numel()
    return Subject(
        eager(spelling, case.width**-0.5),
        inputs,
        [x for x in inputs.values() if x.requires_grad],
        peers,
        alone,
        # scores, their exponentials and a mask, twice as many where they are kept for the backward
        dense_bytes=pairs * dtype.itemsize * (6 if trained else 3) + 3 * inputs["k"].nbytes * case.heads / kv_heads,
        flops=4.0 * pairs * spelling.kept * case.width,
        bytes=float(read * dtype.itemsize),
    )


def block_mask(case: Case, setting: Setting, spelling: Spelling, inputs: Given) -> Callable[[], Any]:
    """Makes FlexAttention's block mask, compiled where things are compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    assert spelling.mask is not None
    mod, heads = spelling.mask(inputs), case.heads if spelling.by_head else None
    make = create_block_mask if setting.tiny else torch.compile(create_block_mask, dynamic=False)
    sizes = (None, heads, case.queries or case.tokens, case.tokens)
    return lambda: make(mod, *sizes, device=str(setting.device))


def flex(case: Case, setting: Setting, spelling: Spelling, inputs: Given) -> Callable[..., Any]:
    """FlexAttention, compiled, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    mask = None if spelling.mask is None else block_mask(case, setting, spelling, inputs)()
    score = None if spelling.score is None else spelling.score(inputs)
    options = {"score_mod": score, "block_mask": mask, "enable_gqa": case.kv_heads not in (0, case.heads)}

    def call(q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> Any:
        if "sink" not in given:
            return flex_attention(q, k, v, **options)
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
        return out * torch.sigmoid(aux.lse - given["sink"][:, None])[..., None].to(out.dtype)

    return call if setting.tiny else torch.compile(call, dynamic=False)


BACKENDS = ("flash", "cudnn", "efficient")


def fused(backend: str, causal: bool) -> Callable[..., Any]:
    """PyTorch's attention, by one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }[backend]

    def call(q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=given.get("bias"), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call
