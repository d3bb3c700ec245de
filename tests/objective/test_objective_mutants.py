"""Planted bugs of the objective: each edits one line of real source and must be caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergence_facts import MUTANT
from test_mutants import mutate

from lad_kernels import GRPOConfig, LADConfig, reference
from lad_kernels.objective import divergences, policy
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels import policy as kernel

POLICY = {
    **{name: ("objective/divergences.py", *bug) for name, bug in MUTANT.items()},
    "length forgotten": ("objective/policy.py", "(w / seq.lengths)[seq.index]", "w.expand(len(d))"),
    "clamp passes the gradient": ("objective/policy.py", "torch.where(stopped & (not direct), 0.0,",
                                  "torch.where(d != d, 0.0,"),
    "level not transposed": ("objective/policy.py", "dlogprobs = seq.clean(seq.level(through_ratio,",
                             "dlogprobs = seq.clean((lambda x, _: x)(through_ratio,"),
    "kl sign": ("objective/policy.py", "dlogprobs - config.kl_coef * w *",
                "dlogprobs + config.kl_coef * w *"),
    "kl clamp passes the gradient": ("objective/policy.py", "torch.where(beyond, 0.0, gap.expm1())", "gap.expm1()"),
    "rollout weights on the loss alone": ("objective/policy.py", "0.0, s * terms.coef)", "0.0, w * terms.coef)"),
    "mean instead of sum": ("objective/policy.py", 'total / self.lengths if level == "sequence" else total',
                            "total / self.lengths"),
}  # fmt: skip


GRPO = {
    "sapo: slope of the plain sigmoid": ("slope = 4 * (d - x.abs())", "slope = (d - x.abs())"),
    "sapo: r forgotten": ("4 * (d - x.abs()).exp()", "4 * (-x.abs()).exp()"),
    "sapo: one temperature": (
        "torch.where(a > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)",
        "torch.where(a > 0, config.sapo_temperature_pos, config.sapo_temperature_pos)",
    ),
    "sapo: loss not scaled": ("torch.sigmoid(x) * (4 / tau)", "torch.sigmoid(x) * 4"),
    "vespo: k of the other sign": ("torch.where(a >= 0, config.vespo_k_pos,", "torch.where(a < 0, config.vespo_k_pos,"),
    "vespo: lambda of the other sign": (
        "torch.where(a >= 0, config.vespo_lambda_pos,",
        "torch.where(a < 0, config.vespo_lambda_pos,",
    ),
    "vespo: not 1 at ratio 1": ("rate * log_ratio.expm1()", "rate * log_ratio.exp()"),
    "cispo: not clipped": ("bounded = r.clamp(low, high)", "bounded = r.clamp(low - 1, high + 9)"),
}
GRPO_CONFIGS = (
    GRPOConfig(policy_loss="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.7),
    GRPOConfig(policy_loss="vespo", importance_sampling_level="sequence_sum"),
    GRPOConfig(policy_loss="cispo"),
)


def compare_grpo(terms, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Loss and gradient against the specification, on log ratios of both signs."""
    gen = torch.Generator().manual_seed(0)
    logp = torch.randn(12, generator=gen, dtype=torch.float64) - 4
    old = logp + 0.3 * torch.randn(12, generator=gen, dtype=torch.float64)
    adv = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
    cu = torch.tensor([0, 3, 3, 8, 12])
    for config in GRPO_CONFIGS:
        leaf = logp.clone().requires_grad_()
        spec = reference.grpo_loss(leaf, old, adv, cu_seqlens=cu, config=config, normalizer=5.0)
        (truth,) = torch.autograd.grad(spec.loss, leaf)
        inputs = PackedInputs(logp.new_tensor(5.0), cu, old_logprobs=old, advantages=adv)
        found = terms(logp, None, inputs, config)
        torch.testing.assert_close(found.dlogprobs, truth, rtol=rtol, atol=atol)
        torch.testing.assert_close(found.loss, spec.loss.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("bug", [None, "vespo through the ratio", *GRPO])
def test_bug_in_the_policy_losses_is_caught(bug, monkeypatch, tmp_path):
    if bug is None:
        compare_grpo(policy.policy_terms)
        return
    if bug in GRPO:
        mutant = mutate("objective/divergences.py", *GRPO[bug], tmp_path)
        monkeypatch.setattr(policy, "grpo_terms", mutant.grpo_terms)
        terms = policy.policy_terms
    else:
        old, new = 'level = "token" if direct else', 'level = "token" if not direct else'
        terms = mutate("objective/policy.py", old, new, tmp_path).policy_terms
    with pytest.raises(AssertionError):
        compare_grpo(terms)


KERNEL = {
    "sapo: slope of the plain sigmoid": ("slope = 4.0 * _exp(", "slope = _exp("),
    "sapo: gate of the other side": ("gate = tl.where(x > 0.0, 1.0, e)", "gate = tl.where(x > 0.0, e, 1.0)"),
    "sapo: one temperature": ("tl.where(adv > 0.0, settings[0], settings[1])", "settings[0] + 0.0 * adv"),
    "vespo: k of the other sign": ("tl.where(adv >= 0.0, k_pos, k_neg)", "tl.where(adv < 0.0, k_pos, k_neg)"),
    "vespo: not 1 at ratio 1": ("rate * _expm1(d)", "rate * _exp(d)"),
    "cispo: not clipped": ("c = -adv * bounded if", "c = -adv * r if"),
}


@pytest.mark.parametrize("bug", [None, *KERNEL])
def test_bug_in_the_kernels_policy_losses_is_caught(bug, monkeypatch, tmp_path, device):
    def narrow(logp, _, inputs, config):
        move = lambda x: x.to(device, torch.float32 if x.is_floating_point() else x.dtype)  # noqa: E731
        inputs = replace(inputs, **{k: move(x) for k, x in vars(inputs).items() if torch.is_tensor(x)})
        found = kernel.policy_terms(move(logp), None, inputs, config)
        return found._replace(loss=found.loss.double().cpu(), dlogprobs=found.dlogprobs.double().cpu())

    if bug is None:
        compare_grpo(narrow, rtol=1e-5, atol=1e-6)
        return
    mutant = mutate("objective/kernels/divergences.py", *KERNEL[bug], tmp_path)
    monkeypatch.setattr(kernel, "_policy_term", mutant._policy_term)
    with pytest.raises(AssertionError):
        compare_grpo(narrow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bug", POLICY)
def test_bug_in_the_objective_is_caught(bug, monkeypatch, tmp_path):
    mutant = mutate(*POLICY[bug], tmp_path)
    if "divergences" in POLICY[bug][0]:
        monkeypatch.setattr(policy, "lad_terms", mutant.lad_terms)
        terms = policy.policy_terms
    else:
        terms = mutant.policy_terms
    with pytest.raises(AssertionError):
        compare_terms(terms, bug if bug in divergences._LAD_TERMS else "js")


def compare_terms(terms, divergence: str) -> None:
    """Gradient of one objective that uses every option, against the specification, at each level."""
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    cu = torch.tensor([0, 3, 3, 8, 12])
    logp, old, ref, adv, weights = rand(12) - 3, rand(12) - 3, rand(12) - 3, rand(4), rand(4).exp()
    for level in ("token", "sequence", "sequence_sum"):
        for mode in ("token-mean", "seq-mean-token-mean"):
            config = LADConfig(
                divergence,
                eta=1.0,
                importance_sampling_level=level,
                loss_agg_mode=mode,
                kl_coef=0.2,
                kl_clamp=2.0,
                log_ratio_clamp=1.5,
            )
            leaf = logp.clone().requires_grad_()
            spec = reference.lad_loss(
                leaf,
                old,
                adv,
                cu_seqlens=cu,
                config=config,
                ref_logprobs=ref,
                rollout_is_weights=weights,
                normalizer=5.0,
            )
            (truth,) = torch.autograd.grad(spec.loss, leaf)
            inputs = PackedInputs(
                logp.new_tensor(5.0), cu, old_logprobs=old, ref_logprobs=ref, advantages=adv, rollout_is_weights=weights
            )
            found = terms(logp, None, inputs, config)
            torch.testing.assert_close(found.dlogprobs, truth, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.loss, spec.loss.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", divergences._LAD_TERMS)
def test_the_objective_without_a_bug_passes(divergence):
    compare_terms(policy.policy_terms, divergence)
