"""profile_sparsity against a direct count, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from lad_kernels import GRPOConfig, LADConfig, linear_grpo_loss, linear_lad_loss, profile_sparsity
from lad_kernels.head import cost, dispatch, memory
from lad_kernels.head.head import Head
from lad_kernels.testing import make_inputs

N, D, V, THETA = 60, 32, 128 * 9 + 40, 3e-3


def direct_count(x, c) -> torch.Tensor:
    """Active pairs of each token, by the rule, from stored probabilities in float64."""
    p = (x.hidden.double() @ x.weight.double().T).softmax(-1)  # [N, V]
    mass = torch.nn.functional.pad(p, (0, -V % 128)).view(N, -1, 128).sum(2)  # [N, blocks]
    norm, token = mass.clone(), torch.arange(N)
    norm[token, x.targets // 128] += 1 - 2 * p[token, x.targets]
    size = c.abs()
    return (size[:, None] * norm > THETA * size[size > 0].mean()).sum(1)


def test_kept_share_is_that_of_the_rule(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "speeds", lambda work: cost.Speeds(8e10, 8e9, 1e-9, 2.0, 1e-4))
    x = make_inputs(N, D, V, entropy=0.6, masked=0.0)
    c = torch.randn(N, generator=torch.Generator().manual_seed(0))
    c[:15] = 0
    found = profile_sparsity(x.hidden, x.weight, x.targets, coefficients=c, tail_mass=THETA, tail="drop", buckets=4)
    assert found.kept_share == pytest.approx(direct_count(x, c).sum().item() / (N * 10))
    assert found.zero_share == 0.25
    assert sum(b.tokens for b in found.buckets) == N
    assert [b.entropy_low for b in found.buckets] == sorted(b.entropy_low for b in found.buckets)
    assert found.buckets[0].kept_share < found.buckets[-1].kept_share
    assert f"{found.kept_share:.2%}" in str(found)
    unbiased = profile_sparsity(x.hidden, x.weight, x.targets, coefficients=c, tail_mass=THETA)
    assert found.kept_share < unbiased.kept_share < 2 * found.kept_share
    assert found.save_png(tmp_path / "sparsity.png").stat().st_size > 5000
    advantages = c  # one token per sequence: what the loss itself keeps agrees with the profile of its coefficients
    with dispatch.force("routed"):
        hidden = x.hidden[:, None].clone().requires_grad_()
        config = LADConfig(
            "pearson", eta=1e3, tail_mass=THETA, tail="drop"
        )  # -c = 2 (1 - e^-u), linear in A at large eta
        out = linear_lad_loss(hidden, x.weight, x.targets[:, None], advantages=advantages, config=config)
    assert out.metrics["kept_share"].item() == pytest.approx(found.kept_share, rel=0.02)


def test_tokens_without_a_gradient_have_nothing_to_drop():
    x = make_inputs(12, 16, 300, masked=0.0, entropy=1.0)
    c = torch.tensor([0.0, 2.0, -1.0]).repeat(4)  # [N]
    found = profile_sparsity(x.hidden, x.weight, x.targets, coefficients=c)
    alone = profile_sparsity(x.hidden[c != 0], x.weight, x.targets[c != 0], coefficients=c[c != 0])
    assert found.zero_share == pytest.approx(1 / 3)
    assert (found.dropped_mass_mean, found.dropped_mass_max) == (alone.dropped_mass_mean, alone.dropped_mass_max)
    assert found.kept_share == pytest.approx(alone.kept_share * 2 / 3)


def test_coefficients_that_are_all_zero_are_measured_as_one_and_said_so():
    """Equal rewards have no advantages, and a policy's sparsity is asked for none the less."""
    x = make_inputs(12, 16, 300, masked=0.0, entropy=1.0)
    ones = profile_sparsity(x.hidden, x.weight, x.targets)
    none = profile_sparsity(x.hidden, x.weight, x.targets, coefficients=torch.zeros(12))
    assert none == replace(ones, unit_coefficients=True)
    assert none.kept_share > 0
    said = "every coefficient is 0, as with equal rewards: measured with c = 1 for every token instead"
    assert str(none) == f"{said}\n{ones}"
    one = profile_sparsity(x.hidden, x.weight, x.targets, coefficients=torch.eye(12)[0])
    assert (one.unit_coefficients, one.zero_share) == (False, pytest.approx(11 / 12))


FAMILIES_THAT_MISLEAD = {"gemma2": "softcap 3", "mpt": "its config's scale is ignored", "falcon_h1": "scale 0.05"}


