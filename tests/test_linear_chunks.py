"""What is computed in chunks is one linear attention where both its parts are proved to be: spellings, near misses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.errors import StaleMask
from refocus.testing import check
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SIZE = 4  # of a chunk


def inputs(count: int, length: int = 12, low: float = 0.5, high: float = 1.0) -> list[Tensor]:
    """q, k, v, gates of decays between `low` and `high`, one for each channel, and numbers between 0 and 1."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v, g, b = (torch.rand(2, 3, length, 5, generator=drawn) for _ in range(5))
    return [q, k, v, (low + (high - low) * g).log(), b[..., 0]][:count]


def zero(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


# ---------------------------------------------------------------------------------------------------- loops


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, slip: str = "") -> Tensor:
    """A gate for each head; `slip` is what is not right."""
    state, rows = zero(k, v), []
    for start in range(0, q.shape[2], SIZE):
        query, key, value, gate = (x[:, :, start : start + SIZE] for x in (q, k, v, g[..., 0]))
        sums = gate.cumsum(-1)
        between = sums[..., :, None] - sums[..., None, :]
        if slip == "inside":
            between = between - gate[..., None, :]
        if slip == "ahead":
            between = between.masked_fill(later(SIZE + 1)[:-1, 1:].roll(1, 1), float("-inf"))
        inside = (query @ key.mT) * (
            between.tril() if slip == "unmasked" else between.masked_fill(later(SIZE), -1e9)
        ).exp()
        if slip not in ("unmasked", "ahead"):
            inside = (query @ key.mT) * between.masked_fill(later(SIZE), float("-inf")).exp()
        reader = sums - gate if slip == "reads" else sums
        rows.append(inside @ value + (query * reader[..., None].exp()) @ state)
        writer = sums[..., -1:] - sums + (gate if slip == "writes" else 0)
        whole = sums[..., -2] if slip == "keeps" else sums[..., -1]
        written = key if slip != "keys" else query
        state = state * whole[..., None, None].exp() + (written * writer[..., None].exp()).mT @ value
    return torch.cat(rows, 2)


def by_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A gate for each channel, its decays on queries and keys: exp(sums) and exp(-sums)."""
    sums = g.unflatten(2, (-1, SIZE)).cumsum(3)
    queries, keys, values = (x.unflatten(2, (-1, SIZE)) for x in (q, k, v))
    inside = ((queries * sums.exp()) @ (keys * (-sums).exp()).mT).tril() @ values
    state, out = zero(k, v), torch.zeros_like(values)
    last = sums[:, :, :, -1:]
    for i in range(queries.shape[2]):
        out[:, :, i] = inside[:, :, i] + (queries[:, :, i] * sums[:, :, i].exp()) @ state
        written = (keys[:, :, i] * (last[:, :, i] - sums[:, :, i]).exp()).mT @ values[:, :, i]
        state = state * last[:, :, i].exp().mT + written
    return out.flatten(2, 3)


def undecayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last chunk is shorter."""
    state, rows = zero(k, v), []
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        rows.append((query @ key.mT).tril() @ value + query @ state)
        state = state + key.mT @ value
    return torch.cat(rows, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor, slip: str = "") -> Tensor:
    """Divided by the sum of the weights, which has a state of its own, or by one where that is larger."""
    state, total, rows = zero(k, v), torch.zeros_like(k[:, :, 0]), []
    for start in range(0, q.shape[2], SIZE):
        query, key, value, gate = (x[:, :, start : start + SIZE] for x in (q, k, v, g[..., 0]))
        sums = gate.cumsum(-1)
        weights = (query @ key.mT) * (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        query, key = query * sums[..., None].exp(), key * (sums[..., -1:] - sums)[..., None].exp()
        divisor = weights.sum(-1) + (query @ total[..., None]).squeeze(-1)
        if slip == "squares":
            divisor = divisor + weights.square().sum(-1)
        rows.append((weights @ value + query @ state) / divisor.abs().clamp(min=1)[..., None])
        kept = sums[..., -1, None].exp()
        state = state * kept[..., None] + key.mT @ value
        total = total * (1 if slip == "undecayed" else kept) + key.sum(2)
    return torch.cat(rows, 2)


def summed_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written into one tensor, its last chunk shorter, an epsilon in the sum."""
    state, total, out = zero(k, v), torch.zeros_like(k[:, :, :1]), torch.zeros_like(v)
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        weights = (query @ key.mT).tril()
        divisor = weights.sum(-1, keepdim=True) + query @ total.mT + 1e-6
        out[:, :, start : start + SIZE] = (weights @ value + query @ state) / divisor
        state, total = state + key.mT @ value, total + key.sum(2, keepdim=True)
    return out


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A constant decay for each head, its powers on the results and on the values."""
    decay = torch.tensor([0.5, 0.9, 0.99])[:, None, None]
    index = torch.arange(SIZE)
    pairs = torch.where(index[:, None] >= index, decay ** (index[:, None] - index).clamp(min=0), 0.0)
    state, rows = zero(k, v), []
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        rows.append((query @ key.mT * pairs) @ value + query @ state * decay ** (index[:, None] + 1))
        state = decay**SIZE * state + key.mT @ (value * decay ** (SIZE - 1 - index[:, None]))
    return torch.cat(rows, 2)


def own_last(q: Tensor, k: Tensor, v: Tensor, slip: str) -> Tensor:
    """A last chunk that is not like the others, only shorter."""
    state, rows = zero(k, v), []
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        weights = query @ key.mT
        weights = weights.tril() if start < 2 * SIZE or slip == "state" else weights
        rows.append(weights @ value + query @ (0.5 * state if start == 2 * SIZE and slip == "state" else state))
        state = state + key.mT @ value
    return torch.cat(rows, 2)


# ---------------------------------------------------------------------------------------------------- all at once


def segments(x: Tensor) -> Tensor:
    """Sums of x[t] over j < t <= i; -inf above the diagonal."""
    n = x.shape[-1]
    x = x[..., None].expand(*x.shape, n).masked_fill(~later(n).mT, 0)
    return x.cumsum(-2).masked_fill(later(n), float("-inf"))


def all_at_once(q: Tensor, k: Tensor, v: Tensor, g: Tensor, slip: str = "") -> Tensor:
    """State-space duality: states of all chunks, carried by the segment sums of what whole chunks decay by."""
    length = q.shape[2]
    rest = -length % SIZE
    q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, SIZE)) for x in (q, k, v))
    a = F.pad(g[..., 0], (0, rest)).unflatten(2, (-1, SIZE))
    sums = a.cumsum(-1)
    inside = torch.einsum("bhcld,bhcsd,bhcls,bhcse->bhcle", q, k, segments(a).exp(), v)
    states = torch.einsum("bhcsd,bhcs,bhcse->bhcde", k, (sums[..., -1:] - sums).exp(), v if slip != "values" else k)
    states = torch.cat((torch.zeros_like(states[:, :, :1]), states), 2)
    carried = segments(F.pad(sums[..., -1 if slip != "last" else -2], (1, 0))).exp()
    before = torch.einsum("bhzc,bhcde->bhzde", carried, states)
    before = before[:, :, 1:] if slip == "late" else before[:, :, :-1]
    out = inside + torch.einsum("bhcld,bhcl,bhcde->bhcle", q, (sums - (a if slip == "read" else 0)).exp(), before)
    return out.flatten(2, 3)[:, :, :length]


