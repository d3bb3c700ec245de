"""Values without meaning for any objective: refused where they may be read; and unusual values that are legal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_api import good, packed

from lad_kernels import GRPOConfig, LADConfig, checks, group_advantages, grpo_loss, lad_loss, linear_lad_loss

NAN, INF = math.nan, math.inf
IMPLS = ("reference", "torch", "triton")


def tokens(**changes):
    """Arguments of lad_loss for two sequences of two tokens, with changes."""
    kw = dict(
        logprobs=torch.tensor([[-1.0, -2.0], [-0.5, -3.0]]),
        old_logprobs=torch.tensor([[-1.1, -2.0], [-0.7, -2.5]]),
        advantages=torch.tensor([1.0, -1.0]),
    )
    return {**kw, **changes}


HALF = torch.tensor([[-1.0, 0.9], [-0.5, -3.0]])
KL = LADConfig(kl_coef=0.1)
BAD_VALUES = {
    "normalizer tensor 0": (dict(normalizer=torch.tensor(0)), ValueError, "normalizer: expected a finite number > 0, got 0"),
    "normalizer tensor negative": (dict(normalizer=torch.tensor(-2.0)), ValueError, "normalizer: expected a finite number > 0"),
    "normalizer tensor nan": (dict(normalizer=torch.tensor(NAN)), ValueError, "normalizer: expected a finite number > 0"),
    "positive log-probs": (dict(logprobs=HALF), ValueError, "logprobs: expected log-probabilities in nats, .*got 0.9"),
    "positive old log-probs": (dict(old_logprobs=HALF), ValueError, "old_logprobs: expected log-probabilities"),
    "positive reference": (dict(ref_logprobs=HALF, config=KL), ValueError, "ref_logprobs: expected log-probabilities"),
    "negative weights": (dict(rollout_is_weights=torch.tensor([1.0, -1.0])), ValueError, "rollout_is_weights: expected importance weights >= 0"),
    "negative token weight": (dict(rollout_is_weights=-HALF), ValueError, "rollout_is_weights: expected importance weights >= 0"),
    "nan advantage": (dict(advantages=torch.tensor([1.0, NAN])), ValueError, "advantages: expected finite values"),
    "inf token advantage": (dict(advantages=torch.tensor([[0.0, 1], [INF, 1]])), ValueError, "advantages: expected finite values"),
}  # fmt: skip
BAD_KINDS = {
    "normalizer tensor bool": (dict(normalizer=torch.tensor(True)), TypeError, r"normalizer: .*pass mask\.sum\(\)"),
    "normalizer bool": (dict(normalizer=True), ValueError, "normalizer: expected a finite number > 0, got True"),
    "integer log-probs": (dict(logprobs=torch.zeros(2, 2, dtype=torch.long)), TypeError, "logprobs: expected float16"),
    "integer old": (dict(old_logprobs=torch.zeros(2, 2, dtype=torch.long)), TypeError, "old_logprobs: expected float16"),
    "group of one, target norm": (dict(config=LADConfig(target_norm="group"), group_size=1), ValueError, "integer >= 2, got 1; alone"),
    "advantages [1, B]": (dict(advantages=torch.zeros(1, 2)), ValueError, r"advantages: expected \[2\] \(one per sequence\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES | BAD_KINDS)
def test_refused(name):
    kw, error, message = (BAD_VALUES | BAD_KINDS)[name]
    with pytest.raises(error, match=message):
        lad_loss(**tokens(**kw))


@pytest.mark.parametrize("name", BAD_VALUES)
def test_refused_on_an_accelerator_only_if_asked(name, monkeypatch):
    """There a check would wait for the device."""
    monkeypatch.setattr(checks, "may_read", lambda x: False)
    lad_loss(**tokens(**BAD_VALUES[name][0]))


@pytest.mark.parametrize("name", [n for n in BAD_VALUES if "normalizer" not in n])
def test_what_does_not_count_may_hold_anything(name):
    """The second sequence and the second token of the first are masked."""
    mask = torch.tensor([[True, False], [False, False]])
    assert lad_loss(**tokens(**BAD_VALUES[name][0], loss_mask=mask)).loss.isfinite()


def test_refused_through_the_head():
    for kw in (dict(advantages=torch.tensor([NAN, 1.0])), dict(normalizer=torch.tensor(0.0)), dict(temperature=True),
               dict(temperature=INF), dict(temperature=torch.tensor(INF)), dict(temperature=torch.full((2, 3), NAN)),
               dict(old_logprobs=torch.ones(2, 3)), dict(softcap=True), dict(logit_scale=True)):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(kw))}: expected"):
            linear_lad_loss(**good(**kw))
    with pytest.raises(TypeError, match="temperature: expected numbers"):
        linear_lad_loss(**good(temperature=torch.tensor(True)))
    for scale in ("group", "batch", "none", "loo"):
        with pytest.raises(ValueError, match="integer >= 2, got 1; alone in its group"):
            linear_lad_loss(
                **good(advantages=None, rewards=torch.zeros(2), group_size=1, config=LADConfig(advantage_scale=scale))
            )


@pytest.mark.parametrize("eps", (0, 0.0, -1e-4, NAN, INF))
def test_eps_of_the_deviation(eps):
    with pytest.raises(ValueError, match="eps: expected a finite number > 0"):
        group_advantages(torch.rand(4), group_size=2, eps=eps)


@pytest.mark.parametrize("value", ("no", 0, None, torch.tensor(True)))
def test_centered_is_a_truth_value(value):
    with pytest.raises(TypeError, match="centered: expected True or False"):
        LADConfig(centered=value)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_one_by_id_has_no_advantage(impl):
    out = linear_lad_loss(
        **good(advantages=None, rewards=torch.tensor([3.0, 1.0]), group_ids=torch.tensor([4, 9])), impl=impl
    )
    assert not out.advantages.count_nonzero()


@pytest.mark.parametrize("impl", IMPLS)
def test_epsilon_low_of_one_or_more_is_no_lower_bound(impl):
    kw = tokens(logprobs=torch.tensor([[-9.0, -2.0], [-7.0, -3.0]]))
    kw["advantages"] = torch.tensor([-1.0, -1.0])
    for policy_loss in ("ppo", "cispo"):
        outs = [
            grpo_loss(**kw, config=GRPOConfig(policy_loss=policy_loss, epsilon_low=e), impl=impl) for e in (0.2, 1, 9.0)
        ]
        assert torch.equal(outs[1].loss, outs[2].loss) and outs[2].metrics["clip_share"] == 0
        assert outs[0].loss != outs[1].loss


@pytest.mark.parametrize("impl", IMPLS)
def test_unused_arguments_are_legal_and_change_nothing(impl):
    """A switch of kl_coef or target_norm needs no other call."""
    plain = lad_loss(**tokens(), impl=impl)
    more = lad_loss(
        **tokens(ref_logprobs=torch.full((2, 2), -7.0), group_size=2, group_ids=torch.zeros(2).long()), impl=impl
    )
    assert torch.equal(plain.loss, more.loss) and plain.metrics.keys() == more.metrics.keys()


NUMBERS = (np.float32, np.float64, np.float16, np.int64, np.int32)


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda k: k.__name__)
def test_numpy_scalars_are_numbers(kind):
    one = kind(1)
    config = LADConfig(
        eta=one,
        log_ratio_clamp=kind(3),
        target_clamp=kind(2),
        kl_coef=one,
        kl_clamp=kind(2),
        entropy_coef=one,
        tail_mass=kind(0),
        epsilon_low=kind(0),
        epsilon_high=one,
    )
    plain = LADConfig(
        eta=1,
        log_ratio_clamp=3,
        target_clamp=2,
        kl_coef=1,
        kl_clamp=2,
        entropy_coef=1,
        tail_mass=0,
        epsilon_low=0,
        epsilon_high=1,
    )
    assert config == plain and type(config.eta) in (int, float)
    assert GRPOConfig(epsilon_low=one, epsilon_high=one, dual_clip=kind(2)) == GRPOConfig(
        epsilon_low=1, epsilon_high=1, dual_clip=2
    )
    kw = good(ref_logprobs=-torch.ones(2, 3))
    for impl in IMPLS:
        a = linear_lad_loss(
            **kw, config=config, normalizer=kind(4), temperature=kind(2), logit_scale=one, softcap=kind(9), impl=impl
        )
        b = linear_lad_loss(
            **kw, config=plain, normalizer=4.0, temperature=2.0, logit_scale=1.0, softcap=9.0, impl=impl
        )
        assert torch.equal(a.loss, b.loss)
    size = np.int64(2)
    eps = kind(1) if kind is not np.float16 else kind(0.5)
    assert torch.equal(
        group_advantages(torch.arange(4.0), group_size=size, eps=eps),
        group_advantages(torch.arange(4.0), group_size=2, eps=float(eps)),
    )
    with pytest.raises(TypeError, match="eta: expected a number"):
        LADConfig(eta=np.bool_(True))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_column_is_one_value_per_sequence(impl):
    """[B, 1] is how frameworks broadcast over [B, T]; packed input too."""
    weights, advantages = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    for make in (good, packed):
        torch.manual_seed(0)
        kw = make()
        flat = linear_lad_loss(**(kw | dict(advantages=advantages, rollout_is_weights=weights)), impl=impl)
        column = linear_lad_loss(
            **(kw | dict(advantages=advantages[:, None], rollout_is_weights=weights[:, None])), impl=impl
        )
        assert torch.equal(flat.loss, column.loss) and torch.equal(flat.advantages, column.advantages)
    kw, temperature = good(), torch.tensor([[0.5], [2.0]])
    spread = linear_lad_loss(**kw, temperature=temperature.expand(2, 3).contiguous(), impl=impl)
    assert torch.equal(linear_lad_loss(**kw, temperature=temperature, impl=impl).loss, spread.loss)
