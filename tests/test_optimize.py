"""`refocus.optimize` and `refocus.explain`: the model stays a model, and nothing that people do with one breaks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import refocus
from refocus import backend, regroup
from refocus.errors import CannotExplain, EngineUnavailable, RegionNotFused, UnknownOption, VerificationFailed


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Causal self-attention, everything spelled out."""

    def __init__(self, width: int = 32, heads: int = 4, returns_weights: bool = False) -> None:
        super().__init__()
        self.heads, self.returns_weights = heads, returns_weights
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(b, n, c))
        return (y, weights) if self.returns_weights else y


class Block(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.attention, self.norm, self.checkpointed = Attention(), nn.BatchNorm1d(32), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)
        return self.norm((x + y).transpose(1, 2)).transpose(1, 2)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ still the same model


def test_the_result_is_the_same_model() -> None:
    model = Block().eval()
    seen = []
    model.attention.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fast = refocus.optimize(model, engine="tiled")
    assert type(fast) is Block and fast is not model
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters()))
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert close(fast(x), model(x))
    assert seen[0] == (2, 9, 32)
    with torch.no_grad():
        model.attention.out.weight.mul_(2)  # shared, so both see it
        assert close(fast(x), model(x))


def test_keyword_arguments_and_functions() -> None:
    model = Attention().eval()
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        assert close(refocus.optimize(model, engine="tiled")(x, scale=0.1), model(x, scale=0.1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain attention."""
        return (q @ k.mT).softmax(-1) @ v

    fast = refocus.optimize(attend, engine="tiled", require=True)
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    assert fast.__doc__ == "Plain attention."
    assert close(fast(q, k, v), attend(q, k, v))


def test_as_a_backend() -> None:
    model = Attention().eval()
    found = []
    fast = torch.compile(model, backend=refocus.refocus_backend, options={"engine": "tiled", "report": found.append})
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        assert close(fast(x), model(x))
    assert [s.fused for s in found[0].sites] == [True]


# ------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference(guard: type) -> None:
    model = Block().eval()
    found: list[refocus.Report] = []
    fast = refocus.optimize(model, engine="tiled", require=True, report=found.append)
    with guard():
        x = torch.randn(2, 8, 32)
        assert close(fast(x), model(x))
    assert found[0].sites[0].fused


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(inside: bool) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.attention(x)

    model = (Cast() if inside else Attention()).eval()
    fast = refocus.optimize(model, engine="tiled", require=True)
    x = torch.randn(2, 8, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        expected, got = model(x), fast(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert (got.float() - expected.float()).abs().max() < 0.02


@pytest.mark.parametrize("engine", [None, "tiled"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_training_gives_the_same_gradients(checkpointed: bool, engine: str | None) -> None:
    model = Block(checkpointed).train()
    twin = Block(checkpointed).train()
    twin.load_state_dict(model.state_dict())
    found: list[refocus.Report] = []
    fast = refocus.optimize(twin, engine=engine, require=engine is not None, report=found.append)
    x = torch.randn(2, 8, 32)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for m, leaf in zip((model, fast), inputs):
        m(leaf).square().sum().backward()
    assert close(inputs[0].grad, inputs[1].grad)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert close(a.grad, b.grad), name
    assert close(model.norm.running_mean, twin.norm.running_mean)
    assert [site.fused for report in found for site in report.sites] == [engine is not None]
    if engine is None:
        assert "needs gradients" in found[0].sites[0].reason


def test_no_grad_inside_a_training_step() -> None:
    """A frozen tower under no_grad is fused although the rest of the graph trains."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = Attention(), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.frozen(x)
            return self.head(y).sum()

    model = Towers()
    found: list[refocus.Report] = []
    fast = refocus.optimize(model, engine="tiled", report=found.append)
    x = torch.randn(1, 6, 32)
    loss, expected = fast(x), model(x)
    assert close(loss, expected)
    loss.backward()
    assert model.head.weight.grad is not None and model.frozen.out.weight.grad is None
    assert found[0].sites[0].fused


# ------------------------------------------------------------------------------------------------ shapes, graphs, state


def test_one_graph_serves_many_lengths() -> None:
    model = Attention().eval()
    found: list[refocus.Report] = []
    fast = refocus.optimize(model, engine="tiled", dynamic=True, require=True, report=found.append)
    with torch.no_grad():
        for length in (33, 70, 129, 12):
            x = torch.randn(2, length, 32)
            assert close(fast(x), model(x))
    assert len(found) == 1


def test_numbers_that_arrive_at_run_time() -> None:
    """With dynamic sizes, a number that the model keeps is a value of the graph, too."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.share = 0.3, 0.5

        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            scores = torch.baddbmm(bias, q, k.mT, beta=self.share, alpha=self.scale)
            return torch.bmm(torch.add(scores, bias, alpha=self.share).softmax(-1), v)

    model = Scaled()
    fast = refocus.optimize(model, engine="tiled", dynamic=True, require=True)
    with torch.no_grad():
        for length in (20, 33):
            inputs = (*torch.randn(3, 2, length, 8).unbind(), torch.randn(2, length, length))
            assert close(fast(*inputs), model(*inputs))


def test_decoding_with_a_cache() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(1, 2, 16, 8))
            self.register_buffer("values", torch.zeros(1, 2, 16, 8))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
            self.keys.index_copy_(2, at, k)
            self.values.index_copy_(2, at, v)
            scores = q @ self.keys.mT / math.sqrt(8)
            seen = torch.arange(16) <= at
            return scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1) @ self.values

    eager, twin = Step(), Step()
    fast = refocus.optimize(twin, engine="tiled")
    with torch.no_grad():
        for t in range(5):
            q, k, v = torch.randn(3, 1, 2, 1, 8).unbind()
            at = torch.tensor([t])
            assert close(fast(q, k, v, at), eager(q, k, v, at))
    assert torch.equal(eager.keys, twin.keys)


def test_a_write_between_scores_and_values_is_not_crossed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        k.zero_()
        v.add_(1.0)
        return weights @ v

    q, k, v = torch.randn(3, 2, 6, 8).unbind()
    expected = attend(q, k.clone(), v.clone())
    fast = refocus.optimize(attend, engine="tiled")
    mine_k, mine_v = k.clone(), v.clone()
    assert close(fast(q, mine_k, mine_v), expected)
    assert torch.equal(mine_k, torch.zeros_like(k)) and torch.equal(mine_v, v + 1)


def test_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model = Broken().eval()
    x = torch.randn(2, 7, 32)
    report = refocus.explain(model, x)
    assert report.graphs >= 2 and len(report.sites) == 2
    with torch.no_grad():
        assert close(refocus.optimize(model, engine="tiled", require=True)(x), model(x))


@pytest.mark.filterwarnings("ignore::refocus.FallbackWarning")  # torch 2.11 notices later, when it compiles
def test_a_graph_that_cannot_be_traced_again_runs_as_it_is() -> None:
    """A scan expands to code under torch.vmap, whose values the tracer loses."""
    from torch._higher_order_ops.associative_scan import associative_scan

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x)
            return associative_scan(lambda a, b: a * 0.5 + b, y, dim=1, combine_mode="generic")

    model = Mixed().eval()
    x = torch.randn(2, 16, 32)
    found: list[refocus.Report] = []
    with torch.no_grad():
        assert close(refocus.optimize(model, engine="tiled", report=found.append)(x), model(x))
    assert found[0].notes or all(site.fused or "failed" in site.reason for site in found[0].sites)


def test_containers_are_one_graph_and_many_models_are_compiled() -> None:
    x = torch.randn(1, 8, 32)
    for _ in range(10):  # more than Dynamo compiles from one code object
        model = nn.Sequential(Attention(), Attention()).eval()
        found: list[refocus.Report] = []
        with torch.no_grad():
            assert close(refocus.optimize(model, engine="tiled", report=found.append)(x), model(x))
        assert [len(r.sites) for r in found] == [2]


def test_equal_layers_are_equal_regions() -> None:
    model = nn.Sequential(*(Attention() for _ in range(12))).eval()
    report = refocus.explain(model, torch.randn(1, 8, 32), engine="tiled")
    assert len(report.sites) == 12
    assert len({(s.notation, s.mask, s.engine) for s in report.sites}) == 1


# ------------------------------------------------------------------------------------------------ what is asked for


def test_probabilities_that_escape_are_left_alone() -> None:
    model = Attention(returns_weights=True).eval()
    x = torch.randn(2, 7, 32)
    report = refocus.explain(model, x, engine="tiled")
    [site] = report.sites
    assert not site.fused and "read elsewhere" in site.reason
    with torch.no_grad():
        for got, expected in zip(refocus.optimize(model, engine="tiled")(x), model(x)):
            assert close(got, expected)
        with pytest.raises(RegionNotFused, match="read elsewhere"):
            refocus.optimize(model, require=True)(x)


@pytest.mark.parametrize("options", [{"engine": "cuda"}, {"verify": "often"}])
def test_unknown_options(options: dict[str, str]) -> None:
    with pytest.raises(UnknownOption, match=next(iter(options.values()))):
        refocus.optimize(Attention(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine is available here")
def test_an_engine_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.no_grad(), pytest.raises(EngineUnavailable, match="triton"):
        refocus.optimize(Attention().eval(), engine="triton")(torch.randn(1, 5, 32))


def test_explain_says_what_the_model_cannot_run_on() -> None:
    with pytest.raises(CannotExplain, match="does not run on these inputs"):
        refocus.explain(Attention(), torch.randn(3, 5, 31))


def test_explain_row() -> None:
    report = refocus.explain(Attention().eval(), torch.randn(2, 200, 32), engine="tiled")
    [site] = report.sites
    assert site.recognized and site.fused and site.family == "softmax" and site.mask == "j <= i"
    assert site.tiles is not None and site.tiles.shape == (64, 64)
    assert (site.tiles.empty, site.tiles.partial, site.tiles.full) == (6, 4, 6)
    assert site.location.endswith(".py:" + site.location.rsplit(":", 1)[1]) and "test_optimize.py" in site.location
    assert site.before is not None and site.after is not None and site.after.bytes < site.before.bytes


# ------------------------------------------------------------------------------------------------ when we are wrong


def test_a_failing_stage_falls_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(facts: object) -> None:
        raise ValueError("a defect of ours")

    monkeypatch.setattr(regroup, "recognize", broken)
    model = Attention().eval()
    x = torch.randn(1, 6, 32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = refocus.optimize(model)
        assert close(fast(x), model(x)) and close(fast(x), model(x))
    ours = [w for w in caught if issubclass(w.category, refocus.FallbackWarning)]
    assert len(ours) == 1 and "a defect of ours" in str(ours[0].message)


def test_a_compiler_error_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lower(gm: torch.fx.GraphModule, inputs: object) -> object:
        calls.append(gm)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return gm.forward

    monkeypatch.setattr("refocus.api.inductor", lower)
    model = Attention().eval()
    x = torch.randn(1, 6, 32)
    with torch.no_grad(), pytest.warns(refocus.FallbackWarning, match="out of memory"):
        assert close(refocus.optimize(model, engine="tiled")(x), model(x))
    assert len(calls) == 2


def test_verify_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention().eval()
    x = torch.randn(1, 6, 32)
    with torch.no_grad():
        assert close(refocus.optimize(model, engine="tiled", verify="first")(x), model(x))
        torch._dynamo.reset()

        def wrong(gm: torch.fx.GraphModule, inputs: object) -> object:
            return lambda *args: [y + 0.1 for y in gm(*args)]

        monkeypatch.setattr("refocus.api.inductor", wrong)
        with pytest.raises(VerificationFailed, match="differs from eager"):
            refocus.optimize(model, engine="tiled", verify="always")(x)


def test_a_graph_without_attention_is_untouched() -> None:
    calls = []
    gm_seen = []

    def lower(gm: torch.fx.GraphModule, inputs: object) -> object:
        gm_seen.append(gm)
        return gm.forward

    def through(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        calls.append(gm)
        return backend.compile_graph(gm, inputs, refocus.options.Options(), lower)

    torch.compile(nn.Linear(4, 4), backend=through)(torch.randn(2, 4))
    assert calls == gm_seen


def test_padded_reads_stay_in_range() -> None:
    """A padded bias and a key that is concatenated: what a condition guards is still loaded within its tensor."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, more: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT, more], dim=-1) + nn.functional.pad(bias, (3, 0))
        return scores.softmax(-1) @ v

    q, k = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    v, bias, more = torch.randn(2, 7, 8), torch.randn(6, 4), torch.randn(2, 6, 2)
    assert close(refocus.optimize(attend, engine="tiled")(q, k, v, bias, more), attend(q, k, v, bias, more))


def test_a_scaled_stable_shift_cancels() -> None:
    """Base-2 softmax over a transposed score matrix, the maximum subtracted before the scale."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bjd,bid->bji", k, q)
        p = torch.exp2((s - s.amax(1, keepdim=True)) * 1.4426950408889634)
        return torch.einsum("bji,bje->bie", p / p.sum(1, keepdim=True), v)

    q, k, v = torch.randn(3, 2, 9, 8).unbind()
    assert close(refocus.optimize(attend, engine="tiled", require=True)(q, k, v), attend(q, k, v))
