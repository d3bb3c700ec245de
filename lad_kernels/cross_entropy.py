"""linear_cross_entropy: supervised training through the head, without storing N x V logits.

Per token, with weight w, smoothing eps, coefficient zeta of the z-loss, and y the target:

    l = w ((1 - eps) (lse - z_y) + eps (lse - mean_j z_j) + zeta lse^2)
    dl / dz_j = w ((1 + 2 zeta lse) p_j - (1 - eps) 1[j = y] - eps / V)

The gradient is known before the head unless zeta > 0, then inside a chunk: one pass, or routed. The last term needs no
logits: one mean row of W for dH, one sum of hidden states for dW.
Sources: z-loss arXiv 2204.02311 section 5; smoothing arXiv 1512.00567 section 7, as torch.nn.functional.cross_entropy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head import (
    ARGUMENTS,
    SCHEMA,
    HeadArguments,
    HeadForward,
    LogitGradient,
    Needs,
    Operands,
    Sparsity,
    flops,
    in_autocast_dtype,
    prepare,
    token_outputs,
)
from lad_kernels.objective import check_choice, check_number, check_tail
from lad_kernels.operators import operator, stacked, unstacked, widest, with_gradients
from lad_kernels.outputs import CrossEntropyStats
from lad_kernels.packing import Packing
from lad_kernels.step import HEAD_METRICS, LossTerms, Step, StepResult, Wanted, all_metrics, attach
from lad_kernels.step_operator import DIFFERENTIABLE, GRADIENTS, empty_gradients, gradients_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


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
    checks.vocab_group(vocab_group, impl, backward)
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )
    options = _Options(
        ignore_index, reduction, label_smoothing, z_loss, token_weights, backward, tail_mass, tail, return_stats
    )
    if torch.compiler.is_compiling() and impl != "reference" and reduction != "none":
        return _compiled(given, options)
    options = _checked(given, options)
    if impl == "reference":
        from lad_kernels import reference

        head = _prepared(given, options).for_reference(given)
        return without_autocast(reference.linear_cross_entropy)(
            head.hidden_states,
            head.lm_head_weight,
            head.target_ids,
            bias=head.bias,
            temperature=head.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            ignore_index=options.ignore_index,
            reduction=options.reduction,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            token_weights=options.token_weights,
            return_stats=options.return_stats,
        )
    if reduction == "none":
        if vocab_group is not None and not torch.compiler.is_compiling():
            _prepared(given, options)  # ranks compare what the operator of log-probs is not given: z_loss and weights
        return _by_token(in_autocast_dtype(given), options)
    operands = _prepared(given, options)
    result, count, loss = _run(operands, options, operands.needs())
    total, metrics = attach(operands, result, count)
    return (total, loss.stats(operands.layout.packing, metrics)) if return_stats else total


class _Options(NamedTuple):
    """Arguments of `linear_cross_entropy` besides those of the head."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    token_weights: Tensor | None  # the shape of target_ids
    backward: str
    tail_mass: float | None
    tail: str
    return_stats: bool


@without_autocast
def _by_token(given: HeadArguments, options: _Options) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """One loss per token, in the shape of target_ids, out of the head's differentiable outputs."""
    counts, stats = given.target_ids != options.ignore_index, options.return_stats
    smoothing, z_loss = options.label_smoothing, options.z_loss
    out = token_outputs(given, counts, return_entropy=stats, return_mean_logit=smoothing > 0, return_correct=stats)
    weights = counts.to(out.lse.dtype)  # the shape of target_ids, 0 where ignored
    if options.token_weights is not None:
        token_weights = options.token_weights.detach()
        if torch.compiler.is_compiling():
            token_weights = _checked_weights(token_weights, given.target_ids, counts)
        weights = torch.where(counts, token_weights.to(weights.dtype), 0.0)
    loss = _loss(weights, out.logprobs, out.lse, out.mean_logit, smoothing, z_loss)
    if not stats:
        return loss
    logprobs, entropy, lse = out.logprobs.detach(), out.entropy.detach(), out.lse.detach()
    accuracy = out.correct.to(lse.dtype).sum() / counts.sum().clamp(min=1)  # []
    penalty = (weights * z_loss * lse.square()).sum()  # []
    return loss, CrossEntropyStats(accuracy, out.correct, logprobs, entropy, penalty, {})


def _prepared(given: HeadArguments, options: _Options, needs: Needs | None = None) -> Operands:
    """Ignored tokens dropped; `needs` as in `prepare`."""
    loss_mask = given.target_ids != options.ignore_index  # the shape of target_ids
    alike = {"loss_mask": loss_mask, "reduction": options.reduction, "z_loss": options.z_loss}
    alike |= {"token_weights": options.token_weights, "backward": options.backward}
    alike |= {"tail_mass": options.tail_mass, "tail": options.tail}
    return prepare(given, loss_mask, None, alike, needs)


