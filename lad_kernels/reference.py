"""The specification: every public function with stored logits, in any dtype up to float64, by autograd alone.

Equation numbers are those of "LAD: Learning Advantage Distribution for Reasoning", arXiv 2602.20132. Nothing here is
fast and nothing is clever; the fast paths are tested against it. It shares no code with them: of the package it
imports only the records (`outputs`, `objective.config`), which hold no mathematics. Arguments are not validated here.

    pi*  proportional to  pi_old e^u,  u = A / eta                                     trust-region optimum (Eq. 2)
    L    = E_{y ~ pi_old} [ e^u f(x) ],  x = (pi / pi_old) / e^u                       practical objective

Eq. 2 prints KL(pi_old || pi); the exponential form is the optimum for KL(pi || pi_old).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lad_kernels.objective.config import GRPOConfig, LADConfig
from lad_kernels.outputs import CrossEntropyStats, LinearLogprobs, LossOutput
from lad_kernels.reference_objective import GENERATORS, SLOPE_AT_ONE, counted, grpo_loss, lad_loss  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprobs(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # number, or the shape of target_ids
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_mask: Tensor | None = None,  # the shape of target_ids
    return_entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
    impl: str = "reference",
    capturable: bool = False,
) -> LinearLogprobs:
    """log pi(y | h), entropy and log-sum-exp of z = softcap(scale (h W^T + b)) / temperature."""
    if vocab_group is not None:
        raise ValueError("vocab_group: expected None, got a group; the reference needs all rows of lm_head_weight")
    if capturable:
        raise ValueError("capturable: expected False, got True; the reference reads on the host which tokens count")
    kept = counted(target_ids, loss_mask, None).reshape(-1).nonzero()[:, 0]  # [M] flat
    z = _logits(hidden_states, lm_head_weight, kept, target_ids.shape, bias, temperature, logit_scale, softcap)
    lse = z.logsumexp(-1)  # [M]
    logprobs = z.gather(1, target_ids.reshape(-1, 1)[kept])[:, 0] - lse  # [M]
    entropy = None
    if return_entropy:
        log_p = (z - lse[:, None]).clamp(min=-1e30)  # [M, V]; a bias of -inf excludes an entry, and 0 * -inf is 0
        entropy = -(log_p.exp() * log_p).sum(-1)  # [M]

    def scatter_back(x: Tensor) -> Tensor:
        return x.new_zeros(target_ids.numel()).index_put((kept,), x).reshape(target_ids.shape)

    return LinearLogprobs(scatter_back(logprobs), None if entropy is None else scatter_back(entropy), scatter_back(lse))


def _logits(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    kept: Tensor,  # [M] flat positions
    shape: torch.Size,  # of target_ids
    bias: Tensor | None,  # [V]
    temperature: float | Tensor,  # number, or the shape of target_ids
    logit_scale: float,
    softcap: float | None,
) -> Tensor:  # [M, V]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    h = hidden_states.reshape(-1, hidden_states.shape[-1])[kept].to(dtype)  # [M, D]
    z = h @ lm_head_weight.to(dtype).T  # [M, V]
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.expand(shape).reshape(-1, 1)[kept].to(dtype)  # [M, 1]
    return z / temperature


def linear_cross_entropy(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,  # the shape of target_ids
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """PyTorch's cross-entropy of stored logits, plus z_loss times lse^2, weighted per token."""
    kept = (target_ids != ignore_index).reshape(-1).nonzero()[:, 0]  # [M] flat
    z = _logits(hidden_states, lm_head_weight, kept, target_ids.shape, bias, temperature, logit_scale, softcap)
    y, lse = target_ids.reshape(-1)[kept], z.logsumexp(-1)  # [M], [M]
    loss = torch.nn.functional.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing)  # [M]
    w = torch.ones_like(lse) if token_weights is None else token_weights.reshape(-1)[kept].to(z.dtype)  # [M]
    w = w / w.sum().clamp(min=torch.finfo(z.dtype).tiny) if reduction == "mean" else w
    squares = z_loss * lse.square()  # [M]
    loss = torch.where(w == 0, 0.0, w * (loss + squares))  # [M]

    def scatter_back(x: Tensor) -> Tensor:
        return x.new_zeros(target_ids.numel()).index_put((kept,), x).reshape(target_ids.shape)

    total = scatter_back(loss) if reduction == "none" else loss.sum()
    if not return_stats:
        return total
    z = z.detach()
    z_y, log_p = z.gather(1, y[:, None])[:, 0], (z - lse.detach()[:, None]).clamp(min=-1e30)  # [M], [M, V]
    correct, entropy = z_y >= z.amax(1), -(log_p.exp() * log_p).sum(-1)  # [M], [M]
    accuracy = correct.to(z.dtype).sum() / max(len(kept), 1)  # []
    return total, CrossEntropyStats(
        accuracy,
        scatter_back(correct),
        scatter_back(z_y - lse.detach()),
        scatter_back(entropy),
        (w * squares).sum().detach(),
        {},
    )


