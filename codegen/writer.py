"""Source text under construction: nested blocks of lines, and names that cannot clash."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

WIDTH = 118
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


class Block:
    """Lines at one depth of indentation. A nested block stays open: lines may be added to it at any time."""

    def __init__(self) -> None:
        self._items: list[str | Block] = []

    def line(self, text: str = "") -> None:
        self._items.append(text)

    def lines(self, texts: Iterable[str]) -> None:
        self._items.extend(texts)

    def nested(self, header: str = "") -> Block:
        """A block below `header`, one level deeper; without a header, a place in this block to fill in later."""
        block = Block()
        if header:
            self.line(header)
            indented = _Indented()
            indented._items.append(block)
            self._items.append(indented)
        else:
            self._items.append(block)
        return block

    def render(self, depth: int = 0) -> Iterator[str]:
        for item in self._items:
            if isinstance(item, Block):
                yield from item.render(depth)
            else:
                yield from wrapped(item, "    " * depth)

    @property
    def empty(self) -> bool:
        return not any(True for _ in self.render())


class _Indented(Block):
    def render(self, depth: int = 0) -> Iterator[str]:
        yield from super().render(depth + 1)


def wrapped(line: str, indent: str) -> Iterator[str]:
    """A line; where it is too long, the arguments of its longest call come on lines of their own."""
    if len(indent) + len(line) <= WIDTH or line.startswith("#"):
        yield indent + line if line else ""
        return
    cuts = _longest_call(line)
    if not cuts:
        yield indent + line
        return
    yield indent + line[: cuts[0] + 1]
    for begin, end in pairwise(cuts):
        yield from wrapped(line[begin + 1 : end].strip() + ",", indent + "    ")
    yield indent + line[cuts[-1] :]


def _longest_call(line: str) -> list[int]:
    """Where the longest call of the line has its opening parenthesis, its commas and its closing parenthesis."""
    best: list[int] = []
    cuts: list[int] = []
    depth = 0
    for at, letter in enumerate(line):
        if letter in "([":
            if depth == 0:
                cuts = [at] if letter == "(" and at and (line[at - 1].isalnum() or line[at - 1] == "_") else []
            depth += 1
        elif letter in ")]":
            depth -= 1
            if depth == 0 and cuts:
                cuts.append(at)
                best = max(best, cuts, key=lambda c: c[-1] - c[0] if c else 0)
                cuts = []
        elif letter == "," and depth == 1 and cuts:
            cuts.append(at)
    return best


class Names:
    """Identifiers of one file: valid, and each handed out once. Names inside a loop may come again in the next one."""

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._taken = set(reserved)
        self._in_loop: set[str] = set()
        self._in_loops: set[str] = set()

    def reserve(self, *names: str) -> None:
        self._taken.update(names)

    def next_loop(self) -> None:
        self._in_loop = set()

    def take(self, wish: str, otherwise: str = "name", in_loop: bool = False) -> str:
        """`wish` where it is a plain lower-case identifier, else `otherwise`; numbered when taken already."""
        name = wish if _NAME.fullmatch(wish) and not keyword.iskeyword(wish) else otherwise
        # A name set before a loop must survive all loops.
        clashes = self._taken | (self._in_loop if in_loop else self._in_loops)
        unique, number = name, 2
        while unique in clashes:
            unique, number = f"{name}_{number}", number + 1
        if in_loop:
            self._in_loop.add(unique)
            self._in_loops.add(unique)
        else:
            self._taken.add(unique)
        return unique
