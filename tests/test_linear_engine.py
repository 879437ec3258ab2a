"""Recognised linear attention runs through the generated kernels: which are planned where, and their numbers.

One child process (this file as a program) runs all models under Triton's interpreter, as in tests/test_triton_flash.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.linear_policy import LinearWork, Sample, choose_linear
from refocus.codegen.plan import Chosen, Leave
from refocus.errors import EngineUnavailable
from refocus.testing import CheckFailed, check
from tests.children import interpreted

CUDA = torch.device("cuda")


class Gated(nn.Module):
    """One decay for each head and step, from gates summed up."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        c = torch.nn.functional.logsigmoid(g).cumsum(-1)
        return ((q @ k.mT) * torch.exp(c[..., :, None] - c[..., None, :])).tril() @ v


class Normalised(nn.Module):
    """A feature map, and weights divided by their sums."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        weights = (q @ k.mT).tril()
        return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


class Everywhere(nn.Module):
    """No mask: there are no kernels for it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT) @ v


class RankOne(nn.Module):
    """RWKV-7's recurrence: each channel decays, and what a key finds in the state is taken away along another."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        w, x = torch.exp(-0.6 * torch.sigmoid(g)), torch.nn.functional.normalize(g + q, dim=-1)
        state, rows, a = v.new_zeros(*v.shape[:2], v.shape[-1], k.shape[-1]), [], torch.sigmoid(q - 0.3)
        for t in range(q.shape[2]):
            found = state @ -x[:, :, t, :, None]
            state = state * w[:, :, t, None] + found @ (x * a)[:, :, t, None] + v[:, :, t, :, None] @ k[:, :, t, None]
            rows.append((state @ q[:, :, t, :, None]).squeeze(-1))
        return torch.stack(rows, 2)


class DeltaByChannel(nn.Module):
    """The delta rule of a state whose channels decay each in its own way, that is kept from call to call."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        k, gate, rows = torch.nn.functional.normalize(k, dim=-1), torch.nn.functional.logsigmoid(g), []
        beta = torch.sigmoid(q.sum(-1, keepdim=True))
        for t in range(q.shape[2]):
            state = state * gate[:, :, t, :, None].exp()
            left = beta[:, :, t] * (v[:, :, t] - (k[:, :, t, None] @ state).squeeze(-2))
            state = state + k[:, :, t, :, None] * left[..., None, :]
            rows.append((q[:, :, t, None] @ state).squeeze(-2))
        return torch.stack(rows, 2), state


def tensors(length: int = 40) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, generator=drawn) for _ in range(3))
    return [q, k, v, torch.randn(1, 2, length, generator=drawn)]


def by_channel() -> list[Tensor]:
    """Of more steps than one chunk has, and no whole chunks."""
    drawn = torch.Generator().manual_seed(1)
    return [torch.rand(1, 2, 40, 8, generator=drawn) for _ in range(4)]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "gated": lambda: (Gated(), tensors()),
    "normalised": lambda: (Normalised(), tensors()[:3]),
    "rank one": lambda: (RankOne(), by_channel()),
    "delta by channel": lambda: (DeltaByChannel(), [*by_channel(), torch.ones(1, 2, 8, 8)]),
}


def child() -> dict[str, str]:
    torch.set_num_threads(1)
    out: dict[str, str] = {}
    for name, make in MODELS.items():
        model, inputs = make()
        try:
            checked = check(model, inputs, engines=("triton",), family="linear", lower=False, gradients=True)
            (site,) = checked.report.sites
            assert site.kernel_path is not None
            out[name] = f"{site.engine} {', '.join(checked.errors)}\n{Path(site.kernel_path).read_text()}"
        except CheckFailed as problem:
            out[name] = str(problem)
    (site,) = refocus.explain(Everywhere(), *tensors()[:3], engine="triton").sites
    out["everywhere"] = f"{site.state}: {site.reason}"
    return out


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    found: dict[str, str] = interpreted("tests.test_linear_engine")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_against_the_oracle(results: dict[str, str], name: str) -> None:
    first, _, source = results[name].partition("\n")
    assert first == "triton triton, triton, backward", results[name]
    assert "def chunk_outputs(" in source


