"""Several readings of one product, and what models put around a softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check, rewritten
from refocus.tolerances import difference
from tests.drawn import Attention, drawn, fuses, scores, stays

# ---------------------------------------------------------------------------------------------------- shared scores


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = scores(q, k)
    return logits.softmax(-1) @ v, logits.transpose(-1, -2).softmax(-1) @ q


def test_scores_that_two_attentions_read() -> None:
    fuses(both_ways, 24, sites=2)


def test_scores_that_somebody_else_reads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        logits = scores(q, k)
        return logits.softmax(-1) @ v, logits.transpose(-1, -2).softmax(-1) @ q, logits.amax(-1)

    stays(function, "a score is read elsewhere", 24)


# ------------------------------------------------------------------------------------------------ after the softmax


def keep() -> Tensor:
    """Rows without any key: the first, and all of one sample."""
    mask = torch.rand(2, 1, 24, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, :, 0], mask[1, :, 5:9] = False, False
    return mask


def cleaned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num() @ v


def cleaned_by_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(~mask, float("-inf")).softmax(-1)
    return p.masked_fill(p.isnan(), 0.0) @ v


def cleaned_in_vain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A finite fill: rows without a key are the mean of all values, and there is nothing to clean."""
    return scores(q, k).masked_fill(~mask, -1e9).softmax(-1) @ v


@pytest.mark.parametrize("function", [cleaned, cleaned_by_where])
def test_rows_without_keys_put_right_after_the_softmax(function: Callable[..., Tensor]) -> None:
    inputs = (*drawn(10), keep())
    found = check(Attention(function), inputs, sites=1, lower=False)
    assert "empty row  = 0" in str(found.report)
    assert not bool(function(*inputs).isnan().any())
    with torch.no_grad():
        got = refocus.testing.rewritten(Attention(function), engine="tiled")(*inputs)
    assert not bool(got.isnan().any()) and bool((got[:, :, 0] == 0).all())


def masked_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0) @ v


def masked_twice_lowest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~mask, -1e9).softmax(-1).masked_fill(~mask, 0.0) @ v


@pytest.mark.parametrize("function", [masked_twice, masked_twice_lowest])
def test_rows_without_keys_masked_again_after_the_softmax(function: Callable[..., Tensor]) -> None:
    found = check(Attention(function), (*drawn(10), keep()), sites=1, lower=False)
    assert "empty row  = 0" in str(found.report) and "gate" not in str(found.report)


def rows_chosen(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, diagonal: int = 0) -> Tensor:
    """Among chosen tokens only, causally: the others' rows are empty, and zeros are put there."""
    both = (rows[:, :, None] & rows[:, None, :]).tril(diagonal)[:, None]
    p = scores(q, k).masked_fill(~both, float("-inf")).softmax(-1)
    return torch.where(rows[:, None, :, None], p, 0.0) @ v


def test_a_condition_that_tells_empty_rows() -> None:
    rows = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.3
    found = check(Attention(rows_chosen), (*drawn(24), rows), sites=1, lower=False)
    assert "empty row  = 0" in str(found.report)


def test_a_condition_that_does_not_tell_all_empty_rows() -> None:
    rows = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.3
    stays(lambda *x: rows_chosen(*x, diagonal=-1), "not plain which of them become zeros", 24, more=(rows,))


def test_a_row_that_is_infinite_as_a_whole_does_not_cancel() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        added = torch.zeros(2, 1, 24, 1, dtype=q.dtype).masked_fill(~rows[:, None, :, None], float("-inf"))
        return (scores(q, k) + added).softmax(-1) @ v

    fuses(function, 10, more=(torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.3,))


def test_an_added_mask_and_zeros_chosen_afterwards() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        p = (scores(q, k) + mask).softmax(-1)
        return torch.where(mask[..., :1] == 0, p, 0.0) @ v

    added = torch.zeros(2, 1, 24, 10).masked_fill((torch.arange(24) > 20)[:, None], float("-inf"))
    stays(function, "not plain which of them become zeros", 10, more=(added,))


def test_an_added_mask_may_hold_infinities_of_its_own() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (scores(q, k) + mask).softmax(-1).nan_to_num() @ v

    added = torch.zeros(2, 1, 24, 10).masked_fill(~keep(), float("-inf"))
    assert (added == -torch.inf).all(-1).any()
    check(Attention(function), (*drawn(10), added), sites=1, lower=False)
    leaves = [t.requires_grad_() for t in drawn(10)]
    rewritten(Attention(function), engine="tiled", require=True)(*leaves, added).square().sum().backward()
    # Those of eager code are no numbers: softmax(x) * 0 of what is no number.
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)


def test_cleaning_with_another_number_stays() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(nan=0.1) @ v

    stays(function, "", 10, more=(keep(),))


