"""What the text of a chunked kernel depends on, the tiles that it is given, and its recurrence in index notation."""

from __future__ import annotations

from dataclasses import dataclass

from refocus.codegen.flash_fit import padded
from refocus.codegen.linear_form import LinearForm

NARROW = ("float16", "bfloat16")
SMALLEST = 16  # what tl.dot multiplies


@dataclass(frozen=True)
class Kind:
    """Keys and the values that are written along them, by name, and what marks the variables and buffers of theirs."""

    keys: str
    values: str
    mark: str = ""


def kinds(form: LinearForm) -> tuple[Kind, ...]:
    """What a state is made of. Where it is looked up by other keys than are written, what is taken away, `u`, goes
    along keys of its own (`refocus.codegen.chunk_delta`)."""
    return (Kind("k", "v"), Kind("erase", "u", "_u")) if form.lookup else (Kind("k", "v"),)


@dataclass(frozen=True)
class Setting:
    """All that the text of a kernel depends on. `repr` rebuilds it.

    `d`, `e`: features and values; `share`: query heads for each key head; `dtypes`: of the operands, by name. `tf32`:
    the device has units for that, which products of float32 may be left to where the operands are narrow anyway.
    """

    form: LinearForm
    chunk: int
    d: int
    e: int
    share: int
    dtypes: tuple[tuple[str, str], ...]
    tf32: bool = True

    @property
    def dtype(self) -> str:
        """What products are computed in: the operands' own narrow dtype, else float32."""
        known = dict(self.dtypes)
        operands = (*"qkv", "erase", "lookup", "u") if self.form.lookup else (*"qkv",)
        same = {known[name] for name in operands if name in known}
        return known["q"] if len(same) == 1 and known["q"] in NARROW else "float32"

    @property
    def narrow(self) -> bool:
        return self.dtype in NARROW

    @property
    def widest(self) -> int:
        return max(64, padded(self.d), padded(self.e))


@dataclass(frozen=True)
class Schedule:
    """Values in a tile (and features, where not told apart), and what Triton is asked for."""

    block: int
    warps: int
    stages: int
    features: int = 0


# Tiles that spill no registers on sm_80 and sm_90, at 64 and 128 features and values (tests/test_triton_aot.py).
# Products of float32 run without tensor cores, which takes more registers.
_NARROW = Schedule(64, 4, 2)
_FLOAT32 = Schedule(32, 8, 1)
_SMALL = Schedule(32, 4, 1)
_WIDE = Schedule(64, 8, 2)
_NARROW_KERNELS = {
    "gates_backward": Schedule(32, 4, 1), "linear_step": _SMALL, "delta_inverse": Schedule(64, 1, 1),
    "queries_backward": _WIDE, "keys_backward": _WIDE, "values_backward": _WIDE,
    "delta_states": Schedule(32, 8, 2, 128), "delta_states_backward": Schedule(32, 8, 1, 128),
}  # fmt: skip
# Decays are tiles, too.
_CHANNEL_KERNELS = {
    "chunk_states": _WIDE, "values_backward": Schedule(32, 4, 2), "delta_effects_backward": Schedule(32, 4, 2),
}  # fmt: skip
# Keys of two kinds are held at once.
_LOOKUP_KERNELS = {"delta_inverse": Schedule(32, 1, 1), "queries_backward": Schedule(32, 8, 2)}
_FLOAT32_LOOKUP_KERNELS = {"delta_states": Schedule(16, 8, 1, 32)}
# With decays as tiles, more than 64 features only fit where loads are spread over the loop.
_FLOAT32_CHANNEL_KERNELS = {"delta_states": Schedule(16, 8, 2, 32)}
# With one tile of features and values there are no loops to load in, and everything is in registers at once.
_SINGLE = Schedule(32, 8, 2)
_SINGLE_KERNELS = ("queries_backward", "keys_backward", "values_backward")
_FLOAT32_KERNELS = {
    "gates_backward": Schedule(32, 8, 1), "linear_step": _SMALL, "delta_inverse": Schedule(32, 1, 1),
    "delta_states_backward": Schedule(16, 8, 1, 32), "chunk_outputs": _SINGLE, "chunk_states": _SMALL,
    "chunk_states_backward": _SMALL,
}  # fmt: skip


def schedule(setting: Setting, name: str) -> Schedule:
    """The schedule of the kernel `name`."""
    if name == "gate_sums":
        return Schedule(32, 4 if setting.form.gate == "channel" else 1, 1)
    if not setting.narrow:
        known = {**_FLOAT32_KERNELS, **(_FLOAT32_LOOKUP_KERNELS if setting.form.lookup else {})}
        if setting.form.gate == "channel" and setting.widest > 64:
            known |= _FLOAT32_CHANNEL_KERNELS
        return known.get(name, _FLOAT32)
    if setting.form.gate == "channel" and name in _CHANNEL_KERNELS:
        return _CHANNEL_KERNELS[name]
    if setting.form.lookup and name in _LOOKUP_KERNELS:
        return _LOOKUP_KERNELS[name]
    if setting.widest <= 64 and name in _SINGLE_KERNELS:
        return _SINGLE
    return _NARROW_KERNELS.get(name, _NARROW)


def notation(form: LinearForm, share: int) -> list[str]:
    """The recurrence, in index notation."""
    shared = f"b//{share}" if share > 1 else "b"
    decay = {"none": "", "head": "exp(gate[c,t]) * ", "channel": "exp(gate[c,t,d]) * "}[form.gate]
    new = "k[c,t,d] * v[c,t,e]"
    lines = []
    if form.lookup:
        new += " + erase[c,t,d] * u[c,t,e]"
        lines.append("u[c,t,e]   = -sum_d lookup[c,t,d] * S[c,t-1,d,e]")
    elif form.erase:
        new = "k[c,t,d] * u[c,t,e]"
        lines.append(f"u[c,t,e]   = erase[c,t] * (v[c,t,e] - sum_d k[c,t,d] * {decay}S[c,t-1,d,e])")
    lines.append(f"S[c,t,d,e] = {decay}S[c,t-1,d,e] + {new}")
    seen = f"S[{shared},t,d,e]"
    if form.strict:
        seen = f"{decay.replace('c,', shared + ',')}S[{shared},t-1,d,e]"
    lines.append(f"O[b,t,e]   = sum_d q[b,t,d] * {seen}")
    if form.sums:
        lines.append(f"sums[b,t]  = the same with v = 1{', and no initial state' if form.initial else ''}")
    return lines
