"""The specification itself, against values derived by hand and numerical differentiation."""

from __future__ import annotations

import pytest
import torch
from divergence_facts import COEFFICIENT

from lad_kernels import GRPOConfig, LADConfig, reference
from lad_kernels.objective.config import ADVANTAGE_SCALES, DIVERGENCES, LEVELS


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("u", (-3.0, -0.2, 0.4, 2.5))
def test_coefficient_at_ratio_one(divergence, u):
    logp = torch.tensor([-1.3], dtype=torch.float64, requires_grad=True)
    config, zero = LADConfig(divergence=divergence, eta=0.5), torch.zeros((), dtype=torch.float64)
    advantages = torch.tensor([u * 0.5], dtype=torch.float64)
    reference.lad_loss(logp, None, advantages, config=config).loss.backward()
    assert -logp.grad.item() == pytest.approx(-COEFFICIENT[divergence](zero, zero + u).item(), rel=1e-12)


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"kl", "rkl", "tv"}))
def test_minimum_lies_at_the_target(divergence):
    """f has its only stationary point at x = 1, so r = e^u is where the loss stops pulling."""
    u = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64)
    old = torch.tensor([-7.0, -6.0, -5.0], dtype=torch.float64)
    logp = (old + u).requires_grad_()
    out = reference.lad_loss(logp, old, u, config=LADConfig(divergence=divergence, eta=1.0))
    out.loss.backward()
    assert logp.grad.abs().max() < 1e-9


@pytest.mark.parametrize("divergence", ("kl", "rkl"))
def test_centered_divergences_rest_without_advantage(divergence):
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    config = LADConfig(divergence=divergence, centered=True)
    reference.lad_loss(logp, None, torch.zeros(2, dtype=torch.float64), config=config).loss.backward()
    assert logp.grad.abs().max() < 1e-15


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_is_the_derivative_of_the_value(level):
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, 5, dtype=torch.float64, generator=gen, requires_grad=True)
    w = torch.randn(11, 5, dtype=torch.float64, generator=gen, requires_grad=True)
    y = torch.randint(0, 11, (3, 4), generator=gen)
    old = -3 * torch.rand(3, 4, dtype=torch.float64, generator=gen)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]])
    for config in (
        LADConfig(importance_sampling_level=level, kl_coef=0.1, entropy_coef=0.1, eta=1.0),
        GRPOConfig(importance_sampling_level=level, dual_clip=3.0),
    ):
        loss = reference.linear_lad_loss if isinstance(config, LADConfig) else reference.linear_grpo_loss

        def value(h, w, config=config, loss=loss):
            return loss(
                h,
                w,
                y,
                old,
                advantages=torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64),
                loss_mask=mask,
                config=config,
                ref_logprobs=old - 0.2,
                softcap=4.0,
            ).loss

        assert torch.autograd.gradcheck(value, (h, w))


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    ids = torch.tensor([7, 7, 7, 7, 3, 3])
    got = {s: reference.group_advantages(rewards, group_ids=ids, scale=s, eps=0.0) for s in ADVANTAGE_SCALES}
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(got["none"], centred)
    torch.testing.assert_close(got["loo"][:2], torch.tensor([1.0, -1 / 3], dtype=torch.float64))
    torch.testing.assert_close(got["group"][:4], centred[:4] / 0.5)
    torch.testing.assert_close(got["group"][4:], centred[4:] / 2**0.5)
    torch.testing.assert_close(got["batch"], centred / rewards.std())
