"""What every kernel takes of a GPU, compiled ahead of time without one, and the table of it under version control.

    python -m tests.aot_resources                    compile everything, and write the table anew
    python -m tests.aot_resources "linear 64"        only this group
    python -m tests.aot_resources --changed          only what is not as it was when the table was written
    python -m tests.aot_resources --check forward    compare, and write nothing

A process that interprets Triton cannot compile, so child processes do, with a compile cache of their own. The table is
tests/aot_resources.json; benchmarks/README.md shows the worst of each kernel. Figures depend on the version of Triton,
which the table records: under another one only the limits that hold for every version are checked.

Compiling takes seconds a kernel, and what comes out depends on nothing but the kernel and Triton's version. So the
table keeps a digest of each kernel beside its figures, and one that is the same need not be compiled to be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.children import ChildFailed, output

TABLE = Path(__file__).with_suffix(".json")
README = Path(__file__).parents[1] / "benchmarks" / "README.md"
# What one block may have: 164 KiB on sm_80 and 228 KiB on sm_90, less what the system takes; 64 KiB on gfx942.
SHARED = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}
REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
UNITS = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}
_POWER = {"": 0, "mma": 1, "mfma": 1, "wgmma": 2}
# Registers that a kernel may take more than the table says, as a share and at least: less changes no occupancy much,
# and a compiler's allocation moves by a few with any change of the text.
MORE, LEAST = 1.10, 8


@dataclass(frozen=True)
class Taken:
    """`spills` and `shared` in bytes; `unit`: what its products run on, "" for plain arithmetic; `digest`: of the
    kernel that took it."""

    registers: int
    spills: int
    shared: int
    unit: str
    plain: bool = False
    digest: str = ""


Found = dict[str, Taken]


def compile_group(group: str, known: Mapping[str, Taken]) -> Found:
    """In a child: a group's kernels by "group/case/kernel target"; a case's second kernel of a name is "name 2". One
    that is as it was in `known` is taken from there, but for the first for each target: were there more that figures
    depend on than digests hold, it would show."""
    from refocus.codegen import aot
    from tests.aot_kernels import GROUPS

    found: Found = {}
    compiled: set[str] = set()
    numbers: dict[tuple[str, str, str], list[str]] = {}
    for one in GROUPS[group]():
        keys = numbers.setdefault((one.case, one.kernel.name, one.target), [])
        if one.kernel.source not in keys:
            keys.append(one.kernel.source)
        number = keys.index(one.kernel.source) + 1
        name = f"{group}/{one.case}/{one.kernel.name}{f' {number}' if number > 1 else ''} {one.target}"
        digest, before = aot.digest(one.kernel, one.target), known.get(name)
        if one.target in compiled and before is not None and (before.digest, before.plain) == (digest, one.plain):
            found[name] = before
            continue
        compiled.add(one.target)
        got = aot.compile_for(one.kernel, one.target)
        found[name] = Taken(got.registers, got.spills, got.shared_bytes, got.matrix_unit, one.plain, digest)
    return found


def in_child(*groups: str, changed: bool = True) -> dict[str, Found]:
    """Groups, compiled by a process that does not interpret; what has not changed is only compiled if `changed` is
    False. Raises RuntimeError with what it said."""
    with tempfile.TemporaryDirectory() as cache:
        options = ["--child", *(["--changed"] if changed else [])]
        try:
            said = output("tests.aot_resources", *options, *groups, interpreted=False, TRITON_CACHE_DIR=cache)
        except ChildFailed as problem:
            raise RuntimeError(str(problem)) from None
    return {
        group: {name: Taken(**fields) for name, fields in found.items()} for group, found in json.loads(said).items()
    }


# ------------------------------------------------------------------------------------------------------- what is wrong


def problems(found: Mapping[str, Taken], table: Mapping[str, Taken], same_version: bool) -> list[str]:
    """Limits that are exceeded, and regressions against the table, each as a sentence."""
    out = [f"{name}: {text}" for name, taken in found.items() for text in _beyond(name, taken)]
    for name, taken in found.items():
        before = table.get(name)
        if before is None:
            out.append(f"{name}: not in the table; python -m tests.aot_resources writes it")
        elif same_version:
            out += [f"{name}: {text}" for text in _worse(taken, before)]
    return out


def _beyond(name: str, taken: Taken) -> Iterable[str]:
    """What holds under every version."""
    target = name.split()[-1]
    if taken.spills and target != "gfx942":  # tile sizes are chosen for NVIDIA's registers
        yield f"spills {taken.spills} bytes"
    if not 0 < taken.registers <= REGISTERS[target]:
        yield f"{taken.registers} registers of {REGISTERS[target]}"
    if taken.shared > SHARED[target]:
        yield f"{taken.shared} bytes of shared memory, of {SHARED[target]}"
    if taken.plain and taken.unit:
        yield f"products run on {taken.unit}, and were to be exact"
    if not taken.plain and not taken.unit:
        yield f"products run on plain arithmetic, not on {UNITS[target]}"


def _worse(taken: Taken, before: Taken) -> Iterable[str]:
    if taken.spills > before.spills:
        yield f"spills {taken.spills} bytes, {before.spills} before"
    if taken.registers > max(before.registers * MORE, before.registers + LEAST):
        yield f"{taken.registers} registers, {before.registers} before"
    if _POWER[taken.unit] < _POWER[before.unit]:
        yield f"products run on {taken.unit or 'plain arithmetic'}, {before.unit} before"


def missing(found: Mapping[str, Taken], table: Mapping[str, Taken], group: str) -> list[str]:
    """Kernels of the table that are no longer compiled."""
    return [name for name in table if name.split("/")[0] == group and name not in found]


# ----------------------------------------------------------------------------------------------------------- the table


def read() -> tuple[str, Found]:
    """Triton's version, and the table."""
    data = json.loads(TABLE.read_text())
    return data["triton"], {name: Taken(*fields) for name, fields in data["kernels"].items()}


