"""LAD and GRPO from the same warm start with the same seeds.

Every run is one call of `trainer.train` in a worker process with one thread, the fastest for a small model. A run
appends a JSON line per step to its own folder; the live table, the plots and the report only read those lines.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from integration.policy import build_policy
from integration.report import Sheet, mean_and_std
from integration.runs import read_records
from integration.tasks import Task
from integration.trainer import TrainConfig, evaluate, load_policy, train, warm_start

plt.switch_backend("Agg")

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
    workers = min(len(configs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_once, each, start, task) for each in configs]
        watch(configs, futures, console)
        results = [future.result() for future in futures]
    after = {name: [r for c, r in zip(configs, results) if c.algorithm == name] for name in ALGORITHMS}
    return Comparison(before, after, folder)


def watch(configs: list[TrainConfig], futures: list[Future], console: Console) -> None:
    """Live table over the runs' JSON lines until all are done."""
    started = time.perf_counter()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while not all(future.done() for future in futures):
            live.update(live_table(configs, time.perf_counter() - started))
            time.sleep(0.5)
            if any(future.done() and future.exception() for future in futures):
                break


def live_table(configs: list[TrainConfig], elapsed: float) -> Table:
    """Latest line of every run, and the time left at the pace so far."""
    table = Table()
    for column in ("run", "step", "reward", "accuracy", "entropy", "distinct right", "tokens/s"):
        table.add_column(column, justify="right" if column != "run" else "left")
    steps = 0
    for config in configs:
        records = read_records(Path(config.out))
        name = f"{config.algorithm} seed {config.seed}"
        steps += len(records)
        if not records:
            table.add_row(name, "waiting", *[""] * 5)
            continue
        last = records[-1]
        numbers = [f"{last[key]:.2f}" for key in ("reward", "accuracy", "entropy", "distinct")]
        table.add_row(name, f"{last['step']}/{config.steps}", *numbers, f"{last['tokens_per_second']:,.0f}")
    total = sum(config.steps for config in configs)
    left = f"{elapsed * (total - steps) / steps:.0f} s" if steps else "unknown"
    table.caption = f"{elapsed:.0f} s elapsed, time left {left}"
    return table


def comparison_sheet(result: Comparison) -> Sheet:
    """Before, LAD and GRPO: mean and standard deviation over seeds."""
    seeds = len(result.after["lad"])
    title = f"Held-out problems, mean ± standard deviation over {seeds} seeds (one warm start)"
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
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6))
    for algorithm, color in zip(ALGORITHMS, ("tab:blue", "tab:red")):
        seeds = range(len(result.after[algorithm]))
        runs = [read_records(run_folder(result.folder, algorithm, seed)) for seed in seeds]
        for axis, (name, label) in zip(axes, panels.items()):
            values = torch.tensor([[record[name] for record in run] for run in runs])  # [S, steps]
            width = min(9, values.size(1))
            smooth = values.unfold(1, width, 1).mean(-1)  # [S, steps - width + 1]
            mean, std = smooth.mean(0), smooth.std(0, correction=min(1, len(runs) - 1))
            steps = torch.arange(len(mean)) + width
            axis.plot(steps.tolist(), mean.tolist(), color=color, label=algorithm.upper())
            axis.fill_between(
                steps.tolist(), (mean - std).tolist(), (mean + std).tolist(), color=color, alpha=0.2, linewidth=0
            )
            axis.set(xlabel="step", ylabel=label)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def comparison_checks(result: Comparison) -> dict[str, bool]:
    """Statement -> whether it holds."""
    checks = {}
    for algorithm, runs in result.after.items():
        gain = sum(run["accuracy"] for run in runs) / len(runs) - result.before["accuracy"]
        statement = f"training: {algorithm.upper()} held-out accuracy up by at least {MIN_GAIN} (measured {gain:+.3f})"
        checks[statement] = gain >= MIN_GAIN
    return checks
