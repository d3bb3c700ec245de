"""Write the public functions as a kernel for Hugging Face's `kernels` library, which loads it without an installation.

    python -m integration.hub_kernel build/hub_kernel
    kernels.get_local_kernel(Path("build/hub_kernel")).linear_lad_loss(...)

The folder holds one copy of the sources per backend, Triton and PyTorch alike, with relative imports alone, so that
several versions live in one process: each has a name of its own, which is also the namespace of its operators.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import lad_kernels

PACKAGE = Path(lad_kernels.__file__).parent
NAME, VERSION = "lad-kernels", 1  # of the kernel on the Hub: a number that rises with incompatible changes
BACKENDS = ("cpu", "cuda", "rocm")
_IMPORT = re.compile(r"^(\s*from )lad_kernels\b\.?", re.MULTILINE)


def sources() -> dict[str, str]:
    """{path in the package: text} of __init__.py and of all that it imports, at once or inside a function."""
    found: dict[str, str] = {}
    waiting = ["lad_kernels"]
    while waiting:
        for path in _files(waiting.pop()):
            name = path.relative_to(PACKAGE).as_posix()
            if name not in found:
                found[name] = path.read_text()
                waiting += _imported(found[name])
    return found


def _files(module: str) -> list[Path]:
    """The files that importing a module runs: its own and those of the packages around it."""
    parts = module.split(".")[1:]
    around = [PACKAGE.joinpath(*parts[:i], "__init__.py") for i in range(len(parts) + 1)]
    return [path for path in (*around, PACKAGE.joinpath(*parts).with_suffix(".py")) if path.is_file()]


def _imported(source: str) -> list[str]:
    """Modules of the package that a source imports; of a name that is no module, the module that has it."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").partition(".")[0] == "lad_kernels"]
    return [f"{node.module}.{alias.name}" for node in ours for alias in node.names] + [str(n.module) for n in ours]


def relative(name: str, source: str) -> str:
    """`source`, the file `name` of the package, with relative imports in place of absolute ones."""
    return _IMPORT.sub(rf"\g<1>{'.' * (name.count('/') + 1)}", source)


def write(folder: Path, backends: tuple[str, ...] = BACKENDS) -> None:
    """Make `folder` anew: build/torch-<backend>/ with the sources and metadata.json.

    Raises:
        ValueError: a source imports the package in a way that a copy under another name could not.
    """
    files = {name: relative(name, source) for name, source in sources().items()}
    for name, source in files.items():
        if _imported(source) or re.search(r"^\s*import lad_kernels", source, re.MULTILINE):
            raise ValueError(f"{name}: expected `from lad_kernels... import ...`, got an import that stays absolute")
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in backends:
        variant = folder / "build" / f"torch-{backend}"
        for name, source in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_text(source)
        metadata = {
            "id": f"lad_kernels_{backend}_{digest}",
            "name": NAME,
            "version": VERSION,
            "license": "MIT",
            "kernels-minver": "0.17.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(f"{folder}: {len(files)} files for each of {', '.join(backends)}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
