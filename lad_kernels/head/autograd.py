"""The head's gradient: what is saved, what is recomputed, in which precision.

Saved: the inputs themselves (no copy), which tokens take part, their lse and entropy. Recomputed in the backward: the
logits, one tile or slab at a time. Nothing of size N x V is ever stored, and nothing that is saved is changed. Tokens
whose coefficients are all zero are dropped before the backward's first product (one host sync on an accelerator).

| quantity | precision |
|---|---|
| hidden states, weight, bias | bfloat16, float16 or float32; float64 in PyTorch only |
| logits, lse, log-probs, entropy | float32, never rounded to 16 bits before the softmax |
| dZ | rounded once to the input dtype for the matrix units (Triton); float32 (PyTorch) |
| dH, dW, dbias | accumulated in float32, rounded once to the dtype of their input |
| tf32 | only if PyTorch is told to use it |

Deterministic: fixed order of every sum and no atomics, unless `dispatch.allow_atomics` asks for them. Gradients are
computed for what needs them alone: a frozen head costs no dW, a frozen body no dH.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lad_kernels import checks
from lad_kernels.head import dispatch, torch_ops
from lad_kernels.head.logits import HeadForward, HeadGradients, LogitGradient, LogitTransform, Routing
from lad_kernels.packing import Packing


@dataclass(frozen=True)
class Head:
    """The head on M packed tokens, in Triton or PyTorch, without autograd."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [M]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    triton: bool

    def take(self, tokens: Tensor | slice | None) -> Head:
        """The head on some of the tokens [A]; None stands for all."""
        if tokens is None:
            return self
        transform, t = self.transform, self.transform.temperature
        if isinstance(t, Tensor):
            transform = replace(transform, temperature=t[tokens])
        return replace(self, hidden=self.hidden[tokens], targets=self.targets[tokens], transform=transform)

    def forward(self, *, want_entropy: bool, want_block_lse: bool = False) -> HeadForward:
        path: Any = torch_ops
        if self.triton:
            from lad_kernels.head.kernels import forward as path
        return path.forward(
            self.hidden, self.weight, self.targets, self.bias, self.transform, want_entropy=want_entropy,
            want_block_lse=want_block_lse,
        )  # fmt: skip

    def has_one_pass(self, need_bias: bool) -> bool:
        """Whether `one_pass` can run.

        Triton: not for float16 (exponentials leave its range), nor for a 16-bit dbias (it would be rounded before the
        sum). PyTorch: not for 16-bit inputs (the weight would be widened twice per chunk), nor with a softcap (its
        slope would be lost).
        """
        dtype = self.hidden.dtype
        if self.triton:
            return dtype == torch.float32 or (dtype == torch.bfloat16 and not need_bias)
        return dtype.itemsize > 2 and self.transform.softcap is None

    def one_pass(
        self, prior: Tensor | None, coefficients: Callable[[slice, Tensor], Tensor], *, chunks: Sequence[slice],
        want_entropy: bool, needs: tuple[bool, bool, bool],
    ) -> tuple[HeadForward, HeadGradients] | None:  # fmt: skip
        """Forward and gradient together; None where the prior log-probs [M] are too far off (Triton)."""
        path: Any = torch_ops.one_pass
        if self.triton:
            from lad_kernels.head.kernels.one_pass import one_pass as path
        return path(
            *self._inputs(), prior, coefficients, chunks=chunks, want_entropy=want_entropy, **_wanted(needs)
        )  # fmt: skip

    def backward(
        self, lse: Tensor, gradient: LogitGradient, routing: Routing | None, needs: tuple[bool, bool, bool],
        *, wide: bool = False,
    ) -> HeadGradients:  # fmt: skip
        """Gradients of hidden [M, D], weight and bias; exact without a routing, and with `wide` not rounded then."""
        path: Any = torch_ops
        options = _wanted(needs) | ({"wide": wide} if routing is None else {})
        if self.triton:
            from lad_kernels.head.kernels import dense, routed

            path = dense if routing is None else routed
            options |= {} if routing is None else {"atomics": dispatch.atomics()}
        chosen = () if routing is None else (routing,)
        return path.backward(*self._inputs(), lse, gradient, *chosen, **options)

    def _inputs(self) -> tuple:
        return self.hidden, self.weight, self.targets, self.bias, self.transform


def _wanted(needs: tuple[bool, bool, bool]) -> dict[str, bool]:
    return dict(zip(("need_hidden", "need_weight", "need_bias"), needs))


def live_tokens(gradient: LogitGradient) -> Tensor | None:
    """Tokens [A] with a coefficient that is not zero, ascending; None if all have one."""
    live = (gradient.onehot != 0) | (gradient.prob != 0)  # [M]
    if gradient.entropy is not None:
        live |= gradient.entropy != 0
    tokens = live.nonzero()[:, 0]  # [A]
    return None if len(tokens) == len(live) else tokens


def take(x: Tensor, tokens: Tensor | slice | None) -> Tensor:
    """[M] -> [A]."""
    return x if tokens is None else x[tokens]


def take_gradient(gradient: LogitGradient, tokens: Tensor | slice | None) -> LogitGradient:
    """Coefficients of some tokens."""
    entropy = None if gradient.entropy is None else take(gradient.entropy, tokens)
    return LogitGradient(take(gradient.onehot, tokens), take(gradient.prob, tokens), entropy)


def spread(found: HeadGradients, packing: Packing, tokens: Tensor | None) -> HeadGradients:
    """Gradients with dH [A, D] of some packed tokens -> with dH in the shape the user gave, zero elsewhere."""
    dh = found.hidden
    if dh is None:
        return found
    if tokens is not None:
        dh = dh.new_zeros(packing.tokens, dh.shape[1]).index_copy_(0, tokens, dh)
    return found._replace(hidden=packing.place(dh))


class LinearLogprobsFunction(torch.autograd.Function):
    """(hidden, weight, bias) -> log-probs, entropy, lse, each [M], with any upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, packing: Packing,
        transform: LogitTransform, want_entropy: bool, triton: bool, new_head: Callable[..., Head],
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        head = new_head(packing.take(hidden), weight, targets, bias, transform, triton)
        out = head.forward(want_entropy=want_entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, out.lse, out.entropy)
        ctx.packing, ctx.transform, ctx.triton, ctx.new_head = packing, transform, triton, new_head
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy, out.lse

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple:
        checks.refuse_double_backward()
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        if (g_logp is None and g_entropy is None and g_lse is None) or not any(ctx.needs_input_grad[:3]):
            return (None,) * 9
        onehot = torch.zeros_like(lse) if g_logp is None else g_logp  # [M]
        prob = -onehot if g_lse is None else g_lse - onehot  # [M]
        if g_entropy is not None:
            prob = prob - g_entropy * entropy
        gradient = LogitGradient(onehot, prob, g_entropy)
        live = live_tokens(gradient)  # [A]
        head = ctx.new_head(ctx.packing.take(hidden), weight, targets, bias, ctx.transform, ctx.triton).take(live)
        found = head.backward(take(lse, live), take_gradient(gradient, live), None, ctx.needs_input_grad[:3])
        return *spread(found, ctx.packing, live), None, None, None, None, None, None
