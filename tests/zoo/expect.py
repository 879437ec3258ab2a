"""What the suite expects of a zoo entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Expect:
    """The outcome of one entry.

    `mask` is the predicate in index notation as the report prints it ("" where every pair is kept; several where sites
    differ; None where the suite does not look). `sites` counts the attention sites. `empty_share` is the theory's share
    of empty tiles at 16 x 16, over the batch axes that the mask depends on. `declined` is a part of the reason if the
    entry must be left alone ("" for any reason). `open`: recognised or not, either is right today; only the result
    counts. `regrouped`: the model reshapes its tokens into groups, so the site's axes are not those of `allowed`.
    """

    family: str = "softmax"
    mask: str | tuple[str, ...] | None = None
    sites: int = 1
    empty_share: float | None = None
    declined: str | None = None
    open: bool = False
    regrouped: bool = False


@dataclass(frozen=True)
class Variant:
    """Another spelling, or other sizes, of an entry: its own maker, and its own outcome where it differs."""

    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    expect: Expect | None = None
