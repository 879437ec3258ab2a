"""What a caller may ask for, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from refocus.errors import UnknownOption

ENGINES = ("triton", "cpp", "tiled", "sdpa")
VERIFY = (None, "first", "always")


@dataclass(frozen=True)
class Options:
    """`engine`: force every recognised region through this engine (None: the plan decides). `verify`: None, "first"
    (compare with eager code on the first call of each shape) or "always". `require`: a site that is not fused is an
    error. `report`: called with the `Report` of each compiled graph, or a path that it is written to."""

    engine: str | None = None
    verify: str | None = None
    require: bool = False
    report: Callable[[Any], None] | str | PathLike[str] | None = None

    @classmethod
    def of(cls, given: Any) -> Options:
        """From a mapping (`torch.compile(options=...)`). Raises UnknownOption."""
        given = dict(given or {})
        unknown = set(given) - set(cls.__dataclass_fields__)
        if unknown:
            raise UnknownOption(
                f"unknown option {sorted(unknown)[0]!r}",
                expected=", ".join(cls.__dataclass_fields__),
                got=", ".join(sorted(unknown)),
                todo="leave it out",
            )
        made = cls(**given)
        if made.engine not in (None, *ENGINES):
            raise UnknownOption(
                f"there is no engine {made.engine!r}",
                expected=", ".join(ENGINES),
                got=made.engine,
                todo="name one of these, or none",
            )
        if made.verify not in VERIFY:
            raise UnknownOption(
                f"verify cannot be {made.verify!r}",
                expected=", ".join(map(repr, VERIFY)),
                got=made.verify,
                todo="name one of these",
            )
        return made
