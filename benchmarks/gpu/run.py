"""What a GPU experiment runs with: its device, shapes, clock and results.

Every row is saved as soon as it is measured. Times are CUDA events, medians of 20 runs with quartiles (fewer where a
time limit says so); inputs rotate among copies that the L2 cannot hold.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import machine
from benchmarks.harness.data import Batch, make_batches, missing
from benchmarks.harness.measure import quartiles
from benchmarks.harness.results import Results
from benchmarks.harness.shapes import GPU, TINY, Shape
from lad_kernels.head import dispatch


class Run:
    """One experiment's device, shapes, clock and results."""

    def __init__(self, path: Path, dry_run: bool, end: float | None = None, without: Sequence[str] = ()):
        self.path, self.dry_run = path, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.shapes = TINY if dry_run else GPU
        self.repeats = 1 if dry_run else 20
        self.end = end or time.monotonic() + 600  # of time.monotonic(), one clock for all processes
        self.paths = [path for path in dispatch.PATHS if path not in without]  # those found right
        notes = ["Dry run on CPU in Triton's interpreter: the numbers mean nothing."] if dry_run else []
        self.results = Results({**machine.describe(self.device, "benchmarks/gpu.sh"), "notes": notes})
        self.results.save(path)

    def add(self, table: str, **row: object) -> None:
        self.results.add(table, **row)
        self.results.save(self.path)

    def missing(self, found: dict[str, str]) -> None:
        self.results.missing |= found
        self.results.save(self.path)

    def has(self, data: str) -> bool:
        """Whether there are data of this kind; why not stands among what is missing."""
        why = missing(data)
        if why:
            self.missing({data: why})
        return why is None

    def time_left(self) -> float:
        return self.end - time.monotonic()

    def time(self, function: Callable[[int], object], repeats: int | None = None) -> list[float]:
        """Quartiles in ms of function(i), i counting the calls, after three; in a dry run it is called once.

        Launches queue up, so their own cost is hidden.
        """
        repeats = min(repeats or self.repeats, self.repeats)
        if self.device != "cuda":
            begin = time.perf_counter()
            function(0)
            return quartiles([time.perf_counter() - begin])
        for i in range(3):
            function(i)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for i, mark in enumerate(marks[1:]):
            function(i)
            mark.record()
        marks[-1].synchronize()
        return quartiles([start.elapsed_time(stop) / 1e3 for start, stop in itertools.pairwise(marks)])

    def batches(self, shape: Shape, data: str = "flat", dtype: torch.dtype = torch.bfloat16) -> list[Batch]:
        return make_batches(shape, data, dtype, self.device)
