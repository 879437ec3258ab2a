"""Constant masks as models keep them: tensors, each with the part of its closed form that says what it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def inward(a: Tensor, b: Tensor, reach: int, size: int) -> Tensor:
    """A window around a that is pushed inwards at the borders, as NATTEN has it."""
    start = (a - reach).clamp(0, size - 2 * reach - 1)
    return (b >= start) & (b <= start + 2 * reach)


def swin(size: int, window: int, shift: int) -> Tensor:
    """[windows, window^2, window^2]: which pairs of a shifted window are of one region."""
    regions, count = torch.zeros(size, size), 0
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for rows in cuts:
        for columns in cuts:
            regions[rows, columns] = count
            count += 1
    n = size // window
    parts = regions.view(n, window, n, window).permute(0, 2, 1, 3).reshape(n * n, -1)
    return parts[:, None] == parts[:, :, None]


def looped(n: int, window: int, tokens: int) -> Tensor:
    """Longformer, written as a loop."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        mask[i, max(0, i - window) : i + window + 1] = True
    mask[:tokens] = True
    mask[:, :tokens] = True
    return mask


def masks(n: int = 256) -> dict[str, tuple[Callable[[], Tensor], str]]:
    """name -> (maker, a piece of the notation of its form)"""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    d, block = i - j, n // 8
    w = math.isqrt(n)
    y, x, v, u = i // w, i % w, j // w, j % w
    heads = torch.arange(4).reshape(4, 1, 1)
    cuts = torch.tensor([n // 5, n // 2])
    document = torch.bucketize(torch.arange(n), cuts, right=True)
    grid = torch.arange(4)
    cube = torch.stack(torch.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(64, 3)
    found: dict[str, tuple[Callable[[], Tensor], str]] = {
        "causal": (lambda: torch.ones(n, n).tril().bool(), "dim1 <= dim0"),
        "strictly causal": (lambda: torch.ones(n, n).tril(-1).bool(), "dim1 < dim0"),
        "offset": (lambda: j[:, :n] <= i[: n // 2] + n // 2, f"dim1 - dim0 < {n // 2 + 1}"),
        "window": (lambda: (d >= 0) & (d < 17), "dim0 - dim1 < 17"),
        "band": (lambda: torch.ones(n, n).tril(5).triu(-9).bool(), "dim0 - dim1 < 10"),
        "dilated": (lambda: d % 4 == 0, "% 4 == 0"),
        "dilated window": (lambda: (d >= 0) & (d < 33) & (d % 4 == 0), "% 4 == 0"),
        "strided keys": (lambda: (j % 7 == 3).expand(n, n).clone(), "% 7"),
        "prefix": (lambda: (j <= i) | (j < 30), "max(30, dim0 + 1)"),
        "block diagonal": (
            lambda: torch.kron(torch.eye(8), torch.ones(block, block)).bool(), f"dim0//{block} == dim1//{block}"
        ),
        "odd blocks": (lambda: i // 24 == j // 24, "dim0//24 == dim1//24"),
        "shifted blocks": (lambda: (i + 8) // 32 == (j + 8) // 32, "(dim0 + 8) // 32 == (dim1 + 8) // 32"),
        "block causal": (lambda: j // 16 <= i // 16, "dim1//16 <= dim0//16"),
        "chunked": (lambda: (i // 32 == j // 32) & (j <= i), "dim1 <= dim0"),
        "sinks": (lambda: (d >= 0) & ((d < 16) | (j < 4)), "dim1 < 4"),
        "global": (lambda: looped(n, 8, 3), "dim1 < 3"),
        "global inside": (lambda: (d.abs() <= 4) | (i == 100) | (j == 100), "dim1 == 100"),
        "padding": (lambda: (j < n - 37) & (i < n - 37), f"dim1 < {n - 37}"),
        "rectangle": (lambda: (i >= 32) & (i < n - 100) & (j >= 17), "dim1 >= 17"),
        "documents": (lambda: document[:, None] == document[None], "or"),
        "2-D neighbourhood": (lambda: ((y - v).abs() <= 2) & ((x - u).abs() <= 1), f"dim0//{w} - dim1//{w} < 3"),
        "2-D inward": (lambda: inward(y, v, 2, n // w) & inward(x, u, 3, w), "max(7"),
        "2-D dilated": (lambda: ((y - v).abs() <= 4) & ((x - u).abs() <= 4) & ((y - v) % 2 == 0), "% 2 == 0"),
        "2-D causal": (lambda: ((y - v).abs() <= 2) & ((x - u).abs() <= 2) & (j <= i), "dim1 <= dim0"),
        "[H, W, H, W]": (
            lambda: (((y - v).abs() <= 2) & ((x - u).abs() <= 1)).reshape(n // w, w, n // w, w), "dim0 - dim2 < 3"
        ),
        "3-D neighbourhood": (lambda: ((cube[:, None] - cube[None]).abs() <= 1).all(-1), "dim0//16 - dim1//16 < 2"),
        "cross": (lambda: (y == v) | (x == u), "or"),
        "circle": (lambda: (y - v) ** 2 + (x - u) ** 2 <= 10, "abs(dim0"),
        "stripes": (lambda: y // 2 == v // 2, f"dim0//{2 * w} == dim1//{2 * w}"),
        "1-D inward": (lambda: inward(i, j, 5, n), f"min({n - 11}, dim0 - 5)"),
        "Sparse Transformer, fixed": (lambda: (j <= i) & ((i // 32 == j // 32) | (j % 32 >= 28)), "% 32 < 4"),
        "Sparse Transformer, strided": (lambda: (j <= i) & ((d < 16) | (d % 16 == 0)), "% 16 == 0"),
        "LogSparse": (lambda: (d == 0) | ((d > 0) & ((d & (d - 1)) == 0)), "dim0 == dim1 + 64"),
        "outside a band": (lambda: d.abs() > 9, "or"),
        "every third row": (lambda: (i % 3 == 0) & (j <= i), "dim0%3 == 0"),
        "pooled keys": (lambda: j[:, : n // 4] <= i // 4, "dim1 <= dim0//4"),
        "memory": (lambda: torch.cat([torch.ones(n, 16, dtype=torch.bool), d >= 0], 1), "dim1 - dim0 < 17"),
        "windows by head": (lambda: (d >= 0) & (d < 8 * (heads + 1)), "8*dim0"),
        "doubled by head": (lambda: (d >= 0) & (d < 8 * 2**heads), "where(dim0"),
        "heads that differ": (lambda: torch.where(heads < 2, d >= 0, d <= 0), "dim0 < 2"),
        "shifted windows": (lambda: swin(14, 7, 3), "dim0 == 1"),
        "additive": (lambda: torch.full((n, n), -torch.inf).triu(1), "-inf"),
        "finite minimum": (lambda: torch.zeros(n, n).masked_fill(d < 0, torch.finfo(torch.float32).min), "where"),
        "half precision": (lambda: torch.zeros(n, n).masked_fill(d < 0, -6e4).bfloat16(), "where"),
        "zeros and ones": (lambda: torch.ones(1, 1, n, n).tril(), "dim3 <= dim2"),
        "integers": (lambda: torch.ones(n, n, dtype=torch.int32).tril(), "dim1 <= dim0"),
        "expanded": (lambda: (d >= 0).expand(3, 2, n, n), "dim3 <= dim2"),
        "one row": (lambda: (torch.arange(n) < 99)[None, None], "dim2 < 99"),
    }  # fmt: skip
    return found


def soft(n: int = 256) -> dict[str, Callable[[], Tensor]]:
    """What has no closed form, or should stay in memory."""
    generator = torch.Generator().manual_seed(0)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return {
        "random": lambda: torch.rand(n, n, generator=generator) < 0.5,
        "random blocks": lambda: torch.kron(torch.rand(16, 16, generator=generator).round(), torch.ones(16, 16)).bool(),
        "bias": lambda: torch.randn(n, n, generator=generator),
        "distances": lambda: -(i - j).abs().float(),
        "Swin's -100": lambda: torch.where(swin(14, 7, 3), 0.0, -100.0),
        "not a number": lambda: torch.where(i >= j, torch.nan, 0.0),
        "three values": lambda: torch.where(i >= j, 0.0, -torch.inf).masked_fill(i == j, 1.0),
        "empty": lambda: torch.zeros(0, 4, dtype=torch.bool),
    }
