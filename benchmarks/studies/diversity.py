"""How objectives trade diversity for accuracy: the demo's task, more rows, several seeds, no time limit.

SmolLM2-135M is fine-tuned on a task with many right answers (`integration/many_answers.py`) by LAD and GRPO, on-policy,
with four and eight mini-batches a rollout, and with a pi_old that stays. What is compared is the number of distinct
right answers at equal accuracy.

    python -m benchmarks.studies.diversity [--seeds 3] [--only NAME]   five minutes of one core a run
    python -m benchmarks.studies.diversity --table                     the table in docs/diversity.md, from the results

Rows of finished runs are kept in results/diversity/results.json; those runs are not repeated.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.results import RESULTS, Results
from integration.diversity import FROZEN, Learner, Record, Run, at_accuracy, looks_of, train
from integration.report import mean_and_std
from lad_kernels import GRPOConfig, LADConfig
from lad_kernels.pretrained import model_folder

FILE, TABLE = RESULTS / "diversity" / "results.json", "distinct right answers at equal accuracy"
REACHED = (("update", 0.8), ("distinct", 0.8), ("distinct", 0.9))
BOUND = {"epsilon_low": 0.2, "epsilon_high": 0.2}
NORMALISED = {"target_norm": "group", "eta": 1.0}
RUNS = (
    Run("GRPO", GRPOConfig(), 1, 12),
    Run("LAD", LADConfig(), 1, 12),
    Run("LAD, hd", LADConfig("hd"), 1, 12),
    Run("GRPO, clip 0.2", GRPOConfig(), FROZEN, 14),
    Run("GRPO, no clip", GRPOConfig(epsilon_low=1e9, epsilon_high=1e9), FROZEN, 14),
    Run("LAD", LADConfig(), FROZEN, 14),
    Run("GRPO, clip 0.2", GRPOConfig(), 4, 28),
    Run("GRPO, clip 0.2, entropy bonus 0.01", GRPOConfig(entropy_coef=0.01), 4, 28),
    Run("GRPO, clip 0.2, k3 to the start 0.04", GRPOConfig(kl_coef=0.04), 4, 28),
    Run("LAD", LADConfig(), 4, 16),
    Run("LAD, bound 0.2", LADConfig(**BOUND), 4, 28),
    Run("LAD, bound 0.2, hd", LADConfig("hd", **BOUND), 4, 28),
    Run("LAD, bound 0.2, kl", LADConfig("kl", **BOUND), 4, 28),
    Run("LAD, bound 0.2, normalised target, eta 1", LADConfig(**NORMALISED, **BOUND), 4, 32),
    Run("GRPO, clip 0.2", GRPOConfig(), 8, 48),
    Run("LAD, bound 0.2", LADConfig(**BOUND), 8, 48),
    Run("LAD, bound 0.2, normalised target, eta 1", LADConfig(**NORMALISED, **BOUND), 8, 48),
)


def load() -> Results:
    """Rows of the runs that are done."""
    return Results.load(FILE) if FILE.exists() else Results(machine.describe("cpu"))


def row(run: Run, seed: int, records: list[Record]) -> dict[str, Any]:
    """A run's line: where it first reached two accuracies, and its end."""
    looks = looks_of(records)
    at = {f"{name} at {accuracy}": at_accuracy(looks, name, accuracy) for name, accuracy in REACHED}
    end = {name: looks[-1][name] for name in ("accuracy", "pass@8", "distinct", "entropy", "tv_to_start")}
    return {"run": run.label, "seed": seed, "updates": run.updates, "seconds": looks[-1]["seconds"], **at, **end}


def run_once(run: Run, seed: int, folder: str) -> None:
    """One run to its end; its row is saved when it is done."""
    torch.set_num_threads(1)
    records: list[Record] = []
    learner = Learner(folder, run, seed, "cpu")

    def write(record: Record) -> None:
        records.append(record)
        if "held_out" in record:
            print(run.label, seed, record["update"], f"{record['seconds']:.0f} s", record["held_out"], flush=True)

    train(learner, float("inf"), write)
    results = load()  # again: another process may have added a row
    results.add(TABLE, **row(run, seed, records))
    results.save(FILE)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a row a method, mean and standard deviation over the seeds that were run."""
    ends = (("accuracy", 2), ("distinct", 1), ("entropy", 2))
    columns = ("seeds", *(f"{name} at {accuracy}" for name, accuracy in REACHED), *(f"end: {name}" for name, _ in ends))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in RUNS:
        own = [each for each in rows if each["run"] == run.label]
        if not own:
            continue
        cells = [run.label, str(len(own))]
        for name, accuracy in REACHED:
            known = [each[f"{name} at {accuracy}"] for each in own if each[f"{name} at {accuracy}"] is not None]
            missing = "" if len(known) == len(own) else f" ({len(known)} of {len(own)} seeds)"
            cells.append(mean_and_std(known, 1) + missing if known else "never")
        cells += [mean_and_std([each[name] for each in own], digits) for name, digits in ends]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are there")
    flags = parser.parse_args(arguments)
    if not flags.table:
        folder = model_folder("smollm2")
        for seed in range(flags.seeds):
            for run in RUNS:
                done = any(r["run"] == run.label and r["seed"] == seed for r in load().tables.get(TABLE, []))
                if (flags.only is None or flags.only in run.label) and not done:
                    run_once(run, seed, folder)
    print("\n".join(table(load().tables.get(TABLE, []))))


if __name__ == "__main__":
    main()
