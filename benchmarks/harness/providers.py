"""Everything that is measured, behind one signature: `forward(batch) -> Tensor`, differentiable in hidden and weight.

job       forward returns          gradient asked for
head      log-probs [N]            with a given upstream gradient per token: what a policy loss sends down
ce        mean cross entropy []    of the scalar; for peers that cannot weigh tokens one by one
lad, grpo the whole loss []        from hidden states, old log-probs and advantages

`eager` is the baseline of each job, written as trainers write it: logits stored in the dtype of the model, widened,
log-softmax, gather. Peers live in `peers.py`; a provider that cannot run here says why in words.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.data import Batch
from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss, linear_logprobs

JOBS = {
    "head": "token log-probs, any upstream gradient",
    "ce": "mean cross entropy",
    "grpo": "GRPO from hidden states",
    "lad": "LAD from hidden states",
}
EAGER = "eager torch"
SLOW_START = frozenset({"compiled"})  # compiles for seconds before its first step
CPU_COMPILES = frozenset({"compiled on a CPU"})
SLOW = frozenset({"slow"})  # takes seconds a step where it is not at home
CHUNK = 512  # rows of the checkpointed baseline
EPSILON, ETA = 0.2, 0.25  # as in the default GRPOConfig and LADConfig
TAIL_MASS, PROMISE = 3e-4, 4e-3  # of the routed rows, and the relative gradient error that they may reach


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


def kernels_missing(batch: Batch) -> str | None:
    """What the package itself answers when the kernels are asked for, on no tokens."""
    try:
        linear_logprobs(batch.hidden[:0], batch.weight, batch.targets[:0], impl="triton")
    except RuntimeError as error:
        return str(error)
    return None


# Eager torch and what PyTorch offers


def eager_logprobs(batch: Batch) -> Tensor:  # [N]
    logits = (batch.hidden @ batch.weight.T).float()  # [N, V]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def eager_ce(batch: Batch) -> Tensor:  # []
    return F.cross_entropy((batch.hidden @ batch.weight.T).float(), batch.targets)


def chunked_logprobs(batch: Batch) -> Tensor:  # [N]
    """Rows in chunks, logits of a chunk recomputed in the backward."""

    def some(hidden: Tensor, targets: Tensor) -> Tensor:  # [C, D], [C] -> [C]
        logits = (hidden @ batch.weight.T).float()  # [C, V]
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    rows = zip(batch.hidden.split(CHUNK), batch.targets.split(CHUNK))
    return torch.cat([checkpoint(some, h, t, use_reentrant=False) for h, t in rows])


def grpo_from_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:  # [N] -> []
    """The token-mean PPO-clip loss as trainers write it."""
    mask = torch.ones_like(batch.old_logprobs)  # [B, T]
    ratio = (logprobs.view(batch.padded) - batch.old_logprobs).exp()  # [B, T]
    a = batch.advantages[:, None]  # [B, 1]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)  # [B, T]
    return (loss * mask).sum() / mask.sum()


def lad_from_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:  # [N] -> []
    """The paper's objective with the Jensen-Shannon divergence, e^u f(r / e^u), written the same way."""
    mask = torch.ones_like(batch.old_logprobs)  # [B, T]
    u = batch.advantages[:, None] / ETA  # [B, 1]
    log_x = logprobs.view(batch.padded) - batch.old_logprobs - u  # [B, T]
    x = log_x.exp()
    loss = u.exp() * 0.5 * (x * log_x - (x + 1) * ((x + 1) / 2).log())  # [B, T]
    return (loss * mask).sum() / mask.sum()


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


def eager_grpo(batch: Batch) -> Tensor:
    return grpo_from_logprobs(eager_logprobs(batch), batch)


def eager_lad(batch: Batch) -> Tensor:
    return lad_from_logprobs(eager_logprobs(batch), batch)


# Ours


def our_logprobs(impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: linear_logprobs(b.hidden, b.weight, b.targets, impl=impl).logprobs


def our_loss(loss: Callable, impl: str, **options: object) -> Callable[[Batch], Tensor]:
    def forward(b: Batch) -> Tensor:
        padded = b.hidden.view(*b.padded, -1), b.weight, b.targets.view(b.padded), b.old_logprobs
        return loss(*padded, advantages=b.advantages, impl=impl, **options).loss

    return forward


def our_providers(impl: str) -> list[Provider]:
    name, missing = f"lad_kernels ({impl})", kernels_missing if impl == "triton" else anywhere
    ce = lambda b: -our_logprobs(impl)(b).mean()  # noqa: E731
    jobs = {
        "head": our_logprobs(impl),
        "ce": ce,
        "grpo": our_loss(linear_grpo_loss, impl),
        "lad": our_loss(linear_lad_loss, impl),
    }
    found = [Provider(name, job, forward, missing, ours=True) for job, forward in jobs.items()]
    routed = {
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
        for job in ("head", "grpo")
    ]
    found.append(Provider(f"torch, {CHUNK}-row checkpoints", "head", chunked_logprobs))
    found.append(Provider("torch linear_cross_entropy", "ce", torch_linear_ce, torch_linear_ce_missing, tags=SLOW))
    return found


def all_providers(job: str | None = None) -> list[Provider]:
    """Every provider, the eager baseline of each job first."""
    from benchmarks.harness.peers import peer_providers

    found = [*torch_providers(), *our_providers("triton"), *our_providers("torch"), *peer_providers()]
    return [p for p in found if job in (None, p.job)]


def split_available(providers: list[Provider], batch: Batch) -> tuple[list[Provider], dict[str, str]]:
    """(those that can run, {name of the others: why not})."""
    reasons = {p: p.unavailable_reason(batch) for p in providers}
    return [p for p, r in reasons.items() if r is None], {p.name: r for p, r in reasons.items() if r is not None}
