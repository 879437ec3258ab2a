"""Triton functions that generated kernels call by name, as source text.

Triton's language has no tanh, round, log1p, ... and divides integers towards zero. Each function here is written out
of what the language does have, without a device library, so that it compiles for every target and runs under the
interpreter. A kernel file contains the ones it calls, and nothing else.

Floats are float32; sources of the less obvious formulas are in the comments of the functions themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SOURCES = (
    """
def add_exactly(a, a_rest, b, b_rest):
    # Knuth's sum, and what it lost to rounding.
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part) + (a_rest + b_rest)
""",
    """
def floor_div(a, b):
    # Triton divides towards zero.
    quotient = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
""",
    """
def floor_mod(a, b):
    # Triton's remainder has the sign of the dividend.
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    """
def tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -y, y)
""",
    """
def counter_mix(x):
    # The finaliser "lowbias32" of C. Wellons' hash prospector, on 32-bit words.
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
""",
    """
def counter_random(seed, row, column):
    # Uniform in [0, 1), a function of the seed and the position alone.
    low = tl.cast(seed, tl.uint32)
    high = tl.cast(seed >> 32, tl.uint32)
    first = counter_mix(tl.cast(row, tl.uint32) ^ low)
    second = counter_mix(first + high)
    word = counter_mix(counter_mix(tl.cast(column, tl.uint32) + first) ^ second)
    return tl.cast(word >> 8, tl.float32) * 5.9604644775390625e-08
""",
    """
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
""",
    """
def log1p(x):
    # Kahan: the error of 1 + x cancels in x / ((1 + x) - 1).
    u = 1.0 + x
    y = tl.log(u) * (x / (u - 1.0))
    return tl.where((u == 1.0) | (u == float("inf")), x, y)
""",
    """
def expm1(x):
    # Kahan: the error of exp(x) cancels in x / log(exp(x)).
    u = tl.exp(x)
    y = (u - 1.0) * (x / tl.log(u))
    y = tl.where(u == 1.0, x, y)
    return tl.where((u == 0.0) | (u == float("inf")), u - 1.0, y)
""",
    """
def exp_rest(x, rounded):
    # What exp(x) lost when it came out as `rounded`, near x = 0, by its series: products of many factors drift.
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    y = y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8)))))))
    return tl.where(near, y - (rounded - 1.0), 0.0)
""",
    """
def softplus(x):
    return relu(x) + log1p(tl.exp(-tl.abs(x)))
""",
    """
def logaddexp(a, b):
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(high == low, high + 0.6931471805599453, high + log1p(tl.exp(low - high)))
""",
    """
def relu(x):
    return tl.where(x < 0, 0.0, x)
""",
    """
def square(x):
    return x * x
""",
    """
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
""",
    """
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
""",
    """
def round_even(x):
    low = tl.floor(x)
    odd = low - 2.0 * tl.floor(0.5 * low)
    rest = x - low
    return tl.where(rest == 0.5, low + odd, tl.where(rest > 0.5, low + 1.0, low))
""",
    """
def power(x, y):
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(0.5 * y) != 0.5 * y)
    signed = tl.where(odd, -size, tl.where(whole | (x == float("-inf")), size, float("nan")))
    one = (y == 0.0) | (x == 1.0) | ((x == -1.0) & (tl.abs(y) == float("inf")))
    return tl.where(one, 1.0, tl.where(x < 0, signed, size))
""",
    """
def float_mod(a, b):
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    """
def atan(x):
    # Cephes atanf: three ranges, then a polynomial of degree nine.
    size = tl.abs(x)
    far, middle = size > 2.414213562373095, size > 0.4142135623730950
    start = tl.where(far, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    t = tl.where(far, -1.0 / size, tl.where(middle, (size - 1.0) / (size + 1.0), size))
    z = t * t
    poly = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    y = start + poly * z * t + t
    return tl.where(x < 0, -y, y)
""",
    """
def isnan(x):
    return x != x
""",
    """
def isinf(x):
    return tl.abs(x) == float("inf")
""",
)

FUNCTIONS = {re.match(r"\ndef (\w+)", text).group(1): text.strip("\n") for text in _SOURCES}  # type: ignore[union-attr]


def sources(names: Iterable[str]) -> list[str]:
    """The source of each named function and of those it calls, in an order in which every callee comes first."""
    wanted: dict[str, str] = {}

    def need(name: str) -> None:
        if name not in wanted:
            for callee in re.findall(r"(?<![.\w])(\w+)\(", FUNCTIONS[name].split(":", 1)[1]):
                if callee in FUNCTIONS:
                    need(callee)
            wanted[name] = f"@triton.jit\n{FUNCTIONS[name]}"

    for name in sorted(names):
        need(name)
    return list(wanted.values())
