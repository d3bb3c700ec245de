"""The public losses on given log-probabilities: arguments in, checked; a differentiable loss out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.objective.config import DIVERGENCES, GRPOConfig, LADConfig, PolicyConfig
from lad_kernels.objective.flat import INPUTS, flat_inputs, inputs_of
from lad_kernels.objective.inputs import PolicyInputs, validate, without_columns
from lad_kernels.objective.policy import PolicyTerms, metric_names
from lad_kernels.objective.terms import Objective
from lad_kernels.operators import operator, refuse_double_backward, stacked, unstacked, widest, with_gradients
from lad_kernels.outputs import LossOutput
from lad_kernels.packing import Packing, pack


def lad_loss(
    logprobs: Tensor,  # [N] or [B, T]
    old_logprobs: Tensor | None,  # same shape
    advantages: Tensor,  # [B], or the shape of logprobs
    *,
    loss_mask: Tensor | None = None,  # the shape of logprobs
    cu_seqlens: Tensor | None = None,  # [B + 1]
    config: LADConfig = LADConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,  # the shape of logprobs
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    entropy: Tensor | None = None,  # the shape of logprobs
    rollout_is_weights: Tensor | None = None,  # [B], or the shape of logprobs
    impl: str = "auto",
) -> LossOutput:
    """LAD (arXiv 2602.20132) on log-probabilities that you already have: sum_t w_t e^u f(r / e^u), u = A / eta.

    The loss value is dominated by e^u terms that carry no gradient; watch `metrics["loss_above_start"]` (the loss
    minus its value at ratio 1) and the `coef_*` metrics instead.

    A token takes part if `loss_mask` keeps it, if it does not lie beyond the last bound of packed input, and if its old
    and reference log-prob and its rollout weight (of those that are used) are finite: a bad number from an engine drops
    its token, not the step. `metrics["nonfinite_share"]` counts such tokens; lengths, means over tokens and the default
    normalizer leave them out, a normalizer that you give is taken as it is. A NaN of the policy itself propagates.

    Args:
        logprobs: [N] packed or [B, T] padded, nats; the gradient flows into it (and into `entropy`) alone.
        old_logprobs: the behaviour policy's log-probs, same shape; None means on-policy, ratio exactly 1.
        advantages: [B] or [B, 1], one per sequence, or one per token; finite where a token counts. Packed input needs
            `cu_seqlens` for [B].
        loss_mask: same shape as logprobs, nonzero where a token counts. Others may hold anything, NaN included.
        cu_seqlens: int32 [B + 1], cumulative sequence lengths of packed input; tokens beyond the last are padding.
        config: divergence, eta, ratio level, aggregation, clamps, KL and entropy weights.
        normalizer: the divisor of the sum over tokens (token-mean, seq-mean-token-sum-norm) or sequences (the other
            modes). Give the global batch's to make gradient accumulation and data parallelism exact. Default: this
            batch's tokens that take part, its sequences with at least one of them, or B * T.
        ref_logprobs: reference policy's log-probs, needed when `config.kl_coef` is not 0, else not read.
        group_size, group_ids: as in `group_advantages`; needed when `config.target_norm` is set, else not read.
        entropy: per-token entropy, needed when `config.entropy_coef` is not 0.
        rollout_is_weights: importance weights >= 0 of the rollout engine, per token or, [B] or [B, 1], per sequence;
            constants.
        impl: `auto`, `triton`, `torch` or `reference`.

    Returns:
        LossOutput; metrics are described in docs/losses.md.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype or device; the message says which and why.
    """
    checks.config(config, LADConfig, "grpo_loss")
    inputs = PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        rollout_is_weights=rollout_is_weights,
    )
    return policy_loss(logprobs, inputs, config, impl)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: GRPOConfig = GRPOConfig(),
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    impl: str = "auto",
) -> LossOutput:
    """PPO-clip and its family (see `GRPOConfig`) on given log-probabilities; arguments as for `lad_loss`."""
    checks.config(config, GRPOConfig, "lad_loss")
    inputs = PolicyInputs(
        old_logprobs=old_logprobs,
        advantages=advantages,
        group_size=group_size,
        group_ids=group_ids,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        rollout_is_weights=rollout_is_weights,
    )
    return policy_loss(logprobs, inputs, config, impl)


@without_autocast
def policy_loss(logprobs: Tensor, inputs: PolicyInputs, config: PolicyConfig, impl: str) -> LossOutput:
    """`lad_loss` or `grpo_loss`, by the config."""
    if torch.compiler.is_compiling() and impl != "reference":
        return _compiled(logprobs, inputs, config, impl)
    inputs = _checked(logprobs, inputs, config, impl)
    if impl == "reference":
        from lad_kernels import reference

        loss: Any = reference.lad_loss if config.objective in DIVERGENCES else reference.grpo_loss
        return loss(
            logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            loss_mask=inputs.loss_mask,
            cu_seqlens=inputs.cu_seqlens,
            config=config,
            normalizer=inputs.normalizer,
            ref_logprobs=inputs.ref_logprobs,
            group_size=inputs.group_size,
            group_ids=inputs.group_ids,
            entropy=inputs.entropy,
            rollout_is_weights=inputs.rollout_is_weights,
        )
    packing, logp, entropy, terms = _evaluate(logprobs, inputs, config, impl)
    loss = _AttachGradient.apply(logp, entropy, terms.loss, terms.dlogprobs, terms.dentropy)
    entropy = None if entropy is None else packing.scatter_back(entropy.detach())  # [N] or [B, T]
    return LossOutput(loss, packing.scatter_back(logp.detach()), entropy, inputs.advantages.detach(), terms.metrics)


def _checked(logprobs: Tensor, inputs: PolicyInputs, config: PolicyConfig, impl: str) -> PolicyInputs:
    checks.impl(impl)
    checks.plain_tensor("logprobs", logprobs)
    checks.floating_dtype("logprobs", logprobs)
    return validate(inputs, logprobs, "logprobs", config)


def _evaluate(
    logprobs: Tensor, inputs: PolicyInputs, config: PolicyConfig, impl: str
) -> tuple[Packing, Tensor, Tensor | None, PolicyTerms]:
    """Packing, log-probs [M], entropy [M], and the objective of them; inputs are checked."""
    packing = pack(logprobs, inputs.loss_mask, inputs.cu_seqlens)
    logp = packing.select(logprobs)
    entropy = None if inputs.entropy is None else packing.select(inputs.entropy)
    return packing, logp, entropy, Objective(inputs, packing, config, impl, logp).terms(logp, entropy)


class _AttachGradient(torch.autograd.Function):
    """Gives a loss that was computed without autograd its known gradient."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss, dlogprobs, dentropy):  # [M], [M] | None, [], [M], [M] | None
        ctx.save_for_backward(dlogprobs, dentropy)
        ctx.set_materialize_grads(False)
        return loss.clone()

    @staticmethod
    @without_autocast
    def backward(ctx, grad):  # []
        refuse_double_backward()
        dlogprobs, dentropy = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        return grad * dlogprobs, None if dentropy is None else grad * dentropy, None, None, None


