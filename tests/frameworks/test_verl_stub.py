"""The adapter of verl beside stubs of what it imports; with_verl/ tests it with verl itself."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from adapter_checks import (
    BAD,
    MASK,
    Fill,
    Found,
    Result,
    Run,
    absent,
    check_bad_token,
    check_masked_tokens,
    check_nan_of_the_policy,
    filled,
    fresh,
    put,
)
from torch import Tensor

from lad_kernels.objective.config import DIVERGENCES

ADAPTER = "lad_kernels.frameworks.verl"


@pytest.fixture
def verl(monkeypatch):
    """The adapter beside the stubs."""

    @dataclass
    class PolicyLossConfig:
        loss_mode: str = "vanilla"

    put(monkeypatch, "verl.models.transformers.monkey_patch", patch_forward_with_backends=None)
    put(monkeypatch, "verl.models.transformers.dense_common", CausalLMOutputForPPO=SimpleNamespace)
    put(monkeypatch, "verl.trainer.ppo.core_algos", register_policy_loss=lambda name: lambda function: function)
    put(monkeypatch, "verl.workers.config", PolicyLossConfig=PolicyLossConfig)
    return fresh(monkeypatch, ADAPTER)


def test_says_what_is_missing_without_its_framework(monkeypatch):
    absent(monkeypatch, "verl")
    adapter = fresh(monkeypatch, ADAPTER)
    with pytest.raises(ImportError, match="verl"):
        adapter.LADPolicyLossConfig()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_have_no_effect(divergence, verl):
    def run(fill: Fill) -> Found:
        data, found = filled(fill, "logp", "old", "weights", "advantages"), {}
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            for level in ("token", "sequence"):
                settings = verl.LADPolicyLossConfig(divergence=divergence, importance_sampling_level=level)
                leaf = data["logp"].clone().requires_grad_()
                loss, metrics = verl.lad_policy_loss(
                    data["old"],
                    leaf,
                    data["advantages"],
                    MASK.float(),
                    mode,
                    SimpleNamespace(policy_loss=settings),
                    data["weights"],
                )
                loss.backward()
                numbers = {n: torch.tensor(x) for n, x in metrics.items()}
                values = {**numbers, "loss": loss, "gradient": leaf.grad}
                found |= {f"{mode} {level} {n}": x for n, x in values.items()}
        return found

    check_masked_tokens(run)


def reduced(verl, mode: str) -> Run:
    def run(data: dict[str, Tensor], mask: Tensor) -> Result:
        leaf = data["logp"].clone().requires_grad_()
        counts = {"dp_size": 2, "batch_num_tokens": 20, "global_batch_size": 6}
        config = SimpleNamespace(policy_loss=verl.LADPolicyLossConfig(), global_batch_info=counts)
        given = data["old"], leaf, data["advantages"], mask, mode, config, data["weights"]
        loss, metrics = verl.lad_policy_loss(*given)
        loss.backward()
        return loss, leaf.grad, metrics["actor/lad/nonfinite_share"]

    return run


MODES = ("token-mean", "seq-mean-token-mean")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ("old", "weights"))
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_token_is_dropped_and_counted(mode, name, bad, verl):
    check_bad_token(reduced(verl, mode), name, bad)


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_of_the_policy_propagates(mode, verl):
    check_nan_of_the_policy(reduced(verl, mode))


@pytest.mark.parametrize(
    ("actor", "own", "bounds"),
    [
        (dict(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2), {}, (None, None)),
        (dict(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28), {}, (0.2, 0.28)),
        (dict(clip_ratio=0.3, clip_ratio_low=None, clip_ratio_high=None), {}, (0.3, 0.3)),
        (dict(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2), {"epsilon_high": 0.1}, (None, 0.1)),
        ({}, {"epsilon_low": 0.2, "epsilon_high": 0.2}, (0.2, 0.2)),
    ],
)
def test_which_bounds_are_in_effect(actor, own, bounds, verl):
    found = verl.LADPolicyLossConfig(**own).lad_config(actor=SimpleNamespace(**actor))
    assert (found.epsilon_low, found.epsilon_high) == bounds
    with pytest.raises(ValueError, match=r"epsilon_low: expected 0\.4 as the actor's clip_ratio has it, got 0\.1"):
        verl.LADPolicyLossConfig(epsilon_low=0.1).lad_config(actor=SimpleNamespace(clip_ratio_low=0.4))
    unread = SimpleNamespace(clip_ratio=0.3, clip_ratio_low=0.2, clip_ratio_high=0.2)  # as verl's own YAML has them
    with pytest.raises(ValueError, match=r"clip_ratio: expected clip_ratio_low and clip_ratio_high .* got 0\.3"):
        verl.LADPolicyLossConfig().lad_config(actor=unread)
