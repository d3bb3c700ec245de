"""linear_cross_entropy: supervised training through the head, without storing N x V logits.

Per token, with weight w, smoothing eps, coefficient zeta of the z-loss, and y the target:

    l = w ((1 - eps) (lse - z_y) + eps (lse - mean_j z_j) + zeta lse^2)
    dl / dz_j = w ((1 + 2 zeta lse) p_j - (1 - eps) 1[j = y] - eps / V)

The gradient is known before the head unless zeta > 0, then inside a chunk: one pass, or routed. The last term needs no
logits: one mean row of W for dH, one sum of hidden states for dW.
Sources: z-loss arXiv 2204.02311 section 5; smoothing arXiv 1512.00567 section 7, as torch.nn.functional.cross_entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import (
    Head,
    HeadArguments,
    HeadForward,
    Layout,
    LogitGradient,
    Needs,
    Operands,
    Sparsity,
    flops,
    prepare,
    select,
)
from lad_kernels.objective import check_choice, check_number, check_tail
from lad_kernels.outputs import CrossEntropyStats
from lad_kernels.packing import Packing
from lad_kernels.step import LossTerms, Step, Wanted, attach

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


@torch.compiler.disable
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
    backward: str = "auto",
    tail_mass: float | None = None,
    tail: str = "unbiased",
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of last hidden states through the lm_head weight.

    Args:
        hidden_states, lm_head_weight, bias, temperature, logit_scale, softcap, vocab_group, impl: as for
            `linear_logprobs`.
        target_ids: [N] or [B, T] integers in [0, V), or ignore_index; already shifted: target_ids[t] is predicted by
            hidden_states[t].
        ignore_index: targets that do not count; they never enter a product, and their hidden states may hold anything.
        reduction: `mean` over the tokens that count (with token_weights: the weighted sum over the sum of weights),
            `sum`, or `none`: one loss per token, 0 where ignored. Without a token that counts `mean` is 0, not NaN.
        label_smoothing: in [0, 1), as in torch.nn.functional.cross_entropy. Not with a softcap or vocab_group.
        z_loss: coefficient of lse^2, which keeps logits from drifting (PaLM uses 1e-4).
        token_weights: factors >= 0, constants; a token of weight 0 costs nothing in the backward.
        backward, tail_mass, tail: how the gradient of the head is computed, and how much of it may be left out, as in
            `LADConfig`; with reduction `none` it is exact.
        return_stats: also return `CrossEntropyStats`. Not with vocab_group.

    Returns:
        The loss, float32 (float64 for float64 input), differentiable in hidden_states, lm_head_weight and bias; with
        return_stats (loss, CrossEntropyStats).

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.plain_tensor("target_ids", target_ids)
    tail_mass = check_tail(backward, tail_mass, tail)
    checks.vocab_group(vocab_group, impl, backward)
    label_smoothing, z_loss = _check(
        ignore_index, reduction, label_smoothing, z_loss, softcap, vocab_group is not None, return_stats
    )
    if reduction == "none" and (backward == "routed" or tail_mass):
        raise ValueError(
            f"reduction: 'none' has no routed backward, since its gradient is known too late; got "
            f"backward={backward!r} and tail_mass={tail_mass!r}; use 'mean' or 'sum'"
        )
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )
    loss_mask = target_ids != ignore_index  # the shape of target_ids
    checks.token_weights(token_weights, target_ids, loss_mask)
    alike = {"loss_mask": loss_mask, "reduction": reduction, "z_loss": z_loss, "token_weights": token_weights}
    operands = prepare(given, loss_mask, None, alike | {"backward": backward, "tail_mass": tail_mass, "tail": tail})
    hidden, weight, bias, targets, layout = operands
    if impl == "reference":
        from lad_kernels import reference

        return without_autocast(reference.linear_cross_entropy)(
            hidden,
            weight,
            target_ids.long(),
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            token_weights=token_weights,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            return_stats=return_stats,
        )
    sparsity = Sparsity.of(tail_mass, tail, backward, hidden.dtype)
    loss = _CrossEntropy.of(operands, reduction, label_smoothing, z_loss, token_weights, sparsity)
    if reduction == "none":
        by_token = _TokenCrossEntropy.apply(hidden, weight, bias, targets, layout, loss, return_stats)
        return _answer(layout.packing.place(by_token), loss, layout.packing, {}, return_stats)
    needs, wanted = operands.needs(), Wanted(return_stats, return_stats, return_stats)
    with torch.no_grad(), flops.counting() as tally:
        result = Step(operands.head(), loss, needs, wanted).run()
    total, metrics = attach(operands, result, tally[0])
    return _answer(total, loss, layout.packing, metrics, return_stats)


@without_autocast
def _answer(
    total: Tensor, loss: _CrossEntropy, packing: Packing, metrics: dict[str, Tensor], return_stats: bool
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """What the public function returns, given the loss [] or one of each token in the shape of target_ids."""
    if not return_stats:
        return total
    logprobs, lse, entropy, correct = loss.out.logprobs, loss.out.lse, loss.out.entropy, loss.out.correct  # [M] each
    accuracy = correct.to(lse.dtype).sum() / max(len(correct), 1)
    z_loss = (loss.weights * loss.z_loss * lse.square()).sum() if loss.z_loss else lse.new_zeros(())
    place = packing.place
    return total, CrossEntropyStats(accuracy, place(correct), place(logprobs), place(entropy), z_loss, metrics)


def _check(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    sharded: bool,
    return_stats: bool,
) -> tuple[float, float]:
    """The two coefficients as Python numbers."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    check_choice("reduction", reduction, REDUCTIONS)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0.0)
    if label_smoothing >= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
    if label_smoothing and softcap is not None:
        raise ValueError(
            f"label_smoothing: expected 0 with a softcap, got {label_smoothing!r}; the mean of capped logits needs all "
            f"of them"
        )
    for name, value in (("label_smoothing", label_smoothing), ("return_stats", return_stats)):
        if value and sharded:
            raise ValueError(
                f"{name}: not built for a head that vocab_group spreads over ranks, got {value!r}; leave it out"
            )
    return label_smoothing, check_number("z_loss", z_loss, 0.0)


