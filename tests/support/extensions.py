"""In how many files an extension of this package is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files_naming(key: str, root: Path) -> set[str]:
    """Files of code and prose in which `key` stands as a word; measurements and history do not count."""
    folders = [root / name for name in ("lad_kernels", "integration", "benchmarks", "tests", "docs")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".md", ".sh")] + [
        *root.glob("*.md")
    ]
    files = [
        p
        for p in files
        if p.name not in ("RESULTS.md", "results.md", "LOG.md", "CHANGELOG.md") and "runs" not in p.parts
    ]
    return {p.relative_to(root).as_posix() for p in files if re.search(rf"\b{key}\b", p.read_text())}
