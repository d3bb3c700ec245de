"""`outputs.METRICS`: complete, and correct for every metric over parts of a batch."""

from __future__ import annotations

import pytest
import torch

from lad_kernels import GRPOConfig, LADConfig, grpo_loss, lad_loss, linear_lad_loss
from lad_kernels.outputs import METRICS

OBJECTIVES = (
    (lad_loss, LADConfig(kl_coef=0.1, log_ratio_clamp=0.3)),
    (lad_loss, LADConfig(importance_sampling_level="sequence", kl_coef=0.1)),
    (lad_loss, LADConfig(epsilon_low=0.1, epsilon_high=0.1)),
    (grpo_loss, GRPOConfig(kl_coef=0.1)),
)


def batch() -> dict[str, torch.Tensor]:
    """Six sequences of eight tokens in float64, every fifth token with an old log-prob that is not finite."""
    gen = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(6, 8, generator=gen, dtype=torch.float64) - 0.1
    noise = lambda: 0.3 * torch.randn(6, 8, generator=gen, dtype=torch.float64)  # noqa: E731
    old = (logp - noise()).clamp(max=0)
    old.view(-1)[::5] = torch.nan
    return {
        "logprobs": logp,
        "old_logprobs": old,
        "ref_logprobs": (logp + noise()).clamp(max=0),
        "entropy": noise().abs(),
        "advantages": noise()[:, 0],
    }


def combined(name: str, parts: list[tuple[dict, dict]]) -> torch.Tensor:
    """One metric of several micro-batches, as METRICS says."""
    values, how = torch.stack([metrics[name] for _, metrics in parts]), METRICS[name]
    if how in ("sum", "max"):
        return values.sum() if how == "sum" else values.amax()
    counts = []
    for given, _ in parts:
        finite, sign = given["old_logprobs"].isfinite(), given["advantages"][:, None].sign()
        chosen = {
            "tokens": finite,
            "positive tokens": finite & (sign > 0),
            "negative tokens": finite & (sign < 0),
            "loss tokens": torch.ones_like(finite),
        }[how]
        counts.append(chosen.sum())
    return (values * torch.stack(counts)).sum() / sum(counts)


@pytest.mark.parametrize(("loss", "config"), OBJECTIVES)
def test_metrics_of_micro_batches_combine_to_those_of_the_batch(loss, config):
    given = batch()
    whole = loss(**given, config=config, normalizer=40.0).metrics
    parts = [{k: v[rows] for k, v in given.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 6))]
    parts = [(part, loss(**part, config=config, normalizer=40.0).metrics) for part in parts]
    seen = [name for name in whole if METRICS[name] != "apart"]
    assert len(seen) >= 13
    for name in seen:
        rtol = 1e-6 if name == "nonfinite_share" else 1e-12  # that one is a quotient of counts in float32
        torch.testing.assert_close(combined(name, parts), whole[name], rtol=rtol, atol=1e-14, msg=name)


def test_ess_does_not_combine():
    """Why it is `apart`: as a mean over tokens it would be wrong."""
    given = batch()
    halves = [{k: v[rows] for k, v in given.items()} for rows in (slice(0, 2), slice(2, 6))]
    (a, b), whole = (lad_loss(**half).metrics["ess"] for half in halves), lad_loss(**given).metrics["ess"]
    assert METRICS["ess"] == "apart" and min((w * a + (1 - w) * b - whole).abs() for w in (1 / 3, 1 / 2)) > 1e-4


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_every_metric_has_its_line(impl, device):
    names = set()
    for loss, config in OBJECTIVES:
        given = {k: v.to(device, torch.float32) for k, v in batch().items()}
        names |= loss(**given, config=config, impl=impl).metrics.keys()
    hidden, weight = torch.zeros(4, 8, device=device, requires_grad=True), torch.zeros(20, 8, device=device)
    ids = torch.zeros(4, dtype=torch.long, device=device)
    names |= linear_lad_loss(hidden, weight, ids, advantages=hidden.detach()[:, 0], impl=impl).metrics.keys()
    assert names == METRICS.keys()
