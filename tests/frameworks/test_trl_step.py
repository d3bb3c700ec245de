"""benchmarks/gpu/trl_step.py on a CPU: its tables, its gate, its search for the largest micro-batch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; the measurement of TRL's steps goes untested")

from benchmarks import report
from benchmarks.gpu import experiments, trl_step
from benchmarks.gpu.plan import PLAN
from benchmarks.gpu.run import Run
from benchmarks.gpu.trl_step import FUSED, LAD, STOCK
from benchmarks.harness.results import Results
from lad_kernels.frameworks import trl as adapter
from lad_kernels.frameworks import trl_options


@pytest.fixture
def run(tmp_path, one_thread) -> Run:
    return Run(tmp_path / "rows.json", dry_run=True)


def test_dry_run(run):
    trl_step.trl_steps(run)
    gate, steps = run.results.tables["TRL gate"], run.results.tables["TRL steps"]
    assert [(r["data"], r["trainer"]) for r in gate] == [
        (d, t) for d in ("flat", "peaked") for t in (STOCK, FUSED, LAD)
    ]
    assert all(r["inside"] for r in gate if r["trainer"] != STOCK)
    assert [(r["tokens"], r["trainer"]) for r in steps[:6]] == [(n, t) for n in (64, 128) for t in (STOCK, FUSED, LAD)]
    assert len(steps) == 12
    assert all(r["tokens_per_s"] == pytest.approx(1e3 * r["tokens"] / r["ms"][1]) for r in steps)
    assert "#### TRL steps" in report.render([Results.load(run.path)])


@pytest.mark.parametrize(("name", "function"), [(FUSED, "linear_logprobs"), (LAD, "linear_lad_loss")])
def test_gate_stops_a_planted_bug(run, monkeypatch, name, function):
    right = getattr(adapter, function)
    monkeypatch.setattr(adapter, function, lambda hidden, *args, **given: right(1.01 * hidden, *args, **given))
    with pytest.raises(SystemExit, match="outside the tolerance on flat data"):
        trl_step.trl_steps(run)
    assert {r["trainer"]: r["inside"] for r in run.results.tables["TRL gate"]}[name] is False
    assert "TRL steps" not in run.results.tables


def test_doubling_stops_at_memory_or_time(run, monkeypatch):
    trainers = trl_step.make_trainers(run, trl_step.SIZES["tiny"][0])
    sizes = {trainers[STOCK]: 256, trainers[FUSED]: 512, trainers[LAD]: 1 << 40}

    def seconds(trainer, batch):
        tokens = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        if tokens > sizes[trainer]:
            raise torch.OutOfMemoryError("no room")
        return tokens / 1e3

    monkeypatch.setattr(trl_step, "seconds", seconds)
    run.time_left = lambda: 1.3
    trl_step.largest(run, trainers, 128, 32)
    rows = {r["trainer"]: r for r in run.results.tables["largest TRL micro-batch"]}
    assert {name: row["tokens_that_fit"] for name, row in rows.items()} == {STOCK: 256, FUSED: 512, LAD: 1024}
    assert "no room" in rows[FUSED]["stopped_by"]
    assert "time is up" in rows[LAD]["stopped_by"]


def test_missing_trl_is_named(run, monkeypatch):
    monkeypatch.setattr(trl_options, "unusable", "TRL 1.15.0")
    trl_step.trl_steps(run)
    assert run.results.missing == {"TRL steps": "no supported TRL, but TRL 1.15.0"}


def test_every_planned_experiment_exists():
    assert {e.name for e in PLAN} <= set(experiments.EXPERIMENTS)
