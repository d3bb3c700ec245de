"""What one run measured, as a JSON file under benchmarks/results/, and how its numbers are written."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Results:
    """Rows by table, reasons of the missing, and the machine line of one run."""

    def __init__(self, machine: dict, tables: dict | None = None, missing: dict | None = None):
        self.machine, self.tables, self.missing = machine, tables or {}, missing or {}

    def add(self, table: str, **row: object) -> None:
        self.tables.setdefault(table, []).append(row)

    def save(self, path: Path) -> None:
        """Whoever is killed while saving leaves the file as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": self.machine, "missing": self.missing, "tables": self.tables}
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        record = json.loads(path.read_text())
        return cls(record["machine"], record["tables"], record["missing"])


def number(x: object) -> str:
    """Three significant figures."""
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
    if isinstance(x, list):
        return " to ".join(number(v) for v in x)
    return str(x).replace("|", "/")


def spread(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{number(middle)} [{number(low)}, {number(high)}]"
