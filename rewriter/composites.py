"""Operations that PyTorch defines by others: traced as these, where the lift reads these and has no word for them.

    torch.hstack((near, far))             ->    torch.cat((near, far), 1)
    F.cosine_similarity(q, k, dim=-1)     ->    (q / |q| * k / |k|).sum(-1)

PyTorch's own definition is run, the one that autograd goes through: values and gradients are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_OPENED = (
    "arctan", "arctanh", "atleast_1d", "atleast_2d", "atleast_3d", "chain_matmul", "column_stack",
    "cosine_similarity", "dsplit", "dstack", "fix", "fliplr", "flipud", "hsplit", "hstack", "linalg_multi_dot",
    "linalg_vecdot", "row_stack", "special_erf", "special_erfc", "special_exp2", "special_expm1", "special_log1p",
    "special_logsumexp", "special_round", "special_sinc", "sum_to_size", "vsplit", "vstack",
)  # fmt: skip


def definitions() -> dict[Any, Callable[..., Any]]:
    """What each of these operations, in all its overloads, is traced as."""
    found = {overload: overload.decompose for name in _OPENED for overload in _overloads(name)}
    return found | {torch.ops.aten.cosine_similarity.default: _cosine_similarity}


def _overloads(name: str) -> Iterator[Any]:
    packet = getattr(torch.ops.aten, name, None)
    for overload in () if packet is None else packet.overloads():
        found = getattr(packet, overload)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(found.name(), "CompositeImplicitAutograd")
        if composite and "out" not in overload:
            yield found


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """PyTorch's own, but that vectors are divided by their norms before they are repeated for each other: of queries
    beside keys, the definition makes both as large as all pairs. No gradient flows into the bound of a norm, and all of
    it past the bound."""
    back = dim - max(x1.dim(), x2.dim()) if dim >= 0 else dim
    floats = x1.is_floating_point() and x1.dtype == x2.dtype
    if not floats or min(x1.dim(), x2.dim()) < -back or x1.shape[back] != x2.shape[back]:
        return torch.ops.aten.cosine_similarity.default.decompose(x1, x2, dim, eps)  # type: ignore[no-any-return]

    def of_length_one(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, 2, back, keepdim=True)
        return x / torch.where(norm < eps, norm + (eps - norm).detach(), norm)  # an overflown norm stays infinite

    return (of_length_one(x1) * of_length_one(x2)).sum(back)
