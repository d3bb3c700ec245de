"""Closed-form losses and coefficients on a dense grid of (log r, u) against float64 autograd of the specification."""

from __future__ import annotations

import pytest
import torch
from divergence_facts import COEFFICIENT_AT_ZERO

from lad_kernels import GRPOConfig, LADConfig, reference
from lad_kernels.objective.config import DIVERGENCES
from lad_kernels.objective.divergences import grpo_terms, lad_terms

DOUBLE = torch.float64


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """log r in [-20, 20] and u in [-80, 80], u = 0 and log r = 0, and pairs with x = e^w within 1e-6 of 1."""
    d = torch.cat([torch.linspace(-20, 20, 81), torch.tensor([-1e-3, -1e-6, 1e-6, 1e-3])]).to(DOUBLE)
    u = torch.cat([torch.linspace(-80, 80, 65), torch.tensor([-1.0, -1e-4, 1e-4, 0.5, 9.9])]).to(DOUBLE)
    dd, uu = (x.reshape(-1) for x in torch.meshgrid(d, u, indexing="ij"))
    near = torch.tensor([-1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.9999, -0.9999, 1.0001], dtype=DOUBLE)
    base = torch.linspace(-15, 15, 31, dtype=DOUBLE)
    bb, nn = (x.reshape(-1) for x in torch.meshgrid(base, near, indexing="ij"))
    return torch.cat([dd, bb + nn]), torch.cat([uu, bb])


def specification(d, u, divergence, centered=False):
    """(loss, coefficient, loss above start) per token: each token is a batch of its own in the reference."""
    logp = d.clone().requires_grad_()
    config = LADConfig(divergence=divergence, eta=1.0, centered=centered)
    zero = torch.zeros_like(d)
    total = reference.lad_loss(logp, zero, u, config=config, normalizer=1.0)
    (coef,) = torch.autograd.grad(total.loss, logp)
    x = (d - u).exp()
    f = reference.GENERATORS[divergence](x, d - u) if divergence != "rkl" else -d
    f0 = reference.GENERATORS[divergence]((-u).exp(), -u) if divergence != "rkl" else zero
    slope = reference.SLOPE_AT_ONE.get(divergence, 0.0) if centered else 0.0
    loss = u.exp() * f - slope * (d.exp() - u.exp())
    start = u.exp() * f0 - slope * (1 - u.exp())
    return loss, coef, loss - start


@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_grid(divergence, centered):
    d, u = grid()
    ours = lad_terms(divergence, d, u, centered=centered)
    loss, coef, above = specification(d, u, divergence, centered)
    scale = d.exp() + u.exp()  # what the specification's own rounding is proportional to
    assert ((ours.coef - coef).abs() <= 1e-11 * coef.abs() + 1e-14 * scale).all()
    assert ((ours.loss - loss).abs() <= 1e-11 * loss.abs() + 3e-14 * scale * (1 + (d - u).abs())).all()
    both = loss.abs() + (loss - above).abs()  # the specification subtracts two of these
    assert (
        (ours.above_start - above).abs() <= 1e-11 * above.abs() + 1e-13 * (scale + both) * (1 + (d - u).abs())
    ).all()


@pytest.mark.parametrize("centered", (False, True))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_against_float64(divergence, centered):
    """The same closed forms in float32: relative error of a few ulp of the exponent's own rounding."""
    d, u = (x.float() for x in grid())
    ours = lad_terms(divergence, d, u, centered=centered)
    truth = lad_terms(divergence, d.double(), u.double(), centered=centered)
    # e^a with a rounded to float32 carries a relative error of |a| 2^-24, and a reaches 2|u| + |d| here
    allowance = 2e-6 * (1 + d.abs() + 2 * u.abs()).double() / 4
    for name in ("coef",) if centered else ("loss", "coef"):
        a, b = getattr(ours, name).double(), getattr(truth, name)
        finite = b.abs() < 1e37
        w = (d.double() - u.double()).abs().clamp(min=1e-30)
        floor = torch.where(w < 1, 2e-7 * d.abs().double() / w, 0.0)  # w itself is rounded before it is used
        # kl's coefficient r (w + 1) vanishes at w = -1, and w carries the rounding of d
        root = 3e-7 * (1 + d.abs()).double() * d.double().exp() if divergence == "kl" else 0.0
        bad = finite & ((a - b).abs() > (allowance + 2 * floor) * b.abs() + root + 1e-37)
        assert not bad.any(), (name, d[bad][:5], u[bad][:5], a[bad][:5], b[bad][:5])


def test_js_is_finite_where_promised():
    d, u = (x.float() for x in grid())
    terms = lad_terms("js", d, u)
    for x in terms:
        assert x.isfinite().all()


def test_above_start_does_not_cancel():
    """At eta 0.25 a loss of 1e4 moves by 1e-4 for a step of 1e-6 nats; the difference keeps its digits in float32."""
    d, u = torch.full((1,), 1e-6), torch.full((1,), 9.9)
    for divergence in DIVERGENCES:
        got = lad_terms(divergence, d, u).above_start.double()
        truth = lad_terms(divergence, d.double(), u.double()).above_start
        assert ((got - truth).abs() <= 1e-4 * truth.abs()).all(), divergence


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity(divergence):
    """A target the policy gives probability 0: r = 0. Coefficients are the limits, never NaN."""
    d, u = torch.full((3,), -torch.inf), torch.tensor([-1.0, 0.0, 2.0])
    terms = lad_terms(divergence, d, u)
    limit = COEFFICIENT_AT_ZERO.get(divergence, torch.zeros_like)(u)
    torch.testing.assert_close(terms.coef, limit)
    assert not terms.loss.isnan().any()
    assert not terms.above_start.isnan().any()


@pytest.mark.parametrize("config", [GRPOConfig(), GRPOConfig(epsilon_high=0.28, dual_clip=3.0)], ids=("ppo", "dual"))
def test_ppo_coefficients(config):
    d = torch.linspace(-3, 3, 121, dtype=DOUBLE) + 1e-4  # off the kinks
    for a in (1.5, -0.7, 0.0):
        logp, adv = d.clone().requires_grad_(), torch.full_like(d, a)
        total = reference.grpo_loss(logp, torch.zeros_like(d), adv, config=config, normalizer=1.0)
        (coef,) = torch.autograd.grad(total.loss, logp)
        terms, clipped = grpo_terms(config, d, d, adv)
        torch.testing.assert_close(terms.coef, coef, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(terms.loss.sum(), total.loss.detach(), rtol=1e-12, atol=1e-12)
        start = grpo_terms(config, d, torch.zeros_like(d), adv)[0].loss
        torch.testing.assert_close(terms.above_start, terms.loss - start, rtol=1e-10, atol=1e-12)
        assert not (clipped & (terms.coef != 0)).any()