def _run(operands: Operands, options: _Options, needs: Needs) -> tuple[StepResult, int, _CrossEntropy]:
    """The forward, how many flops it launched, and the loss with its outputs."""
    stats = options.return_stats
    loss = _CrossEntropy(operands, options)
    with torch.no_grad(), flops.counting() as tally:
        return Step(operands.head(), loss, needs, Wanted(stats, stats, stats)).run(), tally[0], loss


def _checked(given: HeadArguments, options: _Options) -> _Options:
    """The options, with numbers as Python numbers; raises ValueError or TypeError."""
    ignore_index, reduction, _, _, token_weights, backward, _, tail, return_stats = options
    checks.plain_tensor("target_ids", given.target_ids)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    check_choice("reduction", reduction, REDUCTIONS)
    tail_mass = check_tail(backward, options.tail_mass, tail)
    smoothing = check_number("label_smoothing", options.label_smoothing, 0.0)
    if smoothing >= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {smoothing!r}")
    if smoothing and given.softcap is not None:
        raise ValueError(
            f"label_smoothing: expected 0 with a softcap, got {smoothing!r}; the mean of capped logits needs all of "
            f"them"
        )
    for name, value in (("label_smoothing", smoothing), ("return_stats", return_stats)):
        if value and given.vocab_group is not None:
            raise ValueError(
                f"{name}: not built for a head that vocab_group spreads over ranks, got {value!r}; leave it out"
            )
    z_loss = check_number("z_loss", options.z_loss, 0.0)
    if reduction == "none" and (backward == "routed" or tail_mass):
        raise ValueError(
            f"reduction: 'none' has no routed backward, since its gradient is known too late; got "
            f"backward={backward!r} and tail_mass={tail_mass!r}; use 'mean' or 'sum'"
        )
    checks.constant("token_weights", token_weights)
    if not torch.compiler.is_compiling():  # then values are checked by an operator
        checks.token_weights(token_weights, given.target_ids, given.target_ids != ignore_index)
    return options._replace(label_smoothing=smoothing, z_loss=z_loss, tail_mass=tail_mass)


class _CrossEntropy:
    """The loss of M tokens as the head's step sees it."""

    spans = "token"
    needs_outputs = True
    needs_entropy = False
    cu_seqlens: Tensor | None = None
    prior: Tensor | None = None

    @without_autocast
    def __init__(self, operands: Operands, options: _Options):
        hidden, targets = operands.hidden, operands.targets
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = hidden.new_ones(len(targets), dtype=wide)  # [M]
        if options.token_weights is not None:
            weights = operands.layout.packing.select(options.token_weights.detach()).to(wide)
        if options.reduction == "mean":
            total = weights.sum()  # []
            weights = weights / torch.where(total == 0, 1.0, total)
        self.head, self.weights = operands.head(), weights
        self.smoothing, self.z_loss = options.label_smoothing, options.z_loss
        self.sparsity = Sparsity.of(options.tail_mass, options.tail, options.backward, hidden.dtype)
        self.known_before = self.z_loss == 0

    def terms(self, out: HeadForward) -> LossTerms:
        weights, smoothing, self.out = self.weights, self.smoothing, out  # the outputs are kept for `stats`
        mean = self.head.mean_logits() if smoothing else None  # [M]
        loss = _loss(weights, out.logprobs, out.lse, mean, smoothing, self.z_loss).sum()
        gradient = _gradient(weights, out.lse, smoothing, self.z_loss)
        return LossTerms(loss, gradient, {}, mean_logit=-smoothing * weights if smoothing else None)

    def gradient(self, rows: slice, out: HeadForward) -> LogitGradient:  # [C]
        return _gradient(self.weights[rows], out.lse[rows], self.smoothing, self.z_loss)

    def gradient_of(self, chosen: Tensor, out: HeadForward, scored: bool) -> LogitGradient:  # [S]
        return _gradient(self.weights[chosen], out.lse, self.smoothing, self.z_loss)

    @without_autocast
    def stats(self, packing: Packing, metrics: dict[str, Tensor]) -> CrossEntropyStats:
        """What `return_stats` asks for, after `terms`."""
        logprobs, lse, entropy, *_, correct = self.out  # [M] each
        accuracy = correct.to(lse.dtype).sum() / max(len(correct), 1)  # []
        z_loss = (self.weights * self.z_loss * lse.square()).sum()  # []
        scatter_back = packing.scatter_back
        return CrossEntropyStats(
            accuracy, scatter_back(correct), scatter_back(logprobs), scatter_back(entropy), z_loss, metrics
        )


