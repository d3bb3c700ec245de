"""Numbers far from the usual: large rewards, log ratios to +-300 nats; float32 against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_divergences import specification
from test_objective_kernel import run_terms

from lad_kernels import GRPOConfig, LADConfig, group_advantages, grpo_loss, lad_loss, linear_grpo_loss, reference
from lad_kernels.objective import policy
from lad_kernels.objective.config import ADVANTAGE_SCALES, DIVERGENCES, LEVELS
from lad_kernels.objective.divergences import lad_terms
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels import policy as kernel

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


def far_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """log r in +-300, dense where e^d leaves float32 at either end, and u in +-80; float32, held exactly."""
    edge = torch.linspace(80, 110, 61)
    d = torch.cat([torch.linspace(-300, 300, 121), edge, -edge, torch.tensor([1e-3, -1e-3, -1e-6])])
    u = torch.tensor([-80.0, -40, -20, -10, -4, -1, -0.1, 0, 0.1, 1, 4, 10, 20, 40, 80])
    d, u = torch.cartesian_prod(d, u).unbind(1)
    return d.contiguous(), u.contiguous()


LARGE = 1e37  # beyond it e^d itself may leave float32, whose end is 3.4e38


def agrees(found: torch.Tensor, truth: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Within `allowed`; where the truth is beyond LARGE, large or infinite and of its sign."""
    found = found.double()
    large = (found.sign() == truth.sign()) & (found.abs() > 0.9 * LARGE)
    return torch.where(truth.abs() > LARGE, large, (found - truth).abs() <= allowed)


@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", IMPLS)
def test_terms_over_300_nats(impl, divergence, centered, device):
    """No intermediate overflows: a few roundings of the exponents, as on the small grid."""
    d, u = (x.to(device) for x in far_pairs())
    truth = lad_terms(divergence, d.double(), u.double(), centered=centered)
    if impl == "torch":
        found = lad_terms(divergence, d, u, centered=centered)
    else:
        found = run_terms(d, u, divergence, centered)
    d, u = d.double(), u.double()
    rounding = 2.0**-24 * (8 + 2 * d.abs() + 4 * u.abs())
    root = 2.0**-23 * d.exp() * (1 + (d - u).abs()) if divergence == "kl" else 0.0  # c is 0 at w = -1
    near = 2 * torch.where(d.abs() < 1, d.abs() * (u.exp() + 1), 0.0)  # terms of first order that nearly cancel
    for name, got, want in zip(("loss", "coef", "above_start"), found, truth):
        bad = ~agrees(got, want, 2 * rounding * (want.abs() + near) + root + 1e-37)
        assert not bad.any(), (name, d[bad][:4], u[bad][:4], got[bad][:4], want[bad][:4])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_terms_are_the_specification_far_out(divergence):
    """What the float32 sweep takes for the truth; the specification's own powers of x overflow float64 beyond 150."""
    d, u = (x.double() for x in far_pairs())
    inside = (d.abs() <= 150) & ((d - u).abs() > 1)
    d, u = d[inside], u[inside]
    loss, coef, _ = specification(d, u, divergence)
    terms = lad_terms(divergence, d, u)
    scale = d.exp() + u.exp()
    assert ((terms.coef - coef).abs() <= 1e-11 * coef.abs() + 1e-14 * scale).all()
    assert ((terms.loss - loss).abs() <= 1e-11 * loss.abs() + 3e-14 * scale * (1 + (d - u).abs())).all()


