"""What a model does with a result before it computes with it becomes the place where the result is put."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from refocus.codegen import operator
from refocus.lift import op_name
from refocus.options import Options
from refocus.pipeline import rewrite
from refocus.testing import check, rewritten
from refocus.tolerances import difference

HEADS, WIDTH = 2, 8
CHANNELS = HEADS * WIDTH


def attend(x: Tensor) -> Tensor:
    """(batch, tokens, 3 * heads * width) -> (batch, heads, tokens, width)"""
    q, k, v = x.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind()
    return (q @ k.mT / WIDTH**0.5).softmax(-1) @ v


class Windows(nn.Module):
    """Swin: shifted, cut into windows, attended, put together and shifted back."""

    side = 4

    def forward(self, x: Tensor) -> Tensor:
        size, (batch, rows, columns, width) = self.side, x.shape
        x = x.roll((-2, -1), (1, 2)).view(batch, rows // size, size, columns // size, size, width)
        out = attend(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, width))
        out = out.transpose(1, 2).reshape(-1, size * size, CHANNELS)
        out = out.view(batch, rows // size, columns // size, size, size, CHANNELS)
        out = out.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, CHANNELS)
        return out.roll((2, 1), (1, 2)).relu()


def merged(x: Tensor) -> Tensor:
    return attend(x).transpose(1, 2).reshape(x.shape[0], x.shape[1], CHANNELS).relu()


def merged_otherwise(x: Tensor) -> Tensor:
    return attend(x).movedim(1, -2).contiguous().flatten(-2).relu()


def backwards(x: Tensor) -> Tensor:
    """Attention over a sequence that is turned round, and turned back."""
    return attend(x.flip(1)).permute(2, 0, 1, 3).flip(0).flatten(2).relu()


def shifted(x: Tensor) -> Tensor:
    """Groups shifted by half a group, and back (LongLoRA)."""
    groups = x.roll(-3, 1).unflatten(1, (-1, 6)).flatten(0, 1)
    return attend(groups).transpose(1, 2).reshape(x.shape[0], x.shape[1], CHANNELS).roll(3, 1).relu()


def graph_of(run: Callable[[Tensor], Tensor], x: Tensor, engine: str | None = "tiled") -> list[str]:
    """The operations of the rewritten graph after the attention."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(rewrite(gm, Options(engine=engine), inputs).gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend, dynamic=False)(x)
    names = [op_name(n) for n in found[0].graph.nodes if n.op == "call_function"]
    return names[next(k for k, name in enumerate(names) if name.startswith("attend")) + 1 :]


IMAGE, TOKENS = (2, 8, 12, 3 * CHANNELS), (2, 24, 3 * CHANNELS)
PLACED = [(Windows(), IMAGE), (merged, TOKENS), (merged_otherwise, TOKENS), (backwards, TOKENS), (shifted, TOKENS)]


def _name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)


class Module(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.parametrize(("run", "shape"), PLACED, ids=_name)
def test_nothing_is_moved_after_the_attention(run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert graph_of(run, x) == ["relu"]
    check(Module(run), (x,), lower=False, gradients=True)


def test_swin_reads_and_writes_the_image_itself() -> None:
    """Neither its windows nor its heads are copied, on either side."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(rewrite(gm, Options(engine="tiled"), inputs).gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Windows(), backend=backend)(torch.randn(IMAGE))
    assert [op_name(n) for n in found[0].graph.nodes if n.op == "call_function"] == ["attend", "relu"]


def test_an_engine_that_does_not_put_results_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator moves them: what a region says holds for every engine."""
    monkeypatch.setattr(operator, "places", lambda region, engine: region.output is None)
    for run, shape in PLACED:
        check(Module(run), (torch.randn(shape),), lower=False, gradients=True)


def read_twice(x: Tensor) -> Tensor:
    out = attend(x)
    return out.transpose(1, 2).reshape(x.shape[0], x.shape[1], CHANNELS).relu() + out.mean()


def in_part(x: Tensor) -> Tensor:
    return attend(x).transpose(1, 2)[:, ::2].flatten(2).relu()


def repeated(x: Tensor) -> Tensor:
    return attend(x).transpose(1, 2).repeat(1, 2, 1, 1).flatten(2).relu()


def not_contiguous(x: Tensor) -> Tensor:
    """A view: nothing is copied as it is."""
    return attend(x).transpose(1, 2).relu()


def written(x: Tensor) -> Tensor:
    """In place, by the model."""
    out = attend(x).transpose(1, 2)
    out[:, 0] = 1.0
    return out.flatten(2).relu()


@pytest.mark.parametrize("run", [read_twice, in_part, repeated, not_contiguous, written], ids=_name)
def test_near_misses_stay_in_the_graph(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(TOKENS)
    assert "transpose" in graph_of(run, x)
    check(Module(run), (x,), lower=False, gradients=run is not written)


def test_lengths_may_vary() -> None:
    torch._dynamo.reset()
    optimized = rewritten(merged, engine="tiled", require=True)
    for tokens in (24, 30, 41):
        x = torch.randn(2, tokens, 3 * CHANNELS)
        assert difference(optimized(x), merged(x)) < 1e-5


MOVES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.transpose(0, 1),
    lambda t: t.transpose(-1, -2),
    lambda t: t.permute(*reversed(range(t.dim()))),
    lambda t: t.roll(3, -2),
    lambda t: t.roll((1, -2), (0, -1)),
    lambda t: t.flip(-2),
    lambda t: t.flatten(0, 1),
    lambda t: t.reshape(-1, 4),
    lambda t: t.unflatten(0, (2, -1)),
    lambda t: t.unsqueeze(1),
    lambda t: t.contiguous(),
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(MOVES) - 1), max_size=6))
def test_any_chain_of_moves(chain: list[int]) -> None:
    def run(x: Tensor) -> Tensor:
        out = attend(x)
        for k in chain:
            if out.dim() > 1 or k > 8:
                out = MOVES[k](out)
        return out.relu()

    x = torch.randn(2, 6, 3 * CHANNELS)
    torch._dynamo.reset()
    got, expected = rewritten(run, engine="tiled", require=True)(x), run(x)
    assert got.stride() == expected.stride()
    assert difference(got, expected) < 1e-5
