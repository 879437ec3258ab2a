"""Runs one function over many tasks in worker processes, so that a crash or a hang costs one task and not the run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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


def run_isolated(
    function: Callable[[Any], Any], tasks: Sequence[Any], *, processes: int = 1, timeout: float = 600.0
) -> Iterator[Outcome]:
    """Outcomes in the order in which the tasks end. `function` must be importable and tasks and values picklable.

    A task that runs longer than `timeout` seconds is ended together with its process.
    """
    waiting = list(reversed(tasks))
    workers = [_Worker(function) for _ in range(min(processes, len(tasks)))]
    try:
        for worker in workers:
            worker.start(waiting.pop())
        while busy := [worker for worker in workers if worker.busy]:
            wait([worker.pipe for worker in busy], timeout=min(worker.left(timeout) for worker in busy))
            for worker in busy:
                outcome = worker.poll(timeout)
                if outcome is not None:
                    if waiting:
                        worker.start(waiting.pop())
                    yield outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process at a time that serves tasks over a pipe; replaced when it dies, hangs or has served enough."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
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
        self.process = _CONTEXT.Process(target=_serve, args=(other, self.function, name), daemon=False)
        self.process.start()
        other.close()

    def start(self, task: Any) -> None:
        if self.served >= _LIFETIME or not self.process.is_alive():
            self.stop()
            self._launch()
        self.task, self.busy, self.began = task, True, time.monotonic()
        self.served += 1
        self.pipe.send(task)

    def left(self, timeout: float) -> float:
        return max(self.began + timeout - time.monotonic(), 0.0)

    def poll(self, timeout: float) -> Outcome | None:
        """The outcome if the task has ended or must be ended; None while it runs."""
        error, value = "", None
        try:
            if self.pipe.poll():
                value, error = self.pipe.recv()
            elif self.left(timeout) > 0:
                return None
            else:
                self.stop(patience=0)
                error = f"timed out after {timeout:.0f} s"
        except (EOFError, OSError):
            self.process.join()
            error = f"crashed (exit code {self.process.exitcode})\n{self._log_tail()}"
        self.busy = False
        return Outcome(self.task, value, error, time.monotonic() - self.began)

    def _log_tail(self, characters: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-characters:] if self.log else ""

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


def _serve(pipe: Connection, function: Callable[[Any], Any], log: str) -> None:
    """A worker's main: whatever it prints goes to its log, answers go through the pipe."""
    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (function(task), "")
        except Exception:  # any failure of one task is that task's outcome, never the end of the run
            answer = (None, traceback.format_exc())
        pipe.send(answer)
