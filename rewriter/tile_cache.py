"""What tiles of a dense tensor hold at least and at most, kept while the tensor is what it was.

A mask given at run time is read once for all layers and calls: as long as its memory was not written to (see
`refocus.identity`), the extremes of its tiles stand. Nothing here keeps a tensor alive; what belongs to memory that is
gone is dropped when something new is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from refocus.identity import Identity, key_of

Ends = tuple[Tensor, Tensor]
_SMALL = 1 << 12  # elements that are as quickly read again
_MOST = 128


class TileCache:
    """(tensor, how it is read) -> the least and the greatest element of each tile."""

    def __init__(self, most: int = _MOST) -> None:
        self.most = most
        self._kept: dict[Any, tuple[Identity, Ends]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def ends(self, tensor: Tensor, how: Hashable, make: Callable[[], Ends]) -> Ends:
        """What `make` gives, made once for each state of the tensor."""
        state = key_of(tensor) if tensor.numel() >= _SMALL else None
        if state is None:
            return make()
        key = (state, how)
        found = self._kept.get(key)
        if found is not None and found[0].holds(tensor):
            return found[1]
        made = make()
        identity = Identity.of(tensor)
        if identity is not None and identity.state == state:
            with self._lock:
                self._drop(state)
                self._kept[key] = (identity, made)
        return made

    def _drop(self, state: tuple[Any, ...]) -> None:
        """What is gone, what this memory held before it was written to, and the oldest where there are too many."""
        for key, (identity, _) in list(self._kept.items()):
            if identity.gone or (identity.state[:2] == state[:2] and identity.state != state):
                del self._kept[key]
        while len(self._kept) >= self.most:
            del self._kept[next(iter(self._kept))]


CACHE = TileCache()
