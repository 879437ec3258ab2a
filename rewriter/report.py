"""What `refocus.explain` returns: the attention sites of a model, and how they read as text, JSON, HTML and in colour.

A `Site` is one attention that the compiler saw, whether it was replaced or left alone. Everything here is plain
data: a `Report` survives `to_json` and `from_json` unchanged, and no field holds a tensor or a graph.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refocus.pictures import Map, save_png, svg

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Tiles:
    """How many tiles of the query-key plane the mask empties, cuts or leaves whole.

    `shape` is one tile's size as (queries, keys). `empty`, `partial` and `full` count tiles over all batch axes that
    the mask depends on. `picture`, where there is one, draws one plane: a string for each row of tiles, of the
    characters `.` (empty: never visited), `+` (partial: mask evaluated) and `#` (full: no mask needed). `maps`: the
    distinct planes, each for the heads that have it, coarser where a plane has many tiles.
    """

    shape: tuple[int, int]
    empty: int
    partial: int
    full: int
    picture: tuple[str, ...] = ()
    maps: tuple[Map, ...] = ()

    @property
    def total(self) -> int:
        return self.empty + self.partial + self.full

    @property
    def empty_share(self) -> float:
        """Share of the tiles that are skipped, 0 to 1."""
        return self.empty / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows, columns = self.shape
        return (
            f"{rows} x {columns}: {self.empty} empty ({self.empty_share:.0%}), {self.partial} partial, {self.full} full"
        )


@dataclass(frozen=True)
class Cost:
    """Work of one site: `flops` (a multiply-add counts two) and `bytes` moved to and from memory."""

    flops: int
    bytes: int

    def __str__(self) -> str:
        return f"{_quantity(self.flops, 1000, ('', 'k', 'M', 'G', 'T', 'P'))}FLOP, {_bytes(self.bytes)}"


@dataclass(frozen=True)
class Site:
    """One attention in the user's model.

    `recognized`: the region is understood. `fused`: it was replaced by one operator. `reason`: why it was left alone,
    or why this engine was chosen; `blame`: the operation at fault, where one is. `location` is the user's
    "file:line". `notation` and `mask` are the region in index notation; both are empty if it was not recognised.
    `mask_source`: closed form (written as one, or inferred from a constant), vectors, blocks or dense tensors.
    """

    name: str
    location: str
    recognized: bool
    fused: bool
    reason: str = ""
    family: str = ""
    notation: str = ""
    mask: str = ""
    mask_source: str = ""
    tiles: Tiles | None = None
    engine: str = ""
    kernel_path: str | None = None
    before: Cost | None = None
    after: Cost | None = None
    blame: str | None = None

    @property
    def state(self) -> str:
        """One of "fused", "recognised" (understood, left as it is) and "left alone"."""
        return "fused" if self.fused else "recognised" if self.recognized else "left alone"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """The inverse of `dataclasses.asdict`, also after a trip through JSON (lists for tuples)."""
        data = dict(data)
        if data.get("tiles"):
            tiles = data["tiles"]
            maps = tuple(Map(m["label"], tuple(m["rows"]), m["scale"]) for m in tiles.get("maps", ()))
            lists = {"shape": tuple(tiles["shape"]), "picture": tuple(tiles["picture"]), "maps": maps}
            data["tiles"] = Tiles(**{**tiles, **lists})
        for side in ("before", "after"):
            if data.get(side):
                data[side] = Cost(**data[side])
        return cls(**data)


@dataclass(frozen=True)
class Report:
    """All sites of one model, in the order in which they run.

    `graphs`: how many graphs the capture made (more than one: the model has graph breaks). `seconds`: time that
    Refocus's own passes took. `notes`: what kept a whole graph from being read, if anything did.
    """

    sites: tuple[Site, ...]
    graphs: int = 1
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def fused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.fused)

    @property
    def left(self) -> tuple[Site, ...]:
        """The sites that were not replaced, each with its reason."""
        return tuple(site for site in self.sites if not site.fused)

    @property
    def summary(self) -> str:
        recognized = sum(site.recognized for site in self.sites)
        return (
            f"{_count(len(self.sites), 'attention site')}: {recognized} recognised, {len(self.fused)} fused, "
            f"{len(self.left)} left as they are ({_count(self.graphs, 'graph')}, {self.seconds:.2f} s)"
        )

    def __str__(self) -> str:
        lines = [self.summary, *(f"note: {note}" for note in self.notes)]
        if not self.sites and not self.notes:
            lines.append(
                "No attention was found: no product of two tensors is normalised and applied to a third."
                if self.graphs
                else "No graph was captured: the call ran as it is (TORCH_LOGS=graph_breaks says where Dynamo gave up)."
            )
        for names, site in self._groups():
            lines += ["", f"{names}  {site.location}  {site.state}"]
            lines += [f"    {key:<9} {_indent(text)}" for key, text in _facts(site)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        sites = tuple(Site.from_dict(site) for site in data["sites"])
        return cls(sites, data["graphs"], data["seconds"], tuple(data.get("notes", ())))

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls.from_dict(json.loads(text))

    def to_html(self, title: str = "Refocus report") -> str:
        """One self-contained page: no scripts, no links to other files."""
        cards = "\n".join(_card(names, site) for names, site in self._groups())
        return _PAGE.format(title=html.escape(title), summary=html.escape(self.summary), cards=cards)

    def save_pictures(self, folder: str | PathLike[str]) -> list[Path]:
        """A PNG of the tile maps of each distinct site that has a mask. Needs matplotlib (the extra `report`)."""
        written = []
        for names, site in self._groups():
            if site.tiles and site.tiles.maps:
                path = Path(folder) / f"{names.split()[0]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(site.tiles.maps, path, f"{names}: {site.tiles}")
                written.append(path)
        return written

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        panels: list[RenderableType] = [Text(self.summary, style="bold")]
        panels += [Text(f"note: {note}", style="yellow") for note in self.notes]
        for names, site in self._groups():
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for key, text in _facts(site):
                grid.add_row(key, Text(text))
            head = Text.assemble((names, "bold"), "  ", site.location, "  ", (site.state, _COLOURS[site.state]))
            panels.append(Panel(grid, title=head, title_align="left", border_style=_COLOURS[site.state]))
        return Group(*panels)

    def _groups(self) -> Iterator[tuple[str, Site]]:
        """Sites that differ in nothing but their name, together: the equal layers of a model read as one block."""
        groups: dict[Site, list[str]] = {}
        for site in self.sites:
            groups.setdefault(replace(site, name=""), []).append(site.name)
        for site, names in groups.items():
            yield (names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)} equal sites)"), site


_COLOURS = {"fused": "green", "recognised": "yellow", "left alone": "red"}


def joined(reports: Sequence[Report], graphs: int = 1) -> Report:
    """One report of several, with the sites numbered again."""
    sites = (site for report in reports for site in report.sites)
    return Report(
        tuple(replace(site, name=f"attention{number}") for number, site in enumerate(sites)),
        graphs,
        sum(report.seconds for report in reports),
        tuple(note for report in reports for note in report.notes),
    )


def _facts(site: Site) -> Iterator[tuple[str, str]]:
    """The lines of one block: (label, text), only those that say something."""
    yield from (
        (key, text)
        for key, text in (
            ("reason", site.reason),
            ("blame", site.blame or ""),
            ("family", site.family),
            ("computes", site.notation),
            ("mask", f"{site.mask}\nfrom: {site.mask_source}" if site.mask_source else site.mask),
            ("tiles", "\n".join((str(site.tiles), *site.tiles.picture)) if site.tiles else ""),
            ("engine", site.engine),
            ("kernel", site.kernel_path or ""),
            ("cost", _cost(site.before, site.after)),
        )
        if text
    )


def _cost(before: Cost | None, after: Cost | None) -> str:
    if before and after:
        return f"{before}  ->  {after}"
    return str(before or after or "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _quantity(value: float, base: int, units: tuple[str, ...]) -> str:
    rank = 0
    while value >= base and rank + 1 < len(units):
        value, rank = value / base, rank + 1
    return f"{value:.0f} {units[rank]}" if rank == 0 or value >= 100 else f"{value:.3g} {units[rank]}"


def _bytes(value: int) -> str:
    return _quantity(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _indent(text: str) -> str:
    return text.replace("\n", "\n" + " " * 14)


def _card(names: str, site: Site) -> str:
    rows = "".join(f"<dt>{key}</dt><dd>{html.escape(text)}</dd>" for key, text in _facts(site))
    if site.tiles and site.tiles.maps:
        figures = (
            f"<figure>{svg(m)}<figcaption>{html.escape(m.label)}</figcaption></figure>" for m in site.tiles.maps
        )
        rows += f"<dt>tile map</dt><dd class='maps'>{''.join(figures)}</dd>"
    head = f"<h2>{html.escape(names)} <code>{html.escape(site.location)}</code> <em>{site.state}</em></h2>"
    return f'<section class="{site.state.split()[0]}">{head}<dl>{rows}</dl></section>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
section {{ border-left: 4px solid #b35900; margin: 1.2rem 0; padding: .1rem 1rem; background: #f6f8fa }}
section.fused {{ border-color: #1a7f37 }} section.left {{ border-color: #cf222e }}
h2 {{ font-size: 1rem }} em {{ font-style: normal; float: right }}
dl {{ display: grid; grid-template-columns: 6rem 1fr; gap: .2rem 1rem }}
dt {{ color: #57606a }}
.maps {{ display: flex; flex-wrap: wrap; gap: .8rem }} figure {{ margin: 0 }} figcaption {{ text-align: center }}
dd {{ margin: 0; white-space: pre-wrap; font: .85rem ui-monospace, monospace }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{cards}
</html>
"""
