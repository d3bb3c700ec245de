"""Run the GPU experiments, each in a process of its own, within a deadline: `benchmarks/gpu.sh [A] [B] [C]`.

    A   372 s: is every kernel right: tests, errors against float64; then the time and memory of LAD beside GRPO, of the
               head's step beside the library's products and peers, what routing saves, where the time goes by kernel
    B   185 s: peers by shape, a TRL step, the memory and the race checker, hardware counters
    C   rarely needed: workspaces, planted routings, providers that compile for long

Without arguments A runs, then B. `--only test_suite --deadline 300` runs one experiment for as long as that allows.
An experiment (`benchmarks/gpu/experiments.py`) adds rows to a file as it goes: a crash, a hang or a cut loses at most
the row in progress. Experiments run in the order of `plan.py`, those that time nothing run together; each stage has its
limit, and a part's limits add up to its deadline. The next stage's processes import their libraries while the present
one runs, and wait. Each part writes `PART-TIME.json` (all tables) and `PART-TIME.log` (the end of every experiment's
output), B also `PART-TIME-counters.txt`: a second call never overwrites the first. A path that fails the smoke test is
named, and later experiments leave it out.
This process never touches the GPU.

--dry-run runs the same code on CPU tensors, tiny shapes and Triton's interpreter: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import CLOSING, DEADLINE, GRACE, PLAN, SLOW, Experiment, filled, stages

ROOT = Path(__file__).resolve().parents[2]
DRY_FACTOR = 5  # more time for the interpreter
LOG_BYTES = 1 << 20  # of each experiment's output that is kept
NOT_BUILT = {"fp8 forward that only screens": "not built yet"}


def command(experiment: Experiment, rows: Path, dry_run: bool) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu.experiments",
        experiment.name,
        str(rows),
        *(["--dry-run"] if dry_run else []),
    ]


class Process:
    """One experiment. It imports its libraries, then waits for a line on its standard input: when it shall be done."""

    def __init__(self, experiment: Experiment, folder: Path, dry_run: bool):
        self.experiment, self.log = experiment, folder / f"{experiment.name}.log"
        environment = {**os.environ, "LAD_KERNELS_OUT": str(folder)}
        if dry_run:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("w") as out:
            self.child = subprocess.Popen(
                command(experiment, folder / f"{experiment.name}.json", dry_run),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def go(self, seconds: float, without: set[str]) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + seconds + GRACE
        with contextlib.suppress(OSError):  # it died while it imported: `ended` reports that
            self.child.stdin.write(f"{self.begin + seconds} {' '.join(sorted(without))}\n")
            self.child.stdin.close()

    def ended(self) -> str | None:
        """Its status in words once it has ended or met its limit; its whole process group ends with it."""
        code, now = self.child.poll(), time.monotonic()
        if code is None and now < self.end:
            return None
        self.stop()
        status = "cut" if code is None else "done" if code == 0 else f"failed with exit status {code}"
        return f"{status}, {now - self.begin:.0f} s"

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)  # whatever it left running would disturb the next one
        self.child.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_BYTES:]


def rows_of(path: Path) -> dict | str:
    """What an experiment has written, or what is wrong with it."""
    try:
        found = json.loads(path.read_text())
        parts = found["machine"], found["missing"], found["tables"]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("not a record of tables")
    except FileNotFoundError:
        return "no rows"
    except (ValueError, KeyError, TypeError) as error:
        return f"rows unreadable: {type(error).__name__}"
    return found


def merge(folder: Path, plan: Sequence[Experiment], statuses: dict[str, str], arguments: str) -> dict:
    """One record of all experiments so far, in the layout of `results.Results`."""
    record: dict = {"machine": {}, "missing": dict(NOT_BUILT), "tables": {}}
    notes = {}
    for experiment in plan:
        found = rows_of(folder / f"{experiment.name}.json")
        if isinstance(found, str):
            notes[experiment.name] = found
            continue
        record["machine"] = found["machine"] or record["machine"]
        record["missing"] |= found["missing"]
        for name, rows in found["tables"].items():
            record["tables"].setdefault(name, []).extend(rows)
    record["machine"] = {
        "device": "unknown",
        "versions": {},
        "commit": "unknown",
        **record["machine"],
        "command": f"benchmarks/gpu.sh {arguments}".strip(),
    }
    record["tables"]["experiments"] = [
        {
            "experiment": e.name,
            "what": e.what,
            "status": statuses.get(e.name, "not run: not reached, or not asked for"),
            "rows": notes.get(e.name, ""),
        }
        for e in plan
    ]
    return record


def wrong_paths(folder: Path) -> set[str]:
    """Paths that the smoke test found wrong or that broke; what was merely slow to start may work."""
    found = rows_of(folder / "smoke.json")
    rows = [] if isinstance(found, str) else found["tables"].get("smoke", [])
    return {row["path"] for row in rows if row.get("path") and row.get("verdict") not in ("right", SLOW)}


def run(
    plan: Sequence[Experiment], deadline: float, folder: Path, dry_run: bool, save=lambda statuses, logs: None
) -> tuple[dict[str, str], dict[str, str]]:
    """({experiment: status}, {experiment: output}); `save` is told both after every stage."""
    end, statuses, logs, without = time.monotonic() + deadline - CLOSING, {}, {}, set()
    todo = stages(plan)
    waiting = [Process(e, folder, dry_run) for e in todo[0]] if todo else []
    for i in range(len(todo)):
        left = end - time.monotonic() - GRACE
        if left < 5:
            break
        present, waiting = waiting, []
        for process in present:
            process.go(min(process.experiment.seconds * (DRY_FACTOR if dry_run else 1), left), without)
        waiting = [Process(e, folder, dry_run) for e in todo[i + 1]] if i + 1 < len(todo) else []
        while present:
            time.sleep(0.05)
            for process in list(present):
                if (status := process.ended()) is not None:
                    present.remove(process)
                    name = process.experiment.name
                    statuses[name], logs[name] = status, process.output()
                    print(f"{name}: {status}", flush=True)
        without |= wrong_paths(folder)
        save(statuses, logs)
    for process in waiting:
        process.stop()
    return statuses, logs


def output_folder(dry_run: bool) -> Path:
    """$OUT, else a folder of this repository named after the device, asked of nvidia-smi."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="lad-kernels-dry-run-"))
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return ROOT / "benchmarks" / "results" / "-".join(name.lower().split())


