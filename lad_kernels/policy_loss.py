"""linear_policy_loss: any objective of token log-probs, written in PyTorch, with the head's paths that LAD has.

The objective's gradient by autograd, one number per token (two with entropy), is all that the head needs. It is taken
in the forward; the objective's own graph stays with the loss, so that its parameters get their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.compiled_policy_loss import compiled_policy_loss
from lad_kernels.head import (
    HeadArguments,
    HeadForward,
    LogitGradient,
    Operands,
    Sparsity,
    flops,
    in_autocast_dtype,
    prepare,
    select,
)
from lad_kernels.objective import check_tail
from lad_kernels.outputs import LossOutput
from lad_kernels.own_objective import Objective, Tokens, evaluate, refuse_independent, refuse_joint, refuse_nan
from lad_kernels.step import LossTerms, Step, Wanted, attach

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_policy_loss(
    hidden_states: Tensor,  # [N, D] or [B, T, D]
    lm_head_weight: Tensor,  # [V, D]
    target_ids: Tensor,  # [N] or [B, T]
    objective: Objective,
    *,
    loss_mask: Tensor | None = None,  # the shape of target_ids
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_logprobs: bool = True,
    separable: bool = False,
    backward: str = "auto",
    tail_mass: float | None = None,
    tail: str = "unbiased",
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> LossOutput:
    """A loss of your own from last hidden states and the lm_head weight, without storing N x V logits.

    Args:
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl: as for
            `linear_logprobs`.
        objective: `objective(logprobs, entropy, tokens)` returns a scalar loss, or (loss, metrics). It is ordinary
            differentiable PyTorch on the m tokens that count: logprobs [m] and entropy [m] are float32 (float64 for
            float64 input), entropy None without `return_entropy`; `tokens` says which they are and takes their values
            of the batch's tensors. metrics are 0-d tensors or numbers by name. It runs without autocast and must
            give the same for the same arguments: it may be called more than once, also with a few of the tokens if
            `separable`. Parameters that it uses get their gradients. It is not called where no token counts: the loss
            is then 0, without metrics of its own.
        loss_mask: nonzero where a token counts; the others never reach the head or the objective and may hold
            anything.
        cu_seqlens: int32 [B + 1] cumulative lengths of packed [N] input. Tokens beyond the last bound do not count;
            one host sync on an accelerator.
        return_entropy: also compute each token's entropy, give it to the objective and return it. A gradient through
            it counts, so gradients are then not made in one pass.
        return_logprobs: with False the log-probs are not returned.
        separable: your word that the loss is a sum of one term per token which depends on no other token: a sum over
            a constant, not a mean over the tokens given. Gradients can then be made in one pass, chunk by chunk;
            without it only where all tokens fit one chunk. A false claim is an error where chunks were used, and always
            under LAD_KERNELS_VALIDATE=1.
        backward, tail_mass, tail: how the gradient of the head is computed, and how much of it may be left out, as in
            `LADConfig`.

    Returns:
        LossOutput. `loss` is differentiable in hidden_states, lm_head_weight, bias and whatever the objective uses;
        `advantages` is None; `metrics` are the objective's and those of the head's backward.

    Raises:
        ValueError, TypeError: an argument, or what the objective returned, is of the wrong kind, shape, dtype, device
            or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )
    wanted = Wanted(return_logprobs, return_entropy)
    if not callable(objective):
        raise TypeError(
            f"objective: expected a function (logprobs, entropy, tokens) -> loss, got {type(objective).__name__}"
        )
    tail_mass = check_tail(backward, tail_mass, tail)
    checks.vocab_group(vocab_group, impl, backward)
    if torch.compiler.is_compiling() and impl != "reference":
        if backward == "routed":
            raise ValueError("backward: 'routed' is not built for linear_policy_loss under torch.compile; use 'auto'")
        given = in_autocast_dtype(given)
        return compiled_policy_loss(given, objective, loss_mask, cu_seqlens, wanted, separable=separable)
    checks.plain_tensor("target_ids", target_ids)
    checks.layout(target_ids, "target_ids", cu_seqlens)
    checks.mask(loss_mask, target_ids, "target_ids")
    if cu_seqlens is not None and loss_mask is None:
        loss_mask = torch.ones_like(target_ids, dtype=torch.bool)  # so that those beyond the last bound are dropped
    alike = {"loss_mask": loss_mask, "return_entropy": return_entropy, "separable": separable, "backward": backward}
    operands = prepare(given, loss_mask, cu_seqlens, alike | {"tail_mass": tail_mass, "tail": tail})
    sparsity, needs = Sparsity.of(tail_mass, tail, backward, operands.hidden.dtype), operands.needs()
    loss = _OwnLoss(operands, objective, sparsity, needs_entropy=return_entropy, separable=separable)
    if impl == "reference":
        return _reference(operands, given, loss, wanted)
    with torch.no_grad(), flops.counting() as tally:
        result = Step(operands.head(), loss, needs, wanted).run()
    total, metrics = attach(operands, result, tally[0])
    scatter_back = operands.layout.packing.scatter_back
    logprobs = scatter_back(result.logprobs) if return_logprobs else None
    entropy = scatter_back(result.entropy) if return_entropy else None
    return LossOutput(total, logprobs, entropy, advantages=None, metrics=metrics)


