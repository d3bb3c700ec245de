"""linear_logprobs: per-token log-probabilities from hidden states, differentiable in hidden states, weight and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.autocast import without_autocast
from lad_kernels.head.operands import HeadArguments, Layout, prepare
from lad_kernels.head.records import LogitGradient, Needs, select
from lad_kernels.outputs import LinearLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.compiler.disable
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
) -> LinearLogprobs:
    """Token log-probabilities of z = softcap(logit_scale (h W^T + b)) / temperature, without storing logits.

    Differentiable in hidden_states, lm_head_weight and bias through log-probs, entropy and lse. Under torch.compile
    the call is a graph break. Under torch.autocast hidden states and weight are cast to its dtype, and it changes
    nothing else.

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

    Returns:
        LinearLogprobs of float32 tensors (float64 for float64 input), shaped like target_ids.

    Raises:
        ValueError, TypeError: an argument is of the wrong shape, dtype, device or range; the message says which.
        RuntimeError: impl='triton' where Triton cannot run; torch.func transforms; double backward.
    """
    checks.plain_tensor("target_ids", target_ids)
    checks.mask(loss_mask, target_ids, "target_ids")
    checks.vocab_group(vocab_group, impl)
    given = HeadArguments(
        hidden_states, lm_head_weight, target_ids, bias, temperature, logit_scale, softcap, vocab_group, impl
    )
    operands = prepare(given, loss_mask, None, {"loss_mask": loss_mask, "return_entropy": return_entropy})
    hidden, weight, _, targets, layout = operands
    if impl == "reference":
        from lad_kernels import reference

        return without_autocast(reference.linear_logprobs)(
            hidden,
            weight,
            target_ids.long(),
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            loss_mask=loss_mask,
            return_entropy=return_entropy,
        )
    logprobs, entropy, lse = _LinearLogprobs.apply(hidden, weight, bias, targets, layout, return_entropy)
    unpack = layout.packing.place
    return LinearLogprobs(unpack(logprobs), None if entropy is None else unpack(entropy), unpack(lse))


class _LinearLogprobs(torch.autograd.Function):
    """(hidden, weight, bias) -> log-probs, entropy, lse, each [M], with any upstream gradient.

    Saved: the inputs themselves (no copy), lse and entropy. Nothing that is saved is changed.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        layout: Layout,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        temperatures = layout.transform.temperatures
        out = layout.head(hidden, weight, bias, targets, temperatures).forward(want_entropy=want_entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, out.lse, out.lse_rest, out.entropy)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy, out.lse

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple:
        checks.refuse_double_backward()
        hidden, weight, bias, targets, temperatures, lse, rest, entropy = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:3])
        if (g_logp is None and g_entropy is None and g_lse is None) or not any(needs):
            return (None,) * 6
        onehot = torch.zeros_like(lse) if g_logp is None else g_logp  # [M]
        prob = -onehot if g_lse is None else g_lse - onehot  # [M]
        if g_entropy is not None:
            prob = prob - g_entropy * entropy
        gradient = LogitGradient(onehot, prob, g_entropy).with_rest(rest)
        active = gradient.active()  # [A]
        head = ctx.layout.head(hidden, weight, bias, targets, temperatures).select(active)
        gradients = head.backward(select(lse, active), gradient.select(active), None, needs).shaped(hidden)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None
