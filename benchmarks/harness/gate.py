"""No number from a wrong kernel: every provider is compared with float64 on a small input before it is timed.

Regions and rule are those of `lad_kernels.testing`: truth is `reference` in float64 on the rounded inputs, the contract
is `reference` in float32 with outputs rounded once, and each region (value, dH, dW of target rows, dW of the others)
may have twice the contract's error, or FP32_TOLERANCE for float32 outputs. float32 outputs may also have the error
of a few roundings of z_y and lse (`cancellation` and `of_probabilities` there): on peaked data log-probs of 1 are
differences of sums of 22. That allows 4.5e-6 for log-probs, 1.6e-5 for their mean, 4.8e-5 for the GRPO loss (its terms
cancel once more) and 5.2e-6 for gradients; an H100 needed 2.5e-6, 7.4e-6, 5.9e-6 and 3.7e-6. Gradients of a provider
that drops a tail may have the error it promises. A provider of ours outside the rule fails the run. Peers promise other
things: their measured errors are reported next to their times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.data import DRIFT, ENTROPY, INTERPRETED, REAL, Batch, fit, make_batch
from benchmarks.harness.provider import Provider
from benchmarks.harness.shapes import Shape
from lad_kernels import reference
from lad_kernels.testing import (
    CONTRACT_MARGIN,
    FP32_TOLERANCE,
    cancellation,
    format_report,
    make_inputs,
    of_probabilities,
    relative_error,
)

SEQUENCES, LENGTH, HIDDEN, VOCABULARY = (
    10,
    15,
    64,
    600,
)  # two vocabulary tiles of 256, two token tiles of 64, remainders


@dataclass(frozen=True)
class Verdict:
    """What the gate measured for one provider."""

    report: dict[str, tuple[float, float]]  # {region: (error, allowance)}

    @property
    def failed(self) -> list[str]:
        return [name for name, (error, allowed) in self.report.items() if not error <= allowed]

    @property
    def errors(self) -> dict[str, float]:
        return {name: error for name, (error, _) in self.report.items()}


def gate_batch(data: str, dtype: torch.dtype, device: str, *, hidden_size: int = HIDDEN, small: bool = False) -> Batch:
    """A small batch that crosses every tile edge, with spikes at tile borders when flat; of a policy, its own head."""
    if data in REAL:
        shape = Shape("gate", SEQUENCES, LENGTH, hidden_size, VOCABULARY if small else 2 * INTERPRETED, "a few tokens")
        return make_batch(fit(shape, data), data, dtype, device)
    inputs = make_inputs(
        SEQUENCES * LENGTH, hidden_size, VOCABULARY, dtype=dtype, device=device, entropy=ENTROPY[data], masked=0.0
    )
    gen = torch.Generator().manual_seed(1)
    drift = DRIFT * torch.randn(SEQUENCES * LENGTH, generator=gen).to(device)  # [N]
    logprobs = reference.linear_logprobs(inputs.hidden.double(), inputs.weight.double(), inputs.targets).logprobs
    old = (logprobs + drift).clamp(max=0.0).float().view(SEQUENCES, LENGTH)  # [B, T]
    advantages = torch.randn(SEQUENCES, generator=gen).to(device)  # [B]
    return Batch(
        inputs.hidden.requires_grad_(),
        inputs.weight.requires_grad_(),
        inputs.targets,
        inputs.upstream.float(),
        old,
        advantages,
    )


def specification(job: str, batch: Batch) -> Tensor:
    """The job by `reference`: log-probs [N] or a scalar."""
    return from_logprobs(job, reference.linear_logprobs(batch.hidden, batch.weight, batch.targets).logprobs, batch)


def from_logprobs(job: str, logprobs: Tensor, batch: Batch) -> Tensor:
    """The job's value, given log-probs [N]."""
    if job == "head":
        return logprobs
    if job == "ce":
        return -logprobs.mean()
    loss = reference.grpo_loss if job == "grpo" else reference.lad_loss
    return loss(logprobs.view(batch.padded), batch.old_logprobs, batch.advantages).loss


def roundings(job: str, batch: Batch) -> tuple[float, float]:
    """Relative errors that the roundings of float32 logits may leave in the job's value and in its gradients."""
    exact = cast(batch, torch.float64)
    with torch.no_grad():
        out = reference.linear_logprobs(exact.hidden, exact.weight, exact.targets)
    logprobs = out.logprobs.requires_grad_()  # [N]
    value = from_logprobs(job, logprobs, batch)  # [N] or []
    slope = torch.autograd.grad(value, logprobs)[0] if value.ndim == 0 else None  # [N]
    return cancellation(out.lse, value.detach(), slope), of_probabilities(out.lse)


def regions(value: Tensor, dhidden: Tensor, dweight: Tensor, batch: Batch) -> dict[str, Tensor]:
    target_rows = torch.zeros(len(batch.weight), dtype=torch.bool, device=batch.weight.device)  # [V]
    target_rows[batch.targets] = True
    return {
        "value": value.detach(),
        "dH": dhidden,
        "dW target rows": dweight[target_rows],
        "dW other rows": dweight[~target_rows],
    }


def run(provider: Provider, batch: Batch) -> dict[str, Tensor]:
    value, backward = provider.step(batch)
    return regions(value, *backward(), batch)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    leaf = lambda x: x.detach().to(dtype).requires_grad_()  # noqa: E731
    return replace(batch, hidden=leaf(batch.hidden), weight=leaf(batch.weight))


def measure(provider: Provider, batch: Batch) -> Verdict:
    """Errors of `provider` on `batch` and what the rule allows."""
    plain = Provider("specification", provider.job, lambda b: specification(provider.job, b))
    truth, contract = (run(plain, cast(batch, dtype)) for dtype in (torch.float64, torch.float32))
    of_value, of_gradients = roundings(provider.job, batch)
    report = {}
    for name, x in run(provider, batch).items():
        allowed = CONTRACT_MARGIN * relative_error(contract[name].to(x.dtype), truth[name])
        if x.element_size() > 2:
            allowed = max(allowed, FP32_TOLERANCE, of_value if name == "value" else of_gradients)
        if name != "value":
            allowed = max(allowed, provider.promise)
        report[name] = (relative_error(x, truth[name]), allowed)
    return Verdict(report)


def check(provider: Provider, batch: Batch) -> Verdict:
    """`measure`, and raise AssertionError if a provider of ours is outside the rule."""
    verdict = measure(provider, batch)
    if provider.ours and verdict.failed:
        raise AssertionError(
            f"{provider.name}, job {provider.job}: outside the tolerance in {', '.join(verdict.failed)}; it is not "
            f"timed\n{format_report(verdict.report)}"
        )
    return verdict
