"""The portable engine of linear attention: `linear_form` in chunks, as matrix products of plain tensors.

Time and memory are linear in the length: in the forward and in the backward, which makes the states again, one span of
chunks follows the other (`spans`). How the state changes in a chunk is said by `additive`, `delta` and `lookup`, their
decays by `chunks`.
"""

from __future__ import annotations

from torch import Tensor

from refocus.codegen import additive, delta, spans, unmasked
from refocus.codegen import lookup as lookups
from refocus.codegen.linear_form import Grads, LinearForm, Operands


def forward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None,
    erase: Tensor | None = None, initial: Tensor | None = None, lookup: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_form.forward` in chunks of `chunk` (a power of two) steps."""
    given = Operands(q, k, v, gate, erase, initial, lookup)
    if not form.causal:
        return unmasked.forward(form, given)
    return spans.forward(_recurrence(form), form, chunk, given)


def backward(
    form: LinearForm, chunk: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None,
    initial: Tensor | None, lookup: Tensor | None, grads: Grads,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (q, k, v, gate, erase, initial, lookup), in the dtypes of these; None where there is none."""
    given = Operands(q, k, v, gate, erase, initial, lookup)
    if not form.causal:
        return unmasked.backward(form, given, grads)
    return spans.backward(_recurrence(form), form, chunk, given, grads)


def _recurrence(form: LinearForm) -> spans.Recurrence:
    if form.lookup:
        return lookups
    return delta if form.erase else additive
