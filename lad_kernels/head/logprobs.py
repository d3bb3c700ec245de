"""linear_logprobs: per-token log-probabilities from hidden states, differentiable in hidden states, weight and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.head.operands import SCHEMA, HeadArguments, every_position, in_autocast_dtype, prepare
from lad_kernels.head.records import LogitGradient, Needs, select
from lad_kernels.operators import operator, refuse_double_backward
from lad_kernels.outputs import LinearLogprobs

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
    impl: str = "auto",
    capturable: bool = False,
) -> LinearLogprobs:
    """Token log-probabilities of z = softcap(logit_scale (h W^T + b)) / temperature, without storing logits.

    Differentiable in hidden_states, lm_head_weight and bias through log-probs, entropy and lse. Under torch.autocast
    hidden states and weight are cast to its dtype, and it changes nothing else.

    Args:
        hidden_states: [N, D] or [B, T, D], bfloat16, float16, float32 or float64; after the final norm.
        lm_head_weight: [V, D], same dtype, as `lm_head.weight` stores it.
        target_ids: [N] or [B, T] integers in [0, V), already shifted: target_ids[t] is predicted by hidden_states[t].
        bias: [V] head bias.
        temperature: a number, or a float tensor with one value per token.
        logit_scale: multiplies the product (Cohere's logit_scale; for Granite 1 / logits_scaling).
        softcap: c in c tanh(z / c) (Gemma's final_logit_softcapping).
        loss_mask: nonzero where a token counts; other positions return 0, get exactly zero gradient and may hold
            anything. Costs one host sync on an accelerator.
        return_entropy: also return the entropy of each token's distribution.
        vocab_group: the process group over which the rows of the head are sharded. lm_head_weight [V_r, D] and bias
            [V_r] are then this rank's consecutive rows, in rank order and of any number (0 too; cut padding rows off
            with weight[:rows]). Everything else is the same on every rank, target_ids are numbered over the whole
            vocabulary, and every rank makes every call and every backward. Results are the same on every rank; dH is
            in full on every rank and must not be summed again, dW is that of the local rows. A DTensor's rows are
            weight.to_local(). Two all-gathers forward, all-reduces of dH backward, one host sync.
        impl: `auto` (Triton on CUDA and ROCm, PyTorch elsewhere), `triton`, `torch` or `reference`.
        capturable: never wait for the device, so that a CUDA graph can hold the call and its backward. Tokens without
            a gradient then stay in the products; loss_mask and vocab_group are refused.

    Returns:
        LinearLogprobs of float32 tensors (float64 for float64 input), shaped like target_ids.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.vocab_group(vocab_group, impl)
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )._replace(capturable=capturable)
    if impl == "reference":
        checks.plain_tensor("target_ids", target_ids)
        checks.mask(loss_mask, target_ids, "target_ids")
        return prepare(given, loss_mask, None, {}).reference_logprobs(given, loss_mask, return_entropy)
    out = token_outputs(given, loss_mask, return_entropy=return_entropy)
    return LinearLogprobs(out.logprobs, out.entropy, out.lse)


class TokenOutputs(NamedTuple):
    """What the operator returns, each in the shape of target_ids; the first four are differentiable."""

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor
    mean_logit: Tensor | None  # mean over the vocabulary
    correct: Tensor | None  # bool: the target is the likeliest entry


def token_outputs(
    given: HeadArguments,
    loss_mask: Tensor | None,  # the shape of target_ids
    *,
    return_entropy: bool = False,
    return_mean_logit: bool = False,
    return_correct: bool = False,
) -> TokenOutputs:
    """The head's numbers per token; masked tokens are 0."""
    wanted, given = (bool(return_entropy), return_mean_logit, return_correct), in_autocast_dtype(given)
    if not torch.compiler.is_compiling():
        checks.mask(loss_mask, given.target_ids, "target_ids")
    needs = list(Needs.of(given.hidden_states, given.lm_head_weight, given.bias))
    logprobs, entropy, lse, mean, correct, *_ = _forward(*given.flat(), loss_mask, *wanted, needs)
    entropy, mean, correct = (x if want else None for x, want in zip((entropy, mean, correct), wanted))
    return TokenOutputs(logprobs, entropy, lse, mean, correct)


# Each in the shape of target_ids, [0] where it is not wanted; lse_rest: rounding error of lse; rows [R]: of every rank.
_OUTPUTS = (
    "(Tensor logprobs, Tensor entropy, Tensor lse, Tensor mean_logit, Tensor correct, Tensor lse_rest, Tensor rows)"
)
_WANTED = "bool return_entropy, bool return_mean_logit, bool return_correct"


