"""The head's gradient: what is saved, what is recomputed, in which precision.

Saved: the inputs themselves (no copy), which tokens take part, their lse and entropy. Recomputed in the backward: the
logits, one tile or slab at a time. Nothing of size N x V is ever stored, and nothing that is saved is changed. Tokens
whose coefficients are all zero are dropped before the backward's first product (one host sync on an accelerator).
Triton needs at most dispatch.BUDGET bytes beyond inputs, gradients and one float32 dW, whatever N is. The gradients'
room is counted from the start: block masses, freed before there are gradients, may use it.

| quantity | precision |
|---|---|
| hidden states, weight, bias | bfloat16, float16 or float32; float64 in PyTorch only |
| logits, lse, log-probs, entropy | float32, never rounded to 16 bits before the softmax |
| dZ | rounded once to the input dtype for the matrix units (Triton); float32 (PyTorch) |
| dH, dW, dbias | accumulated in float32, rounded once; twice if one pass made them and the loss is scaled afterwards |
| tf32 | only if PyTorch is told to use it |
| torch.autocast | casts hidden states and weight at the door; off inside, forward and backward |

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
from lad_kernels.autocast import without_autocast
from lad_kernels.head import dispatch, pytorch
from lad_kernels.head.records import HeadForward, HeadGradients, LogitGradient, LogitTransform, Routing, gather
from lad_kernels.packing import Packing


@dataclass(frozen=True)
class Head:
    """The head on M tokens, in Triton or PyTorch, without autograd. Hidden states are gathered when they are needed."""

    hidden: Tensor  # [N, D] or [B, T, D], as the user gave them
    weight: Tensor  # [V, D]
    targets: Tensor  # [M]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    triton: bool
    tokens: Tensor | None = None  # [M] flat rows of hidden; None: all of [N, D]

    def take(self, chosen: Tensor | slice | None) -> Head:
        """The head on some of the tokens [A]; None stands for all."""
        if chosen is None:
            return self
        transform, t = self.transform, self.transform.temperature
        if isinstance(t, Tensor):
            transform = replace(transform, temperature=t[chosen])
        hidden, tokens = self.hidden, self.tokens
        if tokens is not None:
            tokens = tokens[chosen]
        elif isinstance(chosen, slice):
            hidden = hidden[chosen]
        else:
            tokens = chosen
        return replace(self, hidden=hidden, tokens=tokens, targets=self.targets[chosen], transform=transform)

    def rows(self) -> Tensor:
        """Hidden states of the tokens [M, D]."""
        return gather(self.hidden, self.tokens)

    def forward(self, *, want_entropy: bool, want_block_lse: bool = False) -> HeadForward:
        path: Any = pytorch
        options: dict[str, Any] = {"want_entropy": want_entropy, "want_block_lse": want_block_lse}
        if self.triton:
            from lad_kernels.head.kernels import forward as path

            rest = (self.weight, self.targets, self.bias, self.transform)
            return path.forward(self.hidden, *rest, tokens=self.tokens, **options)
        return path.forward(*self._inputs(), **options)

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
        """Forward and gradient together, dH [N, D]; None where the prior log-probs [M] are too far off (Triton)."""
        path: Any = pytorch
        options: dict[str, Any] = {"chunks": chunks, "want_entropy": want_entropy} | _wanted(needs)
        if self.triton:
            from lad_kernels.head.kernels import one_pass as path

            rest = (self.weight, self.targets, self.bias, self.transform)
            return path.one_pass(self.hidden, *rest, prior, coefficients, tokens=self.tokens, **options)
        out, found = path.one_pass(*self._inputs(), prior, coefficients, **options)
        return out, self._spread(found)

    def backward(
        self, lse: Tensor, gradient: LogitGradient, routing: Routing | None, needs: tuple[bool, bool, bool]
    ) -> HeadGradients:
        """Gradients of hidden [N, D], zero where no token is, of weight and of bias; exact without a routing.

        Where Triton has no room for all tokens at once (dispatch.BUDGET) they pass in pieces, dW and dbias being added
        up in float32.
        """
        size, workspace = len(lse), 0  # PyTorch takes one piece and a workspace of its own
        if self.triton:
            dense, pairs = (0, 0) if routing is None else (len(routing.dense), len(routing.rows))
            size, workspace = dispatch.piece(
                size, self.hidden.shape[-1], len(self.weight), self.hidden.element_size(), need_hidden=needs[0],
                need_weight=needs[1], gathered=self.tokens is not None, dense=dense, pairs=pairs,
            )  # fmt: skip
        if size == len(lse):
            return self._spread(self.gradients(lse, gradient, routing, needs, workspace))
        head = self if self.weight.stride(1) == 1 else replace(self, weight=self.weight.contiguous())
        into = float32_sums((self.weight, self.bias), needs[1:])
        dh = self.no_gradient() if needs[0] else None  # [N, D]
        for first in range(0, len(lse), size):
            part = slice(first, min(first + size, len(lse)))
            found = head.take(part).gradients(
                lse[part], take_gradient(gradient, part), None if routing is None else routing.part(part), needs,
                workspace, into=into,
            )  # fmt: skip
            if dh is not None:
                dh[part if self.tokens is None else self.tokens[part]] = found.hidden.to(dh.dtype)
            del found  # dW is rounded where it was
        return HeadGradients(dh, *rounded(into, (self.weight, self.bias)))

    def gradients(
        self, lse: Tensor, gradient: LogitGradient, routing: Routing | None, needs: tuple[bool, bool, bool],
        workspace: int, *, into: HeadGradients | None = None,
    ) -> HeadGradients:  # fmt: skip
        """`backward` in one piece, dH [M, D], with so many bytes of workspace (Triton).

        With `into` dW and dbias are added to its float32 tensors (float64 for float64), and dH is not rounded.
        """
        path: Any = pytorch
        options = _wanted(needs) | {"wide": into is not None}
        if self.triton:
            from lad_kernels.head.kernels import dense, routed

            path, options = dense, _wanted(needs) | {"workspace_bytes": workspace, "into": into}
            if routing is not None:
                path, options = routed, options | {"atomics": dispatch.atomics()}
        found = path.backward(*self._inputs(), lse, gradient, *(() if routing is None else (routing,)), **options)
        if self.triton or into is None:
            return found
        for total, x in zip(into[1:], found[1:]):
            if total is not None:
                total.add_(x)
        return into._replace(hidden=found.hidden)

    def scale(self, found: HeadGradients, factor: Tensor) -> HeadGradients:
        """`found` times factor [], in place and with one more rounding, unless it is 1."""
        if self.triton:
            from lad_kernels.head.kernels.scale import scale

            scale(found, factor)
        elif factor.device.type != "cpu" or factor != 1:
            for x in found:
                if x is not None:
                    x.mul_(factor)
        return found

    def no_gradient(self) -> Tensor:
        """Zeros [N, D]."""
        return self.hidden.new_zeros(self.hidden.shape[:-1].numel(), self.hidden.shape[-1])

    def _spread(self, found: HeadGradients) -> HeadGradients:
        """dH [M, D] -> [N, D]."""
        if found.hidden is None or self.tokens is None:
            return found
        return found._replace(hidden=self.no_gradient().index_copy_(0, self.tokens, found.hidden))

    def _inputs(self) -> tuple:
        return self.rows(), self.weight, self.targets, self.bias, self.transform


def float32_sums(inputs: tuple[Tensor, Tensor | None], needs: Sequence[bool]) -> HeadGradients:
    """Zeros, in float32 (float64 for float64), for those gradients of (weight, bias) that are needed."""
    wanted = [x if need else None for x, need in zip(inputs, needs)]
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    return HeadGradients(None, *(None if x is None else x.new_zeros(x.shape, dtype=wide) for x in wanted))


def rounded(sums: HeadGradients, inputs: tuple[Tensor, Tensor | None]) -> list[Tensor | None]:
    """(dW, dbias) in the dtypes of (weight, bias)."""
    return [x if x is None else x.to(y.dtype) for x, y in zip(sums[1:], inputs)]


def _wanted(needs: tuple[bool, bool, bool]) -> dict[str, Any]:
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


def shaped(found: HeadGradients, hidden: Tensor) -> HeadGradients:
    """dH [N, D] -> the shape of the hidden states."""
    return found if found.hidden is None else found._replace(hidden=found.hidden.view(hidden.shape))


class LinearLogprobsFunction(torch.autograd.Function):
    """(hidden, weight, bias) -> log-probs, entropy, lse, each [M], with any upstream gradient."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, packing: Packing,
        transform: LogitTransform, want_entropy: bool, triton: bool, new_head: Callable[..., Head],
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        rows, tokens = packing.source(hidden)
        head = new_head(rows, weight, targets, bias, transform, triton, tokens)
        out = head.forward(want_entropy=want_entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, transform.temperatures, out.lse, out.lse_rest, out.entropy)
        ctx.packing, ctx.transform, ctx.triton, ctx.new_head = packing, transform, triton, new_head
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy, out.lse

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple:
        checks.refuse_double_backward()
        hidden, weight, bias, targets, temperatures, lse, rest, entropy = ctx.saved_tensors
        if (g_logp is None and g_entropy is None and g_lse is None) or not any(ctx.needs_input_grad[:3]):
            return (None,) * 9
        onehot = torch.zeros_like(lse) if g_logp is None else g_logp  # [M]
        prob = -onehot if g_lse is None else g_lse - onehot  # [M]
        if g_entropy is not None:
            prob = prob - g_entropy * entropy
        gradient = LogitGradient(onehot, prob, g_entropy).with_rest(rest)
        live = live_tokens(gradient)  # [A]
        rows, tokens = ctx.packing.source(hidden)
        transform = ctx.transform.at(temperatures)
        head = ctx.new_head(rows, weight, targets, bias, transform, ctx.triton, tokens).take(live)
        found = head.backward(take(lse, live), take_gradient(gradient, live), None, ctx.needs_input_grad[:3])
        return *shaped(found, hidden), None, None, None, None, None, None
