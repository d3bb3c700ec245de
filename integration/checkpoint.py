"""Checkpoints that survive crashes and full disks, with checksums that detect damaged files.

    runs/lad/checkpoint          a link to the newest complete checkpoint
    runs/lad/checkpoint-200/     what `from_pretrained` reads, the trainer's own files, checksums.json

A checkpoint is written into a folder of its own and flushed to the disk, checksums last; then the link is replaced by
one atomic rename, and only after that is the former checkpoint removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lad_kernels.preflight import Refused
from lad_kernels.pretrained import flush, sha256

LINK, CHECKSUMS = "checkpoint", "checksums.json"
_OURS = re.compile(r"checkpoint-(\d+(-again)?|copied)")


class SaveError(Exception):
    """A checkpoint could not be written; the previous one is unchanged."""


def save(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint of `step` by `write(folder)` and point `folder/checkpoint` to it; returns that link.

    Raises:
        SaveError: with the reason; what was written of this checkpoint is removed.
    """
    link = folder / LINK
    former = os.readlink(link) if link.is_symlink() else None
    name = next(n for n in (f"{LINK}-{step}", f"{LINK}-{step}-again") if n != former)
    try:
        tidy(folder)
        (folder / name).mkdir(parents=True)
        write(folder / name)
        _seal(folder / name)
        _point(link, name)
    except Exception as error:  # OSError, or what torch and safetensors raise instead
        if not link.is_symlink() or os.readlink(link) != name:
            shutil.rmtree(folder / name, ignore_errors=True)
        reason = " ".join(str(error).split())
        whole = f"the one in {link} is whole: go on with --resume {folder}"
        kept = whole if link.exists() else "there is none before it"
        raise SaveError(f"the checkpoint of step {step} could not be written ({reason}); {kept}") from error
    tidy(folder)
    return link


def tidy(folder: Path) -> None:
    """Remove the checkpoints that `folder/checkpoint` does not point to: former ones, and remains of a crash."""
    link = folder / LINK
    name = os.readlink(link) if link.is_symlink() else None
    for path in folder.glob(f"{LINK}-*"):
        if _OURS.fullmatch(path.name) and path.name != name:
            shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is removed with the next one


def _seal(checkpoint: Path) -> None:
    """Flush every file to the disk and write their checksums."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(checkpoint).as_posix()] = sha256(path)
    sums = checkpoint / CHECKSUMS
    sums.write_text(json.dumps({"files": files, "sha256": _checksum_of(files)}, indent=1) + "\n")
    for path in (sums, *(p for p in checkpoint.rglob("*") if p.is_dir()), checkpoint):
        flush(path)


def _point(link: Path, name: str) -> None:
    if link.is_dir() and not link.is_symlink():  # the run was copied with its link replaced by a folder
        link.rename(link.with_name(f"{LINK}-copied"))
    new = link.with_name(f"{LINK}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, link)
    flush(link.parent)


def _checksum_of(files: dict[str, str]) -> str:
    """Checksum of the checksums."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def find(given: str) -> Path:
    """The checkpoint meant by `--resume`: the newest complete one of a run's folder, or a checkpoint itself.

    Raises:
        Refused: there is none.
    """
    path = Path(given)
    for checkpoint in (path, path / LINK):
        if (checkpoint / CHECKSUMS).is_file():
            return checkpoint
    others = sorted(str(p) for p in path.glob(f"{LINK}-*") if (p / CHECKSUMS).is_file())
    if others:
        cure = f"name one of {', '.join(others)}"
    elif path.is_dir():
        cure = "nothing was saved here, or not to the end: start again with --out and --overwrite"
    else:
        cure = "name the folder of a run or a checkpoint in it"
    raise Refused(f"resume: expected a folder with a whole checkpoint, got {given!r}; {cure}")


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that `checkpoint` belongs to; None for one outside of a run."""
    link = checkpoint.parent / LINK
    return checkpoint.parent if link.exists() and link.resolve() == checkpoint.resolve() else None


def continues(resume: str | None, folder: Path) -> bool:
    """Whether a run that resumes from `resume` and writes to `folder` continues in its own folder."""
    run = None if resume is None else run_folder(find(resume))
    return run is not None and folder.exists() and run.samefile(folder)


def verify(checkpoint: Path, *names: str) -> None:
    """Check the files `names`, or all of them, against their checksums.

    Raises:
        Refused: a file is missing or differs from what was written; the message names it.
    """
    path = checkpoint / CHECKSUMS
    try:
        sums = json.loads(path.read_bytes())
        files = sums["files"]
        intact = sums["sha256"] == _checksum_of(files)
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _damaged(path, "is not what was written")
    for name in names or files:
        try:
            if sha256(checkpoint / name) != files[name]:
                raise _damaged(checkpoint / name, "is not what was written: its sha256 is another")
        except OSError as error:
            raise _damaged(checkpoint / name, f"cannot be read: {error.strerror}") from error


def _damaged(path: Path, what: str) -> Refused:
    return Refused(
        f"resume: expected a checkpoint as it was written, got {str(path.parent)!r}, where {path.name} {what}; put "
        f"this file back from a copy, or resume from another checkpoint"
    )
