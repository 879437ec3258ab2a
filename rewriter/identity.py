"""Whether a tensor still holds what it held: its storage and PyTorch's own count of writes to it.

The count (`tensor._version`, which autograd keeps) sees every in-place operation, also those of compiled code. It does
not see writes through `tensor.data`, and none from outside PyTorch: memory that NumPy or a file may share has no
identity here, so nothing is remembered about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True, eq=False)
class Identity:
    """A tensor at one moment. It keeps no memory alive, and no other storage can take its place while it exists."""

    storage: StorageWeakRef
    state: tuple[Any, ...]

    @staticmethod
    def of(tensor: Tensor) -> Identity | None:
        """None where a change could go unnoticed, or where there are no values yet (while tracing)."""
        state = _state(tensor)
        return None if state is None else Identity(StorageWeakRef(tensor.untyped_storage()), state)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the same memory, laid out the same way and not written to since."""
        return _state(tensor) == self.state

    @property
    def gone(self) -> bool:
        return bool(self.storage.expired())


def key_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two tensors of one `Identity` have in common, to look it up by. It says little once that one is gone."""
    return _state(tensor)


def _state(tensor: Tensor) -> tuple[Any, ...] | None:
    # A subclass (a fake tensor, a tracer's, a distributed one) may have no memory of its own.
    if not any(type(tensor) is kind for kind in _PLAIN) or tensor.layout != torch.strided:
        return None
    if torch._C._len_torch_dispatch_stack():  # whoever traces must see every operation
        return None
    if tensor.device.type == "meta" or tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    storage = tensor.untyped_storage()
    if not storage.resizable():
        return None
    at = tensor.data_ptr()
    return storage._cdata, at, tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()
