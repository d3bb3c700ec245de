"""A run never loses what it has written: kills, full disks, flipped bytes, signals, two runs in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: what a run survives")
pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: what a run survives")

import kill_points

from integration import checkpoint, trainer
from integration.runs import Signals, cut_log, open_log
from integration.state import load_policy
from integration.tasks import Task
from integration.train_config import CONFIG, TrainConfig, parse_config, saved_fields
from integration.trainer import train
from lad_kernels import preflight
from lad_kernels.preflight import Refused, claim_folder

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
TINY = TrainConfig(
    steps=2,
    prompts_per_step=4,
    group_size=4,
    train_size=60,
    held_out_size=2,
    hidden_size=32,
    layers=1,
    warm_steps=2,
    warm_batch=4,
)
FLAGS = [
    "--steps=2",
    "--prompts-per-step=4",
    "--group-size=4",
    "--train-size=60",
    "--held-out-size=2",
    "--hidden-size=32",
    "--layers=1",
    "--warm-steps=2",
    "--warm-batch=4",
    "--out",
]


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("countdown", TINY.train_size, TINY.held_out_size)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory) -> Path:
    """Folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_policy(TINY), task, replace(TINY, out=str(folder)))
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, links and all."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}


def one_line(capsys, *words: str) -> None:
    """stderr is a line of the program's own, with these words."""
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("lad-kernels train: error: ")
    assert all(word in line for word in words), line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork; lost: the kill test")
