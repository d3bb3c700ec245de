"""pytest plugin: one JSON line per finished test, written at once, so that an interrupted run keeps its tracebacks.

`VERDICTS=<file> python -m pytest -p benchmarks.gpu.verdicts tests`
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

LONGEST = 8_000  # characters of one traceback, its end


class Recorder:
    """Knows every phase of every test that has begun. In pytest-xdist the controller hears of all of them."""

    def __init__(self, path: Path):
        self.path, self.phases = path, defaultdict(list)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        phases = self.phases[report.nodeid]
        phases.append(report)
        if report.when == "teardown":
            self.write(self.phases.pop(report.nodeid))
        elif report.failed:  # its teardown may hang; the line of the whole test comes later and counts
            self.write(phases)

    def write(self, phases: list[pytest.TestReport]) -> None:
        failed = next((p for p in phases if p.failed), None)
        row = {"test": phases[0].nodeid, "outcome": outcome(phases), "seconds": sum(p.duration for p in phases)}
        if failed is not None:
            crash = getattr(failed.longrepr, "reprcrash", None)
            row["why"] = str(failed.longrepr if crash is None else crash.message)[:1000]
            row["text"] = failed.longreprtext[-LONGEST:]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def outcome(phases: list[pytest.TestReport]) -> str:
    """passed, failed, error (outside the test itself) or skipped."""
    failed = next((p for p in phases if p.failed), None)
    if failed is not None:
        return "failed" if failed.when == "call" else "error"
    return "skipped" if any(p.skipped for p in phases) else "passed"


class Guard:
    """Ends a worker of pytest-xdist whose device no longer answers; the next one gets the tests that are left."""

    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.failed = False
        result = yield
        if self.failed and device_is_lost():
            os._exit(1)
        return result


def device_is_lost() -> bool:
    """Whether an error on the device, as an index beyond a tensor, has made it useless for this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Guard() if worker else Recorder(Path(os.environ["VERDICTS"])), "verdicts")


def read(path: Path) -> dict[str, dict]:
    """{test: its last row}; a last line that was cut is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["test"]] = row
    return rows
