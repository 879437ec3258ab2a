"""What can go wrong, one class a mistake: what was expected, what came, what to do, and the user's source line."""

from __future__ import annotations


class RefocusError(Exception):
    """Base of every error raised on purpose.

    `message`: the mistake in one sentence. `expected` / `got`: what should have come, and what did. `todo`: what the
    reader can do now. `location`: the user's `file:line`, where it is known.
    """

    def __init__(
        self, message: str, *, expected: object = None, got: object = None, todo: str = "", location: str = ""
    ) -> None:
        self.message, self.expected, self.got, self.todo, self.location = message, expected, got, todo, location
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [f"{self.location}: {self.message}" if self.location else self.message]
        for label, value in (("expected", self.expected), ("got", self.got), ("to do", self.todo or None)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive Exception's own pickling, which compile workers need.
        return _rebuild, (type(self), self.message, self.expected, self.got, self.todo, self.location)


def _rebuild(
    kind: type[RefocusError], message: str, expected: object, got: object, todo: str, location: str
) -> RefocusError:
    return kind(message, expected=expected, got=got, todo=todo, location=location)


class EngineUnavailable(RefocusError):
    """An engine asked for by name does not exist, or cannot run this region on this machine."""


class RegionNotFused(RefocusError):
    """`require=True`, and an attention site stayed as it was."""


class CannotExplain(RefocusError):
    """`explain` could not run the model on the inputs it was given."""


class VerificationFailed(RefocusError):
    """`verify=`: the fused region and the eager code disagree by more than the tolerance."""


class UnknownOption(RefocusError):
    """An option, or the value of one, that does not exist."""


class NeedsGradient(RefocusError):
    """The fused operator was called on inputs that require a gradient, which it cannot give."""


class BadRegion(RefocusError):
    """The operator was called with tensors or sizes that its region does not describe."""


class CacheProblem(RefocusError):
    """The kernel cache holds something broken, or cannot be written."""


class CacheWarning(UserWarning):
    """Issued once when a `CacheProblem` was worked around."""


class StaleMask(UserWarning):
    """A mask kept as a buffer was changed after the model was compiled, which costs a second compilation."""
