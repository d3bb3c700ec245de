"""LAD and the GRPO family as the head's step sees them: arguments checked, masked tokens dropped, objective bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import HeadArguments, HeadForward, LogitGradient, Needs, Operands, Sparsity, flops, prepare
from lad_kernels.objective import LADConfig, Objective, PolicyConfig, PolicyInputs, validate
from lad_kernels.outputs import LossOutput
from lad_kernels.step import LossTerms, Step, StepResult, Wanted


def prepared(
    given: HeadArguments, inputs: PolicyInputs, config: PolicyConfig, wanted: Wanted, needs: Needs | None = None
) -> tuple[PolicyInputs, Operands]:
    """Everything checked, masked tokens dropped; `needs` as in `prepare`."""
    checks.plain_tensor("target_ids", given.target_ids)
    if given.capturable and config.backward == "routed":
        raise ValueError(
            "capturable: expected False with config.backward='routed', which reads what it keeps on the host"
        )
    inputs = validate(inputs, given.target_ids, "target_ids", config)
    alike = inputs._asdict() | {"config": config, "return_entropy": wanted.entropy, "return_logprobs": wanted.logprobs}
    return inputs, prepare(given, inputs.loss_mask, inputs.cu_seqlens, alike, needs)


def run(
    operands: Operands, inputs: PolicyInputs, config: PolicyConfig, wanted: Wanted, given: HeadArguments, needs: Needs
) -> tuple[StepResult, int]:
    """The forward, and how many flops it launched."""
    with torch.no_grad(), flops.counting() as tally:
        loss = _PolicyLoss(operands, inputs, config, given)
        return Step(operands.head(), loss, needs, wanted, given.capturable).run(), tally[0]


class _PolicyLoss:
    """LAD or a loss of the GRPO family as the head's step sees it."""

    def __init__(self, operands: Operands, inputs: PolicyInputs, config: PolicyConfig, given: HeadArguments):
        hidden, packing = operands.hidden, operands.layout.packing
        tail_mass, backward = (0.0, "dense") if given.capturable else (config.tail_mass, config.backward)
        self.sparsity = Sparsity.of(tail_mass, config.tail, backward, hidden.dtype)
        self.known_before = inputs.old_logprobs is None and config.kl_coef == 0 and config.entropy_coef == 0
        self.needs_outputs = config.is_direct
        self.needs_entropy = config.entropy_coef != 0
        self.spans = "token" if config.importance_sampling_level == "token" else "sequence"
        self.cu_seqlens = packing.cu_seqlens
        self._old, self._packing = inputs.old_logprobs, packing
        self._objective = Objective(inputs, packing, config, given.impl, hidden)

    @property
    def prior(self) -> Tensor | None:
        """[M] log-probabilities of the behaviour policy; any number where the objective drops the token."""
        if self._old is None:
            return None
        return self._packing.select(self._old.detach()).to(self._objective.dtype).nan_to_num(0.0, 0.0, 0.0)

    def terms(self, out: HeadForward) -> LossTerms:
        terms = self._objective.terms(out.logprobs, out.entropy)
        c, c_entropy = terms.dlogprobs, terms.dentropy  # [M], [M]
        gradient = LogitGradient(c, -c if c_entropy is None else -c - c_entropy * out.entropy, c_entropy)
        return LossTerms(terms.loss, gradient, terms.metrics, advantages=terms.advantages)

    def gradient(self, rows: slice, out: HeadForward) -> LogitGradient:  # [C]
        return LogitGradient.of_logprobs(self._objective.coefficients(rows, out.logprobs[rows]))

    def gradient_of(self, chosen: Tensor, out: HeadForward, scored: bool) -> LogitGradient:  # [S]
        """With ratio 1 (or 0 nats) for all other tokens, and for all that are not scored."""
        count, prior = self._packing.tokens, self.prior
        every = out.logprobs.new_zeros(count) if prior is None else prior  # [M]
        if scored:
            every.index_copy_(0, chosen, out.logprobs)
        return LogitGradient.of_logprobs(self._objective.coefficients(slice(0, count), every)[chosen])


def reference_loss(
    operands: Operands, given: HeadArguments, inputs: PolicyInputs, config: PolicyConfig, wanted: Wanted
) -> LossOutput:
    """The specification on validated arguments."""
    from lad_kernels import reference

    loss: Any = reference.linear_lad_loss if isinstance(config, LADConfig) else reference.linear_grpo_loss
    head = operands.for_reference(given)
    return without_autocast(loss)(
        head.hidden_states,
        head.lm_head_weight,
        head.target_ids,
        inputs.old_logprobs,
        advantages=inputs.advantages,
        rewards=inputs.rewards,
        group_size=inputs.group_size,
        group_ids=inputs.group_ids,
        loss_mask=inputs.loss_mask,
        cu_seqlens=inputs.cu_seqlens,
        bias=head.bias,
        temperature=head.temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        config=config,
        normalizer=inputs.normalizer,
        ref_logprobs=inputs.ref_logprobs,
        rollout_is_weights=inputs.rollout_is_weights,
        return_entropy=wanted.entropy,
        return_logprobs=wanted.logprobs,
    )
