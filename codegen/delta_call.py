"""One call of the delta rule on Triton: what is written to the state first; the rest is linear attention.

With u, what is written (`refocus.codegen.chunk_delta`), results are those of linear attention with u as values. And as

    u[t] = erase[t] v[t] + (-erase[t] k[t])^T exp(gate[t]) S[t-1]

u itself is a result of the same kind, read out with queries -erase k that do not see their own step. So backward, with
x for what flows into u in all, the gradients are those of linear attention for q and for these queries, added up.

Where states are looked up by other keys than are written, there are two kinds of keys and values, k with v and `erase`
with u = -lookup[t]^T S[t-1]: what queries read one step before, but for the first of a chunk, which read the state at
its start.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refocus.codegen import chunk_delta
from refocus.codegen.chunk_call import Call
from refocus.codegen.chunk_kernel import empty
from refocus.codegen.chunk_setting import Setting
from refocus.codegen.linear_form import LinearForm

Buffers = dict[str, Tensor]


def forward(call: Call, final: Tensor | None) -> Tensor:
    """The result; the final state goes into `final`."""
    buffers = _written(call, call.setting(), final)
    return plain(call, buffers["u"]).outputs(buffers, call.tensors["v"])[0]


def gradients(call: Call) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, gate, erase, the initial state and what is looked up; `call` has received what flows back."""
    t, n, (heads, d, _) = call.tensors, call.length, call.state_shape
    buffers = _written(call, call.setting(replace(call.form, final=False)), None)
    reads = plain(call, buffers["u"])
    if call.form.gate == "channel":
        buffers |= reads.channel_scores(buffers)
    x, grad_initial = _flow(call, reads, buffers)
    wanted = {f"grad_{kind.keys}": (heads, n, d) for kind, _ in reads.kinds}
    buffers |= {name: empty(t["q"], *shape) for name, shape in wanted.items()}
    buffers["grad_q"] = empty(t["q"], *t["q"].shape, dtype=t["q"].dtype)
    grad_gate = reads.pairs(buffers)
    found = _through_lookups if call.form.lookup else _through_keys
    grads, within = found(call, reads, buffers, x)
    if grad_gate is not None:
        assert within is not None
        grads["gate"] = grad_gate.add_(within)
    results = {name: grad.to(t[name].dtype) for name, grad in grads.items()}
    named = (results.get(name) for name in ("k", "v", "gate", "erase"))
    return buffers["grad_q"], *named, grad_initial, results.get("lookup")


def _through_keys(call: Call, reads: Call, buffers: Buffers, x: Tensor) -> tuple[Buffers, Tensor | None]:
    """The gradients of k, v and erase, once x flows into what is found by keys, and what gates get of that."""
    t = call.tensors
    k, erase = t["k"].float(), t["erase"].float()[..., None]
    reader = {"q": (-erase * k).to(t["k"].dtype), "grad": x}
    inner = buffers | {name: empty(t["q"], *k.shape) for name in ("grad_q", "grad_k")}
    within = Call(replace(reads.form, strict=True), call.chunk, reads.tensors | reader).pairs(inner, inflow=False)
    grad_k = buffers["grad_k"].add_(inner["grad_k"]).addcmul_(erase, inner["grad_q"], value=-1)
    grad_erase = (x * t["v"]).sum(-1).sub_((inner["grad_q"] * k).sum(-1))
    return {"k": grad_k, "v": erase * x, "erase": grad_erase}, within


def _through_lookups(call: Call, reads: Call, buffers: Buffers, x: Tensor) -> tuple[Buffers, Tensor | None]:
    """As `_through_keys`, of what is found by other keys, with the gradient of these."""
    t = call.tensors
    flow = -_ahead(x)
    flow[:, call.chunk - 1 :: call.chunk] = 0.0
    reader = {"q": _ahead(t["lookup"]), "grad": flow}
    looks = Call(replace(reads.form, strict=False), call.chunk, reads.tensors | reader)
    inner = buffers | {name: empty(t["q"], *t["k"].shape) for name in ("grad_q", "grad_k", "grad_erase")}
    within = looks.pairs(inner, inflow=False)
    for one, flows, scores in ((reads, buffers, "scores"), (looks, inner, "found")):
        flows["grad_v"] = empty(t["q"], *t["v"].shape)
        scored = {"scores": buffers[scores]} if call.form.gate == "channel" else {}
        one.kinds[0][1].values(flows | scored, inflow=one is reads)
    grads = {name: buffers[f"grad_{name}"].add_(inner[f"grad_{name}"]) for name in ("k", "v", "erase")}
    grad_lookup = torch.cat((inner["grad_q"][:, :1], inner["grad_q"][:, :-1]), 1)
    grad_lookup[:, :: call.chunk] = -(buffers["states"] @ x[:, :: call.chunk, :, None]).squeeze(-1)
    return grads | {"lookup": grad_lookup}, within


