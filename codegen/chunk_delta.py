"""The delta rule in chunks: what is written to the state, u, so that all else is linear attention with u as values.

Within a chunk u depends on u before it, through a triangular matrix, and on the state at the chunk's start:

    u[t] = erase[t] (v[t] - k[t]^T exp(gate[t]) S[t-1])
    (1 + lower) u = erase v - erase exp(cum) k state,   lower[t, j] = erase[t] exp(cum[t] - cum[j]) (k[t] . k[j]), j < t
    u = added - reads state,    added = (1 + lower)^-1 (erase v),    reads = (1 + lower)^-1 (erase exp(cum) k)

(the WY form: Bischof and Van Loan 1987; Yang et al. 2024). Backward, x is what flows into the right-hand side, which is
what flows into u, times the transposed inverse, and it depends on what flows into the state at the chunk's end:

    x = flow + grads grad_state,   flow = (1 + lower)^-T (scores^T grad),   grads = (1 + lower)^-T (exp(last - cum) k)

Where states are looked up by other keys than are written, values are written as they are, along k, and u, along other
keys (`erase`), takes away what is found. That is read one step earlier than a query reads, with the gates `before` it:

    u[t] = -lookup[t]^T S[t-1]
    (1 + lower) u = -found v - exp(before) lookup state,    before[t] = cum[t-1], 0 at the start
    lower[t, j] = exp(before[t] - cum[j]) (lookup[t] . erase[j]), j < t,    found[t, j] the same with k[j]

and all else is as above, with `erase` for the keys that u is written along. The inverse is found by substitution in
blocks of `SUB` steps, and from these below the diagonal. With gates for each channel, the products of pairs come from
`refocus.codegen.chunk_channels`.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_forward import load_scores
from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import SMALLEST, Setting
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def inverse(setting: Setting) -> ChunkKernel:
    """`inverse`: (key heads, chunks * CHUNK, CHUNK), float32, written where blocks of it are not zero."""
    w = ChunkWriter(setting, "delta_inverse", "the inverse of each chunk's triangular matrix")
    body, blocks = w.body, setting.chunk // SMALLEST
    pairs = [(i, j) for i in range(blocks) for j in range(i + 1)]
    (_lower_of_channels if w.by_channel else _lower)(w, blocks, pairs)
    _substitute(w, blocks)
    for gap in range(1, blocks):
        for j in range(blocks - gap):
            _merge(w, j + gap, j)
    for i, j in pairs:
        address = f"inverse_ptr + (place * CHUNK + {_steps(i)}[:, None]) * CHUNK + {_steps(j)}[None, :]"
        body.line(f"tl.store({address}, inverse_{i}{j})")
    return w.finish()


def _lower(w: ChunkWriter, blocks: int, pairs: list[tuple[int, int]]) -> None:
    """The matrix below its diagonal, in blocks."""
    body, lookup = w.body, w.form.lookup
    w.operand(_written(w), 3)
    w.operand("lookup" if lookup else "erase", 3 if lookup else 2)
    w.gate_sums()
    w.buffer("inverse")
    _stand_in_blocks(w)
    w.whole_lanes("d")
    _read_in_blocks(w, blocks, _written(w), "lookup" if lookup else "erase")
    body.lines(f"lower_{i}{j} = tl.zeros([SUB, SUB], tl.float32)" for i, j in pairs)
    loop = w.lanes(body, "d")
    for i in range(blocks):
        w.tile(loop, f"key_{i}", _written(w), "d", _steps(i), _inside(i))
        if lookup:
            w.tile(loop, f"row_{i}", "lookup", "d", _steps(i), _inside(i))
    row, reads = ("row", "until") if lookup else ("key", "cum")
    loop.lines(f"lower_{i}{j} = {w.dot(f'{row}_{i}', f'tl.trans(key_{j})', f'lower_{i}{j}')}" for i, j in pairs)
    for i in range(blocks):
        if not lookup:
            _erase_of(w, i)
        if w.gated:
            w.gate_sum(body, f"cum_{i}", _steps(i))
        if w.gated and lookup:
            w.gate_sum(body, f"until_{i}", f"({_steps(i)} - 1)", given="" if i else "t > 0")
    body.line("before = t[:, None] > t[None, :]")
    for i, j in pairs:
        difference = w.between(f"{reads}_{i}", f"cum_{j}", ("[:, None]", "[None, :]"))
        difference = f"tl.where(before, {difference}, 0.0)" if i == j else difference
        factors = [*([] if lookup else [f"erase_{i}[:, None]"]), *([f"tl.exp({difference})"] if w.gated else [])]
        weighed = " * ".join([f"lower_{i}{j}", *factors])
        if factors or i == j:
            body.line(f"lower_{i}{j} = {f'tl.where(before, {weighed}, 0.0)' if i == j else weighed}")


def _lower_of_channels(w: ChunkWriter, blocks: int, pairs: list[tuple[int, int]]) -> None:
    """The same from `lower`, (key heads, length, CHUNK): products of keys that do not see themselves, or of what each
    step's next one looks up."""
    body, lookup = w.body, w.form.lookup
    if not lookup:
        w.operand("erase", 2)
    w.buffer("lower")
    w.buffer("inverse")
    _stand_in_blocks(w)
    _read_in_blocks(w, blocks, *(() if lookup else ("erase",)))
    body.line("before = t[:, None] > t[None, :]")
    for i, j in pairs:
        rows = f"({w.key_head} * length + start + {_steps(i)}[:, None]{' - 1' if lookup else ''}) * CHUNK"
        mask = f"{_inside(i)}[:, None]{' & before' if i == j else ''}"
        body.line(f"lower_{i}{j} = tl.load(lower_ptr + {rows} + {_steps(j)}[None, :], mask={mask}, other=0.0)")
    for i in range(blocks) if not lookup else ():
        _erase_of(w, i)
        body.lines(f"lower_{i}{j} = lower_{i}{j} * erase_{i}[:, None]" for j in range(i + 1))


