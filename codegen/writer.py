"""Source text under construction: nested blocks of lines, and names that cannot clash."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator

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
    """A line, with the arguments of its calls on lines of their own where it would be too long."""
    opening, ends = _last_call(line)
    if len(indent) + len(line) <= WIDTH or line.startswith("#") or not opening:
        yield indent + line if line else ""
        return
    closing = ends[-1]
    yield indent + line[:opening]
    begin = opening
    for end in ends:
        text = line[begin:end].strip()
        yield from wrapped(text + ",", indent + "    ")
        begin = end + 1
    yield indent + line[closing:]


def _last_call(line: str) -> tuple[int, list[int]]:
    """Where the arguments of the call that ends the line begin, and where each of them ends; (0, []) if none does."""
    text = line.removesuffix(",")
    if not text.endswith(")"):
        return 0, []
    depth, ends = 0, [len(text) - 1]
    for at in range(len(text) - 1, -1, -1):
        if text[at] in ")]":
            depth += 1
        elif text[at] in "([":
            depth -= 1
            if depth == 0:
                called = at > 0 and (text[at - 1].isalnum() or text[at - 1] == "_")
                return (at + 1, ends[::-1]) if called else (0, [])
        elif text[at] == "," and depth == 1:
            ends.append(at)
    return 0, []


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