def padded_features(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Keys that are exponentials, padded by zeros; results of padding are given out, too."""
    rest = -q.shape[2] % SIZE
    weights = torch.linspace(-1, 1, 20, dtype=q.dtype).view(5, 4)
    q, k = (torch.exp(x @ weights - x.square().sum(-1, keepdim=True) / 2) / 2 for x in (q, k))
    q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, SIZE)) for x in (q, k, v))
    sums = F.pad(g[..., 0], (0, rest)).unflatten(2, (-1, SIZE)).cumsum(-1)
    inside = (q @ k.mT) * (sums[..., :, None] - sums[..., None, :]).masked_fill(later(SIZE), float("-inf")).exp()
    states = (k * (sums[..., -1:] - sums).exp()[..., None]).mT @ v
    states = torch.cat((torch.zeros_like(states[:, :, :1]), states), 2)
    carried = segments(F.pad(sums[..., -1], (1, 0))).exp()
    before = torch.einsum("bhzc,bhcde->bhzde", carried, states)[:, :, :-1]
    return (inside @ v + (q * sums.exp()[..., None]) @ before).flatten(2, 3)


def test_padding_is_not_read_beyond_what_it_pads() -> None:
    check(Module(padded_features), inputs(4, length=10), family="linear", sites=1, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- the delta rule


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, slip: str = "") -> Tensor:
    """The gated delta rule in chunks, by triangular solves."""
    length = q.shape[2]
    rest = -length % SIZE
    k = F.normalize(k, dim=-1)
    q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, SIZE)) for x in (q, k, v))
    g, b = (F.pad(x, (0, rest)).unflatten(2, (-1, SIZE)) for x in (g[..., 0], b))
    sums, b = g.cumsum(-1), b[..., None]
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later(SIZE), float("-inf")).exp()
    system = ((b * k if slip != "rate" else b * b * k) @ k.mT) * (between if slip != "undecayed" else between.ceil())
    inside = (q @ k.mT) * between
    own = torch.linalg.solve_triangular(system, b * v, upper=slip == "upper", unitriangular=True)
    looked_up = (b * (k if slip != "other keys" else q)) * sums[..., None].exp()
    seen = torch.linalg.solve_triangular(system, looked_up, upper=slip == "upper", unitriangular=True)
    state, out = zero(k[:, :, 0], v[:, :, 0]), torch.zeros_like(own)
    q, k = q * sums[..., None].exp(), k * (sums[..., -1:] - sums)[..., None].exp()
    for i in range(q.shape[2]):
        u = own[:, :, i] + seen[:, :, i] @ state if slip == "sign" else own[:, :, i] - seen[:, :, i] @ state
        out[:, :, i] = q[:, :, i] @ state + inside[:, :, i] @ u
        state = state * sums[:, :, i, -1].exp()[..., None, None] + k[:, :, i].mT @ u
    return out.flatten(2, 3)[:, :, :length]


# ---------------------------------------------------------------------------------------------------- states


def carried(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, late: int = 0) -> tuple[Tensor, Tensor]:
    """From a state, and to the next; with `late`, states are kept as they are one step after the end of a chunk."""
    rate, rows = 0.25, []
    index = torch.arange(SIZE)[:, None]
    between = torch.where(index >= index.T, torch.exp(-rate * (index - index.T)), 0.0)
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v * g.exp()))
        rows.append((query @ key.mT * between) @ value + (query * torch.exp(-rate * (index + 1 - late))) @ state)
        written = (key * torch.exp(-rate * (SIZE - 1 + late - index))).mT @ value
        state = state * math.exp(-rate * SIZE) + written
    return torch.cat(rows, 2), state


def by_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for t in range(q.shape[2]):
        state = g[:, :, t].exp().unsqueeze(-1) * state + 0.5 * k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(rows, 2), state


def erasing(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    k, rows = F.normalize(k, dim=-1), []
    for t in range(q.shape[2]):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        state = state * g[:, :, t, :1, None].exp()
        state = state + key * (value - key.mT @ state)
        rows.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(rows, 2), state


def scaled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, number: bool = False) -> tuple[Tensor, Tensor]:
    """What is written to the state is scaled, by head or by a number, as are the pairs; where it is read, nothing."""
    share, rows = 0.5 if number else torch.sigmoid(g[0, :, 0, 0])[:, None, None], []
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        rows.append((share * (query @ key.mT)).tril() @ value + query @ state)
        state = state + share * (key.mT @ value)
    return torch.cat(rows, 2), state


def scaled_values(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule, of half of each value."""
    q, k, v, rate = (x.unflatten(2, (-1, SIZE)) for x in (q, F.normalize(k, dim=-1), v, g[..., :1].exp()))
    system = (rate * k @ k.mT).tril(-1)
    own = torch.linalg.solve_triangular(system, rate * v * 0.5, upper=False, unitriangular=True)
    seen = torch.linalg.solve_triangular(system, rate * k, upper=False, unitriangular=True)
    rows = []
    for i in range(q.shape[2]):
        u = own[:, :, i] - seen[:, :, i] @ state
        rows.append(q[:, :, i] @ state + (q[:, :, i] @ k[:, :, i].mT).tril() @ u)
        state = state + k[:, :, i].mT @ u
    return torch.stack(rows, 2).flatten(2, 3), state


def test_states_hold_what_their_keys_and_values_are_scaled_by() -> None:
    given = [*inputs(4), torch.rand(2, 3, 5, 5)]
    for module in (Module(scaled), Module(scaled, number=True), Module(scaled_values)):
        check(module, given, family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("function", [carried, by_steps, erasing])
def test_states_before_and_after(function: Function) -> None:
    given = [*inputs(4), torch.rand(2, 3, 5, 5)]
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "initial[b,h,d,e]" in site.notation


def test_states_that_are_not_those_of_positions() -> None:
    """What they are one step later is the same attention, from zero, and other states."""
    given = [*inputs(4), torch.rand(2, 3, 5, 5)]
    from_zero = Module(lambda q, k, v, g: carried(q, k, v, g, zero(k, v), late=1)[0])
    check(from_zero, given[:4], family="linear", sites=1, lower=False, gradients=True)
    report = check(Module(carried, late=1), given, fused=False, engines=(), lower=False).report
    assert any("at the end of a chunk" in site.reason for site in report.sites)


SPELLINGS = [gated, by_channels, undecayed, all_at_once, delta, normalised, summed_up, by_heads]


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    low = 1 - 1e-5 if function is all_at_once else 0.5
    given = inputs(function.__code__.co_argcount - ("slip" in function.__code__.co_varnames), low=low)
    report = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report
    assert report.sites[0].mask == "j <= i"
    gate = "gate[b,h,t,d]" if function is by_channels else "gate[b,h,t]"
    assert (gate in report.sites[0].notation) == (function not in (undecayed, summed_up))
    assert ("erase" in report.sites[0].notation) == (function is delta)


@pytest.mark.parametrize("function", [undecayed, all_at_once, delta, summed_up])
def test_a_shorter_last_chunk(function: Function) -> None:
    given = inputs(function.__code__.co_argcount - ("slip" in function.__code__.co_varnames), length=10)
    check(Module(function), given, family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize(
    ("function", "slip", "reason"),
    [
        (gated, "inside", "decays are no sums of the gates"),
        (gated, "unmasked", "not causal"),
        (gated, "reads", "decays otherwise between chunks"),
        (gated, "writes", "decays otherwise between chunks"),
        (gated, "keeps", "no sum of the gates between key and query"),
        (gated, "keys", "other queries, keys or values"),
        (normalised, "undecayed", "the normaliser is no sum of the weights"),
        (normalised, "squares", "the normaliser is not linear in the scores (`square` of them)"),
        (own_last, "state", "the last step"),
        (own_last, "mask", "the last step"),
    ],
)
def test_a_loop_that_is_none(function: Function, slip: str, reason: str) -> None:
    decays = function in (gated, normalised)
    given = inputs(4 if decays else 3, length=12 if decays else 10)
    report = check(Module(function, slip=slip), given, fused=False, engines=(), lower=False).report
    assert any(reason in site.reason for site in report.sites if not site.recognized), report


@pytest.mark.parametrize("slip", ["values", "last", "late", "read"])
def test_states_that_are_others(slip: str) -> None:
    """Its parts may be fused, each by itself; it is not one attention."""
    report = check(Module(all_at_once, slip=slip), inputs(4), fused=False, lower=False).report
    assert not any("48" in site.reason for site in report.sites)
    assert all(site.notation.count("[b,h,g") for site in report.sites if site.recognized)


@pytest.mark.parametrize("slip", ["rate", "undecayed", "upper", "other keys", "sign"])
def test_no_delta_rule(slip: str) -> None:
    report = check(Module(delta, slip=slip), inputs(5), fused=False, engines=(), lower=False).report
    assert not any("erase" in site.notation for site in report.sites)


# ---------------------------------------------------------------------------------------------------- kept decays


class Kept(nn.Module):
    """Lightning attention in blocks, its decays kept as buffers."""

    def __init__(self, size: int = SIZE, rates: tuple[float, ...] = (0.7, 0.1, 1e-5)) -> None:
        super().__init__()
        self.size = size
        slope = torch.tensor(rates)[:, None, None]
        index = torch.arange(size)[:, None] + 1
        pairs = torch.zeros(len(rates), size, size)
        for i in range(size):
            for j in range(i + 1):
                pairs[:, i, j] = torch.exp(-slope[:, 0, 0] * (i - j))
        self.register_buffer("slope", slope)
        self.register_buffer("pairs", pairs)
        self.register_buffer("reads", torch.exp(-slope * index))
        self.register_buffer("writes", torch.exp(-slope * (size - index)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, rows = zero(k, v), []
        for start in range(0, q.shape[2], self.size):
            query, key, value = (x[:, :, start : start + self.size] for x in (q, k, v))
            n = query.shape[2]
            inside = (query @ key.mT) * self.pairs[:, :n, :n]
            rows.append((query * self.reads[:, :n]) @ state + inside @ value)
            written = (key * self.writes[:, -n:]).mT @ value
            state = state * torch.exp(-self.slope * n) + written
        return torch.cat(rows, 2)


@pytest.mark.parametrize("length", [12, 10])
def test_kept_decays(length: int) -> None:
    report = check(Kept(), inputs(3, length), family="linear", sites=1, lower=False, gradients=True).report
    assert "exp(sum_{j<t<=i} gate[b,h,t])" in report.sites[0].notation


@pytest.mark.parametrize(
    ("name", "at"), [("pairs", (1, 3, 0)), ("pairs", (0, 0, 2)), ("reads", (2, 1)), ("writes", (0, 3))]
)
def test_a_kept_decay_that_is_another(name: str, at: tuple[int, ...]) -> None:
    module = Kept()
    getattr(module, name)[at] += 1e-4
    report = check(module, inputs(3), fused=False, engines=(), lower=False).report
    # The pairs of each chunk may be an attention by themselves; what they decay by is no decay any more.
    assert not report.sites[-1].recognized
    assert name != "pairs" or not any(site.family == "linear" for site in report.sites)


def test_a_kept_decay_that_changes() -> None:
    module, given = Kept(), inputs(3)
    run = refocus.optimize(module, engine="tiled", require=True)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), module(*given))
        module.reads.mul_(1.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.testing.assert_close(run(*given), module(*given))
    assert any(issubclass(w.category, StaleMask) for w in seen)
