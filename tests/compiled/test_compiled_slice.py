"""A slice of `make test-compiled` in `make test`: the head in two passes on sm_90, routed on sm_80, an objective.

In processes of their own, since this one interprets its kernels; 40 s with an empty cache of compiled kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLICE = {
    "sm_80": [
        "compiled/test_compiled_kernels.py::test_routed[bfloat16-all-unaligned]",
        "objective/test_objective_kernel.py::test_configurations_on_rewards[entropy and kl]",
    ],
    "sm_90": ["compiled/test_compiled_kernels.py::test_two_passes[bfloat16-all-aligned]"],
}


@pytest.mark.parametrize("arch", SLICE)
def test_compiled(arch):
    environment = {**os.environ, "COMPILED_FOR": arch}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{name}" for name in SLICE[arch]),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(SLICE[arch])} passed" in done.stdout