def test_a_run_killed_anywhere_goes_on_bit_for_bit(tmp_path):
    """About 45 s of one core."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "kill_points.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    early, late = points[:2], points[2:]
    assert len(late) == 20
    assert {point["kind"] for point in late} >= {"torch.save", "fsync", "os.rename", "os.symlink", "half a line"}
    for point in points:
        assert point["files"], point
        assert point["state"], point
        assert point["lines"], point
        assert point["there"], point
    for point in early:
        assert not point["resumed"]
        assert "--resume: expected a folder with a whole checkpoint" in point["words"]
    for point in late:
        assert "going on after step" in point["words"], point
        assert ("half a line" in point["words"]) == (point["kind"] == "half a line"), point


def test_dropout_goes_on_bit_for_bit(task, tmp_path, monkeypatch):
    """What draws without a generator of its own."""
    monkeypatch.setattr(Task, "chat_prompt", lambda self, entry, tokenizer: self.prompt(entry))  # a tenth of the tokens
    policy = load_policy(TINY)
    policy.model.config.attention_dropout = 0.3
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    config = replace(TINY, model=str(tmp_path / "model"), max_new_tokens=4, temperature=2.0)
    for name, steps in (("whole", 4), ("parts", 2)):
        torch.manual_seed(len(name))  # whatever the process has drawn before
        train(load_policy(config), task, replace(config, steps=steps, out=str(tmp_path / name)))
    again = parse_config(["--resume", str(tmp_path / "parts"), "--steps", "4"])
    train(load_policy(again), task, again)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert bytes_of(whole)["model.safetensors"] == bytes_of(parts)["model.safetensors"]
    assert kill_points.trainer_state(whole) == kill_points.trainer_state(parts)


def test_a_flipped_byte_is_an_error_that_names_the_file(run, capsys):
    folder = run / "checkpoint"
    names = sorted(path.name for path in folder.iterdir())
    assert {"model.safetensors", "trainer_state.pt", CONFIG, "checksums.json", "config.json"} <= set(names)
    for name in names:
        path, whole = folder / name, (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        assert trainer.main(["--resume", str(run)]) == 2
        one_line(capsys, "--resume: ", f"where {name} is not what was written")
        path.unlink()
        assert trainer.main(["--resume", str(run)]) == 2
        one_line(capsys, "--resume: ", name if name != "checksums.json" else str(run))
        path.write_bytes(whole)
    checkpoint.verify(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a mebibyte and a half: room for two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("mounting a tmpfs is not permitted; lost: a disk that is really full")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights may still be mapped


@pytest.mark.parametrize("left", [0, 100_000])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(small_disk, trained, capsys, left):
    run, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(trained, run, symlinks=True)
    before = bytes_of(run)
    ballast.write_bytes(b"\1" * (shutil.disk_usage(small_disk).free - left - 8192))
    assert trainer.main(["--resume", str(run), "--steps", "3"]) == 1
    one_line(capsys, "No space left" if left == 0 else "step 3 could not be written", f"--resume {run}")
    assert bytes_of(run) == before
    checkpoint.verify(run / "checkpoint")
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint", "checkpoint-2"]
    ballast.unlink()
    assert trainer.main(["--resume", str(run), "--steps", "3"]) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_failed_write_of_any_file_leaves_the_previous_checkpoint_whole(run, monkeypatch):
    """As above where nothing can be mounted: torch, safetensors and the file system each raise errors of their own."""
    before = bytes_of(run)
    for error in (OSError(28, "No space left on device"), RuntimeError("inline_container.cc"), ValueError("odd")):

        def fail(folder: Path, error=error) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise error

        with pytest.raises(checkpoint.SaveError, match=rf"step 7 .*{error.args[-1]}.*is whole: go on with --resume"):
            checkpoint.save(run, 7, fail)
        assert bytes_of(run) == before
        assert not (run / "checkpoint-7").exists()


@pytest.mark.parametrize(
    ("tail", "warned"),
    [
        (b'{"step": 2, "re', "half a line after step 1"),
        (b"\0\0\0\n", "half a line after step 1"),
        (b"", None),
        (b'{"step": 2}\n{"step": 3}\n', None),
        (b'{"step": 2}', "half a line after step 1"),
    ],
)
def test_the_log_is_cut_after_the_checkpoint(tmp_path, caplog, tail, warned):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
    cut_log(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    assert [warned in message for message in caplog.messages] == ([True] if warned else [])


def test_lost_lines_are_named(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    cut_log(tmp_path, 3)
    assert "the lines of steps 2 to 3 are lost" in caplog.text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, capsys, monkeypatch, number, status):
    own, folder, handlers = trainer.train_step, tmp_path / "run", [signal.getsignal(n) for n in (2, 15)]

    def signalled(state, *rest):
        if state.step == 1:
            os.kill(os.getpid(), number)
        return own(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", signalled)
        assert trainer.main([*FLAGS, str(folder), "--steps", "9"]) == status
    assert f"stopped by {number.name}; the checkpoint is saved" in (said := capsys.readouterr().out)
    assert f"go on with: lad-kernels train --resume {folder}\n" in said
    assert (folder / "checkpoint").resolve().name == "checkpoint-2"
    assert [signal.getsignal(n) for n in (2, 15)] == handlers
    assert trainer.main(["--resume", str(folder), "--steps", "3"]) == 0
    assert "going on after step 2 of 3" in capsys.readouterr().out


def test_a_signal_before_the_first_step_says_that_nothing_is_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "warm_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.main([*FLAGS, str(tmp_path / "run")]) == 143
    assert "stopped by SIGTERM; nothing is lost" in capsys.readouterr().out


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal; from integration.runs import Signals\n"
        "with Signals() as signals, signals.held():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert signals.caught == 15\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr


def test_signals_are_left_alone_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    def enter() -> int | None:
        with Signals() as signals:
            return signals.caught

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is None


def test_one_process_at_a_time_writes_a_log(tmp_path):
    pytest.importorskip("fcntl", reason="needs Unix; lost: the lock of a run's folder")
    with open_log(tmp_path), pytest.raises(Refused, match="out: expected a folder that no other process trains in"):
        open_log(tmp_path).__enter__()
    with open_log(tmp_path):
        pass


def test_a_fresh_run_replaces_nothing_unless_told_to(run, capsys):
    before, log = bytes_of(run), (run / "metrics.jsonl").read_bytes()
    assert trainer.main([*FLAGS, str(run)]) == 2
    one_line(capsys, "--out: expected a new or an empty folder", repr(str(run)), f"--resume {run}", "--overwrite")
    assert bytes_of(run) == before
    assert (run / "metrics.jsonl").read_bytes() == log
    (run / "notes.txt").write_text("mine")
    assert trainer.main([*FLAGS, str(run), "--overwrite", "--steps=1"]) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]
    assert {path.name for path in run.iterdir()} == {"checkpoint", "checkpoint-1", "metrics.jsonl", "notes.txt"}
    assert not parse_config(["--resume", str(run)]).overwrite


def test_runs_without_a_folder_get_one_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight.time, "strftime", lambda _: "now")
    assert [str(claim_folder(None, "train-")) for _ in range(3)] == [f"runs/train-now{end}" for end in ("", "-2", "-3")]
    assert not any(path for path in tmp_path.rglob("*") if path.is_file())


def test_a_run_that_was_copied_without_its_link_goes_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")  # follows it: `checkpoint` is a folder
    assert trainer.main(["--resume", str(tmp_path / "copy"), "--steps", "3"]) == 0
    assert (tmp_path / "copy" / "checkpoint").resolve().name == "checkpoint-3"
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"checkpoint", "checkpoint-3", "metrics.jsonl"}


def test_resume_goes_on_where_the_run_lies_and_keeps_saved_values_where_no_flag_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = TrainConfig(steps=7, eta=0.5, model="a model", out="there", overwrite=True)
    checkpoint.save(Path("moved"), 7, lambda folder: (folder / CONFIG).write_text(json.dumps(saved_fields(saved))))
    Path("run.yaml").write_text("resume: moved\nsteps: 8\n")
    expected = replace(saved, resume="moved/checkpoint", steps=8, out="here", overwrite=False)
    assert parse_config(["--config", "run.yaml", "--out", "here"]) == expected
    assert parse_config(["--config", "run.yaml"]) == replace(expected, out="moved")
    shutil.copytree("moved/checkpoint", "alone")
    assert parse_config(["--resume", "alone"]) == replace(expected, resume="alone", steps=7, out=None)
