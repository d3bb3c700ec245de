"""All GPU experiments, each a function of (Run): `python -m benchmarks.gpu.experiments NAME RESULTS [--dry-run]`.

After its imports the process waits for a line on standard input: its deadline, and paths to leave out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import checks, head_shapes, kernels, paths, smoke, tools
from benchmarks.gpu.run import Run


def trl_steps(run: Run) -> None:
    """GRPO and LAD in TRL's trainers, with TRL's head and with ours."""
    from benchmarks.gpu import trl_step  # imports TRL: many seconds that no other experiment should pay

    trl_step.trl_steps(run)


EXPERIMENTS: dict[str, Callable[[Run], None]] = {
    "trl_steps": trl_steps,
    **checks.EXPERIMENTS,
    **smoke.EXPERIMENTS,
    **tools.EXPERIMENTS,
    **head_shapes.EXPERIMENTS,
    **kernels.EXPERIMENTS,
    **paths.EXPERIMENTS,
}


def main() -> None:
    name, path, *flags = sys.argv[1:]
    if "--dry-run" in flags:
        from tests.support import interpreter

        torch.set_num_threads(1)
        interpreter.install()
    end, *without = sys.stdin.readline().split() or ["0"]
    torch.manual_seed(0)
    EXPERIMENTS[name](Run(Path(path), "--dry-run" in flags, float(end), without))


if __name__ == "__main__":
    main()
