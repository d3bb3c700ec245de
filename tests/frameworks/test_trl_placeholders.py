"""LADTrainer: the contents of masked tokens have no effect, bit for bit, on any path of the loss."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; LADTrainer goes untested")

from test_trl_loss import TamperedTrainer
from trl_cases import ON_CPU, PROMPTS, build, load, options, save_model

from lad_kernels.frameworks.trl import LADConfig
from lad_kernels.objective.config import DIVERGENCES

pytestmark = ON_CPU

PLACEHOLDERS = {
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "-inf": lambda x: torch.full_like(x, -math.inf),
    "1e4": lambda x: torch.full_like(x, 1e4),
    "-1e4": lambda x: torch.full_like(x, -1e4),
    "95 nats below": lambda x: x - 95,
    "95 nats above": lambda x: x + 95,
}
WAYS = {
    "one call": dict(),
    "reference": dict(beta=0.1, use_bias_correction_kl=False, importance_sampling_level="sequence"),
    "reference, corrected": dict(beta=0.1, loss_agg_mode="seq-mean-token-mean"),
    "corrected, by sequence": dict(beta=0.1, importance_sampling_level="sequence_sum"),
    "high entropy, bonus": dict(top_entropy_quantile=0.6, entropy_coef=0.1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def found(trainer, rollout) -> dict[str, torch.Tensor]:
    """Loss, gradients and what was logged."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, rollout)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    return {"loss": loss.detach(), **grads, **{n: torch.tensor(x) for n, x in trainer._metrics["train"].items()}}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("way", WAYS)
def test_masked_tokens_have_no_effect(way, divergence, folder, tmp_path):
    given = options(tmp_path, divergence=divergence, num_iterations=2, eta=1.0, **WAYS[way])
    trainer = build(TamperedTrainer, LADConfig(**given), load(folder))
    trainer.extras = ("tools", "token weights")
    trainer.current_gradient_accumulation_steps = 1
    rollout = trainer._generate_and_score_completions(list(PROMPTS.select([0] * 4)))
    mask = (rollout["completion_mask"] * rollout["tool_mask"]).bool()  # [B, T]
    assert 0 < mask.sum() < mask.numel()
    rollout["advantages"] = rollout["advantages"][:, None].expand(mask.shape).clone()  # TRL takes [B, T] too
    names = ("old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio", "advantages")
    names = [n for n in names if n in rollout]
    assert len(names) == 3 + ("beta" in WAYS[way])
    rollout["old_per_token_logps"] += 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    expected = found(trainer, rollout)
    assert all(x.isfinite().all() for x in expected.values()) and expected["lm_head.weight"].count_nonzero()
    for name, fill in PLACEHOLDERS.items():
        filled = {n: torch.where(mask, rollout[n], fill(rollout[n])) for n in names}
        values = found(trainer, rollout | filled)
        assert values.keys() == expected.keys()
        assert [n for n, x in values.items() if not torch.equal(x, expected[n])] == [], name
