"""Numbers far from the usual: large rewards, log ratios to +-300 nats; float32 against float64."""

from __future__ import annotations

import pytest
import torch

from lad_kernels import GRPOConfig, LADConfig, group_advantages, lad_loss, linear_grpo_loss, reference
from lad_kernels.objective.config import ADVANTAGE_SCALES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: overflow, inf - inf
IMPLS = ("torch", "triton")
REWARDS = {
    "1e6 +- 0.06": torch.tensor([1e6 + 0.0625, 1e6, 1e6 - 0.0625, 1e6, 1e6 + 0.0625, 1e6 - 0.0625]),
    "+- 1e20": torch.tensor([1e20, -1e20, -1e20, 3e20, 0.0, 1e20]),
    "+- 1e-20": torch.tensor([1e-20, -1e-20, -1e-20, 3e-20, 0.0, 1e-20]),
    "1e20 beside 1": torch.tensor([1e20, -1e20, 1e20, 1.0, -1.0, 1.0]),
}


def advantages(rewards, scale, impl) -> torch.Tensor:
    """Of two groups of three, through the loss: the Triton kernel has them in no function of its own."""
    h, w = torch.zeros(6, 1, 4, device=rewards.device), torch.zeros(5, 4, device=rewards.device)
    ids = torch.zeros(6, 1, dtype=torch.long, device=rewards.device)
    config = GRPOConfig(advantage_scale=scale)
    return linear_grpo_loss(h, w, ids, rewards=rewards, group_size=3, config=config, impl=impl).advantages


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_advantages_of_large_and_of_close_rewards(impl, name, scale, device):
    """float32 measured: 1.2e-7 of the largest in each group."""
    rewards = REWARDS[name].to(device)
    truth = reference.group_advantages(rewards.double(), group_size=3, scale=scale).view(2, 3)
    found = advantages(rewards, scale, impl).double().view(2, 3)
    assert ((found - truth).abs() <= 5e-7 * truth.abs().amax(1, keepdim=True)).all(), (found, truth)
    if impl == "torch":
        assert torch.equal(group_advantages(rewards, group_size=3, scale=scale).double().view(2, 3), found)


@pytest.mark.parametrize("shift", (-300.0, -60.0, 0.0, 60.0, 300.0))
@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
@pytest.mark.parametrize(
    "config", [LADConfig(), LADConfig(importance_sampling_level="sequence"), LADConfig(log_ratio_clamp=50.0)]
)
def test_effective_sample_size_far_from_ratio_one(config, impl, shift, device):
    """r^2 leaves float32 beyond 44 nats; the share does not depend on a common factor."""
    d = torch.tensor([[0.5, -0.3, 1.2, 0.0], [-2.0, 0.1, 0.7, 0.2]]) + shift
    old = torch.full_like(d, -400.0)
    out = lad_loss((old + d).to(device), old.to(device), torch.ones(2, device=device), config=config, impl=impl)
    raw = (old + d).double() - old.double()
    level = raw.mean(1, keepdim=True).expand_as(raw) if config.importance_sampling_level == "sequence" else raw
    level = level if config.log_ratio_clamp is None else level.clamp(-50, 50)
    r = (level - level.max()).exp()
    truth = r.sum() ** 2 / (8 * r.square().sum())
    torch.testing.assert_close(out.metrics["ess"].double().cpu(), truth, rtol=1e-5, atol=0)
