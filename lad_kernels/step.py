"""The order of head and objective in one call of a loss, which depends on when the coefficients c_t are known.

before the head     ratio 1, no KL, no entropy term: tokens with c = 0 get log-probs only, the others one pass or two
inside a chunk      one pass, if head/dispatch.py finds it cheaper than what is expected of routing
after the forward   score, then the backward of the tokens with c != 0, dense or routed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels.autocast import without_autocast
from lad_kernels.head import (
    BackwardPlan,
    Head,
    HeadForward,
    HeadGradients,
    LogitGradient,
    Needs,
    Sparsity,
    forward_for_backward,
    one_pass_chunks,
    plan_backward,
    select_active,
    takes_one_pass,
)
from lad_kernels.objective import Objective, PolicyConfig, PolicyInputs, PolicyTerms
from lad_kernels.packing import Packing


class Wanted(NamedTuple):
    """What is returned besides the loss."""

    logprobs: bool
    entropy: bool


class StepResult(NamedTuple):
    """Loss, metrics and per-token outputs, and what the backward multiplies."""

    terms: PolicyTerms
    logprobs: Tensor  # [M]
    entropy: Tensor | None  # [M]
    plan: BackwardPlan | None  # None: no gradient is asked for


@dataclass(frozen=True)
class Step:
    """One call of a loss through the head."""

    head: Head  # of the M tokens that take part
    inputs: PolicyInputs
    packing: Packing
    config: PolicyConfig
    objective: Objective  # of the same inputs
    needs: Needs
    wanted: Wanted

    @property
    def want_entropy(self) -> bool:
        return self.wanted.entropy or self.config.entropy_coef != 0

    @property
    def known_before(self) -> bool:
        """Whether coefficients do not depend on the log-probs at all."""
        return self.inputs.old_logprobs is None and self.config.kl_coef == 0 and self.config.entropy_coef == 0

    @property
    def sparsity(self) -> Sparsity:
        c = self.config
        return Sparsity.of(c.tail_mass, c.tail, c.backward, self.head.hidden.dtype)

    @without_autocast
    def run(self) -> StepResult:
        """Forward of head and objective; all that the backward of the head needs."""
        outputs = self.wanted.logprobs or self.want_entropy
        if self.known_before and any(self.needs):
            return self._coefficients_first(outputs)
        if self.known_before and not outputs:
            logprobs = self._zeros()
            return StepResult(self.objective.terms(logprobs), logprobs, None, None)
        if not any(self.needs):
            out = self.head.forward(want_entropy=self.want_entropy)
            return StepResult(self.objective.terms(out.logprobs, out.entropy), out.logprobs, out.entropy, None)
        result = self._one_pass(self.head)
        if result is not None:
            out, ready, terms = result
            terms = terms or self.objective.terms(out.logprobs, out.entropy)
            gradient = _logit_gradient(terms, out.entropy)
            plan = plan_backward(self.head, out, gradient, None, self.needs, self.sparsity, ready)
            return StepResult(terms, out.logprobs, out.entropy, plan)
        out = forward_for_backward(self.head, self.needs, self.sparsity, want_entropy=self.want_entropy)
        terms = self.objective.terms(out.logprobs, out.entropy)
        gradient = _logit_gradient(terms, out.entropy)
        logprobs, entropy, active = out.logprobs, out.entropy, gradient.active()
        out, gradient = select_active(out, active), gradient.select(active)
        plan = plan_backward(self.head, out, gradient, active, self.needs, self.sparsity)
        return StepResult(terms, logprobs, entropy, plan)

    def _coefficients_first(self, outputs: bool) -> StepResult:
        """Coefficients do not depend on log-probs: tokens with c = 0 are scored only if their outputs are asked for."""
        zeros = self._zeros()
        c = self.objective.coefficients(slice(0, len(zeros)), zeros)  # [M]
        gradient = LogitGradient(c, -c)
        active = gradient.active()  # [A]
        part, gradient, ready = self.head.select(active), gradient.select(active), None
        result = self._one_pass(part, gradient.onehot)
        if result is None:
            out = forward_for_backward(part, self.needs, self.sparsity, want_entropy=self.want_entropy)
        else:
            out, ready, _ = result
        logprobs, entropy = self._of_all_tokens(out, active, outputs)
        plan = plan_backward(self.head, out, gradient, active, self.needs, self.sparsity, ready)
        return StepResult(self.objective.terms(logprobs, entropy), logprobs, entropy, plan)

    def _one_pass(
        self, part: Head, known: Tensor | None = None
    ) -> tuple[HeadForward, HeadGradients, PolicyTerms | None] | None:
        """Forward and gradient of `part` at once, if coefficients are known inside a chunk and it is worth it.

        Args:
            part: the active tokens [A] if their coefficients are known before, else all M.
            known: [A] those coefficients; None: they follow from the log-probs.

        Returns:
            Outputs, gradients, and the objective where a single chunk has computed all of it; None: not in one pass.
        """
        if self.config.entropy_coef != 0 or not part.has_one_pass(self.needs.bias):
            return None
        by_token = known is not None or self.config.importance_sampling_level == "token"
        chunks = one_pass_chunks(part, self.needs, None if by_token else self.packing.cu_seqlens)
        if chunks is None:
            return None
        of_sample = self._coefficients_of if known is None else lambda chosen, _: known[chosen]
        if not takes_one_pass(part, self.needs, self.sparsity, of_sample, all_active=known is not None):
            return None
        whole: list[PolicyTerms] = []  # the objective, where a single chunk has all tokens

        def coefficients(rows: slice, logprobs: Tensor) -> Tensor:  # [A] -> [C]
            if known is not None:
                return known[rows]
            if len(chunks) > 1 or self.want_entropy:
                return self.objective.coefficients(rows, logprobs[rows])
            whole.append(self.objective.terms(logprobs))
            return whole[0].dlogprobs

        result = part.one_pass(
            self._old_logprobs(), coefficients, chunks=chunks, want_entropy=self.want_entropy, needs=self.needs
        )
        if result is None:
            return None
        out, gradients = result
        return out, gradients, whole[0] if whole else None

    def _old_logprobs(self) -> Tensor | None:  # [M]
        """Log-probabilities of the behaviour policy; any number where the objective drops the token."""
        old = self.inputs.old_logprobs
        if old is None:
            return None
        return self.packing.take(old.detach()).to(self._dtype).nan_to_num(0.0, 0.0, 0.0)

    def _coefficients_of(self, chosen: Tensor, logprobs: Tensor) -> Tensor:  # [S], [S] -> [S]
        """Coefficients of a few of the M tokens from their log-probs, with ratio 1 (or 0 nats) for the others."""
        old = self._old_logprobs()
        every = self._zeros() if old is None else old.clone()  # [M]
        every.index_copy_(0, chosen, logprobs)
        return self.objective.coefficients(slice(0, len(every)), every)[chosen]

    def _of_all_tokens(self, out: HeadForward, active: Tensor | None, outputs: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs [M] and entropy [M]: of the active tokens, and of the others if they are asked for."""
        if active is None:
            return out.logprobs, out.entropy
        logprobs, entropy = self._zeros().index_copy_(0, active, out.logprobs), None  # [M]
        if outputs:
            order = torch.zeros_like(logprobs).index_fill_(0, active, 1.0).argsort(stable=True)  # [M]
            rest = order[: len(order) - len(active)]  # without asking the device how many
            others = self.head.select(rest).forward(want_entropy=self.want_entropy)
            logprobs[rest] = others.logprobs
            if self.want_entropy:
                entropy = torch.empty_like(logprobs)
                entropy[active], entropy[rest] = out.entropy, others.entropy
        return logprobs, entropy

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.head.hidden.dtype, torch.float32)

    def _zeros(self) -> Tensor:
        """Placeholder log-probs [M], on which nothing depends."""
        return self.head.hidden.new_zeros(len(self.head.targets), dtype=self._dtype)


def _logit_gradient(terms: PolicyTerms, entropy: Tensor | None) -> LogitGradient:
    """Coefficients of log-prob and entropy -> those of the logits."""
    c, c_entropy = terms.dlogprobs, terms.dentropy  # [M], [M]
    return LogitGradient(c, -c if c_entropy is None else -c - c_entropy * entropy, c_entropy)
