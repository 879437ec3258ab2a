"""Tile maps as pictures: a character for each tile, an SVG for the HTML report, a PNG where matplotlib is installed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

EMPTY, PARTIAL, FULL = ".+#"
_COLOURS = {EMPTY: "#ffffff", PARTIAL: "#9ecae1", FULL: "#2171b5"}
_MEANING = {EMPTY: "never visited", PARTIAL: "mask evaluated", FULL: "no mask needed"}


@dataclass(frozen=True)
class Map:
    """One plane of tiles: a string for each row, of the characters `.` (empty), `+` (partial) and `#` (full). `label`:
    the batch positions that have this plane, "" where all have it. `scale`: tiles along each side of a character."""

    label: str
    rows: tuple[str, ...]
    scale: int = 1


def maps_of(state: Tensor, names: Sequence[str], scale: int = 1, most: int = 16) -> tuple[Map, ...]:
    """The distinct planes of tile states [*batch, query tiles, key tiles], commonest first. `names`: the batch's."""
    lead = state.shape[:-2]
    planes = state.reshape(-1, *state.shape[-2:])
    found: dict[tuple[str, ...], list[int]] = {}
    for at, plane in enumerate(planes[:4096].tolist()):
        rows = tuple("".join((EMPTY, PARTIAL, FULL)[tile] for tile in row) for row in plane)
        found.setdefault(rows, []).append(at)
    kinds = sorted(found.items(), key=lambda kind: (-len(kind[1]), kind[1]))[:most]
    if len(found) == 1:
        return (Map("", kinds[0][0], scale),)
    return tuple(Map(_positions(where, lead, names), rows, scale) for rows, where in kinds)


def _positions(where: Sequence[int], shape: Sequence[int], names: Sequence[str]) -> str:
    """Positions in the batch by name: "h=0..3, 7"; of several axes only the first, and how many more."""
    if len(shape) == 1:
        spans = []
        for _, group in groupby(enumerate(where), key=lambda pair: pair[1] - pair[0]):
            at = [position for _, position in group]
            spans.append(str(at[0]) if len(at) == 1 else f"{at[0]}..{at[-1]}")
        return f"{names[0]}={', '.join(spans)}"
    rest, parts = where[0], []
    for name, size in zip(reversed(names), reversed(shape)):
        rest, place = divmod(rest, size)
        parts.append(f"{name}={place}")
    return ", ".join(reversed(parts)) + (f" and {len(where) - 1} more" if len(where) > 1 else "")


def svg(plane: Map, width: int = 200) -> str:
    """The plane as an inline SVG image: queries down, keys to the right."""
    rows, columns = len(plane.rows), max((len(row) for row in plane.rows), default=0)
    if not rows or not columns:
        return ""
    size = width / max(rows, columns)
    parts = []
    for y, row in enumerate(plane.rows):
        x = 0
        for kind, group in groupby(row):
            length = len(list(group))
            if kind != EMPTY:
                parts.append(f'<path d="M{x} {y}h{length}v1h-{length}z" fill="{_COLOURS[kind]}"/>')
            x += length
    title = html.escape(plane.label or "all heads")
    return (
        f'<svg viewBox="0 0 {columns} {rows}" width="{columns * size:.0f}" height="{rows * size:.0f}" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges" role="img" '
        f'style="background:{_COLOURS[EMPTY]};outline:1px solid #8c959f">'
        f"<title>tiles of {title}: white never visited, light mask evaluated, dark no mask needed</title>"
        f"{''.join(parts)}</svg>"
    )


def save_png(planes: Sequence[Map], path: Path, title: str = "") -> None:
    """Draw the planes side by side. Needs matplotlib (the package's extra `report`)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(3.2 * len(planes) + 0.4, 3.9), layout="constrained")
    for k, plane in enumerate(planes):
        axes = figure.add_subplot(1, len(planes), k + 1)
        values = [[(EMPTY, PARTIAL, FULL).index(tile) for tile in row] for row in plane.rows]
        axes.imshow(values, cmap=ListedColormap(list(_COLOURS.values())), vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(plane.label or "all heads", fontsize=9)
        unit = "tiles" if plane.scale == 1 else f"{plane.scale} tiles"
        axes.set_xlabel(f"keys ({unit})", fontsize=8)
        axes.set_ylabel(f"queries ({unit})", fontsize=8)
    legend = [Patch(facecolor=colour, edgecolor="grey", label=_MEANING[kind]) for kind, colour in _COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
