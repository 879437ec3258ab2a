"""Suite `windows`: many small attentions with a learned relative bias and a window mask, as Swin has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import BACKWARD, FORWARD, Case, Setting, Subject, Suite
from benchmarks.gpu.spelled import BACKENDS, FLEX, SDPA, fused

PLACES = 64  # windows of an image, each with a mask of its own


def cases() -> tuple[Case, ...]:
    return tuple(
        Case("windows", kind, side * side, work, batch=batch, heads=heads, width=32, rank=rank)
        for kind, side, batch, heads, rank in (
            ("7 x 7", 7, 64 * PLACES, 4, 0),
            ("16 x 16", 16, 8 * PLACES, 4, 0),
            ("7 x 7", 7, 8 * PLACES, 16, 1),
            ("16 x 16", 16, PLACES, 16, 1),
        )
        for work in (FORWARD, BACKWARD)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Swin's: a bias from a table, a mask for each place in the image."""
    tokens = q.shape[2]
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    bias = table[place.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    scores = scores + bias.unsqueeze(0)
    scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask[None, :, None]
    return scores.view(-1, *scores.shape[2:]).softmax(-1) @ v


def build(case: Case, setting: Setting) -> Subject:
    side, device, dtype = round(case.tokens**0.5), setting.device, case.torch_dtype
    y, x = torch.arange(case.tokens) // side, torch.arange(case.tokens) % side
    down, aside = (at[:, None] - at[None] + side - 1 for at in (y, x))
    places = torch.arange(min(PLACES, case.batch))[:, None]
    region = (places % 3 == 0) & (y >= side // 2)  # where images that were rolled meet
    mask = torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
    q, k, v = torch.randn(3, case.batch, case.heads, case.tokens, case.width, device=device, dtype=dtype).unbind(0)
    table = torch.randn((2 * side - 1) ** 2, case.heads, device=device, dtype=dtype)
    leaves = [t.detach().requires_grad_(case.trained) for t in (q, k, v, table)]
    inputs = dict(zip(("q", "k", "v", "table"), leaves))
    inputs |= {"place": (down * (2 * side - 1) + aside).to(device), "mask": mask.to(device, dtype)}
    pairs = case.batch * case.heads * case.tokens**2
    peers = {FLEX: lambda: flexed(setting)}
    peers |= {f"{SDPA} {name}": (lambda name=name: by_sdpa(name)) for name in BACKENDS}
    return Subject(
        attention,
        inputs,
        leaves if case.trained else (),
        peers,
        dense_bytes=pairs * dtype.itemsize * 4,
        flops=4.0 * pairs * case.width,
        bytes=4.0 * q.nbytes,
    )


def by_sdpa(backend: str) -> Any:
    """PyTorch's kernel given the sum of bias and mask, windows of an image side by side with its heads."""
    attend = fused(backend, causal=False)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        tokens, places = q.shape[2], mask.shape[0]
        bias = table[place.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        both = (bias[None] + mask[:, None]).flatten(0, 1)[None]
        folded = [x.view(-1, places * x.shape[1], *x.shape[2:]) for x in (q, k, v)]
        return attend(*folded, bias=both.expand(folded[0].shape[0], -1, -1, -1)).view(q.shape)

    return call


def flexed(setting: Setting) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, place: Tensor, mask: Tensor) -> Any:
        places = mask.shape[0]

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + table[place[i, j], h] + mask[b % places, i, j]

        return flex_attention(q, k, v, score_mod=score)

    return call if setting.tiny else torch.compile(call, dynamic=False)


SUITE = Suite(
    "windows",
    "many small attentions",
    cases(),
    build,
    limits={"tokens": 49, "batch": 4, "heads": 1, "width": 16},
    share=1.0,
)