@operator("token_weights", "(Tensor token_weights, Tensor target_ids, Tensor counts) -> Tensor")
def _checked_weights(token_weights: Tensor, target_ids: Tensor, counts: Tensor) -> Tensor:  # of one shape
    """The weights, after checks of values that torch.compile does not know."""
    checks.token_weights(token_weights, target_ids, counts)
    return token_weights.clone()


@_checked_weights.register_fake
def _(token_weights: Tensor, target_ids: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(token_weights)


def _loss(
    weights: Tensor, logprobs: Tensor, lse: Tensor, mean_logit: Tensor | None, smoothing: float, z_loss: float
) -> Tensor:
    """l of every token, all of one shape; a weight of 0 gives 0 also where the rest is infinite."""
    loss = -logprobs
    if mean_logit is not None:
        loss = (1 - smoothing) * loss + smoothing * (lse - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(weights == 0, 0.0, weights * loss)


def _gradient(weights: Tensor, lse: Tensor, smoothing: float, z_loss: float) -> LogitGradient:  # [C], [C] -> [C]
    """By log-prob and lse: without the part of the mean logit."""
    prob = weights * (1 + 2 * z_loss * lse) if z_loss else weights
    return LogitGradient(-(1 - smoothing) * weights, prob)


# Each in the shape of target_ids, [0] where it is not wanted; numbers: accuracy, z-loss and metrics [2 + K].
_OUTPUTS = f"(Tensor loss, Tensor correct, Tensor logprobs, Tensor entropy, Tensor numbers, {GRADIENTS})"
_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, Tensor? token_weights, str backward, "
    "float? tail_mass, str tail, bool return_stats"
)


def _compiled(given: HeadArguments, options: _Options) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """The operator's call, for torch.compile and torch.export to trace."""
    checks.constant("token_weights", options.token_weights)
    given = in_autocast_dtype(given)
    needs = Needs.of(given.hidden_states, given.lm_head_weight, given.bias)
    loss, correct, logprobs, entropy, numbers, *_ = _operator(*given.flat(), *options, list(needs))
    if not options.return_stats:
        return loss
    values = unstacked(numbers, _numbers(needs), loss.dtype)
    accuracy, z_loss = values.pop("token_accuracy"), values.pop("z_loss")
    return loss, CrossEntropyStats(accuracy, correct, logprobs, entropy, z_loss, values)


def _numbers(needs: Needs) -> tuple[str, ...]:
    """Names of the statistics that are one number each."""
    return ("token_accuracy", "z_loss", *(HEAD_METRICS if any(needs) else ()), "head_flops")


def _arguments(arguments: tuple) -> tuple[HeadArguments, _Options, Needs]:
    *options, needs = arguments[ARGUMENTS:]
    return HeadArguments.of_flat(arguments[:ARGUMENTS]), _Options(*options), Needs(*needs)


@operator("linear_cross_entropy", f"({SCHEMA}, {_OPTIONS}, bool[] needs) -> {_OUTPUTS}")
def _operator(*arguments: Any) -> tuple[Tensor, ...]:
    given, options, needs = _arguments(arguments)
    options = _checked(given, options)
    operands = _prepared(given, options, needs)
    result, count, loss = _run(operands, options, needs)
    gradients, new = gradients_of(operands, result, needs), result.logprobs.new_empty
    if not options.return_stats:
        nothing = (new(0, dtype=torch.bool), new(0), new(0), new(0, dtype=widest(new(0).device)))
        return result.terms.loss, *nothing, *gradients
    stats = loss.stats(operands.layout.packing, all_metrics(result, count))
    numbers = stats.metrics | {"token_accuracy": stats.token_accuracy, "z_loss": stats.z_loss}
    outputs = (stats.correct, stats.logprobs, stats.entropy, stacked(numbers, _numbers(needs)))
    return result.terms.loss, *outputs, *gradients


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given, options, needs = _arguments(arguments)
    hidden, stats, names = given.hidden_states, options.return_stats, _numbers(needs)
    new = functools.partial(hidden.new_empty, dtype=torch.promote_types(hidden.dtype, torch.float32))
    shape, count = (given.target_ids.shape, len(names)) if stats else ((0,), 0)
    correct, numbers = hidden.new_empty(shape, dtype=torch.bool), hidden.new_empty(count, dtype=widest(hidden.device))
    gradients = empty_gradients((hidden, given.lm_head_weight, given.bias), needs)
    return new(()), correct, new(shape), new(shape), numbers, *gradients


with_gradients(_operator, DIFFERENTIABLE)
