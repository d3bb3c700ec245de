"""README and the pages under docs/, for the tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: str  # path from the root
    line: int
    language: str
    source: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def after(self) -> str:
        """What a diff leaves."""
        return "".join(line[2:] for line in self.source.splitlines(keepends=True) if not line.startswith("-"))

    def run(self) -> dict:
        """Its names, after it ran as it stands in a namespace of its own; errors show line numbers of the page."""
        names = {"__name__": "snippet"}
        exec(compile("\n" * self.line + self.source, self.page, "exec"), names)
        return names


def snippets(*languages: str) -> list[Snippet]:
    """All fenced blocks of these languages, page by page."""
    found = []
    for path in PAGES:
        text = path.read_text()
        for block in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if block[1] in languages:
                line = text.count("\n", 0, block.start()) + 1
                found.append(Snippet(str(path.relative_to(ROOT)), line, block[1], block[2]))
    return found


def snippets_of(page: str, language: str) -> list[Snippet]:
    """Those of one page."""
    return [s for s in snippets(language) if s.page == page]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    after = (ROOT / page).read_text().split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]
