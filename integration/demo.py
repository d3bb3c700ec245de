"""The demo: the paper's bandit, a real language model under LAD and GRPO, parity with the specification, and memory.

    python -m integration.demo            # SmolLM2-135M on a task with many right answers, about nine minutes
    python -m integration.demo --tiny     # a small decoder from scratch on countdown instead, two minutes
    python -m integration.demo --quick    # the same at toy size, for tests; says nothing about learning

Outputs go to `runs/<time>/`: report.md, PNG plots, metrics.jsonl (every update of every run) and a folder for each
run, which holds the trained model where `--keep-models` asks for it. The exit status is 1 when a stated check fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from integration import bandit, compare, diversity, memory
from integration.report import Sheet
from integration.train_config import TrainConfig, check_machine
from lad_kernels import doctor
from lad_kernels.preflight import Refused, check_model, claim_folder, complain
from lad_kernels.pretrained import model_folder

MODEL = "smollm2"
SECONDS = 400.0  # for the runs of the real model, which make fewer updates on a slower machine
TINY_STEPS = 60  # rollouts of the small decoder, a run: two minutes in all on two cores
TINY_ARMS = ("js", "grpo", "grpo, clipped")  # of the bandit's methods
PARITY = 1e-10  # relative error allowed between our float64 path and the specification's
QUICK = {
    "steps": 2,
    "warm_steps": 5,
    "prompts_per_step": 4,
    "group_size": 4,
    "train_size": 60,
    "held_out_size": 10,
    "hidden_size": 32,
    "layers": 1,
}


class Learned(NamedTuple):
    """What a comparison of runs adds to the report."""

    sheet: Sheet
    text: str
    checks: dict[str, bool]
    results: Any  # for summary.json


def write_report(folder: Path, sheets: list[Sheet], learned: Learned, checks: dict[str, bool], seconds: float) -> None:
    """report.md, and metrics.jsonl with the lines of all runs."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ["# lad_kernels demo", "", f"{machine}; {seconds:.0f} s in all.", ""]
    lines += [sheet.markdown() for sheet in sheets]
    lines += [learned.text, "", "![bandit](bandit.png)", "", "![training](training.png)", "", "## Checks", ""]
    lines += [f"- {'pass' if holds else '**FAIL**'}: {statement}" for statement, holds in checks.items()]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    with open(folder / "metrics.jsonl", "w") as out:
        for path in sorted(folder.glob("*-*/metrics.jsonl")):
            out.write(path.read_text())


def find_model(name: str | None, console: Console) -> str | None:
    """The folder of `name`; of MODEL where none is named, or None where that cannot be had.

    Raises:
        Refused: a named model is not there.
    """
    if name is not None:
        check_model(name)
        return model_folder(name)
    try:
        return model_folder(MODEL)
    except Refused as error:
        console.print(f"--{error}\nNow without it: the small decoder of --tiny.", soft_wrap=True)
        return None


def real_model(flags: argparse.Namespace, console: Console) -> Learned:
    """Every run of `diversity.RUNS` on the task with many right answers."""
    console.print(f"fine-tuning {flags.model or MODEL}: {len(diversity.RUNS)} runs in about {flags.seconds:.0f} s")
    runs = list(diversity.RUNS)
    results = diversity.run_all(
        flags.folder, runs, flags.seconds, flags.device, flags.out, console, keep_models=flags.keep_models
    )
    diversity.plot_runs(runs, results, flags.out / "training.png")
    sheet, text = diversity.runs_sheet(runs, results), diversity.cut_short(runs, results, flags.seconds)
    last = {run.label: records[-1] for run, records in zip(runs, results)}
    return Learned(sheet, text, diversity.run_checks(runs, results), last)


def toy(flags: argparse.Namespace, config: TrainConfig, console: Console) -> Learned:
    """LAD and GRPO on a small decoder that is trained from scratch."""
    result = compare.compare(config, 1 if flags.quick else flags.seeds, flags.out, console)
    compare.plot_comparison(result, flags.out / "training.png")
    sheet, text = compare.comparison_sheet(result), compare.comparison_text(result)
    checks = {} if flags.quick else compare.comparison_checks(result)
    return Learned(sheet, text, checks, {"before": result.before, "after": result.after})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"folder or hub id; {MODEL} if left out, or --tiny where that is missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all runs of the model")
    parser.add_argument("--keep-models", action="store_true", help="save what every run trained, 0.5 GB each")
    parser.add_argument("--tiny", action="store_true", help="a small decoder from scratch instead of the model")
    parser.add_argument("--quick", action="store_true", help="--tiny at toy sizes; the accuracy check is left out")
    parser.add_argument("--task", default="countdown", help="of --tiny: a reasoning-gym dataset")
    parser.add_argument("--seeds", type=int, default=1, help="of --tiny")
    parser.add_argument("--steps", type=int, default=TINY_STEPS, help="of --tiny: rollouts per run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="a new or an empty folder; none makes runs/<time>")
    flags = parser.parse_args(arguments)
    flags.tiny |= flags.quick
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Run everything, report, and return the exit status."""
    flags, console, started = parse(arguments), Console(), time.perf_counter()
    try:
        if flags.seeds < 1:
            raise Refused(f"seeds: expected at least 1, got {flags.seeds}; give 1 or more")
        if not 0 < flags.seconds < float("inf"):
            raise Refused(f"seconds: expected a finite number > 0, got {flags.seconds:g}; {SECONDS:g} is the default")
        sizes = QUICK if flags.quick else {"steps": flags.steps}
        config = TrainConfig(task=flags.task, device=flags.device, **sizes)
        check_machine(config)
        flags.folder = None if flags.tiny else find_model(flags.model, console)
        flags.out = claim_folder(flags.out)
    except ValueError as error:
        return complain("integration.demo", f"--{error}", 2)

    console.rule("1. bandit")
    arms = bandit.run_bandit(seeds=1 if flags.quick else 3, only=TINY_ARMS if flags.tiny else None)
    bandit.plot_bandit(arms, flags.out / "bandit.png")
    checks = bandit.bandit_checks(arms)
    sheets = [bandit.bandit_sheet(arms)]
    console.print(sheets[-1].rich())

    console.rule("2. LAD and GRPO")
    learned = real_model(flags, console) if flags.folder else toy(flags, config, console)
    console.print(learned.sheet.rich())
    console.print(learned.text)
    sheets.append(learned.sheet)
    checks |= learned.checks

    console.rule("3. parity and memory")
    error = doctor.self_check(torch.device("cpu"), "auto", torch.float64)
    checks[f"parity: loss and gradients equal the specification to {PARITY:g} (measured {error:.1e})"] = error <= PARITY
    tokens, hidden_size = (512, 64) if flags.quick else (1024, 896)
    peaks = memory.compare_memory(tokens, hidden_size, flags.device)
    checks |= memory.memory_checks(peaks)
    sheets.append(memory.memory_sheet(peaks, tokens, hidden_size, flags.device))
    console.print(sheets[-1].rich())

    console.rule("checks")
    for statement, holds in checks.items():
        console.print(f"{'[green]pass' if holds else '[red]FAIL'}[/] {statement}", highlight=False)
    seconds = time.perf_counter() - started
    write_report(flags.out, sheets, learned, checks, seconds)
    summary = {"learned": learned.results, "memory": peaks, "seconds": seconds}
    (flags.out / "summary.json").write_text(json.dumps(summary, indent=1))
    console.print(f"{seconds:.0f} s; report: {flags.out / 'report.md'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny tensors: a second thread mostly waits; worker processes use the other cores
    raise SystemExit(main())