def test_finite_fills_need_no_cleaning() -> None:
    fuses(cleaned_in_vain, 10, more=(keep(),))


def blended(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    gate = torch.sigmoid(q.mean((2, 3), keepdim=True))
    attn = gate * scores(q, k).softmax(-1) + 0.7 * table.softmax(-1)
    return (attn / attn.sum(-1, keepdim=True)) @ v


def two_products_blended(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    attn = 0.3 * scores(q, k).softmax(-1) + 2.0 * scores(k[..., :1, :] + q, k).softmax(-1)
    return (attn / attn.sum(-1, keepdim=True)) @ v


def a_bias_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) + table) @ v


@pytest.mark.parametrize("function", [blended, two_products_blended, a_bias_after_the_softmax])
def test_blends(function: Callable[..., Tensor]) -> None:
    fuses(function, 10, more=(torch.randn(2, 24, 10, generator=torch.Generator().manual_seed(2)),))


def test_a_division_by_another_sum_is_none_by_one() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        attn = scores(q, k).softmax(-1) + table.softmax(-1)
        return (attn / attn.square().sum(-1, keepdim=True)) @ v

    stays(function, "", 10, more=(torch.randn(2, 24, 10),))


# ---------------------------------------------------------------------------------------------------- keys and blanks


def rows_and_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys in two axes, which the values are summed over together."""
    k, v = k.unflatten(2, (3, 4)), v.unflatten(2, (3, 4))
    attn = torch.einsum("bhid,bhyxd->bhiyx", q, k).flatten(-2).softmax(-1).unflatten(-1, (3, 4))
    return torch.einsum("bhiyx,bhyxd->bhid", attn, v)


def only_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over one of the two axes, summed over both: attentions to rows of keys, summed."""
    k, v = k.unflatten(2, (3, 4)), v.unflatten(2, (3, 4))
    attn = torch.einsum("bhid,bhyxd->bhiyx", q, k).softmax(-1)
    return torch.einsum("bhiyx,bhyxd->bhid", attn, v)


def test_keys_in_two_axes() -> None:
    fuses(rows_and_columns, 12)
    fuses(only_columns, 12)


