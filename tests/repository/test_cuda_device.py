"""A slice of `make test-device`, which needs a process of its own: the suite on a CUDA device that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SLICE = ("tests/device", "tests/loss/test_autocast.py", "tests/loss/test_failure_modes.py")
PART = "rules or counts or (autocast and torch) or another_thread"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device; lost: nothing, the suite runs on it")
def test_a_slice_of_the_suite_on_the_device():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # conftest.py has put tests/support on the path
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_device.plugin", "-p", "no:cacheprovider", "-n", "0"]
    run = subprocess.run([*command, "-k", PART, *SLICE], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout[-4000:], run.stderr[-2000:])
    assert run.returncode == 0
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50
