"""Run every GPU experiment in a process of its own, within one deadline: `benchmarks/gpu.sh [--dry-run]`.

Each experiment (`benchmarks/experiments.py`) is a function that adds rows to a file as it goes, so a crash, a hang or a
cut loses at most the row in progress. Experiments run in the order of PLAN; each has its own limit, and when the global
deadline nears, the later ones are cut and named. `results.json` (all tables), `log.txt` (the end of every
experiment's output) and `ncu.txt` are all that is written. This process never touches the GPU.

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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 525  # seconds in all
LOG_BYTES = 1 << 20  # of each experiment's output that is kept


@dataclass(frozen=True)
class Experiment:
    name: str  # a function of experiments.py
    seconds: int  # its own limit
    what: str


PLAN = (
    Experiment("ceilings", 30, "E0: cuBLAS products and copy bandwidth, the denominators"),
    Experiment("correctness", 100, "E1: the gate for every provider, run twice bitwise, poisoned memory"),
    Experiment("test_suite", 90, "E1: the repository's own tests on the device"),
    Experiment("lad_against_grpo", 40, "the paper's claim: the ratio of LAD to GRPO in time and memory"),
    Experiment("forward_tiles", 50, "E2: tile shapes of the forward, with and without entropy"),
    Experiment("one_pass", 45, "E3: one pass against two, rows of a chunk"),
    Experiment("routed_kernels", 45, "E6: the routed backward against planted hot shares, and its tiles"),
    Experiment("routed", 70, "E7: every path end to end on peaked and flat data, error beside bound"),
    Experiment("step_parts", 20, "E7: the parts of a routed call, each by itself"),
    Experiment("slabs", 20, "E4: workspace of the two-pass backward"),
    Experiment("single_pass", 15, "E3: the same in library products and row operations"),
    Experiment("peers", 75, "E5: time, memory and error of every provider that is installed"),
    Experiment("trl_steps", 100, "GRPO and LAD micro-batches of a 0.5B model in TRL, with its head and with ours"),
    Experiment("sanitizer", 45, "E10: memcheck and racecheck on small shapes"),
    Experiment("counters", 30, "E9: hardware counters of the two large kernels"),
    Experiment("slow_peers", 45, "E5: providers that compile for long"),
)
NOT_BUILT = ("E8, fp8 screening forward",)


def command(experiment: Experiment, rows: Path, dry_run: bool) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.experiments", experiment.name, str(rows), *(["--dry-run"] if dry_run else [])
    ]  # fmt: skip


def run(experiment: Experiment, folder: Path, limit: float, dry_run: bool) -> tuple[str, str]:
    """(status in words, the end of its output); the experiment's whole process group ends with it."""
    environment = {**os.environ, "LAD_KERNELS_SECONDS": str(limit), "LAD_KERNELS_OUT": str(folder)}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    start, log = time.monotonic(), folder / f"{experiment.name}.log"
    with log.open("w") as out:
        child = subprocess.Popen(
            command(experiment, folder / f"{experiment.name}.json", dry_run), cwd=ROOT, env=environment, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(timeout=limit + 5)
            status = "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"cut after {limit + 5:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # whatever it left running would disturb the next one
        child.wait()
    return f"{status}, {time.monotonic() - start:.0f} s", log.read_text(errors="replace")[-LOG_BYTES:]


def merge(folder: Path, statuses: dict[str, str]) -> dict:
    """One record of all experiments so far, in the layout of `report.Results`."""
    record: dict = {"machine": {}, "missing": {}, "tables": {}}
    for experiment in PLAN:
        path = folder / f"{experiment.name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            record["machine"] = found["machine"] or record["machine"]
            record["missing"] |= found["missing"]
            for name, rows in found["tables"].items():
                record["tables"].setdefault(name, []).extend(rows)
    record["machine"] = {
        "device": "unknown", "versions": {}, "commit": "unknown", **record["machine"], "command": "benchmarks/gpu.sh"
    }  # fmt: skip
    record["tables"]["experiments"] = [
        {"experiment": e.name, "what": e.what, "status": statuses.get(e.name, "not run: not reached, or not asked for")}
        for e in PLAN
    ]
    record["missing"] |= dict.fromkeys(NOT_BUILT, "not built yet")
    return record


def output_folder(dry_run: bool) -> Path:
    """$OUT, else a folder of this repository named after the device, asked of nvidia-smi."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="lad-kernels-dry-run-"))
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return ROOT / "benchmarks" / "results" / "-".join(name.lower().split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[e.name for e in PLAN], default=[])
    parser.add_argument("--deadline", type=int, default=DEADLINE, help="seconds in all")
    options = parser.parse_args()
    out = output_folder(options.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    end, statuses, logs = time.monotonic() + options.deadline, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for experiment in [e for e in PLAN if not options.only or e.name in options.only]:
            left = end - time.monotonic() - 5
            if left < 10:
                break
            statuses[experiment.name], logs[experiment.name] = run(
                experiment, folder, min(experiment.seconds, left), options.dry_run
            )
            print(f"{experiment.name}: {statuses[experiment.name]}", flush=True)
            (out / "results.json").write_text(json.dumps(merge(folder, statuses), indent=1) + "\n")
            (out / "log.txt").write_text("".join(f"==== {n}: {statuses[n]}\n{log}\n" for n, log in logs.items()))
        if (folder / "ncu.txt").exists():
            (out / "ncu.txt").write_text((folder / "ncu.txt").read_text()[: 4 * LOG_BYTES])
    show = [sys.executable, "-m", "benchmarks.report", "--short", str(out / "results.json")]
    done = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout or done.stderr)
    bad = [name for name, status in statuses.items() if not status.startswith("done")]
    print(f"results in {out}; " + (f"not done: {', '.join(bad)}" if bad else "every experiment that ran is done"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
