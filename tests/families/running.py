"""Runs families in processes of their own, so that none that hangs, dies or eats memory takes the others with it."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

SECONDS = 180  # that a family may take; most take one or two
BYTES = 6 * 2**30  # that a process may hold

Result = dict[str, Any]


class Worker:
    """A process that examines one family after another."""

    def __init__(self, context: Any, options: dict[str, Any]) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self.family: str | None = None
        self.start = 0.0

    def give(self, family: str) -> None:
        self.family, self.start = family, time.monotonic()
        self.connection.send(family)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(families: Iterable[str], workers: int, options: dict[str, Any] | None = None) -> Iterator[Result]:
    """The report of each family, as a dictionary, in the order in which they end."""
    context, waiting, options = multiprocessing.get_context("spawn"), list(families)[::-1], options or {}
    pool = [Worker(context, options) for _ in range(min(workers, len(waiting)))]
    for worker in pool:
        worker.give(waiting.pop())
    while busy := [worker for worker in pool if worker.family is not None]:
        ready = wait([worker.connection for worker in busy], timeout=1)
        for worker in busy:
            result = None
            if worker.connection in ready:
                result = _received(worker)
            elif time.monotonic() - worker.start > SECONDS:
                result = _lost(worker.family, f"took more than {SECONDS} s")
            if result is None:
                continue
            yield {**result, "seconds": round(time.monotonic() - worker.start, 1)}
            worker.family = None
            if result.get("is_lost"):
                worker.stop()
                pool.remove(worker)
                pool.append(worker := Worker(context, options))
            if waiting:
                worker.give(waiting.pop())
    for worker in pool:
        worker.stop()


def _received(worker: Worker) -> Result:
    try:
        return worker.connection.recv()
    except EOFError:
        worker.process.join(5)
        return _lost(worker.family, f"ended the process, exit code {worker.process.exitcode}")


def _lost(family: str | None, reason: str) -> Result:
    return {"family": family, "state": "crashed", "reason": reason, "outcomes": {}, "is_lost": True}


def _work(connection: Connection, options: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    examine = _prepared(options)
    while True:
        family = connection.recv()
        try:
            result = examine(family).as_dict()
        except Exception as error:
            result = {"family": family, "state": "not built", "reason": f"the harness: {type(error).__name__}: {error}"}
        connection.send(result)


def _prepared(options: dict[str, Any]) -> Callable:
    """Imports what is slow to import once for each process."""
    import warnings

    import torch
    import transformers

    from tests.families.comparing import examine

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return lambda family: examine(family, **options)
