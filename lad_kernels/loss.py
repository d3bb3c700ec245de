"""The fused losses: hidden states and rewards in, a differentiable loss out.

The head gives the objective N log-probabilities, the objective returns one coefficient per token, c_t = d loss /
d logp_t (and one for the entropy). Both run in the forward; the backward is the head's alone, with c already known, and
never passes through the objective again. step.py decides what is computed when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lad_kernels import checks
from lad_kernels.compiled_loss import compiled_loss
from lad_kernels.head import HeadArguments
from lad_kernels.objective import GRPOConfig, LADConfig, PolicyConfig, PolicyInputs
from lad_kernels.outputs import LossOutput
from lad_kernels.policy_step import prepared, reference_loss, run
from lad_kernels.step import Wanted, attach

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_lad_loss(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None = None,  # the shape of target_ids
    *,
    advantages: Tensor | None = None,  # [B], or the shape of target_ids
    rewards: Tensor | None = None,  # [B]
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    loss_mask: Tensor | None = None,  # the shape of target_ids
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: LADConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of target_ids
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of target_ids
    return_entropy: bool = False,
    return_logprobs: bool = True,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
    capturable: bool = False,
) -> LossOutput:
    """LAD (arXiv 2602.20132) from last hidden states and the lm_head weight, without storing N x V logits.

    Args:
        hidden_states: [N, D] or [B, T, D], bfloat16, float16, float32 or float64; after the final norm.
        lm_head_weight: [V, D], same dtype, as `lm_head.weight` stores it.
        target_ids: [N] or [B, T] integers in [0, V), already shifted: target_ids[t] is predicted by hidden_states[t].
        old_logprobs: the behaviour policy's log-probs in nats, shaped like target_ids; None means on-policy: the ratio
            is exactly 1. Where one is not finite its token is dropped, as by `lad_loss`.
        advantages: one per sequence [B] or one per token. Give this or `rewards`.
        rewards: [B], turned into advantages by `config.advantage_scale`; needs `group_size` or `group_ids`.
        loss_mask: nonzero where a token counts. Others are dropped before the first product, get exactly zero
            gradient and may hold anything (-100, NaN). A fully masked batch gives a differentiable zero.
        cu_seqlens: int32 [B + 1] cumulative lengths of packed [N] input, flash-attention's convention. Tokens beyond
            cu_seqlens[-1] are padding and count as masked; on an accelerator without loss_mask, where that bound is
            not read, they still pass through the head and their hidden states must be finite.
        group_size, group_ids: which sequences are samples of one prompt: as many in a row, or equal ids [B]. Needed for
            `rewards` and `config.target_norm`, else not read.
        bias: [V] head bias.
        temperature: a number, or a float tensor with one value per token: logits are divided by it.
        logit_scale: multiplies the product (Cohere's logit_scale; for Granite 1 / logits_scaling).
        softcap: c in c tanh(z / c) (Gemma's final_logit_softcapping).
        config: divergence, eta, ratio level, aggregation, bounds, clamps, KL and entropy weights, tail_mass.
        normalizer: the divisor of the sum over tokens or sequences, by the aggregation. Give the global batch's to make
            gradient accumulation and data parallelism exact. Default: this batch's.
        ref_logprobs: reference policy's log-probs, needed when `config.kl_coef` is not 0, else not read.
        rollout_is_weights: importance weights >= 0 of the rollout engine, per token or per sequence [B]; constants.
        vocab_group: the process group over which the head's rows are sharded, see `linear_logprobs`; the backward is
            dense then, and `head_flops` counts this rank's.
        impl: `auto` (Triton on CUDA and ROCm, PyTorch elsewhere), `triton`, `torch` or `reference`.
        capturable: never wait for the device, so that a CUDA graph can hold the call and its backward: two passes over
            all tokens, exact. loss_mask, vocab_group and `config.backward="routed"` are refused.
        return_entropy: also return per-token entropy and its mean as a metric; free otherwise.
        return_logprobs: with False the log-probs are not returned, and where coefficients are known in advance
            (`old_logprobs` None, no KL, no entropy) tokens whose coefficient is 0 skip the forward too.

    Returns:
        LossOutput. `loss` is differentiable in hidden_states, lm_head_weight and bias; everything else is detached.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.config(config, LADConfig, "linear_grpo_loss")
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )._replace(capturable=capturable)
    inputs = PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        rollout_is_weights=rollout_is_weights,
    )
    return _linear_loss(given, inputs, config, Wanted(return_logprobs, return_entropy))


def linear_grpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: GRPOConfig = GRPOConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    return_entropy: bool = False,
    return_logprobs: bool = True,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
    capturable: bool = False,
) -> LossOutput:
    """PPO-clip (arXiv 1707.06347) and the GRPO family (arXiv 2402.03300 and later) in the kernels of LAD.

    Args:
        config: which loss of the family, its bounds, level and aggregation, KL and entropy weights, tail_mass.

    All other arguments have the shapes, dtypes and meanings of `linear_lad_loss`; `group_size` and `group_ids` are read
    for `rewards` only.

    Returns, Raises:
        As `linear_lad_loss`.
    """
    checks.config(config, GRPOConfig, "linear_lad_loss")
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )._replace(capturable=capturable)
    inputs = PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        rollout_is_weights=rollout_is_weights,
    )
    return _linear_loss(given, inputs, config, Wanted(return_logprobs, return_entropy))


class LADLoss(nn.Module):
    """`linear_lad_loss` with its constants bound, for people who like modules.

    Args:
        config: what to minimise.
        **constants: any keyword of `linear_lad_loss` that stays the same from call to call, such as `temperature`,
            `softcap` or `group_size`.
    """

    def __init__(self, config: LADConfig = LADConfig(), **constants: Any):
        super().__init__()
        self.config, self.constants = config, constants

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        target_ids: Tensor,
        old_logprobs: Tensor | None = None,
        **batch: Any,
    ) -> LossOutput:
        """Arguments of `linear_lad_loss`; those given here override the bound ones."""
        options = {**self.constants, "config": self.config, **batch}
        return linear_lad_loss(hidden_states, lm_head_weight, target_ids, old_logprobs, **options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.config), *(f"{k}={v!r}" for k, v in self.constants.items())])


def _linear_loss(given: HeadArguments, inputs: PolicyInputs, config: PolicyConfig, wanted: Wanted) -> LossOutput:
    checks.vocab_group(given.vocab_group, given.impl, config.backward)
    if torch.compiler.is_compiling() and given.impl != "reference":
        return compiled_loss(given, inputs, config, wanted)
    inputs, operands = prepared(given, inputs, config, wanted)
    if given.impl == "reference":
        return reference_loss(operands, given, inputs, config, wanted)
    result, count = run(operands, inputs, config, wanted, given, operands.needs())
    scatter_back = operands.layout.packing.scatter_back
    logprobs = scatter_back(result.logprobs) if wanted.logprobs else None
    entropy = None if result.entropy is None else scatter_back(result.entropy)
    advantages = result.terms.advantages if inputs.advantages is None else inputs.advantages.detach()
    total, metrics = attach(operands, result, count)
    return LossOutput(total, logprobs, entropy, advantages, metrics)