@operator("linear_logprobs", f"({SCHEMA}, Tensor? loss_mask, {_WANTED}, bool[] needs) -> {_OUTPUTS}")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *flat, loss_mask, entropy, mean_logit, correct, needs = arguments
    given = HeadArguments.of_flat(flat)
    operands = prepare(given, loss_mask, None, {"loss_mask": loss_mask, "return_entropy": entropy}, Needs(*needs))
    head, layout = operands.head(), operands.layout
    out = head.forward(want_entropy=entropy, want_correct=correct)
    mean = head.mean_logits() if mean_logit else None
    rows = torch.tensor([] if layout.shard is None else layout.shard.rows, dtype=torch.int64)
    tokens = (out.logprobs, out.entropy, out.lse, mean, out.correct, out.lse_rest)
    return *(out.lse.new_empty(0) if x is None else layout.packing.scatter_back(x) for x in tokens), rows


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *flat, _, entropy, mean_logit, correct, _ = arguments
    given = HeadArguments.of_flat(flat)
    dtype, shape = torch.promote_types(given.hidden_states.dtype, torch.float32), given.target_ids.shape
    wanted = (True, entropy, True, mean_logit, correct, True)
    tokens = [given.hidden_states.new_empty(shape if want else 0, dtype=dtype) for want in wanted]
    if correct:
        tokens[4] = tokens[4].bool()
    return *tokens, torch.empty(0 if given.vocab_group is None else given.vocab_group.size(), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """The inputs themselves (no copy), lse and entropy."""
    *flat, loss_mask, ctx.entropy, _, _, _ = inputs
    _, entropy, lse, _, correct, rest, rows = output
    ctx.save_for_backward(*flat[:5], loss_mask, lse, rest, entropy, rows)
    ctx.rest, ctx.arguments = flat[5:], len(inputs)
    ctx.mark_non_differentiable(correct, rest, rows)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_logprobs: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, g_mean: Tensor | None, *_: None
) -> tuple:
    refuse_double_backward()
    needs = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    upstream, nothing = (g_logprobs, g_entropy if ctx.entropy else None, g_lse, g_mean), [None] * ctx.arguments
    if all(g is None for g in upstream) or not any(needs):
        return tuple(nothing)
    *tensors, loss_mask, lse, rest, entropy, rows = ctx.saved_tensors
    gradients = _gradients(*tensors, *ctx.rest, loss_mask, lse, rest, entropy, rows, *upstream, list(needs))
    hidden, weight, bias = (g if need else None for g, need in zip(gradients, needs))
    return hidden, weight, None, bias, *nothing[4:]


_forward.register_autograd(_backward, setup_context=_save)


@operator(
    "linear_logprobs_backward",
    f"({SCHEMA}, Tensor? loss_mask, Tensor lse, Tensor lse_rest, Tensor entropy, Tensor rows, Tensor? g_logprobs, "
    "Tensor? g_entropy, Tensor? g_lse, Tensor? g_mean_logit, bool[] needs) -> "
    "(Tensor hidden_states, Tensor lm_head_weight, Tensor bias)",
)
def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden states, weight and bias; [0] for those that are not needed."""
    *flat, loss_mask, lse, rest, entropy, rows, g_logprobs, g_entropy, g_lse, g_mean, needs = arguments
    given = HeadArguments.of_flat(flat)
    head = every_position(given, rows.tolist())
    lse, rest = lse.reshape(-1), rest.reshape(-1)  # [N]

    def upstream(g: Tensor | None) -> Tensor | None:  # the shape of target_ids -> [N], 0 where masked
        return g if g is None else (g if loss_mask is None else torch.where(loss_mask != 0, g, 0.0)).reshape(-1)

    g_logprobs, g_entropy, g_lse, g_mean = map(upstream, (g_logprobs, g_entropy, g_lse, g_mean))
    onehot = torch.zeros_like(lse) if g_logprobs is None else g_logprobs  # [N]
    prob = -onehot if g_lse is None else g_lse - onehot  # [N]
    if g_entropy is not None:
        prob = prob - g_entropy * entropy.reshape(-1)
    gradient = LogitGradient(onehot, prob, g_entropy).with_rest(rest)
    active = None if given.capturable else gradient.active(g_mean)  # [A]
    part = head.select(active)
    gradients = part.backward(select(lse, active), gradient.select(active), None, Needs(*needs))
    if g_mean is not None:
        part.add_mean_logit(gradients, select(g_mean, active))
    return tuple(lse.new_empty(0) if g is None else g.contiguous() for g in gradients.shaped(flat[0]))


@_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, needs = arguments[0], arguments[1], arguments[3], arguments[-1]
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip((hidden, weight, bias), needs)
    )
