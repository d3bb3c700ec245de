"""Inputs and the acceptance rule that tests and benchmarks share. Truth is `reference` in float64.

The rule, per region and never as one norm for all (a weight gradient that is zero off the target rows would pass):

    truth      `reference` in float64 on inputs already rounded to the working dtype
    contract   `reference` in float32 on the same inputs, each gradient rounded once to the dtype it is promised in
    16-bit     relative Frobenius error <= 2 x the contract's own error
    float32    relative Frobenius error <= the larger of FP32_TOLERANCE and 2 x the contract's own error (where the
               policy is certain, 1 - p cancels and no float32 arithmetic does better)
    logits     float32 log-probs also `cancellation`: z_y and lse are two sums, equal but for logp where the policy is
               certain; float32 gradients also `of_probabilities`: an error of z - lse is relative in p
    masked     exactly zero
    vacuous    a region whose truth is all zero fails

Regions: log-probs, entropy, dH, dW of target rows, dW of the other rows, and the same two for the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lad_kernels import reference

# Largest relative error of a float32 output. Measured over the cases of tests/support on a CPU (PyTorch 2.13): 8e-7
# chunked, 5e-7 in interpreted Triton, except the peaked policy (2.6e-6, where the contract's own error is 2.3e-6). On
# an H100 the gate of the benchmarks (D = 64) measured 4e-8 to 9e-7 on flat data and up to 3.7e-6 of 3.9e-6 on peaked.
FP32_TOLERANCE = 2e-6
CONTRACT_MARGIN = 2.0
# Error of a float32 log-prob in units of 2^-24 |lse|. Measured on an H100 80GB HBM3 (Triton 3.6, mean entropy 0.4 nats,
# D = 64, root mean square over 150 tokens): 1.7 in bfloat16, 2.2 in float16, 1.9 in float32; the kernels' PTX for sm_90
# at D = 80: 2.2. In 16 bits most of it has one sign, since a tensor core cuts what it accumulates off: the mean error
# of a token's log-prob is 1.3 (bfloat16) to 1.9 (float16) such units. The margin is 1.8. It holds for D <= 128: z_y and
# lse come from different sums, and what is cut off grows with D (emulated in 16 bits: 6 units at 256, 90 at 4,096).
# Gradients in float32, in units of 2^-24 rms(lse): up to 2.9 (gate, H100), where the contract has 1.5.
LOGPROB_ROUNDINGS = 4.0


@dataclass(frozen=True)
class HeadInputs:
    """What a head needs, in its working dtype."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N], -100 where masked
    loss_mask: Tensor  # [N] bool
    upstream: Tensor  # [N] gradient of log-probs, not constant
    options: dict  # logit_scale, softcap, temperature

    def cast(self, dtype: torch.dtype) -> HeadInputs:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


@dataclass(frozen=True)
class HeadOutputs:
    """What a head returns: per-token outputs and gradients."""

    logprobs: Tensor  # [N]
    entropy: Tensor | None  # [N]
    dhidden: Tensor | None  # [N, D]
    dweight: Tensor | None  # [V, D]
    dbias: Tensor | None  # [V]