class _OwnLoss:
    """A user's objective as the head's step sees it."""

    known_before = False
    needs_outputs = True
    cu_seqlens: Tensor | None = None
    prior: Tensor | None = None

    def __init__(
        self, operands: Operands, objective: Objective, sparsity: Sparsity, *, needs_entropy: bool, separable: bool
    ):
        self.sparsity, self.needs_entropy, self._objective = sparsity, needs_entropy, objective
        self.spans = "token" if separable else "all"
        packing, kept = operands.layout.packing, operands.layout.packing.kept  # [M]
        if kept is None:
            kept = torch.arange(packing.tokens, device=operands.hidden.device)
        self._tokens = Tokens(kept, None if packing.cu_seqlens is None else packing.sequence, packing.shape)
        self._grad = torch.is_grad_enabled()
        self._chunks: list[tuple[slice, Tensor]] = []  # rows, and d loss / d logprob [C] of them alone

    def terms(self, out: HeadForward) -> LossTerms:
        loss, metrics, gradient = self._evaluate(out, self._tokens, keep=True)
        joint = gradient.onehot  # [M]
        if self.spans == "token" and checks.reads_all_values() and self._grad and len(joint):
            for part in (slice(0, None, 2), slice(1, None, 2)):
                self.gradient(part, out)
        for rows, alone in self._chunks:
            refuse_joint(joint, rows, alone, self._tokens.positions)
        self._chunks.clear()
        return LossTerms(loss, gradient, metrics)

    def gradient(self, rows: slice, out: HeadForward) -> LogitGradient:  # [C]
        some = HeadForward(out.logprobs[rows], out.lse[rows], select(out.entropy, rows), None)  # [C]
        gradient = self._evaluate(some, self._tokens.select(rows))[2]
        self._chunks.append((rows, gradient.onehot))
        return gradient

    def gradient_of(self, chosen: Tensor, out: HeadForward, scored: bool) -> LogitGradient:  # [S]
        if not scored:
            return LogitGradient.of_logprobs(torch.ones_like(out.logprobs))
        return self._evaluate(out, self._tokens.select(chosen))[2]

    def _evaluate(
        self, out: HeadForward, tokens: Tokens, *, keep: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], LogitGradient]:
        """Loss, metrics and gradient for `out` [m] of `tokens`; with `keep` the loss keeps its graph."""
        entropy = out.entropy if self.needs_entropy else None
        with torch.set_grad_enabled(self._grad):
            inputs = [x.detach().clone().requires_grad_(self._grad) for x in (out.logprobs, entropy) if x is not None]
            loss, metrics = self.call(tokens, *inputs)
            if not self._grad or not len(out.logprobs):
                return loss, metrics, LogitGradient.of_logprobs(torch.zeros_like(out.logprobs))
            gradients: Sequence[Tensor | None] = [None] * len(inputs)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)
        if all(g is None for g in gradients):
            refuse_independent()
        c = torch.zeros_like(out.logprobs) if gradients[0] is None else gradients[0]  # [m]
        c_entropy = gradients[1] if len(gradients) > 1 else None  # [m]
        if checks.may_read(c) and not out.logprobs.isnan().any():  # NaN of the head's own are passed on
            refuse_nan(loss, tokens.positions, c, c_entropy)
        prob = -c if c_entropy is None else -c - c_entropy * entropy  # [m]
        return loss if keep else loss.detach(), metrics, LogitGradient(c, prob, c_entropy)

    def call(self, tokens: Tokens, logprobs: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the objective of log-probs and entropy [m], checked; a differentiable 0 for no token."""
        if not len(logprobs):
            return logprobs.sum(), {}
        return evaluate(self._objective, logprobs, entropy, tokens)


@without_autocast
def _reference(operands: Operands, given: HeadArguments, loss: _OwnLoss, wanted: Wanted) -> LossOutput:
    """Stored logits, and autograd through everything."""
    packing = operands.layout.packing
    mask = packing.scatter_back(torch.ones(packing.tokens, dtype=torch.bool, device=operands.hidden.device))
    out = operands.reference_logprobs(given, mask, loss.needs_entropy)
    entropy = packing.select(out.entropy) if wanted.entropy else None  # [M]
    total, metrics = loss.call(loss._tokens, packing.select(out.logprobs), entropy)
    logprobs = out.logprobs.detach() if wanted.logprobs else None
    entropy = out.entropy.detach() if wanted.entropy else None
    return LossOutput(total, logprobs, entropy, advantages=None, metrics=metrics)
