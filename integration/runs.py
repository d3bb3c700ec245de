"""A run's folder, its log, and how a run is stopped, without losing or replacing what it has written."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lad_kernels.preflight import Refused

LOG = "metrics.jsonl"
logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM outside of a step."""


@contextmanager
def open_log(folder: Path) -> Iterator[TextIO]:
    """`metrics.jsonl` for appending, flushed line by line; only one process may hold it.

    Raises:
        Refused: another process writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", buffering=1) as log:
        try:
            import fcntl

            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError as error:
            raise Refused(
                f"out: expected a folder that no other process trains in, got {str(folder)!r}; wait for that run or "
                f"stop it"
            ) from error
        except (ImportError, OSError):  # a system or a file system that has no locks
            logger.debug("%s cannot be locked", folder / LOG)
        yield log


def cut_log(folder: Path, step: int) -> None:
    """Cut `metrics.jsonl` after the line of `step`; what cannot be read (half a line) is cut off with a warning."""
    path, kept, last = folder / LOG, 0, 0
    with path.open("rb") as file:
        for line in file:
            number = _step(line)
            if number is None:
                logger.warning("%s: half a line after step %d was cut off; its step is done again", path, last)
            if number is None or number > step:
                break
            kept, last = kept + len(line), number
    if last < step:
        logger.warning("%s: the lines of steps %d to %d are lost; the checkpoint has them all", path, last + 1, step)
    if kept < path.stat().st_size:
        os.truncate(path, kept)


def _step(line: bytes) -> int | None:
    """The step of a complete line; None of any other."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """A run's lines so far."""
    path = folder / LOG
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written


def side_by_side(
    jobs: list[Callable[[], Any]], workers: int, folders: list[Path], show: Callable[[int, list[dict[str, Any]]], None]
) -> list[Any]:
    """The results of `jobs`, runs that other processes start in this order, `workers` at a time.

    Until the last has ended, or one has failed, `show(i, lines)` gets the lines in `folders[i]`, once there are any.
    """
    ended = False
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(job) for job in jobs]
        while not ended:
            done, others = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
            ended = not others or any(future.exception() for future in done)
            for i, folder in enumerate(folders):
                if records := read_records(folder):
                    show(i, records)
        return [future.result() for future in futures]


class Signals:
    """Handles Ctrl-C and SIGTERM: recorded inside `held()`, `Interrupted` elsewhere; a second one ends the process."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._holding = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with suppress(ValueError):  # outside of the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals are only recorded in `caught` here, which the caller checks."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def _note(self, number: int, _: Any) -> None:
        if self.caught is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.caught = signal.Signals(number)
        if not self._holding:
            raise Interrupted
