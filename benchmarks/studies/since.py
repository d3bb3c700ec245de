"""CPU time of a forward and backward in this checkout over that in another one, in turn, on one thread.

    git worktree add ../before COMMIT
    python -m benchmarks.studies.since ../before     the shapes of `pytest benchmarks`; half an hour, 6 GB

Each checkout has a process of its own, and each case is called in both, one right after the other, so the ratio of a
pair holds where times jitter. Both gradients must agree before a case is timed. The C library keeps what is freed:
else it hangs on what was freed before whether a tensor of some MB is new memory, which the kernel zeroes page by page,
and two checkouts of nearly the same code take 0.6 or 1.4 of each other's time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import groupby, product
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.harness import machine
from benchmarks.harness.data import MADE, Batch, make_batch
from benchmarks.harness.results import RESULTS, Results, number
from benchmarks.harness.shapes import CPU_FULL, CPU_SMALL, SWEEP

FILE = RESULTS / "cpu-2core" / "since.json"
TAIL_MASS = 3e-4
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}  # for glibc's malloc
AGREE = {0.0: 1e-5, TAIL_MASS: 4e-3}  # of the gradients' norms, relative: rounding, and what routing promises
BUDGET, ROUNDS = 30.0, (5, 41)  # seconds of a case, and pairs at least and at most
JOBS = {"head": (0.0,), "ce": (0.0, TAIL_MASS), "grpo": (0.0, TAIL_MASS), "lad": (0.0, TAIL_MASS)}  # and tail masses
CALLS = [  # shape, data, job
    *product(CPU_SMALL, MADE, JOBS),
    *product(SWEEP, MADE, ("grpo",)),
    *product(CPU_FULL[:1], MADE, JOBS),
    *product(CPU_FULL[1:], MADE, ("lad",)),
]
CASES = [(*call, tail_mass) for call in CALLS for tail_mass in JOBS[call[-1]]]


class Checkout:
    """A process that calls the functions of one checkout."""

    def __init__(self, folder: Path):
        worker = str(Path(__file__).with_name("since_worker.py"))
        environment = os.environ | KEEP | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, worker, str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def call(self, *case: object) -> list[float] | None:
        """[seconds, norm of dH, norm of dW]; None where this version lacks the function."""
        self.process.stdin.write("\t".join(map(str, case)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"since: the process of a checkout ended at {case}; its error is above")
        return json.loads(line)

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, which ends it


def write(batch: Batch, path: Path) -> None:
    b, t = batch.padded
    shaped = {"hidden": batch.hidden.detach().view(b, t, -1), "weight": batch.weight.detach()}
    shaped |= {"targets": batch.targets.view(b, t), "upstream": batch.upstream.view(b, t)}
    torch.save(shaped | {"old_logprobs": batch.old_logprobs, "advantages": batch.advantages}, path)


def pairs(before: Checkout, now: Checkout, case: tuple) -> list[tuple[float, float]] | None:
    """Seconds in both, after two warm calls of each, whose gradients agree; None where either lacks the function."""
    old, new = before.call(*case), now.call(*case)
    if old is None or new is None:
        return None
    if not all(abs(x / y - 1) < AGREE[case[-1]] for x, y in zip(new[1:], old[1:])):
        sys.exit(f"since: {case}: expected gradients that agree, got norms {new[1:]} and {old[1:]}")
    once = before.call(*case)[0] + now.call(*case)[0]
    count = min(max(int(BUDGET / once), ROUNDS[0]), ROUNDS[1])
    found = []
    for i in range(count):
        order = (before, now) if i % 2 else (now, before)
        seconds = {checkout: checkout.call(*case)[0] for checkout in order}
        found.append((seconds[before], seconds[now]))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    machine.flush_subnormals()
    old = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, check=True, capture_output=True)
    results = Results(machine.describe("cpu", "python -m benchmarks.studies.since FOLDER"))
    results.machine["notes"] = [f"FOLDER at {old.stdout.decode().strip()}. One thread; CPU time; subnormals flushed."]
    with tempfile.TemporaryDirectory() as temporary:
        for (shape, data), cases in groupby(CASES, key=lambda case: case[:2]):
            path = Path(temporary) / "batch.pt"
            write(make_batch(shape, data, torch.float32, "cpu"), path)
            with Checkout(folder) as before, Checkout(machine.ROOT) as now:
                found = {case[2:]: pairs(before, now, (path, *case[2:])) for case in cases}
            for (job, tail_mass), seconds in found.items():
                if seconds is None:
                    continue
                low, middle, high = quantiles((y / x for x, y in seconds), n=4)
                row = {"job": job, "data": data, "tail_mass": tail_mass, "pairs": len(seconds)}
                row |= {f"{name}_ms": 1e3 * median(x) for name, x in zip(("before", "now"), zip(*seconds))}
                row |= {"now_over_before": middle, "quartiles": [low, high]}
                results.add("this checkout over another", shape=str(shape), **row)
                print(shape, *map(number, row.values()), flush=True)
    results.save(FILE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"since: expected the folder of another checkout, got {sys.argv[1:]}")
    main(Path(sys.argv[1]).resolve())
