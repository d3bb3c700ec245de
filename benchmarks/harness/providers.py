"""Every provider: eager PyTorch and what else PyTorch offers, this package, and the peers of `peers.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.data import Batch
from benchmarks.harness.eager import EAGER, eager_ce, eager_grpo, eager_lad, eager_logprobs
from benchmarks.harness.peers import peer_providers
from benchmarks.harness.provider import SLOW, SLOW_START, Provider, anywhere, compiler_missing
from lad_kernels import (
    GRPOConfig,
    LADConfig,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_lad_loss,
    linear_logprobs,
)

CHUNK = 512  # rows of the checkpointed baseline
TAIL_MASS, PROMISE = 3e-4, 4e-3  # of the routed rows, and the relative gradient error that they may reach

# What PyTorch offers


def chunked_logprobs(batch: Batch) -> Tensor:  # [N]
    """Rows in chunks, logits of a chunk recomputed in the backward."""

    def some(hidden: Tensor, targets: Tensor) -> Tensor:  # [C, D], [C] -> [C]
        logits = (hidden @ batch.weight.T).float()  # [C, V]
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    rows = zip(batch.hidden.split(CHUNK), batch.targets.split(CHUNK))
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in rows])


@cache
def compiled(function: Callable[[Batch], Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a function of a batch; its tensors are the compiled function's arguments."""

    def flat(*tensors: Tensor) -> Tensor:
        return function(Batch(*tensors))

    return torch.compile(flat, dynamic=False)


def run_compiled(function: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: compiled(function)(b.hidden, b.weight, b.targets, b.upstream, b.old_logprobs, b.advantages)


def torch_linear_ce(batch: Batch) -> Tensor:  # []
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(batch.hidden, batch.weight, batch.targets, options=options)


def torch_linear_ce_missing(batch: Batch) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy"


# Ours


def kernels_missing(batch: Batch) -> str | None:
    """What the package itself answers when the kernels are asked for, on no tokens."""
    try:
        linear_logprobs(batch.hidden[:0], batch.weight, batch.targets[:0], impl="triton")
    except RuntimeError as error:
        return str(error)
    return None


def our_logprobs(impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: linear_logprobs(b.hidden, b.weight, b.targets, impl=impl).logprobs


def our_cross_entropy(impl: str, tail_mass: float) -> Callable[[Batch], Tensor]:
    return lambda b: linear_cross_entropy(b.hidden, b.weight, b.targets, tail_mass=tail_mass, impl=impl)


def our_loss(loss: Callable, impl: str, **options: object) -> Callable[[Batch], Tensor]:
    def forward(b: Batch) -> Tensor:
        padded = b.hidden.view(*b.padded, -1), b.weight, b.targets.view(b.padded), b.old_logprobs
        return loss(*padded, advantages=b.advantages, impl=impl, **options).loss

    return forward


def our_providers(impl: str) -> list[Provider]:
    name, missing = f"lad_kernels ({impl})", kernels_missing if impl == "triton" else anywhere
    jobs = {
        "head": our_logprobs(impl),
        "ce": our_cross_entropy(impl, tail_mass=0.0),
        "grpo": our_loss(linear_grpo_loss, impl),
        "lad": our_loss(linear_lad_loss, impl),
    }
    found = [Provider(name, job, forward, missing, ours=True) for job, forward in jobs.items()]
    routed = {
        "ce": our_cross_entropy(impl, tail_mass=TAIL_MASS),
        "grpo": our_loss(linear_grpo_loss, impl, config=GRPOConfig(tail_mass=TAIL_MASS)),
        "lad": our_loss(linear_lad_loss, impl, config=LADConfig(tail_mass=TAIL_MASS)),
    }
    return found + [
        Provider(f"{name}, tail_mass {TAIL_MASS:g}", job, forward, missing, ours=True, promise=PROMISE)
        for job, forward in routed.items()
    ]


def torch_providers() -> list[Provider]:
    baseline = {"head": eager_logprobs, "ce": eager_ce, "grpo": eager_grpo, "lad": eager_lad}
    found = [Provider(EAGER, job, forward, note="stores logits") for job, forward in baseline.items()]
    found += [
        Provider(
            "torch.compile", job, run_compiled(baseline[job]), compiler_missing, note="stores logits", tags=SLOW_START
        )
        for job in ("head", "ce", "grpo")
    ]
    found.append(Provider(f"torch, {CHUNK}-row checkpoints", "head", chunked_logprobs))
    found.append(Provider("torch linear_cross_entropy", "ce", torch_linear_ce, torch_linear_ce_missing, tags=SLOW))
    return found


def all_providers(job: str | None = None) -> list[Provider]:
    """Every provider, the eager baseline of each job first."""
    found = [*torch_providers(), *our_providers("triton"), *our_providers("torch"), *peer_providers()]
    return [p for p in found if job in (None, p.job)]


def split_available(providers: list[Provider], batch: Batch) -> tuple[list[Provider], dict[str, str]]:
    """(those that can run, {name of the others: why not})."""
    reasons = {p: p.unavailable_reason(batch) for p in providers}
    return [p for p, r in reasons.items() if r is None], {p.name: r for p, r in reasons.items() if r is not None}
