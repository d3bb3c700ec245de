"""Inputs of a benchmark, created on its device: `flat` (random, high entropy), `peaked` (low entropy) and `real`.

Flat logits have unit variance, so the entropy is close to log V and no probability is zero: the worst case for
anything that skips small probabilities. Peaked inputs have a mean entropy of 0.4 nats, as a language model under
reinforcement learning has, and targets sampled from the policy. Real ones are those of a pretrained policy
(`benchmarks/states.py`), at a temperature of sampling and of the loss; with `--policy FOLDER` also of a trained one.

Real states have the D and V of their model, and a shape takes the number of its tokens alone. Where it wants more than
were sampled, tokens repeat, and its name says so. A token keeps the same share of blocks however often it occurs, its
pairs are drawn anew each time (by its number), and each copy has a sequence, an advantage and a drift of its own. But
blocks that no token keeps stay empty: as many different tokens would reach more blocks with fewer tokens each, so
repeated tokens fill tiles somewhat better and make routing look cheaper, not dearer. Shapes for the interpreter
(V below 1,024) get the first entries of a real head: they show that the code runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import states
from benchmarks.harness.shapes import Shape
from lad_kernels import linear_logprobs
from lad_kernels.testing import peaked_hidden, sample_targets

ENTROPY = {"flat": None, "peaked": 0.4}  # mean entropy of the policy, nats; None: random hidden states
REAL = {  # policy, temperature of sampling and of the loss
    "real, T=1": ("smollm2", 1.0, 1.0),
    "real, T=0.6": ("smollm2", 0.6, 0.6),
    "real, T=0.3": ("smollm2", 0.3, 0.3),
    "real, T=0.6, loss at 1": ("smollm2", 0.6, 1.0),
    "real, Gemma 3, T=1": ("gemma3-270m", 1.0, 1.0),
    "real, Gemma 3, T=0.6": ("gemma3-270m", 0.6, 0.6),
    "real, Gemma 3, T=0.3": ("gemma3-270m", 0.3, 0.3),
    "untrained, T=1": ("untrained", 1.0, 1.0),  # on the prompts of the trained one
    "trained, T=1": ("trained", 1.0, 1.0),
    "trained, T=0.6": ("trained", 0.6, 0.6),
    "trained, T=0.6, loss at 1": ("trained", 0.6, 1.0),
}
MADE = tuple(ENTROPY)
EVERYWHERE = (*MADE, "real, T=1", "real, T=0.6")  # others: where a data set costs minutes, in test_sparse alone
INTERPRETED = 1024  # a vocabulary below it is for Triton's interpreter
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


def missing(data: str) -> str | None:
    """Why data of this kind cannot be had here; None if they can."""
    return states.missing(REAL[data][0]) if data in REAL else None


def fit(shape: Shape, data: str) -> Shape:
    """The shape that data of this kind have at this number of tokens."""
    if data not in REAL or shape.vocab_size < INTERPRETED:
        return shape
    found = states.load(*REAL[data])
    (vocab_size, hidden_size), tokens = found.weight.shape, len(found.targets)
    name = found.name + f", {tokens:,} tokens repeated" * (shape.tokens > tokens)
    return replace(shape, name=name, hidden_size=hidden_size, vocab_size=vocab_size)


def real_states(shape: Shape, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states [N, D], weight [V, D], targets [N] and log-probs [N]: N tokens from everywhere in the sample."""
    s, v, d = states.load(*REAL[data]), shape.vocab_size, shape.hidden_size
    step = max(len(s.targets) // shape.sequences, shape.length)
    starts = step * torch.arange(shape.sequences)[:, None]  # [B, 1]
    at = (starts + torch.arange(shape.length)).flatten() % len(s.targets)  # [N]
    if v < INTERPRETED:
        return s.hidden[at, :d], s.weight[:v, :d], s.targets[at] % v, None
    return s.hidden[at], s.weight, s.targets[at], s.old_logprobs[at]


def made_states(
    shape: Shape, data: str, weight: Tensor, gen: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same of random states, whose log-probs are not known yet."""
    n, d, v = shape.tokens, shape.hidden_size, shape.vocab_size
    if ENTROPY[data] is None:
        hidden = torch.randn(n, d, generator=gen)  # [N, D]
        return hidden, weight, torch.randint(0, v, (n,), generator=gen), None
    hidden = peaked_hidden(weight, n, ENTROPY[data], gen)  # [N, D]
    return hidden, weight, sample_targets(hidden, weight, gen), None


def make_batch(
    shape: Shape, data: str, dtype: torch.dtype, device: str, *, weight: Tensor | None = None, seed: int = 0
) -> Batch:
    """One batch of the shape `fit(shape, data)`; give `weight` [V, D] float32 to share it between made batches."""
    gen = torch.Generator(device).manual_seed(seed + 1)
    if data in REAL:
        found = real_states(shape, data)
    else:
        weight = make_weight(shape, device) if weight is None else weight
        with torch.device(device):
            found = made_states(shape, data, weight, gen)
    hidden, weight, targets, logprobs = (None if x is None else x.to(device) for x in found)
    n = shape.tokens
    with torch.device(device):
        upstream = torch.randn(n, generator=gen)  # [N]
        drift = torch.randn(n, generator=gen) * DRIFT  # [N]
        advantages = torch.randn(shape.sequences, generator=gen)  # [B]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if logprobs is None:
        with torch.no_grad():
            logprobs = linear_logprobs(hidden, weight, targets, impl="torch").logprobs  # [N], whatever is measured
    old = (logprobs + drift).clamp(max=0.0).view(shape.sequences, shape.length)  # [B, T]
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