def packed(dtype, device, level):
    """Log ratios to +-300 in sequences of two tokens (one long one per token), u of three sizes, a reference afar."""
    d = torch.tensor([-300.0, -104, -95, -89, -60, -1, 0, 1, 20, 60, 80, 85])
    old = torch.full_like(d, -310.0)
    ref = old + 60 * (d / 60).clamp(-1, 1).flip(0)
    u = torch.tensor([-10.0, 0.5, 10.0]).repeat(4)[: 12 if level == "token" else 6]
    bounds = [0, 12] if level == "token" else range(0, 13, 2)
    kw = dict(old_logprobs=old, ref_logprobs=ref, advantages=u, normalizer=torch.tensor(7.0))
    kw = {k: v.to(device, dtype) for k, v in kw.items()}
    bounds = torch.tensor(list(bounds), dtype=torch.int32, device=device)
    inputs = PackedInputs(cu_seqlens=bounds, advantages_by_token=level == "token", **kw)
    return (old + d).to(device, dtype), None, inputs


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_objective_over_300_nats(divergence, level, impl, device):
    """Gradient of each token, loss, KL to the reference and every metric, in float32 against float64."""
    ours = kernel.policy_terms if impl == "triton" else policy.policy_terms
    for centered in (False, True) if divergence in ("kl", "rkl") else (False,):
        config = LADConfig(divergence, eta=1.0, importance_sampling_level=level, centered=centered, kl_coef=0.1)
        found, truth = (
            terms(*packed(dtype, device, level), config)
            for dtype, terms in ((torch.float32, ours), (torch.float64, policy.policy_terms))
        )
        size = truth.dlogprobs.abs() + 1e-3
        assert agrees(found.dlogprobs, truth.dlogprobs, 1e-4 * size).all(), (found.dlogprobs, truth.dlogprobs)
        assert found.metrics.keys() == truth.metrics.keys()
        for name, want in {**truth.metrics, "loss": truth.loss}.items():
            got = found.loss if name == "loss" else found.metrics[name]
            assert agrees(got, want, 1e-4 * (want.abs() + 1e-3)), (name, got, want)


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
@pytest.mark.parametrize("config", [LADConfig(kl_coef=0.1, kl_clamp=10.0), GRPOConfig(kl_coef=0.1, kl_clamp=10.0)])
def test_bounded_kl(config, impl, device):
    """verl's bound: k3 at most 10, no gradient beyond; without it a reference 88 nats away makes the loss infinite."""
    gap = torch.tensor([-50.0, -3.0, 0.5, 2.0, 2.5, 3.0, 89.0, 300.0])
    logp, old = torch.full((8,), -320.0), torch.full((8,), -320.0)
    verl = (gap.double().clamp(-20, 20).exp() - gap.double().clamp(-20, 20) - 1).clamp(-10, 10)
    slope = torch.where(gap.double().expm1() - gap.double() > 10, 0.0, -gap.double().expm1())
    kw = dict(old_logprobs=old, advantages=torch.zeros(8), ref_logprobs=logp + gap)
    kw = {k: v.to(device) for k, v in kw.items()}
    loss = lad_loss if isinstance(config, LADConfig) else grpo_loss
    leaf = logp.to(device).requires_grad_()
    out = loss(leaf, **kw, config=config, impl=impl)
    out.loss.backward()
    torch.testing.assert_close(out.loss.cpu().double(), 0.1 * verl.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["kl_ref"].cpu().double(), verl.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.cpu().double(), 0.1 / 8 * slope, rtol=1e-5, atol=1e-7)
    unbounded = loss(leaf, **kw, config=replace(config, kl_clamp=None), impl=impl)
    assert unbounded.loss.isinf()


@pytest.mark.parametrize(
    "config",
    [GRPOConfig(policy_loss="sapo"), GRPOConfig(policy_loss="vespo", importance_sampling_level="sequence_sum")],
    ids=lambda c: c.policy_loss,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_soft_gates_over_300_nats(impl, config, device):
    """The gate closes before the ratio overflows: loss, gradient and metrics in float32 against float64."""
    ours = kernel.policy_terms if impl == "triton" else policy.policy_terms
    found, truth = (
        terms(*packed(dtype, device, "sequence"), config)
        for dtype, terms in ((torch.float32, ours), (torch.float64, policy.policy_terms))
    )
    assert agrees(found.dlogprobs, truth.dlogprobs, 1e-4 * (truth.dlogprobs.abs() + 1e-3)).all()
    for name in truth.metrics.keys() - {"zero_coef_share"}:  # a closed gate's gradient of e^-200 is 0 in float32
        got, want = found.metrics[name], truth.metrics[name]
        assert agrees(got, want, 1e-4 * (want.abs() + 1e-3)), (name, got, want)
    assert agrees(found.loss, truth.loss, 1e-4 * truth.loss.abs())
