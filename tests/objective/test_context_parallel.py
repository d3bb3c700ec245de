"""`context_parallel_loss` on one rank: what it refuses, drops and bounds; test_distributed.py has its numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from adapter_checks import (
    BAD,
    LOSS_MASK,
    MASK,
    PLACE,
    Fill,
    Found,
    Result,
    Run,
    batch,
    check_bad_token,
    check_masked_tokens,
    check_nan_of_the_policy,
    filled,
)
from torch import Tensor

from lad_kernels import GRPOConfig, LADConfig, lad_loss
from lad_kernels.frameworks.distributed import context_parallel_loss
from lad_kernels.objective.config import DIVERGENCES

WHOLE = {
    "vespo": {"importance_sampling_level": "sequence_sum"},
    "luspo": {"importance_sampling_level": "sequence", "loss_agg_mode": "seq-mean-token-sum"},
}


@pytest.mark.parametrize("policy_loss", WHOLE)
def test_losses_that_weigh_whole_sequences_are_refused_by_name(policy_loss):
    config = GRPOConfig(policy_loss=policy_loss, **WHOLE[policy_loss])
    with pytest.raises(ValueError, match=rf"policy_loss: expected .*, got '{policy_loss}', .* keep sequences whole"):
        context_parallel_loss(torch.zeros(2, 3), None, torch.ones(2), group=None, config=config)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_tokens_have_no_effect(divergence, alone):
    def run(fill: Fill) -> Found:
        data, found = filled(fill, "logp", "old", "ref", "weights"), {}
        entropy = torch.where(MASK, 1.0, fill(torch.zeros(MASK.shape)))  # [B, T]
        for level in ("token", "sequence", "sequence_sum"):
            leaves = [x.clone().requires_grad_() for x in (data["logp"], entropy)]
            config = LADConfig(divergence=divergence, importance_sampling_level=level, kl_coef=0.1, entropy_coef=0.1)
            out = context_parallel_loss(
                leaves[0],
                data["old"],
                data["advantages"][:, 0],
                group=alone,
                loss_mask=MASK,
                config=config,
                ref_logprobs=data["ref"],
                entropy=leaves[1],
                rollout_is_weights=data["weights"],
            )
            out.loss.backward()
            values = {**out.metrics, "loss": out.loss, "gradient": leaves[0].grad, "entropy gradient": leaves[1].grad}
            found |= {f"{level} {n}": x for n, x in values.items()}
        return found

    check_masked_tokens(run)


def at_level(level: str, group) -> Run:
    def run(data: dict[str, Tensor], mask: Tensor) -> Result:
        leaf = data["logp"].clone().requires_grad_()
        config = LADConfig(importance_sampling_level=level, kl_coef=0.1, loss_agg_mode="seq-mean-token-mean")
        out = context_parallel_loss(
            leaf,
            data["old"],
            data["advantages"][:, 0],
            group=group,
            loss_mask=mask,
            config=config,
            ref_logprobs=data["ref"],
            rollout_is_weights=data["weights"],
        )
        out.loss.backward()
        return out.loss, leaf.grad, out.metrics["nonfinite_share"]

    return run


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ("old", "ref", "weights"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_a_bad_token_is_dropped_and_counted(level, name, bad, alone):
    check_bad_token(at_level(level, alone), name, bad)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_a_nan_of_the_policy_propagates(level, alone):
    check_nan_of_the_policy(at_level(level, alone))


@pytest.mark.parametrize("level", ("token", "sequence", "sequence_sum"))
def test_drops_what_lad_loss_drops(level, alone):
    data = batch(LOSS_MASK)
    for name, place in (("old", (0, 2)), ("ref", (2, 1)), ("weights", (2, 3))):
        data[name][place] = math.nan
    config = LADConfig(importance_sampling_level=level, kl_coef=0.1, loss_agg_mode="seq-mean-token-sum")
    given = {"loss_mask": LOSS_MASK, "config": config, "ref_logprobs": data["ref"]}
    found = context_parallel_loss(data["logp"], data["old"], data["advantages"][:, 0], group=alone, **given)
    whole = lad_loss(data["logp"], data["old"], data["advantages"][:, 0], **given)
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.equal(found.logprobs, whole.logprobs)
    for name in found.metrics:
        if "_mean_" not in name and "loss_above" not in name:
            assert found.metrics[name].item() == pytest.approx(whole.metrics[name].item(), rel=1e-5, abs=1e-6), name


def test_bounds_the_kl_term_as_lad_loss(alone):
    data, config = batch(LOSS_MASK), LADConfig(kl_coef=0.1, kl_clamp=0.05)
    for name in ("logp", "old"):  # the reference is 95 nats above the policy
        data[name][PLACE] -= 95
    found = {}
    given = {"loss_mask": LOSS_MASK, "config": config, "ref_logprobs": data["ref"]}
    for loss, group in ((context_parallel_loss, {"group": alone}), (lad_loss, {})):
        leaf = data["logp"].clone().requires_grad_()
        out = loss(leaf, data["old"], data["advantages"][:, 0], **given, **group)
        out.loss.backward()
        found[loss] = torch.cat([out.loss.detach()[None], out.metrics["kl_ref"][None], leaf.grad.flatten()])
    torch.testing.assert_close(found[context_parallel_loss], found[lad_loss], rtol=1e-6, atol=1e-7)
    assert found[lad_loss].isfinite().all()
