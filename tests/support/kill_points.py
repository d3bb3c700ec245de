"""Kill a training run by SIGKILL at each of twenty-two points, resume it, and compare with an uninterrupted run.

    python tests/support/kill_points.py FOLDER    # prints a JSON line per point

One process imports torch and forks a child per run. A point is the k-th of what a run does to its folder: opening,
flushing, renaming, linking, cutting and removing files; half a line written to the log; half a file by torch.save.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from integration import runs, state, trainer

POINTS = 20
FLAGS = [
    "--steps=4", "--save-every=2", "--prompts-per-step=4", "--group-size=4", "--train-size=40", "--held-out-size=2",
    "--hidden-size=16", "--layers=1", "--warm-steps=2", "--warm-batch=4", "--out",
]  # fmt: skip
EVENTS = {"open", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Counter:
    """Counts what happens to `folder` by kind, and kills the process at number `last`."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.kinds = str(folder), last, []

    def note(self, kind: str, before: Callable[[], Any] = lambda: None) -> None:
        self.kinds.append(kind)
        if len(self.kinds) == self.last:
            self.last = None
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, args: tuple) -> None:
        if event in EVENTS and any(isinstance(a, str | os.PathLike) and self.folder in os.fspath(a) for a in args):
            self.note(event)

    def watch(self) -> None:
        sys.addaudithook(self.hook)
        fsync, save, open_log = os.fsync, torch.save, runs.open_log
        os.fsync = lambda file: (self.note("fsync"), fsync(file))

        def half_a_file(saved: Any, path: Path) -> None:
            self.note("torch.save", lambda: path.write_bytes(b"half a file"))
            save(saved, path)

        class Log:
            def __init__(self, log) -> None:
                self.log, self.fileno = log, log.fileno

            def write(log, line: str) -> None:
                self.note("half a line", lambda: (log.log.write(line[: len(line) // 2]), log.log.flush()))
                log.log.write(line)

        @runs.contextmanager
        def watched(folder: Path):
            with open_log(folder) as log:
                yield Log(log)

        state.torch.save, trainer.open_log = half_a_file, watched


def in_child(arguments: list[str], output: Path, counter: Counter | None = None) -> int:
    """Train in a forked child with its output in a file; returns what waitpid does."""
    pid = os.fork()
    if pid == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if counter is not None:
            counter.watch()
        status = trainer.main(arguments)
        if counter is not None:
            output.with_suffix(".kinds").write_text(json.dumps(counter.kinds))
        sys.stdout.flush()
        os._exit(status)
    return os.waitpid(pid, 0)[1]


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common, and what else lies in the folder."""
    sums = json.loads((folder / "checkpoint" / "checksums.json").read_text())["files"]
    # The first names the folder, the second where it was loaded from, the third has one content in several pickles.
    for name in ("trainer_config.json", "tokenizer_config.json", "trainer_state.pt"):
        sums.pop(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second")
    there = sorted(path.name for path in folder.iterdir())
    return {"files": sums, "state": trainer_state(folder), "lines": lines, "there": there}


def trainer_state(folder: Path) -> Any:
    """Optimiser, random generators and step, tensors as lists."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return [plain(value) for value in part]
        return part.tolist() if isinstance(part, torch.Tensor) else part

    return plain(torch.load(folder / "checkpoint" / "trainer_state.pt", weights_only=True))


def chosen(kinds: list[str]) -> list[int]:
    """Two points before the first checkpoint; then the middle one of every kind, and others evenly spread, twenty."""
    start = [i for i, kind in enumerate(kinds) if kind == "os.rename"][1] + 1  # the first one tries the folder out
    found = []
    for kind in dict.fromkeys(kinds[start:]):
        where = [i for i, k in enumerate(kinds) if k == kind and i >= start]
        found.append(where[len(where) // 2])
    rest = [i for i in range(start, len(kinds)) if i not in found]
    needed = POINTS - len(found)
    return [0, start // 2, *sorted(found + [rest[(len(rest) - 1) * i // (needed - 1)] for i in range(needed)])]


def main(folder: Path) -> None:
    whole, output = folder / "whole", folder / "whole.txt"
    assert in_child([*FLAGS, str(whole)], output, Counter(whole, None)) == 0, output.read_text()
    kinds = json.loads(output.with_suffix(".kinds").read_text())
    expected = outcome(whole)
    for index in chosen(kinds):
        killed, said = folder / f"killed-{index}", folder / f"said-{index}.txt"
        assert in_child([*FLAGS, str(killed)], said, Counter(killed, index + 1)) == signal.SIGKILL
        status = os.waitstatus_to_exitcode(in_child(["--resume", str(killed)], said))
        words, resumed = said.read_text(), status == 0
        if status == 2:  # nothing was saved before this point
            assert in_child([*FLAGS, str(killed), "--overwrite"], said) == 0
        found = outcome(killed)
        same = {name: found[name] == expected[name] for name in expected}
        print(json.dumps({"index": index, "kind": kinds[index], "resumed": resumed, "words": words, **same}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
