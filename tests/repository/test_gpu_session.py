"""The GPU session: its limits add up, what crashes loses only itself, a dry run of the whole script ends."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_policy import make_policy

from benchmarks import states
from benchmarks.gpu import checks, experiments, session, verdicts
from benchmarks.gpu.plan import CLOSING, DEADLINE, PLAN, Experiment, filled, longest
from benchmarks.gpu.run import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", tuple(DEADLINE))
def test_limits_add_up_to_the_deadline(part):
    plan = [e for e in PLAN if e.part == part]
    assert plan
    assert longest(plan) <= DEADLINE[part]
    assert all(e.lost for e in plan)


def test_what_a_deadline_leaves_over_goes_to_the_longest_stage():
    plan = [e for e in PLAN if e.name in ("smoke", "correctness", "test_suite")]
    longer = filled(plan, 300)
    assert longest(longer) == 300
    assert [e.seconds for e in longer] == [36, 300 - CLOSING - 36 - 6, 300 - CLOSING - 36 - 6]
    assert filled(plan, 60) == plan  # too short for the limits as they are: the deadline cuts


def test_every_experiment_of_the_plan_exists_and_is_explained():
    assert {e.name for e in PLAN} == set(experiments.EXPERIMENTS)
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    for e in PLAN:
        seconds = f"{e.seconds}{', together with the one above' * e.beside}"
        assert f"| {e.name} | {e.part} | {seconds} | {e.what} | {e.lost} |" in text
    for part, deadline in DEADLINE.items():
        assert f"{part} {longest([e for e in PLAN if e.part == part])} of {deadline} s" in text


RECORD = '{"machine": {"device": "d"}, "missing": {}, "tables": {"%s": [{"row": 1}]}}'
BEHAVIOUR = {  # what an experiment does with the file of its rows
    "good": f"import sys; open(sys.argv[1], 'w').write('{RECORD}' % sys.argv[2])",
    "crashes": f"import os, sys; open(sys.argv[1], 'w').write('{RECORD}' % sys.argv[2]); os.abort()",
    "hangs": "import time; time.sleep(1000)",
    "hangs and leaves a child": "import subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)",
    "writes half a file": "import sys; open(sys.argv[1], 'w').write('{\"machine\": {')",
    "writes no tables": "import sys; open(sys.argv[1], 'w').write('[1, 2]')",
}


def test_experiments_that_crash_hang_and_lie_lose_only_themselves(tmp_path, monkeypatch):
    """Every second one is bad; the rows of the others are whole, and each bad one is named."""
    behaviours = ["good", "crashes", "good", "hangs", "good", "hangs and leaves a child", "good", "writes half a file",
                  "good", "writes no tables", "good"]  # fmt: skip
    plan = [Experiment(f"{i} {name}", "A", 1, "planted", "nothing") for i, name in enumerate(behaviours)]
    monkeypatch.setattr(session, "GRACE", 0.2)
    monkeypatch.setattr(
        session,
        "command",
        lambda e, rows, dry_run: [sys.executable, "-c", BEHAVIOUR[e.name.split(" ", 1)[1]], str(rows), e.name],
    )
    statuses, _ = session.run(plan, 60, tmp_path, dry_run=False)
    record = session.merge(tmp_path, plan, statuses, "A")
    for e in plan:
        name = e.name.split(" ", 1)[1]
        assert statuses[e.name].startswith(
            {"good": "done", "crashes": "failed with", "writes half a file": "done", "writes no tables": "done"}.get(
                name, "cut"
            )
        )
        assert (e.name in record["tables"]) == (name in ("good", "crashes"))  # rows before a crash are kept
    shown = {row["experiment"]: row["rows"] for row in record["tables"]["experiments"]}
    assert shown["7 writes half a file"] == "rows unreadable: JSONDecodeError"
    assert shown["9 writes no tables"] == "rows unreadable: TypeError"
    assert shown["3 hangs"] == "no rows"
    assert record["machine"]["command"] == "benchmarks/gpu.sh A"


def test_a_deadline_cuts_what_comes_last(tmp_path, monkeypatch):
    plan = [Experiment(name, "A", 60, "planted", "nothing") for name in ("first", "second", "third")]
    monkeypatch.setattr(session, "GRACE", 0.2)
    monkeypatch.setattr(session, "command", lambda e, rows, dry_run: [sys.executable, "-c", BEHAVIOUR["hangs"]])
    begin = time.monotonic()
    statuses, _ = session.run(plan, 6 + CLOSING, tmp_path, dry_run=False)
    assert time.monotonic() - begin < 9
    assert list(statuses) == ["first"]
    assert statuses["first"].startswith("cut")


def test_what_the_smoke_test_finds_wrong_is_left_out(tmp_path, monkeypatch):
    """The later experiments are told, and a run without a path has no such rows."""
    rows = [dict(path="routed", verdict="WRONG"), dict(path="one_pass", verdict="right"), dict(path="", verdict="trap")]
    smoke = json.dumps({"machine": {}, "missing": {}, "tables": {"smoke": rows}})
    say = "import sys; open(sys.argv[1], 'w').write({!r} if sys.argv[2] == 'smoke' else sys.stdin.readline())"
    plan = [Experiment(name, "A", 20, "planted", "nothing") for name in ("smoke", "later")]
    monkeypatch.setattr(
        session, "command", lambda e, path, dry_run: [sys.executable, "-c", say.format(smoke), str(path), e.name]
    )
    session.run(plan, 60, tmp_path, dry_run=False)
    assert (tmp_path / "later.json").read_text().split()[1:] == ["routed"]
    run = Run(tmp_path / "run.json", dry_run=True, without=["routed"])
    assert run.paths == ["one_pass", "two_pass"]


def test_a_second_call_keeps_the_first_results(tmp_path, monkeypatch):
    options = argparse.Namespace(dry_run=True)
    monkeypatch.setattr(
        session, "command", lambda e, rows, dry_run: [sys.executable, "-c", BEHAVIOUR["good"], rows, e.name]
    )
    plan = [Experiment("smoke", "A", 20, "planted", "nothing")]
    for _ in range(2):
        assert session.run_part("A", plan, 60, tmp_path, options)
        time.sleep(1.1)
    assert len(list(tmp_path.glob("A-*.json"))) == 2


@pytest.fixture
def packed_states(tmp_path_factory, monkeypatch) -> Path:
    pytest.importorskip(
        "transformers", reason="needs the train extra: transformers; lost: the dry run of the GPU script"
    )
    folder = tmp_path_factory.mktemp("policy")
    monkeypatch.setenv("LAD_KERNELS_CACHE", str(folder / "cache"))
    asked = states.prompts_of()._replace(completions=1, length=4)
    (make_policy(folder / "tiny") / "prompts.json").write_text(json.dumps(asked._asdict()))
    monkeypatch.setenv(states.POLICY, str(folder / "tiny"))
    states.pack(folder / "packed", "trained")
    return folder / "packed"


def test_dry_run_of_the_gpu_script(tmp_path, packed_states):
    """Both parts, end to end: processes, merging, the table; tools and packages that are absent are named."""
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--states", str(packed_states)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("every experiment that ran is done") == 2
    tables, missing = {}, {}
    for part in "AB":
        (path,) = tmp_path.glob(f"{part}-*.json")
        record = json.loads(path.read_text())
        assert record["machine"]["notes"] == ["Dry run on CPU in Triton's interpreter: the numbers mean nothing."]
        assert all(row["status"].startswith("done") for row in record["tables"]["experiments"])
        tables |= record["tables"]
        missing |= record["missing"]
    assert missing["compute-sanitizer"] == "compute-sanitizer is not on the path"
    assert {"smoke", "ceilings", "gate", "checks", "test suite", "head shapes", "lad against grpo", "routed"} <= set(
        tables
    )
    assert {"one pass", "kernels", "step parts", "speed", "experiments"} <= set(tables)
    assert {row["verdict"] for row in tables["smoke"]} == {"right"}
    for table in ("head shapes", "routed", "speed"):
        assert any(row["data"].startswith("real") for row in tables[table]), table
    assert len(list(tmp_path.iterdir())) == 4


SUITE = """
import time
import pytest

