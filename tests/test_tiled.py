"""The dense oracle against attention as one writes it in torch, and the tiled engine against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refocus import oracle, simplify
from refocus.codegen import runs, tiled
from refocus.codegen.plan import Plan
from refocus.ir import BOOL, FALSE, TRUE, Axis, Call, Const, Load, Region
from tests import region_cases as cases

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tiles this small, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ eager code


def attend(
    t: Tensors,
    change: Callable[[Tensor], Tensor] = lambda s: s,
    keep: Tensor | None = None,
    fill: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(change(q k^T scale), masked) v, with repeated key-value heads, in the dtype of q."""
    q = t["q"]
    k, v = (t[x].repeat_interleave(q.shape[1] // t[x].shape[1], 1) for x in ("k", "v"))
    score = change(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale))
    if keep is not None:
        score = score.masked_fill(~keep, torch.finfo(MODEL_DTYPE).min if fill is None else fill)
    return torch.softmax(score, -1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype) @ v


MODEL_DTYPE = torch.float32  # a fill stays that of the model's dtype when the reference is run in float64


def tril(t: Tensors) -> Tensor:
    n, m = t["q"].shape[2], t["k"].shape[2]
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def offsets(t: Tensors) -> Tensor:
    return torch.arange(t["q"].shape[2])[:, None] - torch.arange(t["k"].shape[2])[None]


def with_sink(t: Tensors, score: Tensor, shift: float = 0.0) -> Tensor:
    sink = (t["sink"] + shift).reshape(1, -1, 1, 1).expand(*score.shape[:3], 1)
    weight = torch.softmax(torch.cat([score, sink], -1), -1)[..., :-1]
    return weight @ t["v"].repeat_interleave(score.shape[1] // t["v"].shape[1], 1)


def scores(t: Tensors) -> Tensor:
    return t["q"] @ t["k"].repeat_interleave(t["q"].shape[1] // t["k"].shape[1], 1).mT * t["q"].shape[-1] ** -0.5


def left_padded(t: Tensors) -> Tensor:
    return tril(t) & t["keep"][:, None, None, :]


def masked_rows(t: Tensors) -> Tensor:
    fill = torch.where(t["keep"], 0.0, torch.finfo(MODEL_DTYPE).min).to(t["q"].dtype)
    return torch.softmax(scores(t) + fill[:, None, :, None], -1) @ t["v"]


def zero_rows(t: Tensors) -> Tensor:
    keep = left_padded(t)
    return attend(t, keep=keep, fill=-math.inf).masked_fill(~keep.any(-1, keepdim=True), 0.0)


def added(t: Tensors) -> Tensor:
    return with_sink(t, scores(t) + torch.where(left_padded(t), 0.0, -100.0).to(t["q"].dtype), -100.0)


def low(t: Tensors) -> Tensor:
    return torch.softmax(scores(t).masked_fill(~tril(t), -1e4) + t["added"][:, None, None], -1) @ t["v"]


def drawn(seed: int, row: int, column: int) -> float:
    """The counter's definition, on Python's own numbers."""
    word = 2**32 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = (x ^ x >> 15) * 0x846CA68B & word
        return x ^ x >> 16

    first = mix(row ^ seed & word)
    second = mix(first + (seed >> 32) & word)
    return (mix(mix(column + first & word) ^ second) >> 8) / 2**24


def dropped(t: Tensors) -> Tensor:
    weight = scores(t).masked_fill(~tril(t), -math.inf).softmax(-1)
    b, h, n, m = weight.shape
    numbers = [[drawn(int(t["seed"]), row, j) for j in range(m)] for row in range(b * h * n)]
    keep = torch.tensor(numbers).view(b, h, n, m) >= 1 / 3
    return (weight * keep * 1.5) @ t["v"]


def pairwise(t: Tensors) -> Tensor:
    """The region is a mean: what the model sums over the keys that it sees, divided by their number."""
    weights = torch.relu(t["q"] @ t["k"].mT * t["q"].shape[-1] ** -0.5).square().tril()
    return (weights @ t["v"]) / torch.arange(1, t["q"].shape[2] + 1)[:, None]


def gated(t: Tensors) -> Tensor:
    weight = torch.softmax(scores(t).masked_fill(~tril(t), -math.inf), -1)
    weight = weight * torch.sigmoid(t["gate_k"])[:, None, None, :] * torch.sigmoid(t["gate_q"])[None, :, :, None]
    return weight @ t["v"]


def t5(t: Tensors) -> Tensor:
    distance = offsets(t).clamp(min=0)
    far = 16 + (torch.log(distance.float() / 16.0) / math.log(8.0) * 16.0).clamp(min=0).to(torch.int64)
    bucket = torch.where(distance < 16, distance, far.clamp(max=31))
    return attend(t, lambda s: s + t["table"][bucket].permute(2, 0, 1), tril(t), scale=1.0)


def packed(t: Tensors) -> Tensor:
    b, n, _ = t["qkv"].shape
    q, k, v = t["qkv"].reshape(b, n, 3, cases.H, -1).permute(2, 0, 3, 1, 4)
    return attend({"q": q, "k": k, "v": v})


def swin(t: Tensors) -> Tensor:
    x = torch.roll(t["x"], (-2, -2), (0, 1))
    rows, cols, d = x.shape
    x = x.reshape(rows // 4, 4, cols // 4, 4, d).permute(0, 2, 1, 3, 4).reshape(rows // 4, cols // 4, 16, d)
    return attend({"q": x, "k": x, "v": x}).reshape(rows // 4, cols // 4, 16, d // 2, 2)


def unbatched(t: Tensors) -> Tensor:
    return torch.softmax(t["q"] @ t["k"].T * t["t"], -1) @ t["k"]


def same_document(t: Tensors) -> Tensor:
    return tril(t) & (t["doc"][:, None, :, None] == t["doc"][:, None, None, :])


EAGER: dict[str, Callable[[Tensors], Tensor]] = {
    "dense": attend,
    "causal": lambda t: attend(t, keep=tril(t)),
    "causal_bfloat16": lambda t: attend(t, keep=tril(t)),
    "window": lambda t: attend(t, keep=tril(t) & (offsets(t) < 9)),
    "gqa": lambda t: attend(t, keep=tril(t)),
    "emptied_by_bias": lambda t: attend(t, lambda s: s + t["bias"]).nan_to_num(),
    "additive_bias": lambda t: attend(t, lambda s: s + t["bias"]),
    "alibi": lambda t: attend(t, lambda s: s - t["slopes"][:, None, None] * offsets(t), tril(t)),
    "softcap": lambda t: attend(t, lambda s: torch.tanh(s / 2.0) * 2.0, tril(t) & (offsets(t) <= 20)),
    "padding": lambda t: attend(t, keep=t["keep"][:, None, None, :]),
    "documents": lambda t: attend(t, keep=same_document(t)),
    "sinks": lambda t: with_sink(t, scores(t).masked_fill(~tril(t), -math.inf)),
    "empty_min": lambda t: attend(t, keep=left_padded(t)),
    "empty_inf": lambda t: attend(t, keep=left_padded(t), fill=-math.inf),
    "empty_zero": zero_rows,
    "empty_added": added,
    "low_scores": low,
    "masked_rows": masked_rows,
    "gated": gated,
    "pairwise": pairwise,
    "dropout": dropped,
    "cross": attend,
    "relative_table": lambda t: attend(t, lambda s: s + t["table"][(offsets(t) + 12).clamp(0, 24)].permute(2, 0, 1)),
    "t5_buckets": t5,
    "symbolic": lambda t: attend(t, keep=tril(t)),
    "two_dots": lambda t: attend(t, lambda s: s + t["qp"] @ t["kp"].T * 0.3, tril(t)),
    "merged_heads": packed,
    "windows_2d": swin,
    "unbatched": unbatched,
}


def named(region: Region, tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensors:
    return {o.name: t.to(dtype) if dtype and t.is_floating_point() else t for o, t in zip(region.operands, tensors)}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference; NaN must be where NaN is wanted."""
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    return float((got.double() - want.double()).nan_to_num().abs().max())


def check(result: Tensor, region: Region, tensors: list[Tensor], sizes: list[int], eager: Tensor) -> None:
    """Within 1.5 times the error of eager code of the same dtype, both against the float64 oracle."""
    want = oracle.run(region, tensors, sizes)
    assert result.is_contiguous() and str(result.dtype) == f"torch.{region.out_dtype}"
    assert error(result, want) <= 1.5 * error(eager, want) + cases.floor(result.dtype)


def eager_of(name: str, region: Region, tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    global MODEL_DTYPE
    MODEL_DTYPE = getattr(torch, region.out_dtype)
    return EAGER[name](named(region, tensors, dtype))


# ------------------------------------------------------------------------------------------------ the oracle


def test_every_case_has_eager_code() -> None:
    assert set(EAGER) == set(cases.CASES)


@pytest.mark.parametrize("name", cases.CASES)
def test_oracle_is_what_eager_code_means(name: str) -> None:
    region, tensors, sizes = cases.CASES[name]()
    got, want = oracle.run(region, tensors, sizes), eager_of(name, region, tensors, torch.float64)
    assert got.dtype == torch.float64
    # Rows that the mask empties come from float32 logits.
    assert error(got, want) < (1e-5 if name == "empty_added" else 1e-9)


# ------------------------------------------------------------------------------------------------ the tiled engine


@pytest.mark.parametrize("blocks", [(16, 24), (64, 64), (7, 200)], ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_tiled(name: str, blocks: tuple[int, int]) -> None:
    region, tensors, sizes = cases.CASES[name]()
    result = tiled.run(region, Plan("tiled", block_q=blocks[0], block_k=blocks[1]), tensors, sizes)
    check(result, region, tensors, sizes, eager_of(name, region, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gqa", "window", "empty_min", "empty_inf", "sinks", "t5_buckets", "alibi"])
def test_tiled_dtypes(name: str, dtype: torch.dtype) -> None:
    region, tensors, sizes = cases.CASES[name](dtype=dtype)
    result = tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
    check(result, region, tensors, sizes, eager_of(name, region, tensors))


@pytest.mark.parametrize("elements", [1, 500, 3000])
@pytest.mark.parametrize("name", ["causal", "gqa", "padding", "windows_2d", "empty_added", "documents"])
def test_chunks_of_batch_axes(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    region, tensors, sizes = cases.CASES[name]()
    plan = Plan("tiled", block_q=16, block_k=16)
    whole = tiled.run(region, plan, tensors, sizes)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", elements)
    torch.testing.assert_close(tiled.run(region, plan, tensors, sizes), whole, rtol=1e-5, atol=1e-6)


def test_layouts_that_are_not_contiguous() -> None:
    region, tensors, sizes = cases.gqa()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    plan = Plan("tiled", block_q=16, block_k=16)
    torch.testing.assert_close(tiled.run(region, plan, strided, sizes), tiled.run(region, plan, tensors, sizes))


class Watch(TorchDispatchMode):
    """The largest tensor made, and how many scores were multiplied out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
            if func is torch.ops.aten.bmm.default:
                self.products += out.numel() * args[0].shape[-1]
        return out


def watched(name: str, n: int, block: int = 32) -> Watch:
    region, tensors, sizes = cases.CASES[name](n=n)
    watch = Watch()
    with watch:
        tiled.run(region, Plan("tiled", block_q=block, block_k=block), tensors, sizes)
    return watch


@pytest.mark.parametrize("name", ["dense", "causal", "gqa", "empty_min", "documents", "relative_table", "sinks"])
def test_memory_is_linear(name: str) -> None:
    """No tensor is larger than the result."""
    n, d = 256, 16
    assert watched(name, n).largest <= max(cases.B * cases.H * n * d, cases.B * cases.H * 32 * 32)


def test_empty_tiles_cost_nothing() -> None:
    n, block = 512, 32
    tiles = n // block
    per_tile = watched("dense", n, block).products / tiles**2
    assert watched("causal", n, block).products / per_tile == tiles * (tiles + 1) / 2
    assert watched("window", n, block).products / per_tile == 2 * tiles - 1


def test_full_tiles_do_not_evaluate_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    region, tensors, sizes = cases.causal(n=256)
    monkeypatch.setattr(runs, "WIDEST", 32)  # each tile a column of its own
    # The map of tiles is made first: what it looks at is looked at once and kept, by whichever test came first.
    tiles = tiled.Tiles.of(region, Plan("tiled", block_q=32, block_k=32), tensors, sizes)
    seen = []
    original = tiled.Scope.tensor

    def tensor(self: Any, expr: Any) -> Tensor:
        seen.append(expr)
        return original(self, expr)

    monkeypatch.setattr(tiled.Scope, "tensor", tensor)
    tiles.forward()
    assert seen.count(tiled.scaled(region.score)) == 36 and seen.count(region.mask) == 8


def test_grouped_heads_are_not_repeated() -> None:
    assert tiled.factors(Axis("h", Const(32)), 32, cases.gqa()[0].expressions) == (32,)  # another axis
    region, _, _ = cases.gqa()
    assert tiled.factors(region.batch[1], cases.H, region.expressions) == (2, 2)
    h = Axis("h", Const(24))
    grouped = [simplify.floordiv(h, 12), simplify.floordiv(h, 4), simplify.mod(h, 4), simplify.floordiv(h, 5)]
    assert tiled.factors(h, 24, grouped) == (24 // 12, 3, 4)


# ------------------------------------------------------------------------------------------------ corners


@pytest.mark.parametrize("mode", ["zero", "logits"])
def test_nothing_kept_at_all(mode: str) -> None:
    region, tensors, sizes = cases.dense()
    fill = Const(-1e9, "float32")
    score = Call("add", (region.score, fill), "float32")
    region = replace(region, mask=FALSE, logits=score, empty_row=mode)
    out = tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
    # Added in float32, the fill leaves nothing of the score.
    want = torch.zeros_like(out) if mode == "zero" else tensors[2].mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(oracle.run(region, tensors, sizes).float(), want)


def test_kept_rows_of_infinities_are_nan() -> None:
    """A mask that keeps a key whose score is -inf: softmax of nothing, as in eager code."""
    region, tensors, sizes = cases.additive_bias()
    tensors[3][:, 0, 5] = -math.inf
    tensors[3][:, 1, 6, 3] = math.inf
    out = tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
    check(out, region, tensors, sizes, eager_of("additive_bias", region, tensors))
    assert out[:, 0, 5].isnan().all() and out[:, 1, 6].isnan().all() and int(out.isnan().sum()) == 2 * 2 * 16


def test_no_keys_and_no_queries() -> None:
    region, (q, k, v), _ = cases.symbolic()
    assert tiled.run(region, Plan("tiled"), [q[:, :, :0], k, v], [0, 73]).shape == (2, 4, 0, 16)
    none = tiled.run(replace(region, mask=TRUE), Plan("tiled"), [q, k[:, :, :0], v[:, :, :0]], [53, 0])
    assert none.shape == (2, 4, 53, 16) and not none.any()


def test_operands_stay_as_they_were() -> None:
    """A score that is a plain load is a view of the operand: nothing may be written into it."""
    n = 20
    i, j, e = Axis("i", Const(n)), Axis("j", Const(n)), Axis("e", Const(3))
    score = Load("s", (i, j), "float32")
    s, v, keep = torch.randn(n, n), torch.randn(n, 3), torch.rand(n, n) < 0.7
    operands = tuple(cases.operand(x, t) for x, t in (("s", s), ("v", v), ("keep", keep)))
    region = Region((), i, j, (e,), score, TRUE, score, Load("v", (j, e), "float32"), operands, "float32",
                    empty_row="never")  # fmt: skip
    before = s.clone()
    out = tiled.run(region, Plan("tiled", block_q=8, block_k=8), [s, v, keep])
    torch.testing.assert_close(out, torch.softmax(s, -1) @ v)
    assert torch.equal(s, before)
    masked = replace(region, mask=Load("keep", (i, j), BOOL), empty_row="zero")
    want = torch.softmax(s.masked_fill(~keep, -math.inf), -1) @ v
    torch.testing.assert_close(tiled.run(masked, Plan("tiled", block_q=8, block_k=8), [s, v, keep]), want)


def test_a_score_that_ignores_the_key() -> None:
    """Uniform weights over what the mask keeps."""
    region, tensors, sizes = cases.causal()
    flat = Const(0.0, "float32")
    region = replace(region, score=flat, logits=flat)
    out = tiled.run(region, Plan("tiled", block_q=16, block_k=16), tensors, sizes)
    n = tensors[2].shape[2]
    want = tensors[2].cumsum(2) / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(oracle.run(region, tensors, sizes).float(), want)


def test_batch_positions_with_other_tiles_are_taken_apart() -> None:
    """Documents packed in another way in each sequence: together, only what is empty in both would be skipped."""
    n = 512
    region, tensors, sizes = cases.documents(n=n)
    at = [o.name for o in region.operands].index("doc")
    for packing, apart in (
        ([torch.arange(n) // 256, torch.arange(n) // 64], True),
        ([torch.arange(n) // 64, torch.arange(n) // 64], False),
    ):
        tensors[at] = torch.stack(packing)
        tiles = tiled.Tiles.of(region, Plan("tiled"), tensors, sizes)
        assert (region.batch[0] in tiles.apart) == apart
        out = torch.empty(*tiles.lead, n, 1)
        tiles.most = 1 << 30
        assert len(list(tiles.chunks(out))) == (2 if apart else 1)
        got = tiled.run(region, Plan("tiled"), tensors, sizes)
        torch.testing.assert_close(got.double(), oracle.run(region, tensors, sizes), atol=1e-5, rtol=1e-4)
