"""Long runs: memory, files and tensors do not grow, kills lose nothing, and a lost or diverging rank is detected.

`make soak` runs them at full length; the tests take a slice of each. Figures: docs/numerics.md.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distributed import WORKER

import lad_kernels
from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss, linear_logprobs

FULL = os.environ.get("SOAK") == "1"
STEPS, WARM = (10_000, 1_000) if FULL else (400, 200)
TRAINER_STEPS, KILL_EVERY = (1_000, 50) if FULL else (6, 3)
FLAT = 0.01  # relative growth after the warm steps


def step(rng: random.Random) -> None:
    """One forward and backward of random shape, dtype, objective and inputs."""
    n, d, v = rng.randint(1, 300), rng.randint(8, 64), rng.randint(50, 3000)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,))
    mask = torch.rand(n) < 0.7 if rng.random() < 0.5 else None
    if rng.random() < 0.2:
        out = linear_logprobs(hidden, weight, targets, return_entropy=True, loss_mask=mask)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        return
    call, config = rng.choice([(linear_lad_loss, LADConfig), (linear_grpo_loss, GRPOConfig)])
    old = -torch.rand(n) * 9 if rng.random() < 0.5 else None
    config = config(tail_mass=rng.choice([None, 0.0, 1e-3]), backward=rng.choice(["auto", "dense"]))
    call(hidden, weight, targets, old, advantages=torch.randn(n), loss_mask=mask, config=config).loss.backward()


def held() -> dict[str, int]:
    """What the process and the package hold now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == lad_kernels.__name__]
    sizes = [len(x) for m in modules for x in vars(m).values() if isinstance(x, (dict, list, set))]
    caches = [x.cache_info().currsize for m in modules for x in vars(m).values() if hasattr(x, "cache_info")]
    return {
        "resident MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "open files": len(os.listdir("/proc/self/fd")),
        "live tensors": sum(isinstance(x, torch.Tensor) for x in gc.get_objects()),
        "entries in module-level containers and caches": sum(sizes) + sum(caches),
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: growth of memory and files goes unseen")
@pytest.mark.timeout(0 if FULL else 900)
def test_varied_steps_hold_nothing():
    """In a process of its own: other tests leave memory that may be given back meanwhile."""
    command = [sys.executable, "-c", "import test_soak; test_soak.run_steps()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    print(ran.stdout)
    seen = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    for name, first in seen[0].items():
        last = max(x[name] for x in seen[1:])
        slack = 4 if name == "resident MiB" and not FULL else 0  # the allocator's, over a few hundred steps
        assert last <= first * (1 + FLAT) + slack, (name, [x[name] for x in seen])


def run_steps() -> None:
    """Print what is held after the warm steps, and then ten times."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for i in range(STEPS + 1):
        if i >= WARM and (i - WARM) % ((STEPS - WARM) // 9) == 0:
            print(json.dumps(held()), flush=True)
        step(rng)


def train(*flags: str) -> subprocess.Popen:
    """The small policy, a few tokens a step."""
    command = [sys.executable, "-m", "integration.trainer", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.timeout(0 if FULL else 900)
def test_a_trainer_that_is_killed_again_and_again(tmp_path):
    """SIGKILL after every few steps, then --resume: the log and the weights of a run that nobody killed."""
    small = (
        f"--steps={TRAINER_STEPS}",
        f"--save-every={max(1, KILL_EVERY // 2)}",
        "--prompts-per-step=4",
        "--group-size=8",
        "--warm-batch=32",
        "--train-size=200",
        "--held-out-size=2",
        "--hidden-size=64",
        "--layers=1",
        "--warm-steps=120",
    )
    whole = train(*small, f"--out={tmp_path / 'whole'}")
    told, _ = whole.communicate()
    assert whole.returncode == 0, told
    killed, kills = tmp_path / "killed", 0
    for stop in range(KILL_EVERY, TRAINER_STEPS + KILL_EVERY, KILL_EVERY):
        flags = (*small, f"--out={killed}") if kills == 0 else (f"--resume={killed}",)
        running = train(*flags)
        while running.poll() is None and done(killed) < stop:
            time.sleep(0.02)
        if stop < TRAINER_STEPS and running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        told, _ = running.communicate()
        assert running.returncode in (0, -signal.SIGKILL), told
    print(f"{TRAINER_STEPS} steps, {kills} kills")
    assert kills >= TRAINER_STEPS // KILL_EVERY - 1
    moved = [
        json.loads(line)["grad_norm"] > 0 for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(moved) > 0.5 * TRAINER_STEPS
    weights = [(tmp_path / run / "checkpoint" / "model.safetensors").read_bytes() for run in ("killed", "whole")]
    assert weights[0] == weights[1]


def done(folder: Path) -> int:
    """Steps in the log of a run."""
    log = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def world(folder: Path, ranks: int, module: str) -> list[subprocess.Popen]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER)]
    return [
        subprocess.Popen(
            [*command, str(r), str(ranks), str(folder / "store"), module],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"SOAK_FOLDER": str(folder)},
        )
        for r in range(ranks)
    ]


def test_a_killed_rank_ends_the_others(tmp_path):
    """An error within a minute, no hang."""
    ranks = world(tmp_path, 2, "distributed_soak")
    while not (tmp_path / "running").exists():
        assert all(r.poll() is None for r in ranks), [r.communicate()[0][-2000:] for r in ranks if r.poll()]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    told, _ = ranks[0].communicate(timeout=90)
    took = time.monotonic() - killed
    print(f"the other rank ended {took:.1f} s after the kill")
    assert ranks[0].returncode != 0
    assert took < 60
    assert "Error" in told


def test_ranks_out_of_step_are_named(tmp_path):
    """Three ranks of which one calls with other shapes, settings or another function: each says what differs."""
    ranks = world(tmp_path, 3, "distributed_out_of_step")
    for rank in ranks:
        told, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, told[-3000:]