def version() -> str:
    """Triton's."""
    import triton

    return str(triton.__version__)


def write(found: Found) -> None:
    fields = {name: [t.registers, t.spills, t.shared, t.unit, t.plain, t.digest] for name, t in sorted(found.items())}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in fields.items())
    columns = json.dumps(["registers", "spills", "shared", "unit", "plain", "digest"])
    TABLE.write_text(f'{{\n "triton": "{version()}",\n "columns": {columns},\n "kernels": {{\n{lines}\n }}\n}}\n')


def markdown(triton: str, found: Mapping[str, Taken]) -> str:
    """The worst of each kernel over the cases of its group, for each target."""
    worst: dict[tuple[str, str], dict[str, Taken]] = {}
    for name, taken in found.items():
        group, case, rest = name.split("/")
        group = f"{group} float32" if case.startswith("float32") else group  # for other units, with other tiles
        kernel, target = rest.split()[0], rest.split()[-1]
        row = worst.setdefault((group, kernel), {})
        known = row.get(target, taken)
        row[target] = Taken(
            max(taken.registers, known.registers),
            max(taken.spills, known.spills),
            max(taken.shared, known.shared),
            min(taken.unit, known.unit, key=_POWER.__getitem__),
        )
    lines = [
        f"Triton {triton}. For each target: registers of a thread, KiB of shared memory, what products run on; the "
        "worst over the cases of a group.",
        "",
        "| group | kernel | " + " | ".join(SHARED) + " |",
        "|---|---|" + "---|" * len(SHARED),
    ]
    for (group, kernel), row in worst.items():
        cells = [_cell(row[target]) if target in row else "-" for target in SHARED]
        lines.append(f"| {group} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(taken: Taken) -> str:
    text = f"{taken.registers}, {taken.shared / 1024:.0f} KiB"
    text += f", {taken.unit}" if taken.unit else ""
    return text + (f", spills {taken.spills} bytes" if taken.spills else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot_resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("groups", nargs="*", help="which groups (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the table, and write nothing")
    parser.add_argument("--changed", action="store_true", help="compile only what is not as it was")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    recorded, table = read() if TABLE.exists() else (version(), {})
    if options.child:
        known = table if options.changed and recorded == version() else {}
        groups = {group: compile_group(group, known) for group in options.groups}
        print(json.dumps({group: {name: vars(t) for name, t in found.items()} for group, found in groups.items()}))
        return 0
    from benchmarks.gpu.page import insert
    from tests.aot_kernels import GROUPS

    if not options.check and options.groups and recorded != version():
        parser.error(f"the table is Triton {recorded}'s: under {version()}, all groups have to be written")
    everything: dict[str, Taken] = dict(table) if options.groups else {}
    bad: list[str] = []
    for group in options.groups or GROUPS:
        found = in_child(group, changed=options.changed)[group]
        bad += problems(found, table if options.check else found | table, recorded == version())
        print(f"{group}: {len(found)} kernels", flush=True)
        everything = {name: t for name, t in everything.items() if name.split("/")[0] != group} | found
        if not options.check:
            write(everything)
    print("\n".join(bad))
    if not options.check:
        shown: Any = markdown(version(), dict(sorted(everything.items())))
        README.write_text(insert(README.read_text(), "resources", shown))
        return 0
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
