"""How objectives trade diversity for accuracy: the demo's task, more rows, several seeds, no time limit.

SmolLM2-135M is fine-tuned on a task with many right answers (`integration/many_answers.py`) by LAD and GRPO, on-policy,
with four mini-batches a rollout, and with a pi_old that stays. What is compared is the number of distinct right
answers at equal accuracy.

    python -m benchmarks.studies.diversity [--seeds 3] [--only NAME]   five minutes of one core a run
    python -m benchmarks.studies.diversity --table                     the table in docs/diversity.md, from the results

Finished runs are read from results/diversity/, one file a run, and not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.results import RESULTS
from integration.diversity import FROZEN, Learner, Run, at_accuracy, looks_of, train
from integration.report import mean_and_std
from lad_kernels import GRPOConfig, LADConfig
from lad_kernels.pretrained import model_folder

FOLDER = RESULTS / "diversity"
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
)


def place(run: Run, seed: int) -> Path:
    name = "-".join(run.label.lower().replace(",", "").replace(".", "").split())
    return FOLDER / f"{name}-{seed}.json"


def run_once(run: Run, seed: int, folder: str) -> None:
    """One run to its end; its file appears when it is done."""
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    learner = Learner(folder, run, seed, "cpu")

    def write(record: dict[str, Any]) -> None:
        records.append(record)
        if "held_out" in record:
            print(run.label, seed, record["update"], f"{record['seconds']:.0f} s", record["held_out"], flush=True)

    train(learner, float("inf"), write)
    result = {"config": asdict(run.config), "batches": run.batches, "seed": seed, "looks": looks_of(records)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    place(run, seed).write_text(json.dumps({"machine": machine.describe("cpu"), **result}, indent=1) + "\n")


def table() -> list[str]:
    """Lines of Markdown: a row a method, mean and standard deviation over the seeds that were run."""
    columns = ("seeds", "updates to .80", "distinct at .80", "distinct at .90", "end: accuracy", "distinct", "entropy")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in RUNS:
        paths = sorted(FOLDER.glob(f"{place(run, 0).stem[:-1]}[0-9].json"))
        if not paths:
            continue
        looks = [json.loads(path.read_text())["looks"] for path in paths]
        cells = [run.label, str(len(looks))]
        for name, accuracy in (("update", 0.8), ("distinct", 0.8), ("distinct", 0.9)):
            known = [x for each in looks if (x := at_accuracy(each, name, accuracy)) is not None]
            missing = "" if len(known) == len(looks) else f" ({len(known)} of {len(looks)} seeds)"
            cells.append(mean_and_std(known, 1) + missing if known else "never")
        for name, digits in (("accuracy", 2), ("distinct", 1), ("entropy", 2)):
            cells.append(mean_and_std([each[-1][name] for each in looks], digits))
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
                if (flags.only is None or flags.only in run.label) and not place(run, seed).exists():
                    run_once(run, seed, folder)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
