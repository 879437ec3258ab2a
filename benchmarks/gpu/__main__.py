"""Kernels on a GPU, beside what a user would pick instead: numbers first, then times.

    python -m benchmarks.gpu                             everything, in eight minutes; run again to go on
    python -m benchmarks.gpu --suite dense decode        some of it; --only WORD.. cases whose name holds a word
    python -m benchmarks.gpu --suite numerics            whether results are right, and no times
    python -m benchmarks.gpu --list                      the cases, without a GPU
    python -m benchmarks.gpu --page FILE.json            put a file's tables into benchmarks/README.md

First, many processes check published attentions on the generated kernels against float64, and have every case
compiled, so that caches on disk hold it. Then each case is timed in one process: eager code, `torch.compile` alone,
PyTorch's fused kernels one by one, FlexAttention compiled with its mask made beforehand, flash-linear-attention where
it is installed, and Refocus. What targets need comes first. Results go to benchmarks/results/<device>-<date>.json after
each case; what is there already, of the same source, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import page
from benchmarks.gpu.case import Case
from benchmarks.gpu.drive import NUMERICS, Deadline, prepare, serve, times, wrong
from benchmarks.gpu.store import Store, default_path
from benchmarks.gpu.suites import SUITES, cases
from benchmarks.isolation import run_isolated


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [NUMERICS, *SUITES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=names, default=names, metavar="SUITE", help=", ".join(names))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only what has one of these in its name")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; what is left waits for another run")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing for one case")
    parser.add_argument("--limit", type=float, default=40.0, help="GiB that eager code may hold")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for one case, compilation included")
    parser.add_argument("--processes", type=int, default=max(1, min((os.cpu_count() or 1) - 2, 14)))
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--again", action="store_true", help="measure what the file has already, too")
    parser.add_argument("--verbose", action="store_true", help="say everything that is prepared")
    parser.add_argument("--list", action="store_true", help="print the cases, and measure nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put its tables into benchmarks/README.md")
    # Without a GPU, tiny and interpreted: whether cases run at all. Times are those of an interpreter.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny != (options.device == "cpu"):
        parser.error("--tiny and --device cpu go together")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    asked = cases([name for name in options.suite if name in SUITES], options.only)
    if options.list:
        print("\n".join(case.key for case in asked))
        return 0
    if options.page:
        page.publish(json.loads(options.page.read_text()))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU here, and nothing was measured", file=sys.stderr)
        return 2
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        options.processes = 1
    else:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are many already
    deadline = Deadline(time.monotonic(), 60 * options.minutes)
    store = Store(options.out or default_path(options.tiny))
    pending = [case for case in asked if options.again or not store.has("cases", case.key)]
    prepare(store, options, pending, deadline)
    if pending and not store.data["bandwidth"]:
        for outcome in run_isolated(serve, [options.tiny], timeout=options.timeout):
            store.data["bandwidth"] = outcome.value
    times(store, options, pending, deadline)
    return finish(store, options, asked)


def finish(store: Store, options: argparse.Namespace, asked: Sequence[Case]) -> int:
    """Say what came of it; 1 where something is wrong."""
    store.save()
    print("\n" + "\n".join(page.targets(page.judged(store.data))))
    print("\n".join(page.numerics(store.data[NUMERICS])))
    if not options.tiny and options.out is None:
        page.publish(store.data)
    left = sum(not store.has("cases", case.key) for case in asked)
    print(f"{store.path}: {len(asked) - left} of {len(asked)} cases; run again for the rest" * bool(left))
    problems = wrong(store.data)
    print("\n".join(f"WRONG  {problem}" for problem in problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
