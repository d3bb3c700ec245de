"""LAD's one-sided bound on the ratio: every divergence, level and side, against the specification and differences."""

from __future__ import annotations

import math

import pytest
import torch
from test_mutants import mutate
from torch import Tensor

from lad_kernels import GRPOConfig, LADConfig, lad_loss, linear_lad_loss
from lad_kernels.head import dispatch
from lad_kernels.objective import divergences, policy
from lad_kernels.objective.config import DIVERGENCES, LEVELS
from lad_kernels.objective.kernels import policy as kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter: inf - inf
SIDES = {
    "low": dict(epsilon_low=0.2),
    "high": dict(epsilon_high=0.28),
    "both": dict(epsilon_low=0.2, epsilon_high=0.28),
}
B, T = 60, 2
HIGH, LOW = math.log1p(0.28), math.log1p(-0.2)


def batch(dtype=torch.float64, device="cpu") -> dict[str, Tensor]:
    """Pairs of tokens with a common log ratio, inside and outside the bounds, at targets on both sides of it."""
    d = torch.tensor([-1.7, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 0.45, 1.3, 1.9]).repeat_interleave(6)[:, None]  # [B, 1]
    d = d + torch.tensor([0.01, -0.01])  # [B, T]
    u = torch.tensor([-3.0, -0.6, -0.37, 0.55, 1.6, 4.0]).repeat(10)  # [B]; with kl's -1: on both sides too
    old = torch.full((B, T), -5.0)
    given = dict(logprobs=old + d / T, old_logprobs=old, advantages=u)
    return {k: v.to(device, dtype) for k, v in given.items()}


