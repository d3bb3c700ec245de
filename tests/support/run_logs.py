"""What a run logged, read back from the files that TensorBoard, Weights & Biases and Trackio write: {tag: values}."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterable
from pathlib import Path

BLOCK = 32_768  # bytes; no header of a record of LevelDB's log format crosses into the next block
FULL, LAST = 1, 4  # kinds of its records; 2 and 3 begin and continue one


def in_order(values: Iterable[tuple[str, object]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for tag, value in values:
        if isinstance(value, (int, float)):
            found.setdefault(tag, []).append(value)
    return found


def tensorboard(folder: Path) -> dict[str, list[float]]:
    """Event files: records with their length before and checksums around."""
    from tensorboardX.proto.event_pb2 import Event

    def values():
        for path in sorted(folder.rglob("events.out.tfevents.*")):
            content, at = path.read_bytes(), 0
            while at < len(content):
                (size,) = struct.unpack_from("<Q", content, at)
                event = Event.FromString(content[at + 12 : at + 12 + size])
                at += size + 16
                yield from ((v.tag, v.simple_value) for v in event.summary.value if v.HasField("simple_value"))

    return in_order(values())


def wandb(folder: Path) -> dict[str, list[float]]:
    """The file of an offline run: seven bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    def values():
        (path,) = folder.rglob("*.wandb")
        content, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            _, size, kind = struct.unpack_from("<IHB", content, at)
            record += content[at + 7 : at + 7 + size]
            at += size + 7
            if kind in (FULL, LAST):
                items, record = Record.FromString(record).history.item, b""
                yield from (("/".join(i.nested_key) or i.key, json.loads(i.value_json)) for i in items)

    return in_order(values())


def trackio(folder: Path) -> dict[str, list[float]]:
    """The project's SQLite file."""
    (path,) = folder.rglob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    return in_order(item for (row,) in rows for item in json.loads(row).items())
