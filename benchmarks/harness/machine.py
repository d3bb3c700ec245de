"""Which machine, which versions, which commit, which command: the head of every table."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "verl",
    "quack-kernels",
)


FLUSHED = "Subnormal numbers are flushed to zero (torch.set_flush_denormal), for every provider."
NOT_FLUSHED = "This CPU cannot flush subnormal numbers: stored logits at low temperatures may look slow."


def flush_subnormals() -> bool:
    """Flush subnormal numbers to zero in this process, so that no provider looks slow for them; False where it cannot.

    Products of subnormal numbers are 16 to 50 times slower on CPUs, and probabilities below 1.2e-38 are such numbers.
    """
    return torch.set_flush_denormal(True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """LAD_KERNELS_COMMIT, else the commit of the working tree, with a mark if files differ from it.

    A copy of the tree on another machine may have no history, or another one.
    """
    if given := os.environ.get("LAD_KERNELS_COMMIT"):
        return given

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "lad_kernels")
    except OSError:
        head, changed = None, None
    if head is None:
        return "none (not a git checkout, or no commit yet)"
    return f"{head} with uncommitted changes in lad_kernels" if changed else head


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(device: str, command: str | None = None) -> dict[str, object]:
    """The machine line as a record."""
    line: dict[str, object] = {
        "device": f"{cpu_name()}, {cores()} cores",
        "versions": versions(),
        "commit": commit(),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        line["device"] = (
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    else:
        line["threads"] = torch.get_num_threads()
    return line


def folder(device: str) -> str:
    """The name of this machine's folder under benchmarks/results."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"cpu-{cores()}core"