@pytest.mark.parametrize("family", FAMILIES_THAT_MISLEAD)
@pytest.mark.parametrize("attached", [False, True])
def test_a_model_of_transformers(family, attached):
    """What the model does to its logits is measured; the model is left as it was."""
    pytest.importorskip("transformers", reason="needs the train extra; a model of transformers goes untested")
    from families import IDS, MASK, own_logprobs, tiny_model

    from lad_kernels.frameworks.transformers import attach_fused_head

    model = tiny_model(family, **({"lm_head_multiplier": 0.05} if family == "falcon_h1" else {})).eval()
    handle = attach_fused_head(model) if attached else None
    found = profile_sparsity(model, input_ids=IDS, attention_mask=MASK)
    with torch.no_grad():
        log_p = model(IDS, attention_mask=MASK).logits[:, :-1].float().log_softmax(-1)[MASK[:, 1:] == 1]
    assert found.tokens == MASK[:, 1:].sum()
    assert found.mean_entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)
    assert ("_fused_head" in vars(model)) == attached
    if attached:
        assert attach_fused_head(model) is handle
    with torch.no_grad():
        own_logprobs(model)


def test_what_it_refuses():
    x = make_inputs(4, 8, 200, masked=0.0)
    with pytest.raises(ValueError, match="weight, target_ids"):
        profile_sparsity(x.hidden)
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel"):
        profile_sparsity(nn.Linear(2, 2), input_ids=x.targets)
    for name in ("weight", "target_ids", "bias"):
        with pytest.raises(ValueError, match=f"{name}: expected None with a model"):
            profile_sparsity(nn.Linear(2, 2), input_ids=x.targets, **{name: x.weight})
    with pytest.raises(ValueError, match="logit_scale: expected 1 with a model, got 2"):
        profile_sparsity(nn.Linear(2, 2), input_ids=x.targets, logit_scale=2)
    with pytest.raises(ValueError, match="input_ids"):
        profile_sparsity(nn.Linear(2, 2))
    for given, message in (
        ({"coefficients": torch.ones(3)}, "coefficients: expected"),
        ({"tail": "dropped"}, "tail: expected 'unbiased' or 'drop', got 'dropped'"),
        ({"tail_mass": -1e-4}, "tail_mass: expected a finite number >= 0 or None, got -0.0001"),
        ({"buckets": 0}, "buckets: expected at least 1, got 0"),
        ({"loss_mask": torch.zeros(4)}, "expected at least one token that counts, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            profile_sparsity(x.hidden, x.weight, x.targets, **given)


def test_without_a_tail_mass_it_is_that_of_the_dtype():
    x = make_inputs(40, 8, 600, entropy=0.3, masked=0.0)
    for dtype, tail_mass in ((torch.float32, 0.0), (torch.bfloat16, 3e-4)):
        found = profile_sparsity(x.hidden.to(dtype), x.weight.to(dtype), x.targets, tail_mass=None)
        assert found.tail_mass == tail_mass
        assert (found.kept_share == 1) == (tail_mass == 0)


def test_a_token_that_padding_predicts_does_not_count():
    pytest.importorskip("transformers", reason="needs the train extra; a model of transformers goes untested")
    from families import IDS, tiny_model

    mask = torch.ones_like(IDS)
    mask[0, :2] = 0  # padding on the left
    found = profile_sparsity(tiny_model("llama").eval(), input_ids=IDS, attention_mask=mask)
    assert found.tokens == mask[:, 1:].sum() - 1


@pytest.mark.parametrize("entropy", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_profile_names_the_path_that_a_call_takes(entropy, dtype, monkeypatch):
    """At speeds at which a flat policy is dense and a certain one is routed; the sample holds all tokens."""
    monkeypatch.setattr(cost, "speeds", lambda work: cost.Speeds(8e10, 8e9, 1e-9, 0.4, 1e-7))
    monkeypatch.setattr(memory.Work, "sample", property(lambda work: work.tokens))
    monkeypatch.setattr(dispatch, "SAMPLE_COST", 1e9)
    x = make_inputs(N, 32, 128 * 40, entropy=entropy, masked=0.0, dtype=dtype)
    found = profile_sparsity(x.hidden, x.weight, x.targets, tail_mass=THETA)
    hidden = x.hidden.clone().requires_grad_()
    advantages = torch.ones(1)
    with mock.patch.object(Head, "one_pass", autospec=True, side_effect=Head.one_pass) as one_pass:
        config = GRPOConfig(policy_loss="reinforce", tail_mass=THETA)
        loss = linear_grpo_loss(hidden[None], x.weight, x.targets[None], advantages=advantages, config=config)
    share = loss.metrics["kept_share"].item()
    assert found.path == ("one_pass" if one_pass.called else "routed" if share < 1 else "two_pass")
    assert found.path == ("routed" if entropy else "one_pass" if dtype == torch.float32 else "two_pass")
    assert (found.predicted_speedup > 1) == (found.path == "routed")
    assert f"takes {found.path}" in str(found)
