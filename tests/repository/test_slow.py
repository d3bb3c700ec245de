"""What `make test` leaves to `make test-all`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_line_names_a_test():
    lines = [x for x in (TESTS / "slow.txt").read_text().splitlines() if not x.startswith("#")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    slow = [x.removeprefix("tests/") for x in done.stdout.splitlines() if "::" in x]
    assert lines == sorted(set(lines))
    assert [x for x in lines if not any(name.startswith(x) for name in slow)] == []
