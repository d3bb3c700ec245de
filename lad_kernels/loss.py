"""The staircase between head and objective: hidden states and rewards in, a differentiable loss out.

Up go N log-probabilities, down comes one coefficient per token, c_t = d loss / d logp_t (and one for the entropy).
Both storeys run in the forward; the backward is the head's alone, with c already known, and never passes through the
objective again. step.py decides what is computed when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import flops
from lad_kernels.head.autograd import Head, shaped
from lad_kernels.head.logprobs import head_kind, prepare
from lad_kernels.objective.config import GRPOConfig, LADConfig
from lad_kernels.objective.policy import Config, PolicyInputs, validate
from lad_kernels.outputs import LossOutput
from lad_kernels.step import Step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.compiler.disable
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
) -> LossOutput:
    """LAD (arXiv 2602.20132) from last hidden states and the lm_head weight, without storing N x V logits.

    Args:
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl: as for
            `linear_logprobs`. With a group the backward is dense and `head_flops` counts this rank's.
        old_logprobs: the behaviour policy's log-probs; None means on-policy: the ratio is exactly 1. Where one is not
            finite its token is dropped, as by `lad_loss`.
        advantages: one per sequence [B] or one per token. Give this or `rewards`.
        rewards: [B], turned into advantages by `config.advantage_scale`; needs `group_size` or `group_ids`.
        loss_mask: nonzero where a token counts. Others are dropped before the first product, get exactly zero
            gradient and may hold anything (-100, NaN). A fully masked batch gives a differentiable zero.
        cu_seqlens: int32 [B + 1] cumulative lengths of packed [N] input, flash-attention's convention. Tokens beyond
            cu_seqlens[-1] are padding and count as masked; on an accelerator without loss_mask, where that bound is
            not read, they still pass through the head and their hidden states must be finite.
        config, normalizer, ref_logprobs, rollout_is_weights: as for `lad_loss`.
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
    return _linear_policy_loss(**locals())


@torch.compiler.disable
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
) -> LossOutput:
    """PPO-clip and its family (see `GRPOConfig`) in the same kernels; arguments as for `linear_lad_loss`."""
    checks.config(config, GRPOConfig, "linear_lad_loss")
    return _linear_policy_loss(**locals())


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
        self, hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, old_logprobs: Tensor | None = None,
        **batch: Any,
    ) -> LossOutput:  # fmt: skip
        """Arguments of `linear_lad_loss`; those given here override the bound ones."""
        return linear_lad_loss(
            hidden_states,
            lm_head_weight,
            target_ids,
            old_logprobs,
            **{**self.constants, "config": self.config, **batch},
        )

    def extra_repr(self) -> str:
        return ", ".join([repr(self.config), *(f"{k}={v!r}" for k, v in self.constants.items())])


def _linear_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    config: Config,
    return_entropy: bool,
    return_logprobs: bool,
    vocab_group: ProcessGroup | None,
    impl: str,
    **objective: Any,
) -> LossOutput:
    inputs = PolicyInputs(**objective)
    checks.plain_tensor("target_ids", target_ids)
    checks.vocab_group(vocab_group, impl, config.backward)
    inputs = validate(inputs, target_ids, "target_ids", config)
    hidden, weight, targets, packing, transform = prepare(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, inputs.loss_mask, impl,
        inputs.cu_seqlens, sharded=vocab_group is not None,
    )  # fmt: skip
    if impl == "reference":
        from lad_kernels import reference

        loss: Any = reference.linear_lad_loss if isinstance(config, LADConfig) else reference.linear_grpo_loss
        return without_autocast(loss)(
            hidden, weight, target_ids.long(), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, config=config, return_entropy=return_entropy, return_logprobs=return_logprobs,
            **{name: getattr(inputs, name) for name in objective},
        )  # fmt: skip
    triton = checks.use_triton(impl, hidden.device, hidden.dtype)
    grad = torch.is_grad_enabled()
    needs = (
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        bool(grad and bias is not None and bias.requires_grad),
    )
    replicated = objective | {
        "hidden_states": hidden, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
        "config": config, "return_entropy": return_entropy, "return_logprobs": return_logprobs, "impl": impl,
    }  # fmt: skip
    new_head = head_kind(vocab_group, hidden, weight, bias, targets, replicated, packing)
    with torch.no_grad(), flops.counting() as tally:
        rows, tokens = packing.source(hidden)
        head = new_head(rows, weight, targets, bias, transform, triton, tokens)
        step = Step(head, inputs, packing, config, impl, needs, return_logprobs, return_entropy)
        step.run()
    terms, spent = step.terms, targets.new_full((), tally[0], dtype=_widest(hidden.device))  # []
    loss = _LinearPolicyLoss.apply(hidden, weight, bias, targets, step, spent, new_head)
    entropy = None if step.entropy is None else packing.place(step.entropy)
    used = terms.advantages if inputs.advantages is None else inputs.advantages.detach()
    logprobs = packing.place(step.logprobs) if return_logprobs else None
    return LossOutput(loss, logprobs, entropy, used, {**terms.metrics, **step.metrics, "head_flops": spent})


def _widest(device: torch.device) -> torch.dtype:
    """A dtype in which flops are counted: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _LinearPolicyLoss(torch.autograd.Function):
    """Gives the loss its gradient with respect to (hidden, weight, bias), from coefficients already known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, step: Step, spent: Tensor,
        new_head: Callable[..., Head],
    ) -> Tensor:  # fmt: skip
        transform = step.head.transform
        ctx.save_for_backward(hidden, weight, bias, targets, transform.temperatures)
        ctx.packing, ctx.transform, ctx.triton = step.packing, transform, step.head.triton
        ctx.step, ctx.spent, ctx.new_head = step, spent, new_head
        ctx.set_materialize_grads(False)
        del step.head  # holds the inputs, which autograd keeps
        return step.terms.loss.clone()

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None) -> tuple:  # []
        checks.refuse_double_backward()
        if grad is None:
            return (None,) * 7
        hidden, weight, bias, targets, temperatures = ctx.saved_tensors
        with flops.counting() as tally:
            rows, tokens = ctx.packing.source(hidden)
            transform = ctx.transform.at(temperatures)
            head = ctx.new_head(rows, weight, targets, bias, transform, ctx.triton, tokens)
            found = ctx.step.backward(head, grad)
        ctx.spent += tally[0]
        return *shaped(found, hidden), None, None, None, None