def _stand_in_blocks(w: ChunkWriter) -> None:
    w.stand(False, "one chunk of one head, in blocks of steps.", "tl.arange(0, SUB)")


def _read_in_blocks(w: ChunkWriter, blocks: int, *names: str) -> None:
    """Where these operands are, and which of each block's steps there are."""
    for name in names:
        w.base(w.body, name, False)
    w.body.lines(f"inside_{i} = {_steps(i)} < length - start" for i in range(1, blocks))


def _erase_of(w: ChunkWriter, block: int) -> None:
    address = f"erase_base + {_steps(block)} * erase_stride_1"
    w.body.line(f"erase_{block} = tl.load({address}, mask={_inside(block)}, other=0.0).to(tl.float32)")


def _written(w: ChunkWriter) -> str:
    """The keys that u is written along."""
    return "erase" if w.form.lookup else "k"


def _looked_up(w: ChunkWriter) -> str:
    """The keys that u is found by."""
    return "lookup" if w.form.lookup else "k"


def _decays(w: ChunkWriter, block: Block, *wanted: str, d: str = "") -> None:
    """Asked for before tiles of features are visited, and within, for those of `d`: written where they belong."""
    if w.by_channel == bool(d):
        w.decays(block, *wanted, d=d or "d")


def _scaled(w: ChunkWriter, tile: str, vector: str, decay: str) -> str:
    """A tile [step, feature] times a vector of steps ("" for none) and a decay."""
    decays = f"tl.exp({decay})" if w.gated else ""
    factors = " * ".join(x for x in (vector, "" if w.by_channel else decays) if x)
    return " * ".join([tile, *([f"({factors})[:, None]"] if factors else []), *([decays] if w.by_channel else [])])


def _steps(block: int) -> str:
    return f"(t + {block * SMALLEST})" if block else "t"


def _inside(block: int) -> str:
    return f"inside_{block}" if block else "inside"


