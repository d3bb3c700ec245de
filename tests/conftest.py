"""Where the tests run: on a GPU if there is one, else in Triton's interpreter; uninitialised memory is always NaN."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# Both are read once: by @triton.jit when a kernel's module is imported, by cuBLAS when it is first used.
COMPILED_FOR = os.environ.get("COMPILED_FOR")  # `make test-compiled`: sm_80 or sm_90, whose PTX tests/support/ptx runs
if COMPILED_FOR:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("LAD_KERNELS_CPU_SPEEDS", None)  # read once as well: verdicts are those of the rows that are shipped

# Tests, and the processes they start, import the checkout, tests/support and each other by name.
TESTS = Path(__file__).resolve().parent
FOLDERS = [str(folder) for folder in (TESTS.parent, TESTS, *sorted(TESTS.glob("[!_]*/")))]
sys.path[:0] = FOLDERS
others = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x and x not in FOLDERS]
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *others])

# torch.compile imports setuptools late, and setuptools refuses to be imported after distutils, which packages bring in.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

import interpreter  # noqa: E402

from lad_kernels.head import cost  # noqa: E402

interpreter.install()
collect_ignore = [] if importlib.util.find_spec("verl") else ["frameworks/with_verl"]  # `make test-verl`
collect_ignore += [] if "cuda_device" in sys.modules else ["device"]  # `make test-device`
collect_ignore += [] if COMPILED_FOR else ["compiled/test_compiled_kernels.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What slow.txt names is marked `slow`: `make test` leaves it to `make test-all`."""
    slow = tuple(line for line in (TESTS / "slow.txt").read_text().splitlines() if not line.startswith("#"))
    for item in items:
        if item.path.is_relative_to(TESTS):
            name = f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"
            if name.startswith(slow):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors and for CPU times: on a busy machine two threads spend most of theirs waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not COMPILED_FOR else "cpu"


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels():
    """Kernels that are launched on CPU tensors run as they are compiled for a GPU, if that is asked for."""
    if not COMPILED_FOR:
        yield None
        return
    from ptx.device import running

    with running(COMPILED_FOR) as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    """Every CPU has the speeds of the same row, so that no path, and so no verdict, depends on the machine."""
    monkeypatch.setattr(cost, "intel_avx512", lambda: False)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that a kernel that forgets a row or reads beyond its input is caught."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
