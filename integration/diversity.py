"""LAD and GRPO on a task with many right answers, see `docs/diversity.md`: how each trades diversity for accuracy.

One rollout draws one or more batches from the current policy, which becomes pi_old; each batch is then one update. Runs
are processes of one thread. Progress, table and plot only read the line that a run logs for each update.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from integration.many_answers import (
    HELD_OUT,
    Paths,
    Split,
    make_problems,
    measures,
    paths_of,
    right_probabilities,
    sample,
    score,
)
from integration.report import Sheet
from integration.runs import LOG, read_records, side_by_side
from lad_kernels import GRPOConfig, LADConfig, group_advantages, grpo_loss, lad_loss

Record = dict[str, Any]  # a line of metrics.jsonl
FROZEN = 0  # batches a rollout: as many as there are updates
PROMPTS, GROUP = 8, 32  # problems a batch, completions a problem
LEARNING_RATE = 1.2e-5  # constant; AdamW without weight decay, gradients clipped to norm 1
LOOK_EVERY = 2  # updates between measurements of the held-out problems
AT_ACCURACY = 0.8  # at which runs are compared


@dataclass(frozen=True)
class Run:
    """What is trained, and for how long."""

    name: str
    config: LADConfig | GRPOConfig
    batches: int  # a rollout, each one update; FROZEN: all of the run
    updates: int

    @property
    def label(self) -> str:
        rollout = {1: "on-policy", FROZEN: "pi_old fixed"}.get(self.batches, f"{self.batches} mini-batches")
        return f"{self.name}, {rollout}"


BEST = LADConfig(epsilon_low=0.2, epsilon_high=0.2, target_norm="group", eta=1.0)
RUNS = (
    Run("GRPO", GRPOConfig(), 1, 7),
    Run("LAD", LADConfig(), 1, 7),
    Run("GRPO, clip 0.2", GRPOConfig(), FROZEN, 10),
    Run("LAD", LADConfig(), FROZEN, 10),
    Run("GRPO, clip 0.2", GRPOConfig(), 4, 20),
    Run("LAD, bound 0.2, normalised", BEST, 4, 20),
)


class Batch(NamedTuple):
    """One update's completions: R = PROMPTS * GROUP rows of up to T tokens, a group's rows in a row."""

    paths: Paths
    old_logprobs: Tensor | None  # [R, T]; None: on-policy, the ratio is exactly 1
    ref_logprobs: Tensor | None  # [R, T], of the start; None without a KL term
    rewards: Tensor  # [R], 1 where the answer is right


class Learner:
    """A model, its optimizer, and the state of a run."""

    def __init__(self, folder: str, run: Run, seed: int, device: str):
        self.run, self.device = run, torch.device(device)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.to(self.device).eval()  # no dropout
        self._start = copy.deepcopy(self.model) if run.config.kl_coef else None
        self.split: Split = make_problems(AutoTokenizer.from_pretrained(folder))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(seed)
        self._chooser = random.Random(seed)

    def draw(self) -> Batch:
        """A batch of the current policy."""
        problems = self._chooser.sample(self.split.train, PROMPTS)
        answers = sample(self.model, problems, GROUP, self.split.newline, self._generator)
        rewards = [float(a in set(p.right)) for p, group in zip(problems, answers) for a in group]
        paths = paths_of(problems, answers, self.device)
        with torch.no_grad():
            old = None if self.run.batches == 1 else score(self.model, paths).logprobs  # [R, T]
            ref = None if self._start is None else score(self._start, paths).logprobs  # [R, T]
        return Batch(paths, old, ref, torch.tensor(rewards, device=self.device))

    def backward(self, batch: Batch) -> dict[str, float]:
        """Leaves the gradient of a batch in the parameters; returns its metrics."""
        config = self.run.config
        logprobs, entropy = score(self.model, batch.paths, return_entropy=config.entropy_coef != 0)  # [R, T], [R, T]
        loss = lad_loss if isinstance(config, LADConfig) else grpo_loss
        advantages = group_advantages(batch.rewards, group_size=GROUP, scale=config.advantage_scale)  # [R]
        out = loss(
            logprobs,
            batch.old_logprobs,
            advantages,
            loss_mask=batch.paths.mask,
            config=config,
            ref_logprobs=batch.ref_logprobs,
            entropy=entropy,
            group_size=GROUP,
        )
        out.loss.backward()
        return {name: float(value) for name, value in out.metrics.items()} | {"reward": batch.rewards.mean().item()}

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step."""
        self.optimizer.zero_grad()
        metrics = self.backward(batch)
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        return metrics