def products_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No matrix anywhere."""
    weights = (q[:, :, 0, None] * k).sum(-1).softmax(-1)
    return (weights[..., None] * v).sum(2)


def test_products_by_hand_of_inputs() -> None:
    fuses(products_by_hand, 12)


@pytest.mark.parametrize("blank", [torch.zeros_like, lambda x: x.new_zeros(x.shape), lambda x: torch.full_like(x, 0.0)])
def test_a_mask_made_in_the_image_of_the_scores_reads_none(blank: Callable[[Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        logits = scores(q, k)
        mask = blank(logits).scatter(-1, chosen, 1.0)
        return logits.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v

    chosen = torch.randint(0, 10, (2, 2, 24, 3), generator=torch.Generator().manual_seed(3))
    fuses(function, 10, more=(chosen,))


class Neighbours(nn.Module):
    """Stand-alone self-attention: rows and columns have embeddings, and weights are expanded like the values."""

    def __init__(self, groups: int = 2, width: int = 8, window: int = 3) -> None:
        super().__init__()
        self.groups, self.window = groups, window
        self.rows = nn.Parameter(torch.randn(width // 2, 1, 1, window, 1))
        self.columns = nn.Parameter(torch.randn(width // 2, 1, 1, 1, window))
        self.query, self.key, self.value = (nn.Conv2d(width, width, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        padded = F.pad(x, [self.window // 2] * 4)
        k, v = (f(padded).unfold(2, self.window, 1).unfold(3, self.window, 1) for f in (self.key, self.value))
        rows, columns = k.split(width // 2, dim=1)
        k = torch.cat((rows + self.rows, columns + self.columns), dim=1)
        shape = (batch, self.groups, width // self.groups, height, length, -1)
        q, k, v = self.query(x).view(shape), k.contiguous().view(shape), v.contiguous().view(shape)
        weights = (q * k).sum(2, keepdim=True).softmax(-1).expand_as(v)
        return torch.einsum("bnchwk,bnchwk->bnchw", weights, v).reshape(batch, -1, height, length)


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_that_are_expanded_like_the_values_are_not_made_of_them(dynamic: bool) -> None:
    model, x = Neighbours(), torch.randn(2, 8, 5, 6)
    if not dynamic:
        check(model, (x,), sites=1, lower=False, gradients=True)
        return
    torch._dynamo.reset()
    run = rewritten(model, engine="tiled", require=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 8, 5, 6), (3, 8, 4, 9)):
            x = torch.randn(shape)
            assert difference(run(x), model(x)) < 1e-5


@pytest.mark.parametrize("like", [torch.Tensor.type_as, torch.Tensor.expand_as], ids=["type", "shape"])
def test_what_is_put_in_the_image_of_the_scores_reads_none(like: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The mask is a result, too."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores(q, k)
        mask = like(keep, logits)
        return logits.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v, mask.cumsum(-1)

    fuses(function, 10, more=(torch.randint(0, 2, (24, 10)).index_fill(1, torch.tensor([0]), 1),))


def test_a_softmax_of_one_number_is_no_attention() -> None:
    report = refocus.explain(Attention(lambda q, k, v: scores(q, k).softmax(-1) @ v), *drawn(1), engine="tiled")
    assert not report.sites


def test_a_map_that_nobody_reads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = scores(q, k).softmax(-1)
        shown = torch.zeros(2, 2, 24, 20)
        shown[..., :10] = attn
        shown.view(2, 2, 24, 2, 10)[:, :, :, 1].copy_(attn)
        return attn @ v

    fuses(function, 10)


def test_a_map_that_is_read() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        attn = scores(q, k).softmax(-1)
        shown = torch.zeros(2, 2, 24, 20)
        shown[..., :10] = attn
        return attn @ v, shown.amax(-1)

    stays(function, "the probabilities are read elsewhere", 10)


def test_a_copy_into_the_whole_of_a_tensor_has_a_derivative() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.empty(2, 2, 10, 8, dtype=torch.float64)
        keys[:] = k * 2
        keys[:] = keys.flip(-1).to(k.dtype)
        return scores(q, keys.to(q.dtype)).softmax(-1) @ v

    fuses(function, 10)


def keys_twice(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """One tensor is both the first and the last part of a concatenation."""
    k, v = torch.cat([k, k2, k], -2), torch.cat([v, v2, v], -2)
    return scores(q, k).softmax(-1) @ v


def channels_thrice(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    first, second, third = torch.cat([q, q, q], -1).chunk(3, -1)
    return scores(first, second + k[..., : q.shape[-2], :]).softmax(-1) @ third


@pytest.mark.parametrize("function", [keys_twice, channels_thrice], ids=lambda f: f.__name__)
def test_one_tensor_several_times(function: Callable[..., Tensor]) -> None:
    fuses(function, 40, 24)


def test_a_product_of_a_column_and_a_row_keeps_the_axis_it_sums_over() -> None:
    """Views drop an axis of one element, and a kernel that pads it must see where it ends."""

    class Scaled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lengths = q.norm(dim=-1)[..., :, None] @ k.norm(dim=-1)[..., None, :]
            return ((q @ k.mT) / (lengths + 1e-6)).softmax(-1) @ v

    inputs = torch.randn(3, 2, 2, 20, 8).unbind()
    (site,) = check(Scaled(), inputs, lower=False, gradients=True).report.sites
    assert "sum_d1 q1[b,h,i,d1] * k1[b,h,j]" in site.notation


# ---------------------------------------------------------------------------------------------- maps put together


def maps(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.linspace(-1.0, 1.0, 8)
    return scores(q, k), scores(q, k.cos()), scores((q * table).sin(), k)


def stacked_and_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack(maps(q, k)).sum(0).softmax(-1) @ v


def stacked_and_averaged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack(maps(q, k), -1).mean(-1).softmax(-1) @ v


def stacked_and_weighted(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return (torch.stack(maps(q, k), -1) * w).sum(-1).softmax(-1) @ v


def stacked_and_contracted(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhijc,c->bhij", torch.stack(maps(q, k), -1), w).softmax(-1) @ v


def as_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(maps(q, k), 1).unflatten(1, (3, -1)).sum(1).softmax(-1) @ v


@pytest.mark.parametrize(
    "function", [stacked_and_added, stacked_and_averaged, stacked_and_weighted, stacked_and_contracted, as_channels]
)
def test_maps_of_scores_that_are_put_together_and_added(function: Callable[..., Tensor]) -> None:
    fuses(function, 10, more=(torch.tensor([0.5, -1.0, 2.0]),) if "w" in function.__code__.co_varnames else ())


def test_maps_of_scores_that_are_added_across_heads() -> None:
    """Three of the six heads of three maps at a time."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(maps(q, k), 1).unflatten(1, (2, 3)).sum(2).softmax(-1) @ v

    fuses(function, 10)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ scores(q, k).softmax(-1).mT).mT


def transposed_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), torch.zeros_like(q[..., :1])), -1).softmax(-1)
    return (v.mT @ p.split((10, 1), -1)[0].mT).mT


def transposed_by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhje,bhji->bhei", v, scores(k, q).softmax(2))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("function", [transposed, transposed_part, transposed_by_letters])
def test_keys_before_queries(function: Callable[..., Tensor], heads: int) -> None:
    """Of one head, nothing stands before the keys: the queries stand after them."""
    inputs = [t[:, :heads].contiguous() for t in drawn(10)]
    check(Attention(function), inputs, sites=1, lower=False, gradients=True)
