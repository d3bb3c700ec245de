"""The site that `make docs` builds, from the root of the repository, so that links between files stay as they are.

Pages are Markdown; docs/api.md takes docstrings, which are Markdown with Google's sections.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lad_kernels  # noqa: E402

project, author, release = "lad_kernels", "the authors of lad_kernels", lad_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "benchmarks/RESULTS.md"]
html_theme, html_title, html_show_copyright = "furo", f"lad_kernels {release}", False
myst_heading_anchors = 4  # links to headings, by GitHub's names
suppress_warnings = ["myst.header"]  # generated tables skip levels
default_role = "code"  # `name` in a docstring
autodoc_typehints = "none"  # shapes and dtypes are in the text
autodoc_member_order = "bysource"
napoleon_use_rtype = False  # what a function returns is described, not only named

CONTENTS = """
```{toctree}
:hidden:
:caption: Use
docs/install
docs/losses
docs/own_losses
docs/cross_entropy
docs/compile
docs/sparsity
docs/cli
```
```{toctree}
:hidden:
:caption: Frameworks
:glob:
docs/frameworks/transformers
docs/frameworks/trl
docs/frameworks/verl
docs/frameworks/*
```
```{toctree}
:hidden:
:caption: Evidence
docs/results
docs/numerics
docs/when_it_helps
docs/divergences
docs/diversity
Every measurement <benchmarks/RESULTS>
docs/LOG
```
```{toctree}
:hidden:
:caption: Inside
docs/architecture
docs/api
CONTRIBUTING
CHANGELOG
SECURITY
```
"""

MODULES = "<!-- docs/conf.py: the modules of lad_kernels/frameworks/ that have a page in docs/frameworks/ -->"
MODULE = """
### {name}

```{{eval-rst}}
.. automodule:: lad_kernels.frameworks.{name}
   :members:
```
"""


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """The README is the first page; its table of contents is the site's business."""
    if page == root_doc:
        source[0] += CONTENTS


def add_modules(app: Any, page: str, source: list[str]) -> None:
    """The API reference has a section for every framework that has a page."""
    if page == "docs/api":
        names = sorted(path.stem for path in (ROOT / "docs" / "frameworks").glob("*.md"))
        source[0] = source[0].replace(MODULES, "".join(MODULE.format(name=name) for name in names))


def markdown(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """What Sphinx does not read in a docstring: Markdown's tables, code in modules, bars that mean abs or a norm."""
    done: list[str] = []
    for line in lines:
        indent, cells = line[: len(line) - len(line.lstrip())], [c.strip() for c in line.strip(" |").split("|")]
        previous = done[-1] if done else ""
        if not re.fullmatch(r" *\|[ -].*\|", line):
            if what == "module" and indent and not previous and done[-2:-1] and not done[-2].startswith(" "):
                done += ["::", ""]
            done.append(re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or r"\|", line))
        elif not set(line) <= set("|- "):
            if not re.match(rf"{indent} +[*-] - |{indent} +- ", previous):
                done += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            done += [f"{indent}   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    lines[:] = done


def copy_first_page(app: Any, error: Exception | None) -> None:
    """index.html is what a server shows and a browser opens."""
    if error is None:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
    app.connect("source-read", add_modules)
    app.connect("autodoc-process-docstring", markdown, priority=400)  # before napoleon
    app.connect("build-finished", copy_first_page)