def make_inputs(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    entropy: float | None = None,
    bias: bool = False,
    masked: float = 0.2,
    block: int = 128,
    seed: int = 0,
    **options: float | Tensor | None,
) -> HeadInputs:
    """Random inputs that are hard on tiled kernels.

    With `entropy` None the policy is flat and every `block`-wide vocabulary tile has a spike on its first and last
    column (through the bias, or one hidden direction without it), so that no tile can vanish unnoticed. With a
    number, hidden states are confident mixtures of a few weight rows and the mean entropy is that many nats. An
    eighth of the targets lie in the last, partial vocabulary tile.
    """
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, hidden_size, generator=gen) / hidden_size**0.5  # [V, D]
    if entropy is None:
        hidden = torch.randn(tokens, hidden_size, generator=gen)  # [N, D]
        spikes = torch.zeros(vocab_size)  # [V]
        spikes[::block] = spikes[block - 1 :: block] = spikes[-1] = 3.0
        if not bias:
            hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + spikes
        b = torch.randn(vocab_size, generator=gen) + spikes if bias else None
    else:
        b = torch.randn(vocab_size, generator=gen) * 0.1 if bias else None
        hidden = peaked_hidden(weight, tokens, entropy, gen)
    targets = torch.randint(0, vocab_size, (tokens,), generator=gen)
    targets[: tokens // 8] = vocab_size - 1
    if entropy is not None:
        targets = sample_targets(hidden, weight, gen)
    loss_mask = torch.rand(tokens, generator=gen) >= masked
    loss_mask[:1] = True
    upstream = torch.randn(tokens, generator=gen)
    targets = torch.where(loss_mask, targets, -100)
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    inputs = HeadInputs(move(hidden), move(weight), move(b), move(targets), move(loss_mask), move(upstream), options)
    return inputs.cast(dtype)


def peaked_hidden(weight: Tensor, tokens: int, entropy: float, gen: torch.Generator) -> Tensor:
    """Hidden states [N, D] whose next-token distribution has a mean entropy of `entropy` nats under `weight` [V, D].

    Each is a mixture of 1 to 8 weight rows, drawn with Zipf frequencies (low ids are frequent, as in byte-pair
    vocabularies), plus noise, times one confidence found by bisection on at most 256 of them.
    """
    vocab_size, hidden_size = weight.shape
    frequency = 1 / (torch.arange(vocab_size) + 2.7)
    ids = torch.multinomial(frequency, tokens * 8, replacement=True, generator=gen).view(tokens, 8)
    share = torch.rand(tokens, 8, generator=gen).square()  # [N, 8]
    share[:, 0] = 1
    share *= torch.arange(8) < torch.randint(1, 9, (tokens, 1), generator=gen)
    hidden = (weight[ids] * share[..., None]).sum(1)  # [N, D]
    hidden += torch.randn(tokens, hidden_size, generator=gen) / hidden_size**0.5 * 0.5
    hidden *= 0.5 + torch.rand(tokens, 1, generator=gen)
    probe = hidden[:256] @ weight.T  # [256, V]
    low, high = 0.0, 1e4
    for _ in range(40):
        middle = (low + high) / 2 if high < 1e4 else max(2 * low, 1.0)
        log_p = (probe * middle).log_softmax(-1)
        reached = -(log_p.exp() * log_p).sum(-1).mean().item()
        low, high = (middle, high) if reached > entropy else (low, middle)
    return hidden * high


def sample_targets(hidden: Tensor, weight: Tensor, gen: torch.Generator, chunk: int = 256) -> Tensor:
    """One token [N] from each softmax(h W^T), by the Gumbel trick, a chunk of logits at a time."""
    picked = []
    for h in hidden.split(chunk):
        z = h @ weight.T  # [chunk, V]
        noise = torch.rand(z.shape, generator=gen).clamp_(min=1e-20).log_().neg_().log_().neg_()
        picked.append((z + noise).argmax(-1))
    return torch.cat(picked)


def run_head(head: Callable, inputs: HeadInputs, *, entropy_upstream: Tensor | None = None) -> HeadOutputs:
    """Forward and backward of `head`, a function with the signature of `linear_logprobs`."""
    given = (inputs.hidden, inputs.weight, inputs.bias)
    hidden, weight, bias = (None if x is None else x.detach().clone().requires_grad_() for x in given)
    want = entropy_upstream is not None
    out = head(
        hidden, weight, inputs.targets, bias=bias, loss_mask=inputs.loss_mask, return_entropy=want, **inputs.options
    )
    objective = (out.logprobs * inputs.upstream.to(out.logprobs.dtype)).sum()
    if entropy_upstream is not None:
        objective = objective + (out.entropy * entropy_upstream.to(out.entropy.dtype)).sum()
    objective.backward()
    entropy = None if out.entropy is None else out.entropy.detach()
    dbias = None if bias is None else bias.grad
    return HeadOutputs(out.logprobs.detach(), entropy, hidden.grad, weight.grad, dbias)


def regions(out: HeadOutputs, inputs: HeadInputs) -> dict[str, Tensor]:
    """The parts of the outputs that are compared, each by itself."""
    mask = inputs.loss_mask
    target_rows = torch.zeros(len(inputs.weight), dtype=torch.bool, device=mask.device)
    target_rows[inputs.targets[mask]] = True
    by_token = {"logprobs": out.logprobs, "entropy": out.entropy, "dH": out.dhidden}
    parts = {name: x[mask] for name, x in by_token.items() if x is not None}
    for name, x in (("dW", out.dweight), ("dbias", out.dbias)):
        if x is not None:
            parts[f"{name} target rows"], parts[f"{name} other rows"] = x[target_rows], x[~target_rows]
    return {name: x for name, x in parts.items() if x.numel()}


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth|| in float64; an all-zero truth proves nothing and raises."""
    truth = truth.double()
    norm = truth.norm()
    if norm == 0:
        raise AssertionError("vacuous comparison: the truth is all zero")
    return ((x.double() - truth).norm() / norm).item()


def cancellation(lse: Tensor, value: Tensor, slope: Tensor | None = None) -> float:
    """Relative error of `value` if each log-prob is off by LOGPROB_ROUNDINGS * 2^-24 |lse|, for lse [N] in float64.

    `value` is the log-probs [N], or a number whose derivatives by the log-probs are `slope` [N]; all errors of a
    number may have one sign.
    """
    size = lse.abs() if slope is None else (slope * lse).abs()  # [N]
    return LOGPROB_ROUNDINGS * 2.0**-24 * (size.norm(1 if value.ndim == 0 else 2) / value.norm()).item()


def of_probabilities(lse: Tensor) -> float:
    """Relative error of e^(z - lse) if the exponent is off by LOGPROB_ROUNDINGS * 2^-24 |lse|, for lse [N]."""
    return LOGPROB_ROUNDINGS * 2.0**-24 * lse.square().mean().sqrt().item()


def check_head(
    head: Callable, inputs: HeadInputs, *, entropy_upstream: Tensor | None = None
) -> dict[str, tuple[float, float]]:
    """Apply the rule to `head`. Returns {region: (error, allowance)}; raises AssertionError with the whole report."""
    actual = run_head(head, inputs, entropy_upstream=entropy_upstream)
    return check_outputs(actual, inputs, entropy_upstream=entropy_upstream)


def check_outputs(
    actual: HeadOutputs, inputs: HeadInputs, *, entropy_upstream: Tensor | None = None
) -> dict[str, tuple[float, float]]:
    """The rule on outputs already computed."""
    truth, contract = (
        regions(run_head(reference.linear_logprobs, inputs.cast(dtype), entropy_upstream=entropy_upstream), inputs)
        for dtype in (torch.float64, torch.float32)
    )
    exact = inputs.cast(torch.float64)
    out = reference.linear_logprobs(
        exact.hidden, exact.weight, exact.targets, bias=exact.bias, loss_mask=exact.loss_mask, **exact.options
    )
    lse = out.lse[inputs.loss_mask]  # [kept]
    report, failed = {}, []
    for name, x in regions(actual, inputs).items():
        error = relative_error(x, truth[name])
        allowed = CONTRACT_MARGIN * relative_error(contract[name].to(x.dtype), truth[name])
        if x.element_size() > 2:
            floor = cancellation(lse, truth[name]) if name == "logprobs" else of_probabilities(lse) * (name[0] == "d")
            allowed = max(allowed, FP32_TOLERANCE, floor)
        report[name] = (error, allowed)
        if not error <= allowed:
            failed.append(name)
    if actual.dhidden is not None and actual.dhidden[~inputs.loss_mask].count_nonzero():
        failed.append("masked rows of dH are not exactly zero")
    if actual.logprobs[~inputs.loss_mask].count_nonzero():
        failed.append("masked log-probs are not exactly zero")
    if failed:
        raise AssertionError(f"outside the tolerance: {', '.join(failed)}\n{format_report(report)}")
    return report


def format_report(report: dict[str, tuple[float, float]]) -> str:
    return "\n".join(f"  {name:20s} {error:.2e} of {allowed:.2e} allowed" for name, (error, allowed) in report.items())
