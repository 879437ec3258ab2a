"""Products of weights and values that sum over heads, too: the key is one of the axes that they sum over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.facts import gather_facts
from refocus.finite_rows import Above
from refocus.ir import Axis, Const
from refocus.simplify import floordiv, mod
from tests.drawn import fuses, scores, stays

KEYS = 10


def heads_of_weights_and_values(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bid", p, v)


def one_value_for_all_heads(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjd->bid", p, v[:, 1])


def heads_beside_each_other(p: Tensor, v: Tensor) -> Tensor:
    """One product over heads and keys: (b, i, h j) @ (b, h j, d)."""
    return p.transpose(1, 2).flatten(2) @ v.flatten(1, 2)


def keys_before_heads(p: Tensor, v: Tensor) -> Tensor:
    return torch.tensordot(p.permute(0, 2, 3, 1), v[0].transpose(0, 1), ([2, 3], [0, 1]))


def multiplied_and_summed(p: Tensor, v: Tensor) -> Tensor:
    return (p[..., None] * v[:, :, None]).sum((1, 3))


def added_to(p: Tensor, v: Tensor) -> Tensor:
    """What is added to the weights is multiplied with the values of all heads."""
    return torch.einsum("bhij,bhjd->bid", p * 0.5 + 0.1, v)


def mixed_before(p: Tensor, v: Tensor) -> Tensor:
    mixture = torch.tensor([[0.6, -0.4], [0.3, 0.9]], dtype=p.dtype)
    return torch.einsum("bhij,bhjd->bid", torch.einsum("gh,bhij->bgij", mixture, p), v)


def keys_in_rows_and_columns(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhixy,bhxyd->bid", p.unflatten(-1, (2, 5)), v.unflatten(2, (2, 5)))


SPELLINGS = (
    heads_of_weights_and_values, one_value_for_all_heads, heads_beside_each_other, keys_before_heads,
    multiplied_and_summed, added_to, mixed_before, keys_in_rows_and_columns,
)  # fmt: skip


@pytest.mark.parametrize("product", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    fuses(lambda q, k, v: product(scores(q, k).softmax(-1), v), KEYS)


def test_a_softmax_over_keys_of_all_heads_is_none_of_each() -> None:
    """Each key is compared with the query of its own head, which no region has."""
    stays(lambda q, k, v: scores(q, k).transpose(1, 2).flatten(2).softmax(-1) @ v.flatten(1, 2), "the weights", KEYS)


def test_an_axis_of_the_values_alone_is_no_head() -> None:
    stays(
        lambda q, k, v: torch.einsum("bhij,bhjde->bhid", scores(q, k).softmax(-1), v[..., None] * v[..., None, :]),
        "the values are not summed over one key axis",
        KEYS,
    )


def test_weights_are_read_down_to_what_normalises_them() -> None:
    """What tells keys and heads apart lies above: below, a model may have anything, at any length."""

    def function(x: Tensor, v: Tensor) -> Tensor:
        for _ in range(3):
            x = x / x.exp().sum(-1, keepdim=True)
        return torch.matmul((x.softmax(-1) * 0.5).transpose(1, 2).flatten(2), v)

    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(torch.randn(2, 3, 7, 5), torch.randn(2, 15, 4))
    facts = gather_facts(gm)
    (softmax,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    (product,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    batch, query, both = (Axis(name, Const(size)) for name, size in (("b", 2), ("i", 7), ("c", 15)))
    (load,) = Above(facts).at(product.args[0], (batch, query, both)).loads
    assert load.tensor == softmax.name
    assert load.index == (batch, floordiv(both, Const(5)), query, mod(both, Const(5)))
