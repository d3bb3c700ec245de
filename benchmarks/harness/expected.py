"""Predictions for a GPU and published numbers of peers, next to what a GPU measured: benchmarks/results/expected.json.

That file is a list of entries with the fields

    experiment, table   what writes the row that the entry is about
    match               the row's identifying fields, all of them; a final * in a text matches any rest
    quantity            the field of the row; of quartiles the median counts
    predicted           a number, or null: then only measured and published values are compared
    source              how the prediction was made
    device              optional, a word of the card's name: the entry is then compared with results of that card alone
    published           [{value, what, device, source}] of the same shape and unit
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Results

NAME = "expected.json"
OFF = 0.15  # a prediction missed by more than this share is marked
FIELDS = {"experiment", "table", "match", "quantity", "predicted", "published", "source"}
OF_A_CARD = {"ms", "device_ms", "total_ms", "tflops", "gb_per_s"}  # other quantities are ratios, shares and sizes


@dataclass(frozen=True)
class Table:
    """What an experiment writes, as far as entries may ask for it."""

    experiment: str
    keys: tuple[str, ...]  # fields that identify a row
    quantities: tuple[str, ...]


TABLES = {
    "ceilings": Table("ceilings", ("what",), ("ms", "tflops", "gb_per_s")),
    "forward tiles": Table("forward_tiles", ("shape", "tiles", "entropy"), ("ms", "tflops", "of_library_product")),
    "head shapes": Table(
        "head_shapes",
        ("shape", "data", "job", "provider"),
        ("ms", "of_three_products", "beyond_gradients_mib", "vs_eager"),
    ),
    "lad against grpo": Table("lad_against_grpo", ("shape", "data"), ("time_ratio", "memory_ratio")),
    "memory": Table("peers", ("job", "shape", "provider"), ("peak_mib", "beyond_gradients_mib")),
    "one pass": Table(
        "one_pass",
        ("shape", "path", "rows"),
        ("ms", "tflops", "of_three_products", "kept_share", "flops_of_ndv", "beyond_gradients_mib"),
    ),
    "routed": Table(
        "routed",
        ("shape", "data", "case", "path"),
        ("ms", "tflops", "of_three_products", "kept_share", "flops_of_ndv", "beyond_gradients_mib"),
    ),
    "routed kernels": Table("routed_kernels", ("shape", "share", "way"), ("ms", "tflops", "of_library_rate")),
    "speed": Table("peers", ("job", "shape", "data", "dtype", "provider"), ("total_ms", "vs_eager")),
    "step parts": Table("step_parts", ("shape", "part"), ("ms", "device_ms", "launches", "of_whole_call")),
}


def load(results: Path) -> list[dict[str, Any]]:
    """The entries of the folder `results`; none if it has no such file."""
    path = results / NAME
    return json.loads(path.read_text()) if path.exists() else []


def problems(entry: dict[str, Any]) -> list[str]:
    """Why no experiment could produce the row of an entry, or what it lacks."""
    if set(entry) - {"device"} != FIELDS:
        return [f"fields {sorted(entry)}"]
    found = [f"{name} is empty" for name in ("source", "match") if not entry[name]]
    table = TABLES.get(entry["table"])
    if table is None:
        return [*found, f"no experiment writes a table {entry['table']!r}"]
    if entry["experiment"] != table.experiment:
        found.append(f"{entry['table']!r} is written by {table.experiment}")
    if set(entry["match"]) != set(table.keys):
        found.append(f"a row is identified by {', '.join(table.keys)}")
    if entry["quantity"] not in table.quantities:
        found.append(f"{entry['table']!r} has no {entry['quantity']}")
    if entry["predicted"] is None and not entry["published"]:
        found.append("nothing is expected")
    if entry["predicted"] is not None and not (is_number(entry["predicted"]) and entry["predicted"] > 0):
        found.append("predicted is not a positive number")
    if entry["predicted"] is not None and entry["quantity"] in OF_A_CARD and "device" not in entry:
        found.append("times and rates belong to a card")
    for claim in entry["published"]:
        if set(claim) != {"value", "what", "device", "source"} or not all(claim.values()):
            found.append(f"published: {claim}")
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def what(entry: dict[str, Any]) -> str:
    """An entry's row in words."""
    shown = {name: value for name, value in entry["match"].items() if value != ""}
    return ", ".join(v.rstrip("*").strip() if isinstance(v, str) else f"{k} {v}" for k, v in shown.items())


@dataclass(frozen=True)
class Compared:
    """An entry and what was measured for it."""

    entry: dict[str, Any]
    measured: float

    @property
    def off(self) -> float | None:
        """measured / predicted - 1."""
        predicted = self.entry["predicted"]
        return None if predicted is None else self.measured / predicted - 1

    @property
    def marked(self) -> bool:
        return self.off is not None and abs(self.off) > OFF


@dataclass(frozen=True)
class Comparison:
    rows: list[Compared]  # the largest miss first, those without a prediction last
    missing: int  # entries whose row was not measured
    elsewhere: int  # entries of another card

    def counts(self) -> str:
        marked = sum(row.marked for row in self.rows)
        return (
            f"Off by more than {100 * OFF:.0f} %: {marked} of {len(self.rows)} compared; "
            f"not measured: {self.missing}; of another card: {self.elsewhere}."
        )


def on_gpu(run: Results) -> bool:
    return "multiprocessors" in run.machine["device"]


def age(path: Path) -> tuple[list[int], str]:
    """Sorts files by the date or number that their names end with, those without one first."""
    return [int(x) for x in re.findall(r"\d+", re.search(r"(?:-\d+)*$", path.stem)[0])], path.name


def compare(entries: list[dict[str, Any]], runs: Iterable[Results]) -> Comparison:
    """Entries against runs on GPUs, the newest run last: where several have a row, the newest counts."""
    gpus = [run for run in runs if on_gpu(run)]
    rows, missing, elsewhere = [], 0, 0
    for entry in entries:
        fitting = [run for run in gpus if entry.get("device", "") in ("", *run.machine["device"].split(",")[0].split())]
        values = [value(row, entry) for run in fitting for row in run.tables.get(entry["table"], [])]
        if found := [v for v in values if v is not None]:
            rows.append(Compared(entry, found[-1]))
        elif fitting:
            missing += 1
        else:
            elsewhere += 1
    rows.sort(key=lambda row: -1.0 if row.off is None else abs(row.off), reverse=True)
    return Comparison(rows, missing, elsewhere)


def value(row: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """The quantity of an entry in a row; None if the row is another or has no such number."""
    if not all(fits(row.get(name), wanted) for name, wanted in entry["match"].items()):
        return None
    found = row.get(entry["quantity"])
    if isinstance(found, list) and found:
        found = found[len(found) // 2]
    return float(found) if is_number(found) else None


def fits(found: object, wanted: object) -> bool:
    if isinstance(wanted, str) and wanted.endswith("*"):
        return isinstance(found, str) and found.startswith(wanted[:-1])
    return found == wanted
