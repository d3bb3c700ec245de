"""GRPOConfig's policy losses against TRL's own `_compute_loss`, in float64, on log-probs given to both."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; SAPO, VESPO and LUSPO go without an outside oracle")

from trl import GRPOTrainer

from lad_kernels import GRPOConfig, grpo_loss

B, T = 5, 6
TRL = {  # TRL's loss_type and level; ours
    "sapo": ("sapo", "token", GRPOConfig(policy_loss="sapo", loss_agg_mode="seq-mean-token-mean", kl_coef=0.1)),
    "sapo of the mean": ("sapo", "sequence", GRPOConfig(
        policy_loss="sapo", loss_agg_mode="seq-mean-token-mean", importance_sampling_level="sequence", kl_coef=0.1)),
    "vespo": ("vespo", "token", GRPOConfig(policy_loss="vespo", importance_sampling_level="sequence_sum", kl_coef=0.1)),
    "luspo": ("luspo", "sequence", GRPOConfig(
        policy_loss="luspo", importance_sampling_level="sequence", loss_agg_mode="seq-mean-token-sum", kl_coef=0.1)),
    "cispo": ("cispo", "token", GRPOConfig(policy_loss="cispo", epsilon_low=1.0, epsilon_high=0.2, kl_coef=0.1)),
    "grpo": ("grpo", "token", GRPOConfig(loss_agg_mode="seq-mean-token-mean", kl_coef=0.1)),
}  # fmt: skip


def trl_loss(kind: str, level: str, config: GRPOConfig, logprobs, kw) -> torch.Tensor:
    """GRPOTrainer._compute_loss on a stand-in that returns the given log-probs."""
    mask = kw["loss_mask"].long()
    args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        args=args, accelerator=accelerator, loss_type=kind, importance_sampling_level=level, beta=config.kl_coef,
        epsilon_low=config.epsilon_low, epsilon_high=1.2 if kind == "cispo" else config.epsilon_high,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, max_completion_length=T,
        _metrics=defaultdict(lambda: defaultdict(list)), get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T),
        "completion_mask": mask,
        "advantages": kw["advantages"],
        "old_per_token_logps": kw["old_logprobs"],
        "ref_per_token_logps": kw["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("impl", ("reference", "torch"))
@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_are_those_of_trl(name, impl):
    kind, level, config = TRL[name]
    gen = torch.Generator().manual_seed(0)
    noise = lambda scale: scale * torch.randn(B, T, generator=gen, dtype=torch.float64)  # noqa: E731
    logp = noise(0.5) - 3
    mask = torch.rand(B, T, generator=gen) < 0.7
    mask[:, 0] = True
    kw = dict(
        old_logprobs=logp - noise(0.2),
        ref_logprobs=logp - noise(0.2),
        loss_mask=mask,
        advantages=torch.tensor([1.0, -0.7, 0.0, 2.0, -1.5], dtype=torch.float64),
    )
    ours, theirs = (logp.clone().requires_grad_() for _ in range(2))
    out = grpo_loss(ours, config=config, impl=impl, **kw)
    out.loss.backward()
    truth = trl_loss(kind, level, config, theirs, kw)
    truth.backward()
    torch.testing.assert_close(out.loss, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert ours.grad.count_nonzero()
