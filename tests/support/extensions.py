"""Which adapters there are, and in which files an extension of this package is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules of lad_kernels/frameworks/ that are no adapter of one training framework; every other one is.
SHARED = ("distributed", "head_call", "head_module", "logit_transform", "options", "transformers")
MODULES = {p.stem for p in (ROOT / "lad_kernels" / "frameworks").glob("[!_]*.py")}


def framework_of(module: str) -> str | None:
    """Whose adapter a module of lad_kernels/frameworks/ is: a second file of an adapter is NAME_more.py. None for what
    several share, and for other modules."""
    name = re.match(r"lad_kernels\.frameworks\.(\w+)", module)
    if name is None or name[1] in SHARED:
        return None
    parts = name[1].split("_")
    beginnings = ("_".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((beginning for beginning in beginnings if beginning in MODULES), name[1])


FRAMEWORKS = sorted({framework_of(f"lad_kernels.frameworks.{name}") for name in MODULES} - {None})


def files_naming(pattern: str, root: Path) -> set[str]:
    """Files of code and prose in which `pattern` is found, in any case; measurements and history do not count."""
    folders = [root / name for name in ("lad_kernels", "integration", "benchmarks", "tests", "docs")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".md", ".sh")]
    files += [p for p in root.iterdir() if p.suffix in (".py", ".md", ".toml") or p.name == "Makefile"]
    history = ("RESULTS.md", "results.md", "LOG.md", "CHANGELOG.md")
    files = [p for p in files if p.name not in history and "runs" not in p.parts]
    return {p.relative_to(root).as_posix() for p in files if re.search(pattern, p.read_text(), re.IGNORECASE)}