@dataclass
class _CrossEntropy:
    """The loss of M tokens as the head's step sees it."""

    head: Head  # of the same tokens
    weights: Tensor  # [M] w, the reduction's divisor in it
    smoothing: float
    z_loss: float
    sparsity: Sparsity
    out: HeadForward | None = None  # [M] kept for the statistics
    spans: str = "token"
    needs_outputs: bool = True
    needs_entropy: bool = False
    cu_seqlens: Tensor | None = None
    prior: Tensor | None = None

    @classmethod
    @without_autocast
    def of(
        cls,
        operands: Operands,
        reduction: str,
        smoothing: float,
        z_loss: float,
        token_weights: Tensor | None,  # the shape of target_ids
        sparsity: Sparsity,
    ) -> _CrossEntropy:
        hidden, targets = operands.hidden, operands.targets
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = hidden.new_ones(len(targets), dtype=wide)  # [M]
        if token_weights is not None:
            weights = operands.layout.packing.take(token_weights.detach()).to(wide)
        if reduction == "mean":
            total = weights.sum()  # []
            weights = weights / torch.where(total == 0, 1.0, total)
        return cls(operands.head(), weights, smoothing, z_loss, sparsity)

    @property
    def known_before(self) -> bool:
        return self.z_loss == 0

    def by_token(self, out: HeadForward) -> Tensor:
        """[M] l."""
        loss = -out.logprobs if not self.smoothing else -(1 - self.smoothing) * out.logprobs  # [M]
        if self.smoothing:
            loss = loss + self.smoothing * (out.lse - self.head.mean_logits())
        if self.z_loss:
            loss = loss + self.z_loss * out.lse.square()
        return torch.where(self.weights == 0, 0.0, self.weights * loss)  # a weight of 0 also where a loss is infinite

    def terms(self, out: HeadForward) -> LossTerms:
        mean = -self.smoothing * self.weights if self.smoothing else None  # [M]
        self.out = out
        return LossTerms(
            self.by_token(out).sum(), _gradient(self.weights, out.lse, self.smoothing, self.z_loss), {}, mean_logit=mean
        )

    def gradient(self, rows: slice, out: HeadForward) -> LogitGradient:  # [C]
        return _gradient(self.weights[rows], out.lse[rows], self.smoothing, self.z_loss)

    def gradient_of(self, chosen: Tensor, out: HeadForward) -> LogitGradient:  # [S]
        return _gradient(self.weights[chosen], out.lse, self.smoothing, self.z_loss)


def _gradient(weights: Tensor, lse: Tensor, smoothing: float, z_loss: float) -> LogitGradient:  # [C], [C] -> [C]
    """By log-prob and lse: without the part of the mean logit."""
    prob = weights * (1 + 2 * z_loss * lse) if z_loss else weights
    return LogitGradient(-(1 - smoothing) * weights, prob)


class _TokenCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias) -> a loss per token [M], with any upstream gradient."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        layout: Layout,
        loss: _CrossEntropy,
        want_stats: bool,
    ) -> Tensor:
        temperatures = layout.transform.temperatures
        loss.out = out = loss.head.forward(want_entropy=want_stats, want_correct=want_stats)
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, out.lse, out.lse_rest, loss.weights)
        ctx.layout, ctx.smoothing, ctx.z_loss = layout, loss.smoothing, loss.z_loss
        ctx.set_materialize_grads(False)
        return loss.by_token(out)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None) -> tuple:  # [M]
        checks.refuse_double_backward()
        needs = Needs(*ctx.needs_input_grad[:3])
        if grad is None or not any(needs):
            return (None,) * 7
        hidden, weight, bias, targets, temperatures, lse, rest, weights = ctx.saved_tensors
        weights = weights * grad  # [M]
        gradient = _gradient(weights, lse, ctx.smoothing, ctx.z_loss).with_rest(rest)
        active = gradient.active()  # [A]
        head = ctx.layout.head(hidden, weight, bias, targets, temperatures).select(active)
        gradients = head.backward(select(lse, active), gradient.select(active), None, needs)
        if ctx.smoothing:
            head.add_mean_logit(gradients, -ctx.smoothing * select(weights, active))
        gradients = gradients.shaped(hidden)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None
