"""Runs one function over many tasks in worker processes, so that a crash or a hang costs one task and not the run."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")
_LIFETIME = 20  # tasks that one process serves before a new one takes its place: compilers keep what they made


@dataclass(frozen=True)
class Outcome:
    """What became of a task: `value`, or `error` (a traceback, "crashed ...", "timed out ...")."""

    task: Any
    value: Any = None
    error: str = ""
    seconds: float = 0.0

    @property
    def brief(self) -> str:
        """The error in one line: the last of a traceback, the first of anything else."""
        lines = self.error.strip().splitlines() or [""]
        return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def run_isolated(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    *,
    processes: int = 1,
    timeout: float = 600.0,
    lifetime: int = _LIFETIME,
) -> Iterator[Outcome]:
    """Outcomes in the order in which the tasks end. `function` must be importable and tasks and values picklable.

    A process serves `lifetime` tasks. Where tasks measure memory on a CPU it must be one: that leaves the C allocator
    in a state in which every large block is mapped anew (`benchmarks.measure.return_free_memory`), which takes longer.

    A task that runs longer than `timeout` seconds is ended together with its process; its error says where it was.
    Tasks are drawn as workers become free: what draws them up may stop when time is up.
    """
    waiting = iter(tasks)
    workers: list[_Worker] = []
    try:
        for task in itertools.islice(waiting, processes):
            workers.append(_Worker(function, timeout, lifetime))
            workers[-1].start(task)
        while busy := [worker for worker in workers if worker.busy]:
            wait([worker.pipe for worker in busy], timeout=min(worker.left for worker in busy))
            for worker in busy:
                outcome = worker.poll()
                if outcome is not None:
                    for task in itertools.islice(waiting, 1):
                        worker.start(task)
                    yield outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process at a time that serves tasks over a pipe; replaced when it dies, hangs or has served enough."""

    def __init__(self, function: Callable[[Any], Any], timeout: float, lifetime: int) -> None:
        self.function = function
        self.timeout = timeout
        self.lifetime = lifetime
        self.busy = False
        self.task: Any = None
        self.began = 0.0
        self.log: Path | None = None
        self._launch()

    def _launch(self) -> None:
        handle, name = tempfile.mkstemp(prefix="worker-", suffix=".log")
        os.close(handle)
        self.log, self.served = Path(name), 0
        self.pipe, other = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(other, self.function, name, self.timeout), daemon=False)
        self.process.start()
        other.close()

    def start(self, task: Any) -> None:
        if self.served >= self.lifetime or not self.process.is_alive():
            self.stop()
            self._launch()
        self.task, self.busy, self.began = task, True, time.monotonic()
        self.served += 1
        with contextlib.suppress(OSError):  # a process that is already dead: `poll` will say so
            self.pipe.send(task)

    @property
    def left(self) -> float:
        """Seconds until the task must be ended: its time, and a moment in which it writes down where it is."""
        return max(self.began + self.timeout + 0.5 - time.monotonic(), 0.0)

    def poll(self) -> Outcome | None:
        """The outcome if the task has ended or must be ended; None while it runs."""
        error, value = "", None
        try:
            if self.pipe.poll():
                value, error = self.pipe.recv()
            elif self.left > 0:
                return None
            else:
                error = f"timed out after {self.timeout:.0f} s, in\n{self._where()}"
                self.stop(patience=0)
        except (EOFError, OSError):
            self.process.join()
            error = f"crashed (exit code {self.process.exitcode})\n{self._log_tail()}"
        self.busy = False
        return Outcome(self.task, value, error, time.monotonic() - self.began)

    def _log_tail(self, characters: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-characters:] if self.log else ""

    def _where(self, frames: int = 6) -> str:
        """The innermost frames of the main thread, from what `faulthandler` wrote last."""
        text = self.log.read_text(errors="replace") if self.log else ""
        _, _, stack = text.rpartition("(most recent call first):\n")
        return "\n".join(stack.splitlines()[:frames])

    def stop(self, patience: float = 5.0) -> None:
        """End the process: by closing its pipe, and by force if it has not ended after `patience` seconds."""
        self.pipe.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        if self.log:
            self.log.unlink(missing_ok=True)
            self.log = None


def _serve(pipe: Connection, function: Callable[[Any], Any], log: str, timeout: float) -> None:
    """A worker's main: whatever it prints goes to its log, answers go through the pipe."""
    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    faulthandler.enable()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        faulthandler.dump_traceback_later(timeout)
        try:
            answer = (function(task), "")
        except Exception:  # any failure of one task is that task's outcome, never the end of the run
            answer = (None, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
