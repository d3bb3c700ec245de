"""Tables that are shown on the terminal and written to a Markdown file from the same rows."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from rich.table import Table


class Sheet(NamedTuple):
    """A titled table of strings."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For the terminal: the first column left, numbers right."""
        table = Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For report.md."""
        lines = [f"## {self.title}", "", *("| " + " | ".join(row) + " |" for row in (self.columns, *self.rows))]
        lines.insert(3, "|" + "---|" * len(self.columns))
        return "\n".join(lines) + "\n"


def mean_and_std(values: list[float], digits: int = 3) -> str:
    """Mean and sample standard deviation; the mean alone for one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