def train(learner: Learner, seconds: float, write: Callable[[Record], None], *, every: int = LOOK_EVERY) -> None:
    """A run of at most `seconds`; the number of updates follows from a first batch, timed and thrown away.

    `write` gets a record before the first update and after each: update, updates (of the run), planned, seconds,
    seconds_left, and metrics; where the held-out problems were measured, also `held_out`, see `measures`.
    """
    begun, run = time.perf_counter(), learner.run
    held_out = learner.split.held_out
    start = right_probabilities(learner.model, held_out)
    looked = time.perf_counter() - begun
    learner.backward(learner.draw())
    each = time.perf_counter() - begun - looked + looked / every  # seconds an update, its share of a look included
    updates = int(max(1, min(run.updates, (seconds - looked) / each - 1)))
    record: Record = {"updates": updates, "planned": run.updates}
    first = {"seconds": 0.0, "seconds_left": updates * each, "held_out": measures(start, start)}
    write({**record, "update": 0, **first})
    begun = time.perf_counter()
    for update, batch in enumerate(_batches(learner, updates), 1):
        metrics = learner.update(batch)
        due = update % every == 0 or update == updates
        looks = {"held_out": measures(right_probabilities(learner.model, held_out), start)} if due else {}
        spent = time.perf_counter() - begun
        left = spent / update * (updates - update)
        write({**record, "update": update, "seconds": spent, "seconds_left": left, **looks, **metrics})


def _batches(learner: Learner, updates: int) -> Iterator[Batch]:
    """One batch an update, drawn a rollout at a time."""
    size = learner.run.batches or updates
    for first in range(0, updates, size):
        yield from [learner.draw() for _ in range(min(size, updates - first))]


def looks_of(records: list[Record]) -> list[dict[str, float]]:
    """The measurements of a run: `measures`, update and seconds."""
    return [{**r["held_out"], "update": r["update"], "seconds": r["seconds"]} for r in records if "held_out" in r]


def at_accuracy(looks: list[dict[str, float]], name: str, accuracy: float = AT_ACCURACY) -> float | None:
    """A measure where held-out accuracy first reaches `accuracy`, between two measurements in proportion; or None."""
    for before, after in pairwise(looks):
        if before["accuracy"] < accuracy <= after["accuracy"]:
            part = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[name] + part * (after[name] - before[name])
    return None


