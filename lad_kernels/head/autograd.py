"""The head's gradient: what is saved, what is recomputed, in which precision.

Saved: the inputs themselves (no copy), which tokens take part, their lse and entropy. Recomputed in the backward: the
logits, one tile or slab at a time. Nothing of size N x V is ever stored, and nothing that is saved is changed.

| quantity | precision |
|---|---|
| hidden states, weight, bias | bfloat16, float16 or float32; float64 in PyTorch only |
| logits, lse, log-probs, entropy | float32, never rounded to 16 bits before the softmax |
| dZ | rounded once to the input dtype for the matrix units (Triton); float32 (PyTorch) |
| dH, dW, dbias | accumulated in float32, rounded once to the dtype of their input |
| tf32 | only if PyTorch is told to use it |

Deterministic: no atomics, fixed order of every sum. Gradients are computed for what needs them alone: a frozen head
costs no dW, a frozen body no dH.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.head import torch_ops
from lad_kernels.head.logits import HeadForward, HeadGradients, LogitGradient, LogitTransform
from lad_kernels.packing import Packing


def head_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, *,
    want_entropy: bool, triton: bool,
) -> HeadForward:  # fmt: skip
    """Forward on [M, D] packed hidden states, without autograd."""
    if triton:
        from lad_kernels.head.kernels import forward as kernel

        return kernel.forward(hidden, weight, targets, bias, transform, want_entropy=want_entropy, want_block_lse=False)
    return torch_ops.forward(hidden, weight, targets, bias, transform, want_entropy=want_entropy)


def head_backward(
    hidden: Tensor,  # [N, D] or [B, T, D], as the user gave it
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [M]
    lse: Tensor,  # [M]
    gradient: LogitGradient,
    *,
    packing: Packing,
    transform: LogitTransform,
    triton: bool,
    needs: tuple[bool, bool, bool],
) -> HeadGradients:
    """Gradients of hidden (in its own shape), weight and bias."""
    need_hidden, need_weight, need_bias = needs
    if not any(needs):
        return HeadGradients(None, None, None)
    backward: Any = torch_ops.backward
    if triton:
        from lad_kernels.head.kernels.dense import backward
    found = backward(
        packing.take(hidden), weight, targets, bias, transform, lse, gradient,
        need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
    )  # fmt: skip
    return found._replace(hidden=None if found.hidden is None else packing.place(found.hidden))


class LinearLogprobsFunction(torch.autograd.Function):
    """(hidden, weight, bias) -> log-probs, entropy, lse, each [M], with any upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, packing: Packing,
        transform: LogitTransform, want_entropy: bool, triton: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        out = head_forward(
            packing.take(hidden), weight, targets, bias, transform, want_entropy=want_entropy, triton=triton
        )
        ctx.save_for_backward(hidden, weight, bias, targets, out.lse, out.entropy)
        ctx.packing, ctx.transform, ctx.triton = packing, transform, triton
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy, out.lse

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple:
        checks.refuse_double_backward()
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        if g_logp is None and g_entropy is None and g_lse is None:
            return (None,) * 8
        onehot = torch.zeros_like(lse) if g_logp is None else g_logp  # [M]
        prob = -onehot if g_lse is None else g_lse - onehot  # [M]
        if g_entropy is not None:
            prob = prob - g_entropy * entropy
        found = head_backward(
            hidden, weight, bias, targets, lse, LogitGradient(onehot, prob, g_entropy),
            packing=ctx.packing, transform=ctx.transform, triton=ctx.triton, needs=ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *found, None, None, None, None, None
