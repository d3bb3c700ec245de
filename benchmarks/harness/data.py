"""Inputs of a benchmark, created on its device: `flat` (random, high entropy) and `peaked` (policy-like, low entropy).

Flat logits have unit variance, so the entropy is close to log V and no probability is zero: the worst case for
anything that skips small probabilities. Peaked inputs have a mean entropy of 0.4 nats, as a language model under
reinforcement learning has, and targets sampled from the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.shapes import Shape
from lad_kernels import linear_logprobs
from lad_kernels.testing import peaked_hidden, sample_targets

ENTROPY = {"flat": None, "peaked": 0.4}  # mean entropy of the policy, nats; None: random hidden states
COLD_BYTES = 256 << 20  # several times the L2 of any GPU: inputs rotate among copies that add up to this
DRIFT = 0.1  # standard deviation of logprobs - old_logprobs


@dataclass(frozen=True)
class Batch:
    """What every provider gets. `hidden` and `weight` are leaves that require gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    upstream: Tensor  # [N] float32: gradient of the log-probs in the head job
    old_logprobs: Tensor  # [B, T] float32
    advantages: Tensor  # [B] float32

    @property
    def padded(self) -> tuple[int, int]:
        return tuple(self.old_logprobs.shape)

    @property
    def gradient_bytes(self) -> int:
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.element_size()


def make_weight(shape: Shape, device: str, seed: int = 0) -> Tensor:  # [V, D] float32
    gen = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=gen, device=device)
    return weight.mul_(shape.hidden_size**-0.5)


def make_batch(
    shape: Shape, data: str, dtype: torch.dtype, device: str, *, weight: Tensor | None = None, seed: int = 0
) -> Batch:
    """One batch; give `weight` [V, D] float32 to share it between batches."""
    weight = make_weight(shape, device) if weight is None else weight
    gen = torch.Generator(device).manual_seed(seed + 1)
    n, d, v = shape.tokens, shape.hidden_size, shape.vocab_size
    with torch.device(device):
        if ENTROPY[data] is None:
            hidden = torch.randn(n, d, generator=gen)  # [N, D]
            targets = torch.randint(0, v, (n,), generator=gen)  # [N]
        else:
            hidden = peaked_hidden(weight, n, ENTROPY[data], gen)  # [N, D]
            targets = sample_targets(hidden, weight, gen)  # [N]
        upstream = torch.randn(n, generator=gen)  # [N]
        drift = torch.randn(n, generator=gen) * DRIFT  # [N]
        advantages = torch.randn(shape.sequences, generator=gen)  # [B]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, targets, impl="torch").logprobs + drift  # [N], whatever is measured later
    old = old.clamp(max=0.0).view(shape.sequences, shape.length)  # [B, T]
    return Batch(hidden.requires_grad_(), weight.detach().requires_grad_(), targets, upstream, old, advantages)


def make_batches(shape: Shape, data: str, dtype: torch.dtype, device: str) -> list[Batch]:
    """Enough copies that a GPU's cache cannot hold what the next run reads; one on the CPU."""
    first = make_batch(shape, data, dtype, device)
    count = 1 if device == "cpu" else min(8, max(2, math.ceil(COLD_BYTES / first.gradient_bytes)))
    copy = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
    others = [
        Batch(
            copy(first.hidden), copy(first.weight), first.targets, first.upstream, first.old_logprobs, first.advantages
        )
        for _ in range(count - 1)
    ]
    return [first, *others]
