"""Checks before a program starts: the device exists, the model exists, the folder can be written to."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path


class Refused(ValueError):
    """A flag, file or folder that cannot be used; the message begins with the flag's name and ends with the cure."""


def complain(program: str, message: str, status: int) -> int:
    """One line on stderr; returns the status."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def claim_folder(
    out: str | None, prefix: str = "", *, used: bool = False, flag: str = "out", cure: str = "name another folder"
) -> Path:
    """Create and test the folder of a run: a file, its flush to the disk, a link and a rename.

    Args:
        out: None makes a new folder `runs/<prefix><date>-<time>`.
        used: the folder may contain something.
        flag: the name of `out` in messages.
        cure: what the message advises if it contains something.

    Raises:
        Refused: it contains something, or cannot be written.
    """
    folder = Path(out) if out is not None else Path("runs") / f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if out is None:
            folder = _new(folder)
        elif not used and folder.exists() and (held := sorted(path.name for path in folder.iterdir())):
            raise Refused(f"{flag}: expected a new or an empty folder, got {out!r}, which holds {held[0]}; {cure}")
        folder.mkdir(parents=True, exist_ok=True)
        _try_out(folder)
    except OSError as error:
        raise Refused(
            f"{flag}: expected a folder that can be written to, got {str(folder)!r} ({error.strerror}); name another"
        ) from error
    return folder


def _new(folder: Path) -> Path:
    """`folder`, or a numbered neighbour where another process was faster in the same second."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for name in (folder.name, *(f"{folder.name}-{i}" for i in range(2, 100))):
        with suppress(FileExistsError):
            folder.with_name(name).mkdir()
            return folder.with_name(name)
    raise FileExistsError(17, "a hundred runs began in this second", str(folder))


def _try_out(folder: Path) -> None:
    probe, link = folder / ".probe", folder / ".probe.link"
    with probe.open("wb") as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    link.unlink(missing_ok=True)  # of a run that was killed here
    link.symlink_to(probe.name)
    link.replace(probe)
    probe.unlink()


def check_device(device: str) -> None:
    """Raises Refused unless `device` is the CPU or an accelerator that is here."""
    import torch

    there = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if there is not None else 0
    names = ["cpu", *([] if there is None else [there.type, *(f"{there.type}:{i}" for i in range(count))])]
    if device not in names:
        raise Refused(f"device: expected {' or '.join(names)}, got {device!r}; this machine has no other")


def check_model(model: str) -> None:
    """Raises Refused unless there is a model's configuration at this path or hub id."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise Refused(
            f"model: expected a folder with a model or a hub id, got {model!r} ({str(error).splitlines()[0]}); check "
            f"the path, or the connection to the hub"
        ) from error
