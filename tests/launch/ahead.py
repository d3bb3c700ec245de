"""Compile for an H100 or H200, without one, what record.py has recorded: `python tests/launch/ahead.py RECORDS`.

Into TRITON_CACHE_DIR, kernels and launchers, above the driver that launches nothing (libcuda.c). Only the same Triton
on the same Python finds them, under the same path. What a launch does not read is deleted.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

SOURCES = (".ttir", ".ttgir", ".llir", ".ptx", ".source")


def recorded(folder: Path) -> Iterator[tuple]:
    for file in sorted(folder.glob("*.pickle")):
        with file.open("rb") as rows:
            while True:
                try:
                    yield pickle.load(rows)
                except EOFError:
                    break


def value(description: tuple) -> Any:
    """An argument that is compiled like the one described."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    kind, *rest = description
    if kind == "tensor":
        dtype = getattr(torch, rest[0])
        return torch.empty(64, dtype=dtype)[rest[1] // dtype.itemsize :]
    if kind == "descriptor":
        base = torch.empty(512, 512, dtype=getattr(torch, rest[0]))
        return TensorDescriptor(base, list(base.shape), list(base.stride()), list(rest[1]))
    if kind == "function":
        return getattr(importlib.import_module(rest[0]), rest[1])
    return tuple(map(value, rest[0])) if kind == "tuple" else rest[0]


def compile_one(row: tuple) -> str | None:
    """What is wrong with it; None: it is compiled."""
    module, name, given = row
    try:
        kernel = getattr(importlib.import_module(module), name)
        kernel.warmup(grid=(1, 1, 1), **{n: value(x) for n, x in given})._init_handles()
    except Exception as error:
        return f"{module}.{name}: {type(error).__name__}: {error}"
    return None


def use_stub() -> None:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    active = CudaDriver()
    active.get_current_stream, active.get_current_device = (lambda device=0: 0), (lambda: 0)
    active.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(active)


def prune(folder: Path) -> None:
    """Leave what is loaded: the binary, its description, the launcher."""
    for group in folder.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {k: v for k, v in paths.items() if not k.endswith(SOURCES)}}))
    for file in folder.glob("*/*"):
        if file.suffix in SOURCES:
            file.unlink()


def main() -> int:
    rows = {repr(row): row for row in recorded(Path(sys.argv[1]))}
    with Pool(os.cpu_count(), use_stub) as pool:
        wrong = [x for x in pool.imap_unordered(compile_one, rows.values()) if x is not None]
    prune(Path(os.environ["TRITON_CACHE_DIR"]))
    print("\n".join(wrong[:5]), f"{len(rows)} kernels, {len(wrong)} of them not compiled", sep="\n")
    return 2 if len(wrong) == len(rows) else int(bool(wrong))  # 1: the others are worth carrying


if __name__ == "__main__":
    raise SystemExit(main())
