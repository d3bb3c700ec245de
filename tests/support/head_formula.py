"""The head as a formula in any dtype, inputs for it, and the allowances of the tests of its kernels."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from lad_kernels.head.records import BLOCK, HeadForward, HeadGradients, LogitTransform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT32_LIMIT = 2e-6
CONTRACT_FACTOR = 2.0
N, D, V = 261, 80, 521
CROSSES = dict(N=2, D=1, V=2)  # full default tiles in front of a remainder, at least: see test_tile_edges.py
FEATURES = ("bias", "scale", "softcap", "temperature")
FEATURE_CASES = [(dtype, features) for dtype in DTYPES for features in ((), FEATURES)]
FEATURE_CASES += [("bfloat16", (feature,)) for feature in FEATURES]


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    upstream: Tensor  # [3, N]: of log-probabilities, lse, entropy


def make(device, dtype=torch.float32, features=(), *, n=N, d=D, v=V, seed=0) -> Inputs:
    """Logits of standard deviation 2.7; every seventh target lies in the last block, which is partial."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * 2.7 / d**0.5
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::7] = (v - 1) // BLOCK * BLOCK + targets[::7] % ((v - 1) % BLOCK + 1)
    bias = torch.randn(v, generator=generator).to(dtype).to(device) if "bias" in features else None
    temperature = (torch.rand(n, generator=generator) + 0.5).to(device) if "temperature" in features else 1.0
    scale, softcap = 0.7 if "scale" in features else 1.0, 4.0 if "softcap" in features else None
    upstream = torch.randn(3, n, generator=generator).to(device)
    hidden, weight = hidden.to(dtype).to(device), weight.to(dtype).to(device)
    return Inputs(hidden, weight, targets.to(device), bias, LogitTransform(scale, softcap, temperature), upstream)


@functools.cache
def formula(inputs: Inputs, dtype: torch.dtype) -> tuple[HeadForward, HeadGradients]:
    """Logits, softmax and autograd in `dtype`."""
    leaves = [
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
        for x in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    hidden, weight, bias = leaves
    transform, temperature = inputs.transform, inputs.transform.temperature
    z = transform.scale * (hidden @ weight.T + (0 if bias is None else bias))  # [N, V]
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    lse = z.logsumexp(1)  # [N]
    log_p = z - lse[:, None]  # [N, V]
    logprobs = log_p.gather(1, inputs.targets[:, None])[:, 0]  # [N]
    entropy = -(log_p.exp() * log_p).sum(1)  # [N]
    block_lse = torch.stack([block.logsumexp(1) for block in z.split(BLOCK, dim=1)])  # [blocks, N]
    (torch.stack([logprobs, lse, entropy]) * inputs.upstream).sum().backward()
    outputs = HeadForward(*(x.detach() for x in (logprobs, lse, entropy, block_lse)))
    correct = log_p.argmax(1) == inputs.targets  # [N]
    return outputs._replace(correct=correct), HeadGradients(*(None if x is None else x.grad for x in leaves))


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; a truth of zero would prove nothing and fails."""
    norm = truth.double().norm()
    assert norm > 0, "vacuous comparison: the truth is zero"
    return ((actual.double() - truth.double()).norm() / norm).item()


def regions(gradients: HeadGradients, targets: Tensor) -> dict[str, Tensor]:
    target_rows = torch.zeros(gradients.weight.shape[0], dtype=torch.bool, device=targets.device)
    target_rows[targets] = True
    parts = {
        "dH": gradients.hidden,
        "dW, target rows": gradients.weight[target_rows],
        "dW, other rows": gradients.weight[~target_rows],
    }
    parts |= {} if gradients.bias is None else {"db": gradients.bias}
    return {name: part for name, part in parts.items() if part.numel()}


def same(a: HeadForward, b: HeadForward) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x, y), name
