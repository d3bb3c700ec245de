"""The order of head and loss in one call, which depends on when the gradient of a token is known.

before the head     (ratio 1 without KL; cross-entropy) tokens without a gradient are scored only if their outputs are
                    asked for, the others take one pass, two passes or the routed backward
inside a chunk      one pass, if head/dispatch.py finds it cheaper than what is expected of routing
after the forward   score, then the backward of the tokens with a gradient, dense or routed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lad_kernels.autocast import without_autocast
from lad_kernels.head import (
    BackwardPlan,
    Head,
    HeadForward,
    HeadGradients,
    Layout,
    LogitGradient,
    Needs,
    Operands,
    Sparsity,
    forward_for_backward,
    one_pass_chunks,
    plan_backward,
    select,
    select_active,
    takes_one_pass,
)
from lad_kernels.operators import refuse_double_backward, widest

# Metrics of a backward, by plan.py
HEAD_METRICS = ("kept_share", "routed_share", "dropped_mass_mean", "dropped_mass_max", "dhidden_bound", "dweight_bound")


class Wanted(NamedTuple):
    """What is returned besides the loss."""

    logprobs: bool
    entropy: bool
    correct: bool = False  # whether targets are the likeliest entries


class LossTerms(NamedTuple):
    """A loss, its gradient and what it reports."""

    loss: Tensor  # []
    gradient: LogitGradient  # [M]
    metrics: dict[str, Tensor]  # 0-d
    mean_logit: Tensor | None = None  # [M] d loss / d (the mean of a token's logits)
    advantages: Tensor | None = None  # [B] or [M], as used


class TokenLoss(Protocol):
    """A loss of M tokens by what the head computes of them: log-prob, lse and, where wanted, entropy."""

    sparsity: Sparsity
    needs_outputs: bool  # its value depends on what the head computes
    needs_entropy: bool  # its gradient has a part by the entropy
    spans: str  # what the gradient of a token depends on: "token", its "sequence", or "all" tokens
    cu_seqlens: Tensor | None  # [B + 1] bounds of the sequences among the tokens

    @property
    def prior(self) -> Tensor | None:
        """[M] earlier log-probs, near which those of now are."""

    @property
    def known_before(self) -> bool:
        """Whether its gradient depends on nothing that the head computes."""

    def terms(self, out: HeadForward) -> LossTerms:
        """Of all tokens; called once."""

    def gradient(self, rows: slice, out: HeadForward) -> LogitGradient:  # [C]
        """Of the tokens `rows` alone, without a part by the entropy; `out` [M] is filled up to rows.stop."""

    def gradient_of(self, chosen: Tensor, out: HeadForward, scored: bool) -> LogitGradient:  # [S]
        """Of a few tokens, for an estimate; `out` [S] is theirs, but unless `scored` its log-probs are not.

        Not asked for where it spans all tokens.
        """


class StepResult(NamedTuple):
    """Loss, metrics and per-token outputs, and what the backward multiplies."""

    terms: LossTerms
    logprobs: Tensor  # [M]
    entropy: Tensor | None  # [M]
    correct: Tensor | None  # [M] bool
    plan: BackwardPlan | None  # None: no gradient is asked for


@dataclass(frozen=True)
class Step:
    """One call of a loss through the head."""

    head: Head  # of the M tokens that take part
    loss: TokenLoss
    needs: Needs
    wanted: Wanted
    capturable: bool = False  # without waiting for the device: two passes, all tokens

    @property
    def want_entropy(self) -> bool:
        return self.wanted.entropy or self.loss.needs_entropy

    @without_autocast
    def run(self) -> StepResult:
        """Forward of head and loss; all that the backward of the head needs."""
        loss, outputs = self.loss, self.wanted.logprobs or self.wanted.correct or self.want_entropy
        if loss.known_before and any(self.needs):
            return self._gradient_first(outputs)
        if loss.known_before and not (outputs or loss.needs_outputs):
            out = self._zeros()
            return StepResult(loss.terms(out), out.logprobs, None, None, None)
        if not any(self.needs):
            out = self.head.forward(want_entropy=self.want_entropy, want_correct=self.wanted.correct)
            return StepResult(loss.terms(out), out.logprobs, out.entropy, out.correct, None)
        result = self._one_pass(self.head)
        if result is not None:
            out, ready, terms = result
            terms = terms or loss.terms(out)
            return self._planned(out, out, terms, terms.gradient, None, ready)
        every = forward_for_backward(
            self.head, self.needs, loss.sparsity, want_entropy=self.want_entropy, want_correct=self.wanted.correct
        )
        terms = loss.terms(every)
        if every.block_lse is not None and self.head.triton:
            # Asking for the active tokens would wait for the forward; kernels that choose pairs queue up behind it.
            return self._planned(every, every, terms, terms.gradient, None, all_given=True)
        active = None if self.capturable else terms.gradient.active()  # [A]; None: all, or not to be asked for
        gradient = terms.gradient.select(active)  # [A]
        return self._planned(every, select_active(every, active), terms, gradient, active)

    def _gradient_first(self, outputs: bool) -> StepResult:
        """The gradient depends on no output: tokens without one are scored only if their outputs are asked for."""
        gradient = self.loss.gradient(slice(0, len(self.head.targets)), self._zeros())  # [M]
        active, ready = None if self.capturable else gradient.active(), None  # [A]
        part, gradient = self.head.select(active), gradient.select(active)
        result = self._one_pass(part, gradient)
        if result is None:
            out = forward_for_backward(
                part, self.needs, self.loss.sparsity, want_entropy=self.want_entropy, want_correct=self.wanted.correct
            )
        else:
            out, ready, _ = result
        every = self._of_all_tokens(out, active, outputs)
        return self._planned(every, out, self.loss.terms(every), gradient, active, ready)

    def _planned(
        self,
        every: HeadForward,  # [M]
        out: HeadForward,  # [A]
        terms: LossTerms,
        gradient: LogitGradient,  # [A]
        active: Tensor | None,  # [A]; None: all
        ready: HeadGradients | None = None,
        all_given: bool = False,
    ) -> StepResult:
        given = (self.head, out, gradient, active, self.needs, self.loss.sparsity, ready)
        plan = plan_backward(*given, mean_logit=select(terms.mean_logit, active), all_given=all_given)
        return StepResult(terms, every.logprobs, every.entropy, every.correct, plan)

    def _one_pass(
        self, part: Head, known: LogitGradient | None = None
    ) -> tuple[HeadForward, HeadGradients, LossTerms | None] | None:
        """Forward and gradient of `part` at once, if the gradient is known inside a chunk and it is worth it.

        `part` has all M tokens, or where the gradient is known before the head the active ones [A], and `known` theirs.
        Returns outputs, gradients, and the loss where a single chunk has computed all of it; None: not in one pass.
        """
        loss, spans = self.loss, "token" if known is not None else self.loss.spans
        want_all = self.want_entropy and self.wanted.correct
        if self.capturable or loss.needs_entropy or not part.has_one_pass(self.needs.bias, want_all=want_all):
            return None
        chunks = one_pass_chunks(part, self.needs, loss.cu_seqlens if spans == "sequence" else None)
        if chunks is None or (spans == "all" and len(chunks) > 1):
            return None
        of_few = loss.gradient_of if known is None else lambda chosen, *_: known.select(chosen)
        sampled = None if spans == "all" else of_few
        if not takes_one_pass(part, self.needs, loss.sparsity, sampled, all_active=known is not None):
            return None
        whole: list[LossTerms] = []  # the loss, where a single chunk has all tokens

        def gradient(rows: slice, out: HeadForward) -> LogitGradient:  # [A] -> [C]
            if known is not None:
                return known.select(rows)
            if len(chunks) > 1:
                return loss.gradient(rows, out)
            whole.append(loss.terms(out))
            return whole[0].gradient

        result = part.one_pass(
            loss.prior,
            gradient,
            chunks=chunks,
            want_entropy=self.want_entropy,
            want_correct=self.wanted.correct,
            needs=self.needs,
        )
        return None if result is None else (*result, whole[0] if whole else None)

    def _of_all_tokens(self, out: HeadForward, active: Tensor | None, outputs: bool) -> HeadForward:
        """Outputs [M]: of the active tokens, and of the others if they are asked for, else zeros."""
        if active is None:
            return out
        every = self._zeros()
        if self.want_entropy:
            every = every._replace(entropy=torch.zeros_like(every.lse))
        if self.wanted.correct:
            every = every._replace(correct=torch.zeros_like(every.lse, dtype=torch.bool))
        self._place(every, active, out)
        if outputs:
            order = torch.zeros_like(every.lse).index_fill_(0, active, 1.0).argsort(stable=True)  # [M]
            rest = order[: len(order) - len(active)]  # without asking the device how many
            others = self.head.select(rest).forward(want_entropy=self.want_entropy, want_correct=self.wanted.correct)
            self._place(every, rest, others)
        return every

    @staticmethod
    def _place(every: HeadForward, tokens: Tensor, out: HeadForward) -> None:
        """Outputs [A] of some tokens into those of all [M], in place."""
        for name in ("logprobs", "lse", "entropy", "correct"):
            if (x := getattr(every, name)) is not None:
                x[tokens] = getattr(out, name)

    def _zeros(self) -> HeadForward:
        """Placeholders [M], on which nothing depends."""
        dtype = torch.promote_types(self.head.hidden.dtype, torch.float32)
        logprobs, lse = self.head.hidden.new_zeros(2, len(self.head.targets), dtype=dtype)  # [M], [M]
        return HeadForward(logprobs, lse, None, None)


def attach(operands: Operands, result: StepResult, flops: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [] with its gradient, and all metrics; `flops` were launched so far."""
    plan, loss = result.plan, result.terms.loss
    if plan is not None:
        loss = _LinearLoss.apply(*operands, loss, plan)
    return loss, all_metrics(result, flops)


