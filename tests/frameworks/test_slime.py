"""The adapter of slime, beside a stub of its scoring function."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from adapter_checks import BAD, Fill, Found, absent, check_masked_tokens, close, put
from pages import snippets_of
from torch import Tensor

from lad_kernels import LADConfig
from lad_kernels.frameworks.slime import slime_lad_loss
from lad_kernels.objective.config import DIVERGENCES


def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, total_lengths, response_lengths, **top_p):
    """slime's, without its parallelism: logits [1, N, V] -> log-probs [T_i] of the responses."""
    logp = (logits[0] / args.rollout_temperature).log_softmax(-1)  # [N, V]
    rows, start = [], 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths):
        own = logp[start + total - response - 1 : start + total - 1]
        rows.append(own.gather(-1, tokens[total - response :, None])[:, 0])
        start += total
    return torch.empty(0), {"log_probs": rows}


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    put(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )


def case(**more) -> tuple[SimpleNamespace, dict, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Arguments, batch, logits [1, N, V], the reducer (a sum of means over samples, divisors fixed beforehand) and the
    mask that it multiplies by [M]."""
    g = torch.Generator().manual_seed(1)
    totals, responses, vocab = [6, 4], [4, 2], 11
    masks = [torch.tensor([1.0, 1, 0, 1]), torch.tensor([1.0, 1])]
    divisors = [5, 5]  # both samples belong to one rollout
    logits = torch.randn(1, sum(totals), vocab, generator=g)
    batch = {
        "unconcat_tokens": [torch.randint(0, vocab, (n,), generator=g) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "advantages": [torch.randn(1, generator=g).expand(n) for n in responses],
        "log_probs": [-3 * torch.rand(n, generator=g) for n in responses],
    }

    def reduce(x):
        return sum((a * m).sum() / d for a, m, d in zip(x.split(responses), masks, divisors))

    args = SimpleNamespace(rollout_temperature=0.8, use_rollout_logprobs=False, lad={"eta": 0.6}, **more)
    return args, batch, logits, reduce, torch.cat(masks)


def scored(args: SimpleNamespace, batch: dict, logits: Tensor) -> Tensor:
    """Log-probs of all responses [M]."""
    given = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    return torch.cat(get_log_probs_and_entropy(logits, args=args, **given)[1]["log_probs"])


def test_lads_gradient_under_its_own_reduction():
    args, batch, logits, reduce, mask = case(entropy_coef=0.0, use_tis=False)
    leaf = logits.clone().requires_grad_()
    loss, log = slime_lad_loss(args, batch, leaf, reduce)
    loss.backward()

    wide = logits.double().requires_grad_()
    logp, old = scored(args, batch, wide), torch.cat(batch["log_probs"]).double()
    u = torch.cat(batch["advantages"]).double() / 0.6
    x = (logp - old - u).exp()
    tokens = u.exp() * 0.5 * (x * x.log() - (x + 1) * ((x + 1) / 2).log())  # js, as the paper writes it
    reduce(tokens).backward()
    assert close(leaf.grad, wide.grad)
    assert log["loss"] == loss.detach()
    assert torch.isclose(log["ppo_kl"].double(), reduce(old - logp), rtol=1e-5)

    on_policy = {name: x for name, x in batch.items() if name != "log_probs"}
    assert slime_lad_loss(args, on_policy, logits, reduce)[1]["lad/ratio"] == reduce(torch.ones_like(mask))


def test_refuses_what_it_cannot_honour():
    for name, value in (("entropy_coef", 0.01), ("use_tis", True), ("use_kl_loss", True)):
        args, batch, logits, reduce, _ = case(**{name: value})
        with pytest.raises(ValueError, match=f"^{name}: "):
            slime_lad_loss(args, batch, logits, reduce)
    args, batch, logits, reduce, _ = case()
    args.lad = {"importance_sampling_level": "sequence"}
    with pytest.raises(ValueError, match=r"^importance_sampling_level: "):
        slime_lad_loss(args, batch, logits, reduce)


def test_says_what_is_missing_without_its_framework(monkeypatch):
    absent(monkeypatch, "slime")
    with pytest.raises(ImportError, match="slime"):
        slime_lad_loss(None, {}, None, None)


def test_configuration_of_the_page():
    """Its flags are taken as they stand, with slime's names and types; its file has fields of LADConfig."""
    (flags,), (settings,) = (snippets_of("docs/frameworks/slime.md", language) for language in ("diff", "yaml"))
    parser = argparse.ArgumentParser()
    for name in ("advantage-estimator", "loss-type", "custom-loss-function-path", "custom-config-path"):
        parser.add_argument(f"--{name}")
    for name in ("eps-clip", "eps-clip-high"):
        parser.add_argument(f"--{name}", type=float)
    given = parser.parse_args(shlex.split(flags.after)[1:-1])
    assert given.custom_loss_function_path == f"{slime_lad_loss.__module__}.{slime_lad_loss.__name__}"
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; lost: slime's configuration on its page")
    own = yaml.safe_load(settings.source)["lad"]
    assert LADConfig(**own).eta == 0.25
    args, batch, logits, reduce, _ = case()
    args.lad, args.eps_clip, args.eps_clip_high = own, given.eps_clip, given.eps_clip_high
    with pytest.warns(UserWarning, match=r"out of \[0.8, 1.28\]"):
        assert slime_lad_loss(args, batch, logits, reduce)[0].isfinite()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_have_no_effect(divergence):
    def run(fill: Fill) -> Found:
        args, batch, logits, reduce, mask = case(use_tis=False)
        args.lad["divergence"] = divergence
        logp = scored(args, batch, logits)  # [M]
        for name in ("log_probs", "advantages"):
            batch[name] = torch.where(mask.bool(), torch.cat(batch[name]), fill(logp)).split(batch["response_lengths"])
        leaf = logits.clone().requires_grad_()
        loss, metrics = slime_lad_loss(args, batch, leaf, reduce)
        loss.backward()
        return {**metrics, "loss": loss, "gradient": leaf.grad}

    check_masked_tokens(run)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_is_dropped_and_counted(bad):
    """Not adapter_checks.check_bad_token: slime's gradient is that of its logits, and its reducer makes the mask."""

    def run(masks):
        args, batch, logits, _, _ = case()
        batch["log_probs"][0][1] = bad
        lengths, leaf = batch["response_lengths"], logits.clone().requires_grad_()

        def reduce(x):
            return (x.split(lengths)[0] * masks[0]).sum() / 5 + (x.split(lengths)[1] * masks[1]).sum() / 5

        loss, log = slime_lad_loss(args, batch, leaf, reduce)
        loss.backward()
        return loss.detach(), leaf.grad, log

    masks = torch.tensor([1.0, 1, 0, 1]), torch.tensor([1.0, 1])
    loss, gradient, log = run(masks)
    expected_loss, expected_gradient, expected_log = run((torch.tensor([1.0, 0, 0, 1]), masks[1]))
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient) and loss.isfinite()
    assert log["lad/nonfinite_share"] == 1 / 5  # in the reducer's own terms
    assert all(torch.equal(log[n], expected_log[n]) for n in log if n != "lad/nonfinite_share")