def run_once(folder: str, run: Run, seconds: float, device: str, out: Path, keep_model: bool) -> None:
    """One run in a process of its own: its lines in `out/metrics.jsonl`, with `keep_model` the model in `out/model`."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    learner = Learner(folder, run, 0, device)
    with (out / LOG).open("w", buffering=1) as log:
        train(learner, seconds, lambda record: print(json.dumps(record), file=log))
    if keep_model:
        save_model(learner, AutoTokenizer.from_pretrained(folder), out / "model")


def save_model(learner: Learner, tokenizer: Any, folder: Path) -> None:
    """What was trained, with its prompts as benchmarks/states.py takes them."""
    learner.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = [*learner.split.train, *learner.split.held_out]
    longest = max(len(answer) for problem in problems for answer in problem.right)
    texts = [tokenizer.decode(problem.prompt) for problem in problems]
    asked = {"completions": 6, "length": longest, "chat": False, "texts": texts}
    (folder / "prompts.json").write_text(json.dumps(asked, indent=1) + "\n")


def run_all(
    folder: str, runs: list[Run], seconds: float, device: str, out: Path, console: Console, *, keep_models: bool = False
) -> list[list[Record]]:
    """All runs within about `seconds`, two side by side where there are two cores; returns each one's lines.

    A run may take the share of the time that its planned updates are of all; a slower machine makes fewer updates.
    """
    workers = 1 if device == "cuda" else min(2, os.cpu_count() or 1, len(runs))
    each = seconds * workers / sum(run.updates for run in runs)  # an update
    places = [out / f"{i}-{'-'.join(run.label.lower().replace(',', '').split())}" for i, run in enumerate(runs)]
    longest_first = sorted(zip(runs, places), key=lambda pair: -pair[0].updates)
    jobs = [partial(run_once, folder, r, each * r.updates, device, p, keep_models) for r, p in longest_first]
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as progress:
        bars = [progress.add_task(run.label, total=run.updates, text="waiting") for run in runs]

        def show(i: int, records: list[Record]) -> None:
            last, seen = records[-1], looks_of(records)[-1]
            measured = f"accuracy {seen['accuracy']:.2f}  entropy {seen['entropy']:.2f} nats"
            text = f"{measured}  {last['seconds_left']:.0f} s left"
            progress.update(bars[i], completed=last["update"], total=last["updates"], text=text)

        side_by_side(jobs, workers, places, show)
    return [read_records(place) for place in places]


def runs_sheet(runs: list[Run], results: list[list[Record]]) -> Sheet:
    """The start, and the end of every run, on the held-out problems."""

    def measured(record: Record) -> list[str]:
        seen = record["held_out"]
        return [f"{seen['accuracy']:.2f}", f"{seen['distinct']:.1f}", f"{seen['entropy']:.2f}"]

    columns = ["run", "updates, s", "accuracy", "distinct in 64", "entropy, nats", f"distinct at {AT_ACCURACY:.2f}"]
    rows = [["start", "", *measured(results[0][0]), ""]]
    for run, records in zip(runs, results):
        reached, last = at_accuracy(looks_of(records), "distinct"), records[-1]
        took = f"{last['update']}, {last['seconds']:.0f}"
        rows.append([run.label, took, *measured(last), "never" if reached is None else f"{reached:.1f}"])
    title = f"{HELD_OUT} held-out problems: accuracy, and how many of the right answers the policy still gives"
    return Sheet(title, columns, rows)


def cut_short(runs: list[Run], results: list[list[Record]], seconds: float) -> str:
    """A line about the runs that time has cut; empty if there are none."""
    lasts = [(run, records[-1]["updates"]) for run, records in zip(runs, results)]
    cut = [f"{run.label} {updates} of {run.updates}" for run, updates in lasts if updates < run.updates]
    return f"cut to keep to {seconds:.0f} s, in updates: {'; '.join(cut)}" if cut else ""


def run_checks(runs: list[Run], results: list[list[Record]]) -> dict[str, bool]:
    """Statement -> whether it holds: what LAD promises, of runs that were not cut."""
    done = {run.label: records for run, records in zip(runs, results) if records[-1]["update"] == run.updates}
    checks = {}
    lad, grpo = (done.get(f"{name}, pi_old fixed") for name in ("LAD", "GRPO, clip 0.2"))
    if lad and grpo:
        ours, theirs = (records[-1]["held_out"]["accuracy"] for records in (lad, grpo))
        statement = f"pi_old fixed: LAD learns where clipped GRPO stalls (accuracy {ours:.2f} against {theirs:.2f})"
        checks[statement] = ours > theirs + 0.1
    lad, grpo = (done.get(f"{name}, on-policy") for name in ("LAD", "GRPO"))
    if lad and grpo:
        ours, theirs = (at_accuracy(looks_of(records), "distinct") for records in (lad, grpo))
        if ours is not None and theirs is not None:
            statement = (
                f"on-policy: LAD keeps more at accuracy {AT_ACCURACY} ({ours:.1f} distinct against {theirs:.1f})"
            )
            checks[statement] = ours > theirs
    return checks


def plot_runs(runs: list[Run], results: list[list[Record]], path: Path) -> None:
    """Entropy over right answers against accuracy, one curve a run, from the start on the left."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colors = {"LAD": "tab:blue", "GRPO": "tab:red"}
    styles = {1: ":", FROZEN: "--"}
    for run, records in zip(runs, results):
        looks = looks_of(records)
        axes.plot(
            [look["accuracy"] for look in looks],
            [look["entropy"] for look in looks],
            color=colors[run.name.split(",")[0]],
            linestyle=styles.get(run.batches, "-"),
            marker="o",
            markersize=3,
            label=run.label,
        )
    axes.set(xlabel="accuracy on held-out problems", ylabel="entropy over right answers, nats", xlim=(None, 1))
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=150)