@pytest.mark.parametrize("case", ["no prior-float32", "two"])
def test_wrong(case):
    found, allowed = 2.1e-6, 2e-6
    assert found <= allowed, "logprobs"

def test_right():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("no device")

def test_error(broken):
    pass

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

def test_last():
    time.sleep({})
"""


@pytest.mark.parametrize(("workers", "hangs"), [(0, False), (2, True)])
def test_a_test_run_keeps_verdicts_and_tracebacks(tmp_path, capsys, workers, hangs):
    """Whole names and tracebacks of what failed, also when the run is cut."""
    (tmp_path / "test_planted.py").write_text(SUITE.format(1000 if hangs else 0))
    run = Run(tmp_path / "rows.json", dry_run=True, end=time.monotonic() + (30 if hangs else 100))
    with pytest.raises(SystemExit, match="cut" if hangs else "exit status 1"):
        checks.run_tests(run, ["-n", str(workers), str(tmp_path / "test_planted.py")])
    tables = json.loads(run.path.read_text())["tables"]
    (counts,) = tables["test suite"]
    assert counts == dict(
        outcome="cut" if hangs else "exit status 1", passed=1 + (not hangs), failed=2, error=1, skipped=1
    )
    failed = {row["test"].split("::")[1]: row["why"] for row in tables["failed tests"]}
    assert set(failed) == {"test_wrong[no prior-float32]", "test_wrong[two]", "test_error"}
    assert failed["test_wrong[two]"] == "AssertionError: logprobs\nassert 2.1e-06 <= 2e-06"
    assert failed["test_error"] == "RuntimeError: no device"
    (spent,) = tables["test files"]
    assert (spent["ended"], spent["file"].endswith("test_planted.py")) == (5 + (not hangs), True)
    shown = capsys.readouterr().out
    assert "test_wrong[no prior-float32]\n" in shown
    assert "assert found <= allowed" in shown


@pytest.mark.parametrize("lost", (True, False))
@pytest.mark.parametrize("failed", (True, False))
def test_a_worker_ends_with_its_device(failed, lost, monkeypatch):
    """And not for a failure that the device survived."""

    def synchronize():
        if lost:
            raise RuntimeError("device-side assert triggered")

    ended, guard = [], verdicts.Guard()
    monkeypatch.setattr(verdicts.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verdicts.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(verdicts.os, "_exit", ended.append)
    protocol = guard.pytest_runtest_protocol()
    next(protocol)
    guard.pytest_runtest_logreport(argparse.Namespace(failed=failed))
    with pytest.raises(StopIteration):
        protocol.send(True)
    assert ended == [1] * (failed and lost)


def test_the_suite_of_a_gpu_leaves_out_only_what_launches_no_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "run_tests", lambda run, arguments: asked.extend(arguments))
    checks.test_suite(argparse.Namespace(dry_run=False))
    assert all((ROOT / x).exists() for x in asked if x.startswith("tests/"))
    others = ["-k", f"not ({asked[asked.index('-k') + 1]})", "-n", "0"]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *asked, *others]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lost = [line for line in done.stdout.splitlines() if "::" in line and not any(x in line for x in checks.LEFT_OUT)]
    assert len(lost) > 50
    assert all("torch" in line.split("[")[1].strip("]").split("-") for line in lost)