def all_metrics(result: StepResult, flops: int) -> dict[str, Tensor]:
    """Those of the loss and of the head; `flops` were launched so far."""
    plan, metrics, loss = result.plan, dict(result.terms.metrics), result.terms.loss
    if plan is not None:
        for name, x in plan.metrics.items():
            if isinstance(x, float):
                x = torch.full((), x, dtype=result.logprobs.dtype, device=loss.device)  # []
            metrics[name] = x
    count = flops + (0 if plan is None else plan.flops)
    metrics["head_flops"] = torch.full((), count, dtype=widest(loss.device), device=loss.device)  # []
    return metrics


class _LinearLoss(torch.autograd.Function):
    """Gives the loss its gradient with respect to (hidden, weight, bias), from coefficients already known.

    The loss keeps whatever graph it has of its own: parameters of an objective get their gradients through it. All
    tensors are saved by autograd, so that hooks on saved tensors see them. Routed gradients of an accelerator are made
    in the forward: its kernels wait for the host, which would go through autograd first. Not in float16, where they
    would underflow before a loss scaler's factor. Gradients that are ready are given away; a second backward computes
    them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        layout: Layout,
        loss: Tensor,
        plan: BackwardPlan,
    ) -> Tensor:
        scaled_later = torch.float16 in [x.dtype for x in (hidden, weight, bias) if x is not None]
        if layout.triton and plan.routing is not None and not scaled_later:
            plan = plan.made(layout.head(hidden, weight, bias, targets))
        tensors = plan.tensors()
        ctx.save_for_backward(hidden, weight, bias, targets, *layout.tensors(), *tensors)
        ctx.layout, ctx.plan = layout.holding(None, None), plan.holding([None] * len(tensors))
        ctx.set_materialize_grads(False)
        return loss.clone()

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None) -> tuple:  # []
        refuse_double_backward()
        if grad is None:
            return (None,) * 7
        hidden, weight, bias, targets, kept, temperatures, *tensors = ctx.saved_tensors
        plan, ctx.plan = ctx.plan.holding(tensors), replace(ctx.plan, ready=None)
        head = ctx.layout.holding(kept, temperatures).head(hidden, weight, bias, targets)
        gradients = plan.run(head, grad).shaped(hidden)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, grad, None
