"""The process in which answers are scored, reached past the filters: what it stops and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: scoring")
pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: scoring")
pytest.importorskip("resource", reason="needs process limits; lost: the scoring worker")

from hostile_text import escapes, evaluator

from integration import scoring

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("code", range(8))
def test_worker_alone_lets_no_file_appear(code, tmp_path):
    """Text that a filter would stop: a scorer that evaluates it is stopped by the process."""
    scoring.worker.score(*evaluator(), escapes(tmp_path / "file")[code])
    assert list(tmp_path.iterdir()) == []
    specification, entry = evaluator()
    assert scoring.worker.score(specification, entry, entry["answer"]).score == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9**9**9", "cpu"),
        ("sum(iter(int, 1))", "cpu"),
        ("[0]*10**10", None),
        ("'a'*10**10", None),
        ("exit()", None),
        ("__import__('time').sleep(99)", "wall"),
        ("__import__('os').kill(__import__('os').getppid(), 9)", "forbidden"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "forbidden"),
        ("__import__('ctypes').string_at(0)", "forbidden"),
        ("print('1' * 99) or 'A'", None),
    ],
)
def test_worker_stops_and_goes_on(text, reason, monkeypatch):
    monkeypatch.setattr(scoring, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(scoring, "WALL_SECONDS", 2.0)
    specification, entry = evaluator()
    outcome = scoring.worker.score(specification, entry, text)
    assert (outcome.score, outcome.stopped) == (0, reason)
    monkeypatch.undo()
    assert scoring.worker.score(specification, entry, entry["answer"]) == (1, pytest.approx(0, abs=1), None)


KERNEL = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
import scoring_worker as worker
listener = socket.create_server(("127.0.0.1", 0))
address = listener.getsockname()
held = {"network": worker.leave_network(), "files": worker.make_read_only()}
worker.drop_capabilities()
worker.set_limits()
def refused(act):
    try:
        act()
    except (OSError, MemoryError):
        return True
file = os.path.join(sys.argv[2], "file")
writes = [refused(a) for a in (lambda: open(file, "w"), lambda: os.mkdir(file), lambda: os.symlink("a", file),
    lambda: os.execv("/bin/true", ["true"]), lambda: os.remove(sys.argv[3]), lambda: os.kill(os.getppid(), 0))]
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # no business of Landlock
network = refused(lambda: socket.create_connection(address, 2)) and refused(lambda: datagram.sendto(b"x", address))
always = [refused(lambda: bytearray(3 << 30))]
print(held["network"], held["files"], network, all(writes), all(always))
"""


def test_kernel_holds_what_the_audit_hook_would_miss(tmp_path):
    """The same acts without the hook."""
    (tmp_path / "mine").touch()
    arguments = [str(ROOT / "integration"), str(tmp_path), str(tmp_path / "mine")]
    run = subprocess.run([sys.executable, "-P", "-c", KERNEL, *arguments], capture_output=True, text=True, timeout=60)
    network_left, landlock, network, writes, always = (word == "True" for word in run.stdout.split())
    assert always, run.stderr
    assert network or not network_left
    assert writes or not landlock
    if not (network_left and landlock):
        pytest.skip(f"kernel without network namespaces ({network_left}) or Landlock ({landlock}); the rest holds")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_is_0(value):
    program = (
        "import sys, types\nsys.path.insert(0, sys.argv[1])\nfrom scoring_worker import score\n"
        "print(score(types.SimpleNamespace(score_answer=lambda *_: float(sys.argv[2])), {}, 'text', 1.0))"
    )
    arguments = [sys.executable, "-P", "-c", program, str(ROOT / "integration"), value]
    assert subprocess.check_output(arguments, text=True) == "0.0\n"


def test_death_of_the_worker_loses_nothing():
    specification, entry = evaluator()
    assert scoring.worker.score(specification, entry, entry["answer"]).score == 1
    scorer = int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(scoring.worker.pid)]))
    for pid in (scorer, None):
        os.kill(pid or scoring.worker.pid, signal.SIGKILL)
        if pid is None:  # the second one dies with the first, but may still answer until it does
            os.waitid(os.P_PID, scoring.worker.pid, os.WEXITED | os.WNOWAIT)
        assert scoring.worker.score(specification, entry, entry["answer"]) == (1, pytest.approx(0, abs=1), None)


def test_a_busy_machine_scores_as_an_idle_one(monkeypatch):
    """The limit is CPU time: a worker that gets none for longer than its limit is not stopped."""
    specification, entry = evaluator()
    scoring.worker.score(specification, entry, entry["answer"])
    monkeypatch.setattr(scoring, "CPU_SECONDS", 0.5)
    group = scoring.worker.pid
    os.killpg(group, signal.SIGSTOP)
    threading.Timer(1.5, os.killpg, (group, signal.SIGCONT)).start()
    assert scoring.worker.score(specification, entry, entry["answer"]) == (1, pytest.approx(0, abs=0.4), None)
    assert scoring.worker.pid == group


def test_a_fork_has_a_worker_of_its_own():
    specification, entry = evaluator()
    scoring.worker.score(specification, entry, entry["answer"])
    before = scoring.worker.pid
    if (child := os.fork()) == 0:
        fine = scoring.worker.score(specification, entry, entry["answer"]).score == 1 and scoring.worker.pid != before
        scoring.worker.close()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert scoring.worker.pid == before
    assert scoring.worker.score(specification, entry, entry["answer"]).score == 1


def test_worker_ends_with_a_killed_trainer():
    program = (
        "import os, signal\nfrom integration import scoring\nimport pickle\n"
        "scoring.worker.score(pickle.dumps(('gcd', {'seed': 0, 'size': 1})), {'answer': '1'}, '1')\n"
        "print(scoring.worker.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    group = int(run.stdout)
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its trainer")
