"""What is measured, behind one signature: `forward(batch) -> Tensor`, differentiable in hidden and weight.

job       forward returns          gradient asked for
head      log-probs [N]            with a given upstream gradient per token, as from a policy loss
ce        mean cross entropy []    of the scalar; for peers that cannot weigh tokens one by one
lad, grpo the whole loss []        from hidden states, old log-probs and advantages

A provider that cannot run here gives the reason.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.data import Batch

JOBS = {
    "head": "token log-probs, any upstream gradient",
    "ce": "mean cross entropy",
    "grpo": "GRPO from hidden states",
    "lad": "LAD from hidden states",
}
SLOW_START = frozenset({"compiled"})  # compiles for seconds before its first step
CPU_COMPILES = frozenset({"compiled on a CPU"})
SLOW = frozenset({"slow"})  # takes seconds a step where it is not at home


def anywhere(batch: Batch) -> str | None:
    """The reason function of what runs on every machine."""
    return None


@dataclass(frozen=True)
class Provider:
    """One way to do a job."""

    name: str
    job: str
    forward: Callable[[Batch], Tensor]
    unavailable: Callable[[Batch], str | None] = anywhere
    ours: bool = False
    note: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)  # one of the three above
    promise: float = 0.0  # relative gradient error that it allows itself beyond the rule, on peaked data

    def unavailable_reason(self, batch: Batch) -> str | None:
        """Why this provider cannot run on `batch`, in words; None if it can."""
        return self.unavailable(batch)

    def step(self, batch: Batch) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """(value, backward): the forward has run; `backward()` gives dH [N, D] and dW [V, D]."""
        value = self.forward(batch)
        upstream = batch.upstream.to(value.dtype) if self.job == "head" else None

        def backward() -> tuple[Tensor, Tensor]:
            return torch.autograd.grad(value, (batch.hidden, batch.weight), upstream)

        return value, backward


def package_missing(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the package {name} is not installed"


def needs(*packages: str, cuda: bool = False) -> Callable[[Batch], str | None]:
    """A reason function: packages that must be installed, and whether a CUDA device is needed."""

    def reason(batch: Batch) -> str | None:
        for name in packages:
            if package_missing(name):
                return package_missing(name)
        return f"it needs a CUDA device, the input is on {batch.hidden.device}" if cuda and not on_cuda(batch) else None

    return reason


def on_cuda(batch: Batch) -> bool:
    return batch.hidden.is_cuda


def compiler_missing(batch: Batch) -> str | None:
    if on_cuda(batch) or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler on CPU and none is on the path"