def few(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Twelve pairs for the interpreter, some with kl's own change of sign, at u - 1, on the other side than u."""
    chosen = [*range(0, B, 7), 8, 10, 58]
    return {k: v[chosen] for k, v in batch(dtype, device).items()}


def measure(kw: dict[str, Tensor], config, impl: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss [], d loss / d logp [B, T], metrics."""
    leaf = kw["logprobs"].clone().requires_grad_()
    out = lad_loss(**(kw | {"logprobs": leaf}), config=config, impl=impl, group_size=6)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), grad, out.metrics


def agree(found, truth, rtol: float) -> None:
    """Loss, gradient and every metric that both have."""
    torch.testing.assert_close(found[0].double().cpu(), truth[0], rtol=rtol, atol=rtol)
    size = truth[1].abs()
    assert ((found[1].double().cpu() - truth[1]).abs() <= rtol * (size + size.mean())).all()
    assert torch.equal(found[1].cpu() == 0, truth[1] == 0)
    close = max(1e2 * rtol, 1e-7)  # shares are quotients of counts in float32
    for name, want in truth[2].items():
        torch.testing.assert_close(found[2][name].double().cpu(), want, rtol=close, atol=close, msg=name)


def configs(divergence: str):
    for centered in (False, True) if divergence in divergences._CENTERED else (False,):
        for level in LEVELS:
            for side in SIDES.values():
                yield LADConfig(divergence, eta=1.0, centered=centered, importance_sampling_level=level, **side)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_level_and_side_is_the_specification(divergence):
    kw, shares = batch(), []
    for config in configs(divergence):
        truth = measure(kw, config, "reference")
        agree(measure(kw, config, "torch"), truth, 1e-11)
        shares.append(truth[2]["clip_share"])
    rises = divergence == "rkl"  # its c is negative at every ratio, so that the lower bound alone never holds
    assert min(shares) > 0 or (rises and min(shares) == 0 and max(shares) > 0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_kernel_is_the_specification(divergence, device):
    kw = few(torch.float32, device)
    double = {k: v.double().cpu() for k, v in kw.items()}
    for config in configs(divergence):
        if config.importance_sampling_level == "token" or None not in (config.epsilon_low, config.epsilon_high):
            agree(measure(kw, config, "triton"), measure(double, config, "reference"), 5e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_stopped(level, divergence):
    """By the sign of the gradient without a bound, from autograd: those pushed on beyond a bound, and no other."""
    kw = batch()
    d = (kw["logprobs"] - kw["old_logprobs"]) if level == "token" else None  # [B, T]
    if d is None:
        d = (kw["logprobs"] - kw["old_logprobs"]).sum(1, keepdim=True) / (T if level == "sequence" else 1)
    for centered in (False, True):
        plain = LADConfig(divergence, eta=1.0, centered=centered, importance_sampling_level=level)
        bounded = LADConfig(
            divergence, eta=1.0, centered=centered, importance_sampling_level=level, epsilon_low=0.2, epsilon_high=0.28
        )
        _, slope, before = measure(kw, plain, "reference")
        stopped = ((d > HIGH) & (slope < 0)) | ((d < LOW) & (slope > 0))  # [B, T]
        for impl in ("reference", "torch"):
            _, grad, metrics = measure(kw, bounded, impl)
            torch.testing.assert_close(grad, torch.where(stopped, 0.0, slope), rtol=1e-10, atol=1e-14)
            assert metrics["clip_share"].item() == pytest.approx(stopped.expand_as(grad).double().mean().item())
            for name in ("ratio_mean", "ratio_max", "ess", "approx_kl_k1", "approx_kl_k3", "frac_over_target"):
                assert metrics[name].item() == pytest.approx(before[name].item(), rel=1e-6), name
            assert "clip_share" not in before


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_is_that_of_the_value(level, divergence):
    """Central differences of the loss and of `loss_above_start`, away from the kinks; no move where it is stopped."""
    kw, step = batch(), 1e-6
    for config in configs(divergence):
        if config.importance_sampling_level != level or (divergence == "tv" and level == "token"):
            continue  # tv: a kink at the target itself
        _, grad, _ = measure(kw, config, "torch")
        move = torch.zeros(B, T, dtype=torch.float64)
        for i in range(B):
            move.zero_()[i, 0] = step
            up, down = (lad_loss(**(kw | {"logprobs": kw["logprobs"] + s}), config=config) for s in (move, -move))
            for pair in ((up.loss, down.loss), (up.metrics["loss_above_start"], down.metrics["loss_above_start"])):
                numeric = ((pair[0] - pair[1]) / (2 * step)).item()
                assert numeric == pytest.approx(grad[i, 0].item(), rel=1e-5, abs=3e-7), (config, i)


@pytest.mark.parametrize("impl", ("reference", "torch", "triton"))
@pytest.mark.parametrize("sign", (1, -1))
def test_exactly_at_the_bound_and_one_step_beyond(sign, impl, device):
    """At it the token still counts in full; a step further it does not, and the loss has not moved."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    config = LADConfig(eta=1.0, epsilon_low=0.5, epsilon_high=1.0)
    bound = torch.tensor([config.log_ratio_high if sign > 0 else config.log_ratio_low], dtype=dtype, device=device)
    old = torch.zeros(1, dtype=dtype, device=device)
    if sign > 0:  # log-probs are at most 0: the ratio is exact where one of both is
        old = -bound

    def at(d: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logp, before = (torch.zeros_like(d), -d) if sign > 0 else (d, torch.zeros_like(d))
        kw = dict(logprobs=logp[None], old_logprobs=before[None], advantages=d.new_tensor([3.0 * sign]))
        leaf = kw["logprobs"].clone().requires_grad_()
        out = lad_loss(**(kw | {"logprobs": leaf}), config=config, impl=impl)
        out.loss.backward()
        return out.loss.detach(), leaf.grad, out.metrics

    inside, outside = at(bound), at(torch.nextafter(bound, bound * 9))
    assert len(old) and inside[1].item() != 0 and inside[2]["clip_share"] == 0
    assert outside[1].item() == 0 and outside[2]["clip_share"] == 1 and torch.equal(inside[0], outside[0])


@pytest.mark.parametrize("impl", ("reference", "torch", "triton"))
def test_a_zero_offset_and_one_that_is_no_bound(impl, device):
    """epsilon 0: nothing is pushed away from ratio 1, a step from ratio 1 itself is free; epsilon_low >= 1: none."""
    kw = few(torch.float32, device)
    grads = {}
    for name, bounds in {
        "zero": dict(epsilon_low=0, epsilon_high=0),
        "none": {},
        "one": dict(epsilon_low=1),
        "more": dict(epsilon_low=7.5),
    }.items():
        config = LADConfig(eta=1.0, **bounds)
        assert config.clips == (name == "zero")
        grads[name] = measure(kw, config, impl)[1]
    d = kw["logprobs"] - kw["old_logprobs"]
    away = d * grads["none"] < 0
    assert away.any() and not grads["zero"][away].count_nonzero()
    assert torch.equal(grads["zero"][~away], grads["none"][~away])
    assert torch.equal(grads["one"], grads["none"]) and torch.equal(grads["more"], grads["none"])
    on_policy = lad_loss(
        kw["logprobs"], None, kw["advantages"], config=LADConfig(epsilon_high=0, epsilon_low=0), impl=impl
    )
    assert on_policy.metrics["clip_share"] == 0


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_infinities(divergence, impl, device):
    """r = 0 is never pushed on by the lower bound; both -inf is ratio 1; old = -inf drops the token; NaN stays NaN."""
    logp = torch.tensor([[-math.inf, -math.inf, -1.0, -1.0]], device=device)
    old = torch.tensor([[-1.0, -math.inf, -math.inf, -1.0]], device=device)
    adv = torch.tensor([0.5], device=device)
    config = LADConfig(divergence, eta=1.0, epsilon_low=0.2, epsilon_high=0.2)
    plain = LADConfig(divergence, eta=1.0)
    kw = dict(logprobs=logp, old_logprobs=old, advantages=adv)
    (_, found, metrics), (_, truth, _) = (measure_one(kw, c, impl) for c in (config, plain))
    assert torch.equal(found, truth) and metrics["clip_share"] == 0
    kw["logprobs"] = torch.full_like(logp, math.nan)
    loss, grad, _ = measure_one(kw | {"old_logprobs": torch.full_like(old, -1.0)}, config, impl)
    assert loss.isnan() and (grad.isnan().all() or divergence == "rkl")


def measure_one(kw, config, impl):
    leaf = kw["logprobs"].clone().requires_grad_()
    out = lad_loss(**(kw | {"logprobs": leaf}), config=config, impl=impl)
    out.loss.backward()
    return out.loss.detach(), leaf.grad, out.metrics


TOGETHER = {
    "log_ratio_clamp inside": dict(log_ratio_clamp=0.15),
    "log_ratio_clamp outside": dict(log_ratio_clamp=0.4),
    "target_clamp": dict(target_clamp=0.9),
    "target_norm": dict(target_norm="group"),
    "kl and weights": dict(kl_coef=0.3, kl_clamp=0.5),
    "mean of each sequence": dict(loss_agg_mode="seq-mean-token-mean"),
}


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("name", TOGETHER)
def test_with_other_options(name, impl, device):
    dtype = torch.float64 if impl == "torch" else torch.float32
    gen = torch.Generator().manual_seed(0)
    kw = batch(dtype, device) if impl == "torch" else few(dtype, device)
    shape = kw["logprobs"].shape
    kw["rollout_is_weights"] = torch.rand(shape, generator=gen).to(device, dtype)
    kw["ref_logprobs"] = (kw["logprobs"] - torch.rand(shape, generator=gen).to(device, dtype)).clamp(max=0)
    for divergence in ("js", "kl"):
        for level in LEVELS:
            config = LADConfig(divergence, 1.0, level, epsilon_low=0.2, epsilon_high=0.28, **TOGETHER[name])
            truth = measure({k: v.double().cpu() for k, v in kw.items()}, config, "reference")
            agree(measure(kw, config, impl), truth, 1e-11 if impl == "torch" else 1e-5)
            assert (truth[2]["clip_share"] == 0) == (name == "log_ratio_clamp inside")


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("path", dispatch.PATHS)
def test_stopped_tokens_are_dropped_from_the_backward(path, impl, device):
    """Through the head: gradient of none of them, and of two passes no product either."""
    n, d, v = 40, 16, 300
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, d, generator=gen).to(device).requires_grad_() for s in (n, v))
    ids = torch.randint(0, v, (n,), generator=gen).to(device)
    with torch.no_grad():
        logp = (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    far = torch.arange(n, device=device) % 4 == 0
    old = torch.where(far, logp - 0.5, logp - 0.1).clamp(max=0)
    kw = dict(advantages=torch.ones(n, device=device), impl=impl, return_logprobs=False)
    grads, flops = {}, {}
    for name, bound in (("none", None), ("bound", 0.2)):
        with dispatch.force(path):
            out = linear_lad_loss(hidden, weight, ids, old, config=LADConfig(epsilon_high=bound, tail_mass=1e-9), **kw)
            grads[name], _ = torch.autograd.grad(out.loss, (hidden, weight))
        flops[name] = out.metrics["head_flops"].item()
    torch.testing.assert_close(out.metrics["clip_share"].item(), 0.25)
    assert not grads["bound"][far].count_nonzero() and grads["none"][far].count_nonzero() > 0
    torch.testing.assert_close(grads["bound"][~far], grads["none"][~far], rtol=1e-4, atol=1e-7)
    if path == "two_pass":
        assert flops["none"] - flops["bound"] == 6 * far.sum() * d * v
    elif path == "routed":
        assert flops["bound"] < flops["none"]


@pytest.mark.parametrize("value", (-0.1, math.nan, math.inf))
@pytest.mark.parametrize("name", ("epsilon_low", "epsilon_high"))
def test_bad_offsets(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 0"):
        LADConfig(**{name: value})
    with pytest.raises(TypeError, match=f"{name}: expected a number or None"):
        LADConfig(**{name: "0.2"})


def test_grpo_reports_its_share_always():
    assert GRPOConfig().clips and not LADConfig().clips


CLIP = "above, below = (log_ratio > high) & (log_ratio < turn), (log_ratio < low) & (log_ratio > turn)"
TORCH = {
    "sides swapped": (
        "return torch.where(above, high, torch.where(below, low,",
        "return torch.where(above, low, torch.where(below, high,",
    ),
    "two-sided": (CLIP, "above, below = log_ratio > high, log_ratio < low"),
    "sign of c ignored above": ("(log_ratio > high) & (log_ratio < turn)", "(log_ratio > high)"),
    "sign of c reversed": (
        CLIP,
        "above, below = (log_ratio > high) & (log_ratio > turn), (log_ratio < low) & (log_ratio < turn)",
    ),
    "raw ratio": (
        "low, high = config.log_ratio_low, config.log_ratio_high",
        "low, high = 1 - config.epsilon_low, 1 + config.epsilon_high",
    ),
    "offset as log ratio": (
        "low, high = config.log_ratio_low, config.log_ratio_high",
        "low, high = -config.epsilon_low, config.epsilon_high",
    ),
    "kl's -1 forgotten": ('_TURN = {"kl": -1.0, ', "_TURN = {"),
    "rkl turns": ('"rkl": math.inf}', '"rkl": 0.0}'),
    "centered forgotten": (
        "(0.0 if config.centered else _TURN.get(config.divergence, 0.0))",
        "_TURN.get(config.divergence, 0.0)",
    ),
}
POLICY = {
    "loss not clipped": ("terms = lad_terms(config.objective, inside, u,", "terms = lad_terms(config.objective, d, u,"),
    "gradient not stopped": ("torch.where(clipped, 0.0, terms.coef)", "terms.coef"),
    "target share of the clipped": ("over, clamped = d > u,", "over, clamped = inside > u,"),
}
KERNEL = {
    "sides swapped": (
        "bound = tl.minimum(tl.maximum(d, low), high)",
        "bound = tl.where(d > high, low, tl.where(d < low, high, d))",
    ),
    "two-sided": ("beyond = (d - bound) * (turn - d) > 0.0", "beyond = tl.abs(d - bound) > 0.0"),
    "sign of c reversed": ("(turn - d) > 0.0", "(d - turn) > 0.0"),
    "raw ratio": ("tl.minimum(tl.maximum(d, low), high)", "tl.minimum(tl.maximum(d, _exp(low)), _exp(high))"),
    "kl's -1 forgotten": ("turn = u - 1.0", "turn = u"),
    "rkl turns": ('turn = tl.zeros_like(u) + float("inf")', "turn = u"),
    "centered forgotten": ('if OBJECTIVE == "kl" and not CENTERED:', 'if OBJECTIVE == "kl":'),
    "loss not clipped": ("_lad_term(inside, u, OBJECTIVE", "_lad_term(d, u, OBJECTIVE"),
    "gradient not stopped": ("c, over = tl.where(clipped, 0.0, c), d > u", "over = d > u"),
    "target share of the clipped": ("0.0, c), d > u", "0.0, c), inside > u"),
}
MUTANT_CONFIGS = [
    LADConfig(d, eta=1.0, centered=c, epsilon_low=0.2, epsilon_high=0.28)
    for d, c in (("js", False), ("kl", False), ("kl", True), ("rkl", False))
]


def compare(impl: str, device: str) -> None:
    for config in MUTANT_CONFIGS:
        kw = batch(torch.float64, device) if impl == "torch" else few(torch.float32, device)
        truth = measure({k: v.double().cpu() for k, v in kw.items()}, config, "reference")
        agree(measure(kw, config, impl), truth, 1e-11 if impl == "torch" else 5e-6)


@pytest.mark.parametrize("bug", [None, *TORCH, *POLICY])
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    if bug in TORCH:
        monkeypatch.setattr(policy, "clip", mutate("objective/divergences.py", *TORCH[bug], tmp_path).clip)
    elif bug is not None:
        terms = mutate("objective/policy.py", *POLICY[bug], tmp_path).policy_terms
        monkeypatch.setattr(policy, "policy_terms", terms)
    if bug is None:
        compare("torch", "cpu")
        return
    with pytest.raises(AssertionError):
        compare("torch", "cpu")


@pytest.mark.parametrize("bug", [None, *KERNEL])
def test_a_planted_bug_in_the_kernel_is_caught(bug, monkeypatch, tmp_path, device):
    if bug is None:
        compare("triton", device)
        return
    mutant = mutate("objective/kernels/divergences.py", *KERNEL[bug], tmp_path)
    monkeypatch.setattr(kernel, "_policy_term", mutant._policy_term)
    with pytest.raises(AssertionError):
        compare("triton", device)
