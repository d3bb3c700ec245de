"""Several processes on gloo: each world is started once and runs the cases of some modules in turn."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parents[1] / "support" / "distributed_worker.py"
LIMIT = 240  # seconds of one world


def run_world(world: int, folder: Path, *modules: str) -> str:
    """Start `world` processes; returns what rank 0 printed. The first to fail ends the others and fails the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(WORKER), str(rank), str(world), str(folder / "store"), *modules]
        with log.open("w") as out:
            processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
    ends = time.monotonic() + LIMIT
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes) or time.monotonic() > ends:
            time.sleep(1)  # others may be about to say why
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        tails = "\n".join(f"--- rank {rank}: {log.read_text()[-3000:]}" for rank, log in enumerate(logs))
        raise AssertionError(f"{modules}: exit codes {codes} of {world} processes\n{tails}")
    return logs[0].read_text()


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_vocabulary_and_sequences(world, tmp_path):
    print(run_world(world, tmp_path, "distributed_vocabulary", "distributed_context"))


def needs(package: str, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}: {reason}")


@needs("peft", "gradients of wrapped models go unchecked (FSDP2, DDP, PEFT)")
@pytest.mark.parametrize("world", [2, 3])
def test_wrapped_models(world, tmp_path):
    """FSDP, DDP and PEFT around a fused head, and rows on a tensor-parallel mesh."""
    print(run_world(world, tmp_path, "distributed_wrappers", "distributed_heads"))


@needs(
    "deepspeed",
    "ZeRO-3 goes unchecked; it is no extra because it is built on the spot: pip install wheel ninja, then "
    "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8; the first run compiles for a minute",
)
@pytest.mark.parametrize("world", [2, 3])
def test_zero3(world, tmp_path):
    print(run_world(world, tmp_path, "distributed_zero3"))