def _substitute(w: ChunkWriter, blocks: int) -> None:
    """The inverses of the blocks on the diagonal, row by row."""
    body = w.body
    body.lines(f"inverse_{i}{i} = tl.where(t[:, None] == t[None, :], 1.0, 0.0)" for i in range(blocks))
    loop = body.nested("for step in range(1, SUB):")
    loop.line("row = (t == step)[:, None]")
    for i in range(blocks):
        loop.line(f"known = tl.sum(tl.where(row, lower_{i}{i}, 0.0), 0)")
        loop.line(f"known = tl.sum(known[:, None] * inverse_{i}{i}, 0)")
        loop.line(f"inverse_{i}{i} -= tl.where(row, known[None, :], 0.0)")


def _merge(w: ChunkWriter, i: int, j: int) -> None:
    """A block below the diagonal, from those between it and the diagonal."""
    body = w.body
    body.line(f"corner = {_dot(w, f'lower_{i}{j}', f'inverse_{j}{j}', 'tf32x3')}")
    body.lines(f"corner += {_dot(w, f'lower_{i}{m}', f'inverse_{m}{j}', 'tf32x3')}" for m in range(j + 1, i))
    body.line(f"inverse_{i}{j} = -{_dot(w, f'inverse_{i}{i}', 'corner', 'tf32x3')}")


@lru_cache(maxsize=256)
def effects(setting: Setting) -> ChunkKernel:
    """`reads` (key heads, length, d), in what products are computed in, and `added` (key heads, length, e), float32."""
    w = ChunkWriter(setting, "delta_effects", "what a chunk adds to its state, and reads from it")
    for name in ("lookup", "k", "v") if setting.form.lookup else ("k", "v"):
        w.operand(name, 3)
    if not setting.form.lookup:
        w.operand("erase", 2)
    _products(w, "v", "reads", "added", last=False)
    return w.finish()


@lru_cache(maxsize=256)
def effects_backward(setting: Setting) -> ChunkKernel:
    """`grads` (key heads, length, d), in what products are computed in, and `flow` (key heads, length, e), float32.
    `grad_u` is what flows into u within the chunk."""
    w = ChunkWriter(setting, "delta_effects_backward", "what flows back through the inverse of each chunk's matrix")
    w.operand(_written(w), 3)
    w.operand("grad_u", 3, "float32")
    _products(w, "grad_u", "grads", "flow", last=True)
    return w.finish()


def _products(w: ChunkWriter, values: str, of_keys: str, of_values: str, last: bool) -> None:
    """The inverse times keys and values of the chunk, with what they are weighted by; transposed, with `last`."""
    body, finds = w.body, w.form.lookup and not last
    w.gate_sums()
    w.buffer("inverse")
    w.buffer(of_keys, w.setting.dtype)
    w.buffer(of_values)
    w.stand(False, "one chunk of one head.")
    w.whole_lanes("d")
    w.whole_lanes("e")
    address = "inverse_ptr + (place * CHUNK + t[:, None]) * CHUNK + t[None, :]"
    body.line(f"inverse = tl.load({address}, mask=t[:, None] >= t[None, :], other=0.0)")
    erase = "" if last or finds else "erase"
    if last:
        body.line("inverse = tl.trans(inverse)")
    elif erase:
        _erase(w)
    decay, key = "left" if last else "before" if finds else "cum", _written(w) if last else _looked_up(w)
    if not finds:
        _decays(w, body, decay)
    w.base(body, key, False)
    if finds:
        _found(w)
    loop = w.lanes(body, "d")
    _decays(w, loop, decay, d="d")
    w.tile(loop, "key", key, "d", dtype="float32")
    if erase or w.gated:
        loop.line(f"key = {_scaled(w, 'key', erase, decay)}")
    loop.line(f"key = {_dot(w, 'inverse', 'key', 'tf32')}")
    w.put_tile(loop, of_keys, "key", "d", w.key_head)
    w.base(body, values, False)
    loop = w.lanes(body, "e")
    if finds:
        w.tile(loop, "value", values, "e")
        loop.line(f"value = {w.dot(w.narrow('found'), 'value')}")
    else:
        w.tile(loop, "value", values, "e", dtype="float32")
    if erase:
        loop.line("value = value * erase[:, None]")
    loop.line(f"value = {'-' if finds else ''}{_dot(w, 'inverse', 'value', 'tf32')}")
    w.put_tile(loop, of_values, "value", "e", w.key_head)