# Log-probs, entropy and both gradients in the shape of the given log-probs, [0] without entropy; metrics [K].
_OUTPUTS = "(Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, Tensor dlogprobs, Tensor dentropy)"


def _compiled(logprobs: Tensor, inputs: PolicyInputs, config: PolicyConfig, impl: str) -> LossOutput:
    """The operator's call, for torch.compile and torch.export to trace."""
    inputs = without_columns(inputs, logprobs, "logprobs")
    loss, logp, entropy, metrics, *_ = _OPERATORS[type(config)](logprobs, *flat_inputs(inputs, config), impl)
    names = metric_names(config, entropy=inputs.entropy is not None)
    entropy = None if inputs.entropy is None else entropy
    return LossOutput(loss, logp, entropy, inputs.advantages.detach(), unstacked(metrics, names, loss.dtype))


def _operator(name: str, kind: type) -> Any:
    """`lad_kernels::name`, for configs of a kind: the loss and its gradient."""

    @operator(name, f"(Tensor logprobs, {INPUTS}, str impl) -> {_OUTPUTS}")
    def loss(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *flat, impl = arguments
        inputs, config = inputs_of(kind, flat)
        inputs = _checked(logprobs, inputs, config, impl)
        packing, logp, entropy, terms = _evaluate(logprobs, inputs, config, impl)
        tokens = (logp.detach().clone(), entropy, terms.dlogprobs, terms.dentropy)  # [M] each
        empty = terms.loss.new_empty(0)
        logp, entropy, dlogprobs, dentropy = (empty if x is None else packing.scatter_back(x) for x in tokens)
        metrics = stacked(terms.metrics, metric_names(config, entropy=inputs.entropy is not None))
        return terms.loss, logp, entropy.clone(), metrics, dlogprobs, dentropy

    @loss.register_fake
    def _(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *flat, _ = arguments
        inputs, config = inputs_of(kind, flat)
        shape, entropy = logprobs.shape, inputs.entropy
        new = functools.partial(logprobs.new_empty, dtype=torch.promote_types(logprobs.dtype, torch.float32))
        return (
            new(()),
            logprobs.new_empty(shape),
            new(0) if entropy is None else entropy.new_empty(shape),
            logprobs.new_empty(len(metric_names(config, entropy=entropy is not None)), dtype=widest(logprobs.device)),
            new(shape),
            new(shape if config.entropy_coef != 0 else 0),
        )

    with_gradients(loss, (0, _ENTROPY))
    return loss


_ENTROPY = 11  # among the arguments
_OPERATORS = {LADConfig: _operator("lad_loss", LADConfig), GRPOConfig: _operator("grpo_loss", GRPOConfig)}
