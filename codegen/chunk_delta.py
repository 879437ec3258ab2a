"""The delta rule in chunks: what is written to the state, u, so that all else is linear attention with u as values.

Within a chunk u depends on u before it, through a triangular matrix, and on the state at the chunk's start:

    u[t] = erase[t] (v[t] - k[t]^T exp(gate[t]) S[t-1])
    (1 + lower) u = erase v - erase exp(cum) k state,   lower[t, j] = erase[t] exp(cum[t] - cum[j]) (k[t] . k[j]), j < t
    u = added - reads state,    added = (1 + lower)^-1 (erase v),    reads = (1 + lower)^-1 (erase exp(cum) k)

(the WY form: Bischof and Van Loan 1987; Yang et al. 2024). Backward, x is what flows into the right-hand side, which is
what flows into u, times the transposed inverse, and it depends on what flows into the state at the chunk's end:

    x = flow + grads grad_state,   flow = (1 + lower)^-T (scores^T grad),   grads = (1 + lower)^-T (exp(last - cum) k)

The inverse is found by substitution in blocks of `SUB` steps, all of them at once; then blocks are merged in pairs.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_kernel import SMALLEST, ChunkKernel, ChunkWriter, Setting
from refocus.codegen.flash_fit import padded
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def inverse(setting: Setting) -> ChunkKernel:
    """`inverse`: (key heads, chunks * CHUNK, CHUNK), float32."""
    w = ChunkWriter(setting, "delta_inverse", "the inverse of each chunk's triangular matrix")
    body = w.body
    w.operand("k", 3)
    w.operand("erase", 2)
    if w.gated:
        w.buffer("cum")
    w.buffer("inverse")
    w.stand(False, "one chunk of one head.")
    w.whole_lanes("d")
    w.base(body, "k", False)
    body.line("lower = tl.zeros([CHUNK, CHUNK], tl.float32)")
    loop = w.lanes(body, "d")
    w.tile(loop, "key", "k", "d")
    loop.line(f"lower = {w.dot('key', 'tl.trans(key)', 'lower')}")
    _erase(w)
    w.decays(body, last=False)
    body.line("before = t[:, None] > t[None, :]")
    decay = " * tl.exp(tl.where(before, cum[:, None] - cum[None, :], 0.0))" if w.gated else ""
    body.line(f"lower = tl.where(before, lower * erase[:, None]{decay}, 0.0)")
    body.line("inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0)")
    body.line("block = (t // SUB)[:, None] == (t // SUB)[None, :]")
    loop = body.nested("for step in range(1, SUB):")
    loop.line("row = (t % SUB == step)[:, None] & block")
    loop.line("known = tl.sum(tl.where(row, lower, 0.0), 0)")
    loop.line("known = tl.sum(known[:, None] * inverse, 0)")
    loop.line("inverse -= tl.where(row, known[None, :], 0.0)")
    size = SMALLEST
    while size < setting.chunk:
        body.line(f"pair = (t // {2 * size})[:, None] == (t // {2 * size})[None, :]")
        body.line(f"corner = tl.where(pair & ((t // {size})[:, None] > (t // {size})[None, :]), lower, 0.0)")
        body.line(f"corner = {_dot(w, 'inverse', 'corner', 'tf32x3')}")
        body.line(f"inverse -= {_dot(w, 'corner', 'inverse', 'tf32x3')}")
        size *= 2
    body.line(f"tl.store({_PLACE}, inverse)")
    return w.finish()


_PLACE = "inverse_ptr + (place * CHUNK + t[:, None]) * CHUNK + t[None, :]"


@lru_cache(maxsize=256)
def effects(setting: Setting) -> ChunkKernel:
    """`reads` (key heads, length, d), in what products are computed in, and `added` (key heads, length, e), float32."""
    w = ChunkWriter(setting, "delta_effects", "what a chunk adds to its state, and reads from it")
    w.operand("k", 3)
    w.operand("v", 3)
    w.operand("erase", 2)
    _products(w, "v", "reads", "added", last=False)
    return w.finish()


@lru_cache(maxsize=256)
def effects_backward(setting: Setting) -> ChunkKernel:
    """`grads` (key heads, length, d), in what products are computed in, and `flow` (key heads, length, e), float32.
    `grad_u` is what flows into u within the chunk."""
    w = ChunkWriter(setting, "delta_effects_backward", "what flows back through the inverse of each chunk's matrix")
    w.operand("k", 3)
    w.operand("grad_u", 3, "float32")
    _products(w, "grad_u", "grads", "flow", last=True)
    return w.finish()


def _products(w: ChunkWriter, values: str, of_keys: str, of_values: str, last: bool) -> None:
    """The inverse times keys and values of the chunk, with what they are weighted by; transposed, with `last`."""
    body = w.body
    for wanted, name in ((w.gated, "cum"), (True, "inverse")):
        if wanted:
            w.buffer(name)
    w.buffer(of_keys, w.setting.dtype)
    w.buffer(of_values)
    w.stand(False, "one chunk of one head.")
    w.whole_lanes("d")
    w.whole_lanes("e")
    body.line(f"inverse = tl.load({_PLACE})")
    if last:
        body.line("inverse = tl.trans(inverse)")
    else:
        _erase(w)
    w.decays(body, last)
    factors = [] if last else ["erase"]
    factors += ["tl.exp(last - cum)" if last else "tl.exp(cum)"] if w.gated else []
    w.base(body, "k", False)
    loop = w.lanes(body, "d")
    w.tile(loop, "key", "k", "d", dtype="float32")
    if factors:
        loop.line(f"key = key * ({' * '.join(factors)})[:, None]")
    loop.line(f"key = {_dot(w, 'inverse', 'key', 'tf32')}")
    w.put_tile(loop, of_keys, "key", "d", w.key_head)
    w.base(body, values, False)
    loop = w.lanes(body, "e")
    w.tile(loop, "value", values, "e", dtype="float32")
    if not last:
        loop.line("value = value * erase[:, None]")
    loop.line(f"value = {_dot(w, 'inverse', 'value', 'tf32')}")
    w.put_tile(loop, of_values, "value", "e", w.key_head)


@lru_cache(maxsize=256)
def states(setting: Setting) -> ChunkKernel:
    """`states` as in `refocus.codegen.chunk_states`, and `u` (key heads, length, e), in what products take."""
    w = _writer(setting, "delta_states", "the state at the start of every chunk, and what is written to it")
    body, form = w.body, setting.form
    w.operand("k", 3)
    w.operand("reads", 3, setting.dtype)
    w.operand("added", 3, "float32")
    for wanted, name in ((w.gated, "cum"), (form.initial, "initial"), (True, "states"), (form.final, "final")):
        if wanted:
            w.buffer(name)
    w.buffer("u", setting.dtype)
    loop = _scan(w, "initial" if form.initial else "", "chunk")
    w.put_state(loop, "states", "state")
    for name in ("k", "reads", "added"):
        w.base(loop, name, False)
    w.tile(loop, "reads", "reads", "d")
    w.tile(loop, "added", "added", "e", dtype="float32")
    loop.line(f"u = added - {w.state_dot('reads', 'state')}")
    w.put_tile(loop, "u", "u", "e", w.key_head)
    w.decays(loop, last=True)
    w.tile(loop, "key", "k", "d")
    key = "key"
    if w.gated:
        loop.line("state = state * tl.exp(last)")
        loop.line("key = key * tl.exp(last - cum)[:, None]")
        key = w.narrow("key")
    loop.line(f"state = {w.dot(f'tl.trans({key})', w.narrow('u'), 'state')}")
    if form.final:
        w.put_state(body, "final", "state", w.key_head)
    return w.finish()


@lru_cache(maxsize=256)
def states_backward(setting: Setting) -> ChunkKernel:
    """`grad_states` as in `refocus.codegen.chunk_states`, and `x` (key heads, length, e), float32."""
    w = _writer(setting, "delta_states_backward", "what flows into the end of every chunk, and into what it writes")
    body, form = w.body, setting.form
    for name in ("q", "k", "grad"):
        w.operand(name, 3)
    w.operand("erase", 2)
    w.operand("grads", 3, setting.dtype)
    w.operand("flow", 3, "float32")
    given = (w.gated, "cum"), (form.final, "grad_final"), (True, "grad_states"), (form.initial, "grad_initial")
    for wanted, name in given:
        if wanted:
            w.buffer(name)
    w.buffer("x")
    loop = _scan(w, "grad_final" if form.final else "", "back")
    w.put_state(loop, "grad_states", "state")
    for name in ("k", "grads", "flow"):
        w.base(loop, name, False)
    w.tile(loop, "grads", "grads", "d")
    w.tile(loop, "flow", "flow", "e", dtype="float32")
    loop.line(f"x = flow + {w.state_dot('grads', 'state')}")
    w.put_tile(loop, "x", "x", "e", w.key_head)
    w.decays(loop, last=True)
    if w.gated:
        loop.line("state = state * tl.exp(last)")
    _erase(w, loop)
    w.tile(loop, "key", "k", "d")
    loop.line(f"key = key * (-erase{' * tl.exp(cum)' if w.gated else ''})[:, None]")
    turned = f"tl.trans({w.narrow('key')})"
    loop.line(f"state = {w.dot(turned, w.narrow('x'), 'state')}")
    shared = w.sharing(loop)
    w.base(shared, "q", True)
    w.base(shared, "grad", True)
    w.tile(shared, "query", "q", "d")
    w.tile(shared, "grad", "grad", "e")
    if w.gated:
        shared.line("query = query * tl.exp(cum)[:, None]")
    turned = f"tl.trans({w.narrow('query') if w.gated else 'query'})"
    shared.line(f"state = {w.dot(turned, 'grad', 'state')}")
    if form.initial:
        w.put_state(body, "grad_initial", "state", w.key_head)
    return w.finish()


def _writer(setting: Setting, name: str, what: str) -> ChunkWriter:
    """Programs of a state hold all features: what is read from it is summed over them."""
    w = ChunkWriter(setting, name, what)
    w.block_d, w.blocks_d = padded(setting.d), 1
    return w


def _scan(w: ChunkWriter, starts: str, counter: str) -> Block:
    """The loop over chunks, from the last one where the `counter` is called "back"."""
    body = w.body
    w.size("length")
    body.line("# One program: all features and a tile of the values of the state of one head, chunk after chunk.")
    body.line(f"{w.key_head} = tl.program_id(0).to(tl.int64)")
    w.own_lanes("d", "")
    w.own_lanes("e", "tl.program_id(1)")
    body.line("t = tl.arange(0, CHUNK)")
    body.line("chunks = tl.cdiv(length, CHUNK)")
    if starts:
        w.state(body, "state", starts, w.key_head)
    else:
        body.line("state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)")
    loop = body.nested(f"for {counter} in range(0, chunks):")
    if counter == "back":
        loop.line("chunk = chunks - 1 - back")
    loop.line(f"place = {w.key_head} * chunks + chunk")
    loop.line("start = tl.cast(chunk, tl.int64) * CHUNK")
    loop.line("inside = t < length - start")
    return loop


def _erase(w: ChunkWriter, block: Block | None = None) -> None:
    block = block or w.body
    w.base(block, "erase", False)
    block.line("erase = tl.load(erase_base + t * erase_stride_1, mask=inside, other=0.0).to(tl.float32)")


def _dot(w: ChunkWriter, a: str, b: str, precision: str) -> str:
    """A product of float32; where operands are narrow, what it is rounded to (as they were) is still finer."""
    return f'tl.dot({a}, {b}, input_precision="{precision if w.setting.narrow else "ieee"}")'
