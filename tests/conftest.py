"""Where the tests run: on a GPU if there is one, else in Triton's interpreter; uninitialised memory is always NaN."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Both are read once: by @triton.jit when a kernel's module is imported, by cuBLAS when it is first used.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import interpreter

interpreter.install()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that a kernel that forgets a row or reads beyond its input is caught."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