def _found(w: ChunkWriter) -> None:
    """`found`: what is looked up against the keys of earlier steps of the chunk; with gates for each channel from a
    buffer, as `_lower_of_channels` has it."""
    body = w.body
    if w.by_channel:
        w.buffer("found")
        w.seen(body, reads="before")
        load_scores(w, body, "found", "found", w.key_head, "(t - 1)")
        return
    w.base(body, "k", False)
    w.decays(body, "cum", "before", "rest")
    w.seen(body, reads="before")
    body.line("found = tl.zeros([CHUNK, CHUNK], tl.float32)")
    loop = w.lanes(body, "d")
    w.tile(loop, "row", "lookup", "d")
    w.tile(loop, "key", "k", "d")
    loop.line(f"found = {w.dot('row', 'tl.trans(key)', 'found')}")
    w.weigh(body, "found")


@lru_cache(maxsize=256)
def states(setting: Setting) -> ChunkKernel:
    """`states` as in `refocus.codegen.chunk_states`, and `u` (key heads, length, e), in what products take."""
    w = ChunkWriter(setting, "delta_states", "the state at the start of every chunk, and what is written to it")
    form = setting.form
    # Each tile of the state gets what is written along these keys: values as they are, and u.
    written = [("key", "k", "value"), ("erased", "erase", "u")] if form.lookup else [("key", "k", "u")]
    for _, key, value in written:
        w.operand(key, 3)
        if value == "value":
            w.operand("v", 3)
    w.operand("reads", 3, setting.dtype)
    w.operand("added", 3, "float32")
    w.gate_sums()
    for wanted, name in ((form.initial, "initial"), (True, "states"), (form.final, "final")):
        if wanted:
            w.buffer(name)
    w.buffer("u", setting.dtype)
    loop = _scan(w, "initial" if form.initial else "", "chunk")
    for name in (*(key for _, key, _ in written), *(("v",) if form.lookup else ()), "reads", "added"):
        w.base(loop, name, False)
    w.tile(loop, "u", "added", "e", dtype="float32")
    for d, state in _tiles(w):
        w.put_state(loop, "states", state, d=d)
        w.tile(loop, "reads", "reads", d)
        loop.line(f"u -= {w.state_dot('reads', state)}")
    w.put_tile(loop, "u", "u", "e", w.key_head)
    if w.setting.narrow:
        loop.line(f"written = {w.narrow('u')}")
    if form.lookup:
        w.tile(loop, "value", "v", "e")
    _decays(w, loop, "kept", "left")
    for name, key, value in written:
        for d, state in _tiles(w):
            _decays(w, loop, *(("kept", "left") if key == "k" else ("left",)), d=d)
            w.tile(loop, name, key, d)
            if w.gated:
                if key == "k":
                    w.keep(loop, state)
                loop.line(f"{name} = {name} * tl.exp(left){w.spread}")
            turned = f"tl.trans({w.narrow(name) if w.gated else name})"
            put = "written" if value == "u" and w.setting.narrow else value
            loop.line(f"{state} = {w.dot(turned, put, state)}")
    if form.final:
        for d, state in _tiles(w):
            w.put_state(w.body, "final", state, w.key_head, d)
    return w.finish()