def group_advantages(
    rewards: Tensor,  # [B]
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    scale: str = "group",
    eps: float = 1e-4,
    impl: str = "reference",
) -> Tensor:  # [B]
    """Rewards to advantages. Scorable rewards are the finite ones; the others take no part and get advantage 0."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    ids = torch.arange(len(rewards), device=rewards.device) // group_size if group_ids is None else group_ids
    scorable = rewards.isfinite()
    batch_std = rewards[scorable].std() if scorable.sum() > 1 else rewards.new_zeros(())
    advantages = torch.zeros_like(rewards)
    for group in ids.unique():
        members = (ids.to(rewards.device) == group.to(rewards.device)) & scorable
        count = int(members.sum())
        if count < 2:
            continue
        r = rewards[members]  # [count]
        centred = r - r.mean()
        if scale == "group":
            advantages[members] = centred / (r.std() + eps)
        elif scale == "batch":
            advantages[members] = centred / (batch_std + eps)
        elif scale == "loo":  # R - mean of the others
            advantages[members] = centred * count / (count - 1)
        else:
            advantages[members] = centred
    return advantages


def linear_lad_loss(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
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
    config: LADConfig | GRPOConfig = LADConfig(),  # of either loss
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    return_entropy: bool = False,
    return_logprobs: bool = True,
    vocab_group: ProcessGroup | None = None,
    impl: str = "reference",
    capturable: bool = False,
) -> LossOutput:
    """`linear_logprobs`, `group_advantages` if rewards are given, then `lad_loss`."""
    want_entropy = return_entropy or config.entropy_coef != 0
    head = linear_logprobs(
        hidden_states,
        lm_head_weight,
        target_ids,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        loss_mask=counted(target_ids, loss_mask, cu_seqlens),
        return_entropy=want_entropy,
        vocab_group=vocab_group,
        capturable=capturable,
    )
    if advantages is None:
        advantages = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale=config.advantage_scale)
    loss: Any = lad_loss if isinstance(config, LADConfig) else grpo_loss
    out = loss(
        head.logprobs, old_logprobs, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens, config=config,
        normalizer=normalizer, ref_logprobs=ref_logprobs, group_size=group_size, group_ids=group_ids,
        entropy=head.entropy, rollout_is_weights=rollout_is_weights,
    )  # fmt: skip
    return out if return_logprobs else out._replace(logprobs=None)


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
    impl: str = "reference",
    capturable: bool = False,
) -> LossOutput:
    """`linear_logprobs`, `group_advantages` if rewards are given, then `grpo_loss`."""
    return linear_lad_loss(
        hidden_states, lm_head_weight, target_ids, old_logprobs, advantages=advantages, rewards=rewards,
        group_size=group_size, group_ids=group_ids, loss_mask=loss_mask, cu_seqlens=cu_seqlens, bias=bias,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, config=config, normalizer=normalizer,
        ref_logprobs=ref_logprobs, rollout_is_weights=rollout_is_weights, return_entropy=return_entropy,
        return_logprobs=return_logprobs, vocab_group=vocab_group, impl=impl, capturable=capturable,
    )  # fmt: skip