def _ahead(x: Tensor) -> Tensor:
    """What each step's next one has; zeros at the last."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


def plain(call: Call, u: Tensor) -> Call:
    """Linear attention with u as values, or as those of keys of their own."""
    t, lookup = call.tensors, call.form.lookup
    form = LinearForm(strict=call.form.strict, gate=call.form.gate, erase=lookup, lookup=lookup)
    kept = {name: x for name, x in t.items() if name in ("q", "k", "gate", "grad")}
    return Call(form, call.chunk, kept | ({"v": t["v"], "erase": t["erase"], "u": u} if lookup else {"v": u}))


def reading(call: Call) -> Setting:
    """The setting of the kernel that writes the results."""
    v = call.tensors["v"]
    u = torch.empty(v.shape, dtype=getattr(torch, call.setting().dtype), device="meta")
    return plain(call, u).setting(out=v.dtype)


def _written(call: Call, setting: Setting, final: Tensor | None) -> Buffers:
    """The gates' sums, the inverses, the states, and u; with gates for each channel, the products of pairs."""
    q, (heads, d, e), n = call.tensors["q"], call.state_shape, call.length
    dtype = getattr(torch, setting.dtype)
    buffers = call.gate_sums(setting) | {"inverse": empty(q, heads, call.chunks * call.chunk, call.chunk)}
    if call.form.gate == "channel":
        buffers |= _pairs_of_channels(call, buffers)
    call.run(chunk_delta.inverse(setting), (heads * call.chunks,), buffers)
    effects = {"reads": empty(q, heads, n, d, dtype=dtype), "added": empty(q, heads, n, e)}
    call.run(chunk_delta.effects(setting), (heads * call.chunks,), buffers | effects)
    buffers |= {"states": empty(q, heads, call.chunks, d, e), "u": empty(q, heads, n, e, dtype=dtype)}
    kernel = chunk_delta.states(setting)
    results = {} if final is None else {"final": final}
    call.run(kernel, (heads, kernel.tiles[1]), buffers | effects | results)
    return buffers


def _pairs_of_channels(call: Call, buffers: Buffers) -> Buffers:
    """Of keys, those that are looked up by each step, or by each step's next one: `lower` of those that u is written
    along; where others are looked up, `found` of those that values are."""
    t, lookup = call.tensors, call.form.lookup
    queries, form = _ahead(t["lookup"]) if lookup else t["k"], LinearForm(strict=not lookup, gate="channel")

    def scores(keys: str) -> Tensor:
        given = {"q": queries, "k": t[keys], "v": t["v"], "gate": t["gate"]}
        return Call(form, call.chunk, given).channel_scores(buffers)["scores"]

    return {"lower": scores("erase"), "found": scores("k")} if lookup else {"lower": scores("k")}


def _flow(call: Call, reads: Call, buffers: Buffers) -> tuple[Tensor, Tensor | None]:
    """x, and what flows into the initial state; what flows into the end of each chunk goes into the buffers."""
    q, (heads, d, e), n, setting = call.tensors["q"], call.state_shape, call.length, call.setting()
    grad_u, x = empty(q, heads, n, e), empty(q, heads, n, e)
    kind, of_u = reads.kinds[-1]
    scored = {"scores": buffers[f"scores{kind.mark}"]} if call.form.gate == "channel" else {}
    of_u.values(buffers | scored | {"grad_v": grad_u}, inflow=False)
    effects = {"grads": empty(q, heads, n, d, dtype=getattr(torch, setting.dtype)), "flow": empty(q, heads, n, e)}
    call.run(chunk_delta.effects_backward(setting), (heads * call.chunks,), buffers | effects | {"grad_u": grad_u})
    buffers["grad_states"] = empty(q, heads, call.chunks, d, e)
    results = {"x": x} | ({"grad_initial": empty(q, heads, d, e)} if setting.form.initial else {})
    kernel = chunk_delta.states_backward(setting)
    call.run(kernel, (heads, kernel.tiles[1]), buffers | effects | results)
    return x, results.get("grad_initial")
