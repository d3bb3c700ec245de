"""LAD and GRPO from the same warm start with the same seeds.

Every run is one call of `trainer.train` in a worker process with one thread, the fastest for a small model. Progress,
plots and report only read the lines that a run appends to its log.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from integration.policy import build_policy
from integration.report import Sheet, mean_and_std
from integration.runs import read_records, side_by_side
from integration.tasks import Task
from integration.trainer import TrainConfig, evaluate, load_policy, make_progress, progress_line, train, warm_start

ALGORITHMS = ("lad", "grpo")
MEASURES = ("accuracy", "pass@8", "distinct", "entropy")
MIN_GAIN = 0.05  # check: mean held-out accuracy over seeds is at least this far above the warm start
Evaluation = dict[str, float]


@dataclass
class Comparison:
    """Held-out measures before and after, and the folder with every run's lines."""

    before: Evaluation
    after: dict[str, list[Evaluation]]  # algorithm -> one per seed
    folder: Path


def run_folder(folder: Path, algorithm: str, seed: int) -> Path:
    return folder / f"{algorithm}-{seed}"


def run_once(config: TrainConfig, start: Path, task: Task) -> Evaluation:
    """One run in a worker process: train from the warm start, evaluate."""
    torch.set_num_threads(1)
    policy = build_policy(str(start), config.device, pretrained=False)
    train(policy, task, config)
    return evaluate(policy, task, config)


def compare(config: TrainConfig, seeds: int, folder: Path, console: Console) -> Comparison:
    """Warm start once, then every algorithm and seed; shows the runs while they train."""
    task = Task(config.task, config.train_size, config.held_out_size)
    policy, start = load_policy(config), folder / "warm_start"
    losses = warm_start(policy, task, config)
    policy.model.save_pretrained(start)
    policy.tokenizer.save_pretrained(start)
    before = evaluate(policy, task, config)
    console.print(
        f"warm start: {len(losses)} supervised steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}, "
        f"held-out accuracy {before['accuracy']:.3f}"
    )
    configs = [
        replace(config, algorithm=algorithm, seed=seed, out=str(run_folder(folder, algorithm, seed)))
        for seed in range(seeds)
        for algorithm in ALGORITHMS
    ]
    jobs = [partial(run_once, each, start, task) for each in configs]
    with make_progress(console) as progress:
        bars = [progress.add_task(f"{c.algorithm} seed {c.seed}", total=c.steps, text="waiting") for c in configs]

        def show(i: int, records: list[dict[str, Any]]) -> None:
            progress.update(bars[i], completed=len(records), text=progress_line(records[-1]))

        results = side_by_side(jobs, min(len(jobs), os.cpu_count() or 1), [Path(each.out) for each in configs], show)
    after = {name: [r for c, r in zip(configs, results) if c.algorithm == name] for name in ALGORITHMS}
    return Comparison(before, after, folder)


def comparison_sheet(result: Comparison) -> Sheet:
    """Before, LAD and GRPO: mean and standard deviation over seeds."""
    title = f"Held-out problems, mean ± standard deviation over {len(result.after['lad'])} seeds (one warm start)"
    columns = ["policy", "accuracy", "pass@8", "distinct right answers in 16", "entropy, nats/token"]
    rows = [["before", *(f"{result.before[name]:.3f}" for name in MEASURES)]]
    for algorithm, runs in result.after.items():
        rows.append([algorithm.upper(), *(mean_and_std([run[name] for run in runs]) for name in MEASURES)])
    return Sheet(title, columns, rows)


def comparison_text(result: Comparison) -> str:
    """What the numbers say about diversity."""
    mean = {a: {m: sum(run[m] for run in runs) / len(runs) for m in MEASURES} for a, runs in result.after.items()}
    before, lad, grpo = result.before["distinct"], mean["lad"]["distinct"], mean["grpo"]["distinct"]
    return (
        f"Distinct right answers per problem went from {before:.2f} to {lad:.2f} with LAD and {grpo:.2f} with GRPO; "
        f"token entropy from {result.before['entropy']:.2f} to {mean['lad']['entropy']:.2f} and "
        f"{mean['grpo']['entropy']:.2f} nats. Both train with pi_old refreshed at every rollout, where each loss keeps "
        "concentrating the policy; LAD's target distribution is kept for good only under a frozen pi_old (the bandit)."
    )


def plot_comparison(result: Comparison, path: Path) -> None:
    """Training accuracy, entropy and distinct right answers by step: mean over seeds, band of one deviation."""
    panels = {"accuracy": "accuracy", "entropy": "entropy, nats/token", "distinct": "distinct right answers of a group"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for algorithm, color in zip(ALGORITHMS, ("tab:blue", "tab:red")):
        seeds = range(len(result.after[algorithm]))
        runs = [read_records(run_folder(result.folder, algorithm, seed)) for seed in seeds]
        for axis, (name, label) in zip(axes, panels.items()):
            values = torch.tensor([[record[name] for record in run] for run in runs])  # [S, steps]
            width = min(9, values.size(1))
            smooth = values.unfold(1, width, 1).mean(-1)  # [S, steps - width + 1]
            mean, std = smooth.mean(0).numpy(), smooth.std(0, correction=min(1, len(runs) - 1)).numpy()
            steps = range(width, values.size(1) + 1)
            axis.plot(steps, mean, color=color, label=algorithm.upper())
            axis.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
            axis.set(xlabel="step", ylabel=label)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def comparison_checks(result: Comparison) -> dict[str, bool]:
    """Statement -> whether it holds."""
    checks = {}
    for algorithm, runs in result.after.items():
        gain = sum(run["accuracy"] for run in runs) / len(runs) - result.before["accuracy"]
        statement = f"training: {algorithm.upper()} held-out accuracy up by at least {MIN_GAIN} (measured {gain:+.3f})"
        checks[statement] = gain >= MIN_GAIN
    return checks
