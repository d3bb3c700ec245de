"""Fused losses for reinforcement learning of language models: hidden states in, gradients out, no N x V logits.

from lad_kernels import linear_lad_loss
out = linear_lad_loss(hidden_states, lm_head.weight, target_ids, old_logprobs, rewards=rewards, group_size=8)
out.loss.backward()
"""

from lad_kernels.cross_entropy import linear_cross_entropy
from lad_kernels.head import SparsityProfile, linear_logprobs, profile_sparsity
from lad_kernels.loss import LADLoss, linear_grpo_loss, linear_lad_loss
from lad_kernels.objective import GRPOConfig, LADConfig, group_advantages, grpo_loss, lad_loss
from lad_kernels.outputs import CrossEntropyStats, LinearLogprobs, LossOutput
from lad_kernels.own_objective import Tokens
from lad_kernels.policy_loss import linear_policy_loss

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyStats",
    "GRPOConfig",
    "LADConfig",
    "LADLoss",
    "LinearLogprobs",
    "LossOutput",
    "SparsityProfile",
    "Tokens",
    "group_advantages",
    "grpo_loss",
    "lad_loss",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_lad_loss",
    "linear_logprobs",
    "linear_policy_loss",
    "profile_sparsity",
]
