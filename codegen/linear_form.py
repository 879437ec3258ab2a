"""What a linear-attention kernel computes, as a function of plain tensors, and its definition step by step.

    S[t] = exp(gate[t]) * S[t-1] + k[t] v[t]^T                                      (sums)
    S[t] = R - erase[t] k[t] (k[t]^T R) + erase[t] k[t] v[t]^T,    R = exp(gate[t]) * S[t-1]   (the delta rule)
    S[t] = exp(gate[t]) * S[t-1] - erase[t] (lookup[t]^T S[t-1]) + k[t] v[t]^T         (a change of rank one)
    out[t] = q[t]^T S[t]         (with `strict`, q[t]^T exp(gate[t]) S[t-1]: a position does not see itself)
    sums[t] = q[t]^T z[t],       z[t] = exp(gate[t]) * z[t-1] + k[t]      what a normaliser divides by

Written out as weights, the first is out[i] = sum over j <= i of (sum_d q[i,d] k[j,d] exp(sum over j < t <= i of
gate[t,d])) v[j]. Gates are logarithms of decays, at most 0 where the recurrence is to be stable. Sources:
Katharopoulos et al. 2020 (linear transformers), Sun et al. 2023 (retention), Yang et al. 2024 (gated linear
attention; the delta rule in chunks), Dao and Gu 2024 (state-space duality), Yang et al. 2025 (gated delta rule), Peng
et al. 2025 (generalised delta rules).

Every engine has the two functions below, of the same tensors, so that engines can be compared without a graph:

    forward(form, chunk, q, k, v, gate, erase, initial, lookup)          -> (out, sums, final)
    backward(form, chunk, q, k, v, gate, erase, initial, lookup, grads)  -> their gradients, None where there is none

    q     (B, N, D)                    k  (C, M, D), v (C, M, E)    query heads b // (B // C) share keys and values
    gate  (C, M) or (C, M, D) or None  erase  (C, M) or None        initial  (C, D, E) or None
    lookup  (C, M, D) or None: what is looked up, in the state before the step; then `erase` is (C, M, D) as well
    out   (B, N, E) in the dtype of v  sums   (B, N) float32/64     final    (C, D, E) float32/64

Causal forms have N = M. Any strides; stride 0 occurs (a decay that is the same at every step). The state is float32,
float64 for float64 inputs. `grads` are those of (out, sums, final), None for what nothing flows back into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GATES = ("none", "head", "channel")  # no decay; one number a step, (C, M); one a step and feature, (C, M, D)
Grads = Sequence[Tensor | None]


@dataclass(frozen=True)
class LinearForm:
    """The kind of recurrence. `repr` rebuilds it.

    `causal`: a query sees the keys up to its own position (strictly before it, with `strict`); otherwise all keys, and
    then there are no gates. `gate` is one of `GATES`. `erase`: the delta rule; with `lookup`, any change of rank one.
    `sums`: the normaliser's sums are asked for. `initial`: there is a state to start from. `final`: the state after the
    last step is asked for.
    """

    causal: bool = True
    strict: bool = False
    gate: str = "none"
    erase: bool = False
    sums: bool = False
    initial: bool = False
    final: bool = False
    lookup: bool = False

    def __post_init__(self) -> None:
        assert self.gate in GATES, self.gate
        assert self.causal or not (self.strict or self.gate != "none" or self.erase)
        assert not (self.erase and self.sums)
        assert self.erase or not self.lookup


@dataclass(frozen=True)
class Operands:
    """The tensors of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None
    erase: Tensor | None = None
    initial: Tensor | None = None
    lookup: Tensor | None = None


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def forward(
    form: LinearForm, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, erase: Tensor | None = None,
    initial: Tensor | None = None, lookup: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The definition, step by step in float64: what every engine is compared with. Differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    share = q.shape[0] // k.shape[0]
    q = q.unflatten(0, (k.shape[0], share))  # (C, share, N, D)
    state = k.new_zeros(k.shape[0], k.shape[2], v.shape[2]) if initial is None else initial.double()
    total = k.new_zeros(k.shape[0], k.shape[2])
    if not form.causal:
        state, total = state + k.mT @ v, total + k.sum(1)
        out = (q @ state[:, None]).flatten(0, 1)
        return out, (q @ total[:, None, :, None]).squeeze(-1).flatten(0, 1) if form.sums else None, state
    outs, sums = [], []
    for t in range(k.shape[1]):
        key, value = k[:, t, :, None], v[:, t, None]
        found = None if lookup is None else lookup[:, t, None].double() @ state
        if gate is not None:
            decay = gate[:, t].double().exp()
            decay = decay[:, None] if decay.dim() == 1 else decay
            state, total = state * decay[..., None], total * decay
        if form.strict:
            outs.append(q[:, :, t] @ state)
            sums.append(q[:, :, t] @ total[..., None])
        if erase is not None and found is not None:
            state = state - erase[:, t, :, None].double() * found
        elif erase is not None:
            beta = erase[:, t, None, None].double()
            value = beta * (value - key.mT @ state)
        state, total = state + key * value, total + k[:, t]
        if not form.strict:
            outs.append(q[:, :, t] @ state)
            sums.append(q[:, :, t] @ total[..., None])
    out = torch.stack(outs, 2).flatten(0, 1)
    return out, torch.stack(sums, 2).squeeze(-1).flatten(0, 1) if form.sums else None, state if form.final else None