@lru_cache(maxsize=256)
def states_backward(setting: Setting) -> ChunkKernel:
    """`grad_states` as in `refocus.codegen.chunk_states`, and `x` (key heads, length, e), float32."""
    w = ChunkWriter(setting, "delta_states_backward", "what flows into the end of every chunk, and what it writes")
    form = setting.form
    for name in ("q", _looked_up(w), "grad"):
        w.operand(name, 3)
    if not form.lookup:
        w.operand("erase", 2)
    w.operand("grads", 3, setting.dtype)
    w.operand("flow", 3, "float32")
    w.gate_sums()
    given = (form.final, "grad_final"), (True, "grad_states"), (form.initial, "grad_initial")
    for wanted, name in given:
        if wanted:
            w.buffer(name)
    w.buffer("x")
    loop = _scan(w, "grad_final" if form.final else "", "back")
    for name in (_looked_up(w), "grads", "flow"):
        w.base(loop, name, False)
    w.tile(loop, "x", "flow", "e", dtype="float32")
    for d, state in _tiles(w):
        w.put_state(loop, "grad_states", state, d=d)
        w.tile(loop, "grads", "grads", d)
        loop.line(f"x += {w.state_dot('grads', state)}")
    w.put_tile(loop, "x", "x", "e", w.key_head)
    if form.lookup:  # what is found is taken away
        loop.line(f"x = {w.narrow('(-x)')}")
    elif w.setting.narrow:
        loop.line(f"x = {w.narrow('x')}")
    decay = "before" if form.lookup else "cum"
    _decays(w, loop, "kept", "cum", decay)
    if not form.lookup:
        _erase(w, loop)
    for d, state in _tiles(w):
        _decays(w, loop, "kept", decay, d=d)
        if w.gated:
            w.keep(loop, state)
        w.tile(loop, "key", _looked_up(w), d)
        if w.gated or not form.lookup:
            loop.line(f"key = {_scaled(w, 'key', '' if form.lookup else '-erase', decay)}")
        turned = f"tl.trans({w.narrow('key') if w.gated or not form.lookup else 'key'})"
        loop.line(f"{state} = {w.dot(turned, 'x', state)}")
    shared = w.sharing(loop)
    w.base(shared, "q", True)
    w.base(shared, "grad", True)
    w.tile(shared, "grad", "grad", "e")
    for d, state in _tiles(w):
        _decays(w, shared, "cum", d=d)
        w.tile(shared, "query", "q", d)
        if w.gated:
            shared.line(f"query = query * tl.exp(cum){w.spread}")
        turned = f"tl.trans({w.narrow('query') if w.gated else 'query'})"
        shared.line(f"{state} = {w.dot(turned, 'grad', state)}")
    if form.initial:
        for d, state in _tiles(w):
            w.put_state(w.body, "grad_initial", state, w.key_head, d)
    return w.finish()


def _tiles(w: ChunkWriter) -> list[tuple[str, str]]:
    """The features and the state of each tile that a program holds: what is read from a state is summed over all."""
    if w.blocks_d == 1:
        return [("d", "state")]
    return [(f"d_{n}", f"state_{n}") for n in range(w.blocks_d)]


def _scan(w: ChunkWriter, starts: str, counter: str) -> Block:
    """The loop over chunks, from the last one where the `counter` is called "back"."""
    body = w.body
    w.size("length")
    body.line("# One program: all features and a tile of the values of the state of one head, chunk after chunk.")
    body.line(f"{w.key_head} = tl.program_id(0).to(tl.int64)")
    for n, (d, _) in enumerate(_tiles(w)):
        body.line(f"{d} = {f'{n} * BLOCK_D + ' if n else ''}tl.arange(0, BLOCK_D)")
    w.own_lanes("e", "tl.program_id(1)")
    body.line("t = tl.arange(0, CHUNK)")
    body.line("chunks = tl.cdiv(length, CHUNK)")
    for d, state in _tiles(w):
        if starts:
            w.state(body, state, starts, w.key_head, d)
        else:
            body.line(f"{state} = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)")
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
    return f'tl.dot({a}, {b}, input_precision="{w.precision(precision)}")'