def test_a_nan_of_the_policy_propagates():
    args, batch, logits, reduce, _ = case()
    leaf = logits.clone()
    leaf[0, 2] = math.nan  # the row that predicts the first loss token
    for log_probs in (batch["log_probs"], None):
        loss, _ = slime_lad_loss(args, {**batch, "log_probs": log_probs}, leaf.requires_grad_(), reduce)
        assert loss.isnan()


@pytest.mark.parametrize(
    ("clips", "lad", "expected"),
    [
        ({"eps_clip": 0.2, "eps_clip_high": None}, {}, {}),  # slime's defaults
        ({"eps_clip": 0.2, "eps_clip_high": None}, {"epsilon_high": 0.2}, {"epsilon_high": 0.2}),
        ({"eps_clip": 0.1, "eps_clip_high": None}, {}, {"epsilon_low": 0.1, "epsilon_high": 0.1}),
        ({"eps_clip": 0.2, "eps_clip_high": 0.28}, {}, {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    ],
)
def test_its_own_clip_is_the_bound_on_the_ratio(clips, lad, expected):
    args, batch, logits, reduce, _ = case(**clips)
    plain, *_ = case()
    args.lad, plain.lad = {"eta": 0.6, **lad}, {"eta": 0.6, **expected}
    batch["advantages"] = [torch.full((4,), 2.0), torch.full((2,), -2.0)]
    own = scored(args, batch, logits).split(batch["response_lengths"])
    batch["log_probs"] = [own[0] - 0.4, own[1] + 0.4]  # ratios of 1.49 and 0.67, short of both targets
    gradients = []
    for each in (args, plain):
        leaf = logits.clone().requires_grad_()
        slime_lad_loss(each, batch, leaf, reduce)[0].backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    free, *_ = case()
    leaf = logits.clone().requires_grad_()
    slime_lad_loss(free, batch, leaf, reduce)[0].backward()
    assert torch.equal(leaf.grad, gradients[0]) == (not expected)  # the bound stops something in this case


def test_a_bound_that_contradicts_its_clip_is_refused():
    args, batch, logits, reduce, _ = case(eps_clip=0.1, eps_clip_high=None)
    args.lad = {"epsilon_high": 0.3}
    with pytest.raises(ValueError, match=r"epsilon_high: expected 0\.1 as --eps-clip has it, got 0\.3"):
        slime_lad_loss(args, batch, logits, reduce)


@pytest.mark.parametrize(
    ("clip", "words"),
    [(0.2, "no bound on the ratio; slime's default --eps-clip sets none"), (0.1, r"out of \[0.9, 1.1\]")],
)
def test_the_bound_in_effect_is_said(clip, words):
    args, batch, logits, reduce, _ = case(eps_clip=clip, eps_clip_high=None)
    with pytest.warns(UserWarning, match=words):
        slime_lad_loss(args, batch, logits.requires_grad_(), reduce)
