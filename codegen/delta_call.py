"""One call of the delta rule on Triton: what is written to the state first; the rest is linear attention.

With u, what is written (`refocus.codegen.chunk_delta`), results are those of linear attention with u as values. And as

    u[t] = erase[t] v[t] + (-erase[t] k[t])^T exp(gate[t]) S[t-1]

u itself is a result of the same kind, read out with queries -erase k that do not see their own step. So backward, with
x for what flows into u in all, the gradients are those of linear attention for q and for these queries, added up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refocus.codegen import chunk_backward, chunk_delta
from refocus.codegen.chunk_call import Call
from refocus.codegen.chunk_kernel import empty
from refocus.codegen.chunk_setting import Setting
from refocus.codegen.linear_form import LinearForm


def forward(call: Call, final: Tensor | None) -> Tensor:
    """The result; the final state goes into `final`."""
    buffers = _written(call, call.setting(), final)
    return _plain(call, buffers["u"]).outputs(buffers, call.tensors["v"])[0]


def gradients(call: Call) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, gate, erase, the initial state and what is looked up; `call` has received what flows back."""
    t, setting = call.tensors, call.setting()
    buffers = _written(call, call.setting(replace(call.form, final=False)), None)
    plain = _plain(call, buffers["u"])
    x, grad_initial = _flow(call, plain, setting, buffers)
    k, erase, wide = t["k"].float(), t["erase"].float()[..., None], torch.float32
    # What q reads.
    buffers["grad_q"] = empty(t["q"], *t["q"].shape, dtype=t["q"].dtype)
    grad_k = buffers["grad_k"] = empty(t["q"], *k.shape)
    grad_gate = plain.by_head(plain.setting(grad_q=t["q"].dtype, grad_k=wide), buffers)
    # What u reads.
    reader = {"q": (-erase * k).to(t["k"].dtype), "grad": x}
    strict = Call(replace(plain.form, strict=True), call.chunk, plain.tensors | reader)
    inner = buffers | {"grad_q": empty(t["q"], *k.shape), "grad_k": empty(t["q"], *k.shape)}
    grad_gate_within = strict.by_head(strict.setting(grad_q=wide, grad_k=wide), inner, inflow=False)
    grad_k = grad_k.add_(inner["grad_k"]).addcmul_(erase, inner["grad_q"], value=-1)
    grad_v = (erase * x).to(t["v"].dtype)
    grad_erase = (x * t["v"]).sum(-1).sub_((inner["grad_q"] * k).sum(-1)).to(t["erase"].dtype)
    if grad_gate is not None:
        assert grad_gate_within is not None
        grad_gate = grad_gate.add_(grad_gate_within).to(t["gate"].dtype)
    return buffers["grad_q"], grad_k.to(t["k"].dtype), grad_v, grad_gate, grad_erase, grad_initial, None


def _plain(call: Call, u: Tensor) -> Call:
    """Linear attention with u as values."""
    form = LinearForm(strict=call.form.strict, gate=call.form.gate)
    kept = {name: x for name, x in call.tensors.items() if name in ("q", "k", "gate", "grad")}
    return Call(form, call.chunk, kept | {"v": u})


def _written(call: Call, setting: Setting, final: Tensor | None) -> dict[str, Tensor]:
    """The gates' sums, the inverses, the states, and u."""
    q, (heads, d, e), n = call.tensors["q"], call.state_shape, call.length
    dtype = getattr(torch, setting.dtype)
    buffers = call.gate_sums(setting) | {"inverse": empty(q, heads, call.chunks * call.chunk, call.chunk)}
    call.run(chunk_delta.inverse(setting), (heads * call.chunks,), buffers)
    effects = {"reads": empty(q, heads, n, d, dtype=dtype), "added": empty(q, heads, n, e)}
    call.run(chunk_delta.effects(setting), (heads * call.chunks,), buffers | effects)
    buffers |= {"states": empty(q, heads, call.chunks, d, e), "u": empty(q, heads, n, e, dtype=dtype)}
    kernel = chunk_delta.states(setting)
    results = {} if final is None else {"final": final}
    call.run(kernel, (heads, kernel.tiles[1]), buffers | effects | results)
    return buffers


def _flow(call: Call, plain: Call, setting: Setting, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """x, and what flows into the initial state; what flows into the end of each chunk goes into the buffers."""
    q, (heads, d, e), n = call.tensors["q"], call.state_shape, call.length
    grad_u, x = empty(q, heads, n, e), empty(q, heads, n, e)
    kernel = chunk_backward.values(plain.setting(grad_v=torch.float32), inflow=False)
    plain.run(kernel, (heads * call.chunks, kernel.tiles[1]), buffers | {"grad_v": grad_u})
    effects = {"grads": empty(q, heads, n, d, dtype=getattr(torch, setting.dtype)), "flow": empty(q, heads, n, e)}
    call.run(chunk_delta.effects_backward(setting), (heads * call.chunks,), buffers | effects | {"grad_u": grad_u})
    buffers["grad_states"] = empty(q, heads, call.chunks, d, e)
    results = {"x": x} | ({"grad_initial": empty(q, heads, d, e)} if setting.form.initial else {})
    kernel = chunk_delta.states_backward(setting)
    call.run(kernel, (heads, kernel.tiles[1]), buffers | effects | results)
    return x, results.get("grad_initial")