@pytest.mark.slow
def test_forms_without_kernels_are_left_with_the_reason(results: dict[str, str]) -> None:
    assert "the triton engine does not take it: without an order" in results["everywhere"]


# ---------------------------------------------------------------------------------------------------- plans


def asked(length: int = 1024, dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> tuple[LinearWork, Sample]:
    work = LinearWork(8, 8, length, length, 64, 64, "none", "pairs")
    x = torch.empty(8, length, 64, dtype=dtype, device="meta")
    return work, Sample(LinearForm(causal=causal), x, x, x, None)


def outcome(*given: object, **more: object) -> Chosen | Leave:
    return choose_linear(*asked(*given, **more), CUDA, None, trained=False)  # type: ignore[arg-type]


def test_on_a_gpu_the_kernels_are_the_default() -> None:
    found = outcome()
    assert isinstance(found, Chosen) and found.plan.engine == "triton" and found.plan.block_k == 64
    assert isinstance(half := outcome(dtype=torch.float32), Chosen) and half.plan.block_k == 32


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_other_keys_run_in_the_kernels_with_their_gradients(gate: str) -> None:
    """What is multiplied in float32 goes in shorter chunks."""
    work, sample = asked()
    form = LinearForm(gate=gate, erase=True, lookup=True)
    gates = None if gate == "none" else sample.q if gate == "channel" else sample.q[..., 0]
    sample = replace(sample, form=form, gate=gates, erase=sample.q, lookup=sample.q)
    for given, chunk in ((sample, 64), (replace(sample, lookup=sample.q.float()), 32)):
        found = choose_linear(replace(work, spelled="steps"), given, CUDA, None, trained=True)
        assert isinstance(found, Chosen) and found.plan.engine == "triton" and found.plan.block_k == chunk


def test_few_pairs_stay() -> None:
    assert isinstance(outcome(128), Leave) and isinstance(outcome(129), Chosen)


def test_pairs_are_cheap_where_many_threads_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in chunks is many small operations, which more threads make no faster."""
    work, sample = asked(512, torch.float32)
    planned = []
    for threads in (1, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        planned.append(choose_linear(work, sample, torch.device("cpu"), None, trained=False))
    assert isinstance(planned[0], Chosen) and isinstance(planned[1], Leave)


@pytest.mark.parametrize(
    ("changed", "reason"), [({"causal": False}, "without an order"), ({"dtype": torch.float64}, "q is float64")]
)
def test_what_the_kernels_decline_runs_in_tiles(changed: dict[str, object], reason: str) -> None:
    found = outcome(**changed)
    assert isinstance(found, Chosen) and found.plan.engine == "tiled"
    assert "the triton engine does not take it: " + reason in found.reason


def test_disabled_engines_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOCUS_DISABLE", "triton")
    found = outcome()
    assert isinstance(found, Chosen) and found.plan.engine == "tiled" and "names 'triton'" in found.reason
    monkeypatch.setenv("REFOCUS_DISABLE", "triton,tiled")
    assert isinstance(outcome(), Leave)


def test_linear_spellings_stay() -> None:
    work, sample = asked()
    found = choose_linear(replace(work, spelled="linear"), sample, CUDA, None, trained=False)
    assert isinstance(found, Leave) and "linear in the length already" in found.reason


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, the kernels run anywhere")
def test_a_named_engine_that_cannot_run_is_an_error() -> None:
    work, sample = asked()
    with pytest.raises(EngineUnavailable):
        choose_linear(work, sample, torch.device("cpu"), "triton", trained=False)


if __name__ == "__main__":
    print(json.dumps(child()))