def run_part(part: str, plan: Sequence[Experiment], deadline: float, out: Path, options: argparse.Namespace) -> bool:
    """Run and save one part; print its table; whether everything that ran is done."""
    stem = out / f"{part}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    arguments = " ".join([part, *(["--dry-run"] if options.dry_run else [])])

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def save(statuses: dict[str, str], logs: dict[str, str]) -> None:
            record = merge(folder, plan, statuses, arguments)
            stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            stem.with_suffix(".log").write_text("".join(f"==== {n}: {statuses[n]}\n{log}\n" for n, log in logs.items()))
            if (folder / "counters.txt").exists():
                text = (folder / "counters.txt").read_text(errors="replace")
                Path(f"{stem}-counters.txt").write_text(text[: 4 * LOG_BYTES])

        statuses, _ = run(plan, deadline, folder, options.dry_run, save)
    show = [sys.executable, "-m", "benchmarks.harness.terminal", f"{stem}.json"]
    done = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout or done.stderr)
    bad = [name for name, status in statuses.items() if not status.startswith("done")]
    print(f"{stem}.json; " + (f"not done: {', '.join(bad)}" if bad else "every experiment that ran is done"))
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="A, B or C; default A, then B")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[e.name for e in PLAN], default=[], help="these, of any part")
    parser.add_argument("--states", metavar="FOLDER", help="packed states of a policy; default .carry/states")
    parser.add_argument("--deadline", type=int, help="seconds of each part; any to spare go to its longest stage")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(DEADLINE):
        parser.error(f"PART: expected {', '.join(DEADLINE)}, got {', '.join(sorted(unknown))}")
    parts = options.parts or (list(DEADLINE) if options.only else ["A", "B"])
    if options.states:
        os.environ["LAD_KERNELS_STATES"] = str(Path(options.states).resolve())  # the experiments read it
    out = output_folder(options.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    good, factor = True, DRY_FACTOR if options.dry_run else 1
    for part in parts:
        plan = [e for e in PLAN if e.part == part and (not options.only or e.name in options.only)]
        if plan:
            plan = filled(plan, options.deadline) if options.deadline else plan
            good &= run_part(part, plan, options.deadline or DEADLINE[part] * factor, out, options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
