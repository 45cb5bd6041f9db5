"""Models checked in processes of their own: one that crashes, or takes too long, costs its row and no other."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from bench.coverage.check import BROKEN, Row, check
from bench.coverage.subject import Subject, subjects

LIMIT = 300.0  # seconds a model may take
_MODELS_OF_A_PROCESS = 30  # they leave memory behind
_PROCESSES = multiprocessing.get_context("spawn")
Work = Callable[[str, str, bool], Row]  # library, model, whether it is also compiled


def checked(
    todo: Sequence[Subject], sample: set[tuple[str, str]], jobs: int, limit: float = LIMIT, work: Work | None = None
) -> Iterator[tuple[Subject, Row]]:
    """Each subject with its row, as they are done.

    Args:
        sample: which are also compiled, by library and name.
        jobs: how many processes.
        limit: seconds for one model.
        work: what a process does with a model; `check` by default.
    """
    idle: SimpleQueue[_Worker] = SimpleQueue()
    workers = [_Worker(work or _check) for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def row(subject: Subject) -> Row:
        worker = idle.get()
        try:
            start = time.perf_counter()
            found = worker(subject, (subject.library, subject.name) in sample, limit)
            return found | {"seconds": round(time.perf_counter() - start, 1)}
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(jobs) as threads:
        try:
            rows = {threads.submit(row, subject): subject for subject in todo}
            for done in as_completed(rows):
                yield rows[done], done.result()
        finally:
            threads.shutdown(cancel_futures=True)
            for worker in workers:
                worker.stop()


class _Worker:
    """A process, and another once it has died, was stopped or has done many models."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, subject: Subject, compiled: bool, limit: float) -> Row:
        if self._process is None:
            self._line, far = _PROCESSES.Pipe()
            self._process = _PROCESSES.Process(target=_serve, args=(far, self._work), daemon=True)
            self._process.start()
            far.close()
            self._done = 0
            self._line.recv()  # its imports are no part of a model's time
        try:
            self._line.send((subject.library, subject.name, compiled))
            if not self._line.poll(limit):
                self.stop()
                return {"result": BROKEN, "detail": f"takes more than {limit:.0f} s"}
            found: Row = self._line.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return {"result": BROKEN, "detail": f"its process ended with {code} (-9: out of memory; -11: a fault in C)"}
        self._done += 1
        if self._done == _MODELS_OF_A_PROCESS:
            self.stop()
        return found

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
            self._process = None


def _serve(line: Connection, work: Work) -> None:
    """A process of its own core, quiet: a row for each model that comes in."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    line.send("ready")
    while True:
        line.send(work(*line.recv()))


def _check(library: str, name: str, compiled: bool) -> Row:
    return check(next(s for s in subjects(library) if s.name == name), compiled)
