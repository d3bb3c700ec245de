"""The head on some tokens, in Triton or PyTorch, without autograd: forward, both together in one pass, backward.

Nothing of size N x V is ever stored: the backward recomputes logits one tile or slab at a time. Triton needs at most
memory.BUDGET bytes beyond inputs, gradients and one float32 dW, whatever N is. Memory that the gradients use later
counts towards the budget from the start, so block masses (freed before the backward) may use it.

| quantity | precision |
|---|---|
| hidden states, weight, bias | bfloat16, float16 or float32; float64 in PyTorch only |
| logits, lse, log-probs, entropy | float32, never rounded to 16 bits before the softmax |
| dZ | rounded once to the input dtype for the matrix units (Triton); float32 (PyTorch) |
| dH, dW, dbias | accumulated in float32, rounded once; twice if made in the forward and the loss is scaled afterwards |
| what an active pair adds to dH | bfloat16 in Triton: rounded to 11 bits first, 3 more than dH has |
| tf32 | only if PyTorch is told to use it |
| torch.autocast | casts hidden states and weight at the public function; off inside, forward and backward |

Deterministic: fixed order of every sum and no atomics, unless `dispatch.allow_atomics` asks for them. Gradients are
computed only for inputs that require them: a frozen head costs no dW, a frozen body no dH.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lad_kernels.head import cost, dispatch, memory, pytorch
from lad_kernels.head.records import (
    GradientSums,
    HeadForward,
    HeadGradients,
    LogitGradient,
    LogitTransform,
    Needs,
    Routing,
    gather,
    scatter,
)


@dataclass(frozen=True)
class Head:
    """The head on M tokens. Their hidden states are gathered only when they are needed."""

    hidden: Tensor  # [N, D] or [B, T, D], as the user gave them
    weight: Tensor  # [V, D]
    targets: Tensor  # [M]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    triton: bool
    tokens: Tensor | None = None  # [M] flat rows of hidden; None: all of [N, D]

    def select(self, chosen: Tensor | slice | None) -> Head:
        """The head on some of the tokens [A]; None stands for all."""
        if chosen is None:
            return self
        targets, transform = self.targets[chosen], self.transform.select(chosen)
        hidden, tokens = self.hidden, self.tokens
        if tokens is not None:
            tokens = tokens[chosen]
        elif isinstance(chosen, slice):
            hidden = hidden[chosen]
        else:
            tokens = chosen
        return replace(self, hidden=hidden, tokens=tokens, targets=targets, transform=transform)

    def thin_vocabulary(self, step: int) -> Head:
        """The head on every step-th vocabulary entry; a target that is not among them stands for the one before."""
        bias = None if self.bias is None else self.bias[::step].contiguous()
        return replace(self, weight=self.weight[::step], bias=bias, targets=self.targets // step)

    def work(self, needs: Needs) -> memory.Work:
        """Shapes and dtype, as far as time and memory depend on them."""
        vocab, hidden_size = self.weight.shape
        architecture, itemsize = cost.architecture(self.hidden.device, self.triton), self.hidden.dtype.itemsize
        return memory.Work(len(self.targets), hidden_size, vocab, itemsize, architecture, needs.hidden, needs.weight)

    def forward(self, *, want_entropy: bool, want_block_lse: bool = False, want_correct: bool = False) -> HeadForward:
        """Log-probs, lse, entropy, block masses of the M tokens, and whether each target is the likeliest entry."""
        forward: Callable[..., HeadForward] = pytorch.forward
        if self.triton:
            from lad_kernels.head.kernels.forward import forward
        return forward(
            self.hidden,
            self.weight,
            self.targets,
            self.bias,
            self.transform,
            want_entropy=want_entropy,
            want_block_lse=want_block_lse,
            want_correct=want_correct,
            tokens=self.tokens,
        )

    def has_one_pass(self, need_bias: bool, *, want_all: bool = False) -> bool:
        """Whether `one_pass` can run; `want_all`: entropy and correct as well.

        Triton: not for float16 (exponentials leave its range), nor for a 16-bit dbias (it would be rounded before the
        sum), nor with all outputs under a softcap with a temperature per token (registers would spill). PyTorch: not
        for 16-bit inputs (the weight would be widened twice per chunk), nor with a softcap (its slope would be lost).
        """
        dtype = self.hidden.dtype
        if self.triton:
            fits = not want_all or self.transform.softcap is None or self.transform.temperatures is None
            return fits and (dtype == torch.float32 or (dtype == torch.bfloat16 and not need_bias))
        return dtype.itemsize > 2 and self.transform.softcap is None

    def one_pass(
        self,
        prior: Tensor | None,  # [M] log-probs that may be 44 nats off (Triton); None: 0
        gradient: Callable[[slice, HeadForward], LogitGradient],
        *,
        chunks: Sequence[slice],
        want_entropy: bool,
        want_correct: bool,
        needs: Needs,
    ) -> tuple[HeadForward, HeadGradients] | None:
        """Forward and gradient together, dH [N, D]; None where the prior is too far off (Triton)."""
        operands = (self.hidden, self.weight, self.targets, self.bias, self.transform, prior, gradient)
        one_pass: Callable[..., tuple[HeadForward, HeadGradients] | None] = pytorch.one_pass
        if self.triton:
            from lad_kernels.head.kernels.one_pass import one_pass
        return one_pass(
            *operands,
            chunks=chunks,
            want_entropy=want_entropy,
            want_correct=want_correct,
            needs=needs,
            tokens=self.tokens,
        )

    def backward(
        self, lse: Tensor, gradient: LogitGradient, routing: Routing | None, needs: Needs, *, wide: bool = False
    ) -> HeadGradients:
        """Gradients of hidden [N, D], zero for all other tokens, of weight and of bias; exact without a routing.

        In the dtypes of the inputs, or with `wide` in that of the sums, float32 (float64 for float64).
        Where all tokens at once would exceed Triton's memory.BUDGET they are processed in chunks, and dW and dbias are
        accumulated in float32.
        """
        size, workspace = len(lse), 0  # PyTorch takes one chunk and a workspace of its own
        if self.triton:
            dense, pairs = (0, 0) if routing is None else (len(routing.dense), len(routing.rows))
            gathered = self.tokens is not None
            size, workspace = self.work(needs).token_chunk(size, gathered=gathered, dense=dense, pairs=pairs)
        if size == len(lse):
            sums = GradientSums.zeros(self.weight, self.bias, needs) if wide else None
            gradients = self.chunk_gradients(lse, gradient, routing, needs, workspace, sums=sums)
            dh = gradients.hidden  # [M, D]
            return gradients if dh is None else gradients._replace(hidden=scatter(dh, self.hidden, self.tokens))
        head = self if self.weight.stride(1) == 1 else replace(self, weight=self.weight.contiguous())
        sums = GradientSums.zeros(self.weight, self.bias, needs)
        dh = self.no_gradient(wide) if needs.hidden else None  # [N, D]
        for first in range(0, len(lse), size):
            chunk = slice(first, min(first + size, len(lse)))
            gradients = head.select(chunk).chunk_gradients(
                lse[chunk],
                gradient.select(chunk),
                None if routing is None else routing.part(chunk),
                needs,
                workspace,
                sums=sums,
            )
            if dh is not None:
                dh[chunk if self.tokens is None else self.tokens[chunk]] = gradients.hidden.to(dh.dtype)
            del gradients  # frees dH [C, D] before dW is rounded
        return HeadGradients(dh, *sums.rounded(self.weight, self.bias, wide))

    def chunk_gradients(
        self,
        lse: Tensor,
        gradient: LogitGradient,
        routing: Routing | None,
        needs: Needs,
        workspace: int,
        *,
        sums: GradientSums | None = None,
    ) -> HeadGradients:
        """`backward` of all M tokens at once, dH [M, D], with `workspace` bytes (Triton).

        With `sums` dW and dbias are added to it, and dH is not rounded.
        """
        operands = (self.rows(), self.weight, self.targets, self.bias, self.transform, lse, gradient)
        if not self.triton:
            return pytorch.backward(*operands, routing, needs=needs, sums=sums)
        from lad_kernels.head.kernels import dense
        from lad_kernels.head.kernels.routed import launch as routed

        if routing is None:
            return dense.backward(*operands, needs=needs, workspace_bytes=workspace, sums=sums)
        return routed.backward(
            *operands, routing, needs=needs, workspace_bytes=workspace, sums=sums, atomics=dispatch.atomics()
        )

    def rows(self) -> Tensor:
        """Hidden states of the tokens [M, D]."""
        return gather(self.hidden, self.tokens)

    def scale(self, gradients: HeadGradients, factor: Tensor) -> HeadGradients:
        """`gradients` times factor [], in place and with one more rounding, unless it is 1."""
        if self.triton:
            from lad_kernels.head.kernels.scale import scale

            scale(gradients, factor)
        elif factor.device.type != "cpu" or factor != 1:
            for x in gradients:
                if x is not None:
                    x.mul_(factor)
        return gradients

    def mean_logits(self) -> Tensor:
        """Mean over the vocabulary of each token's logits [M], from one mean row of the weight; without a softcap."""
        row, offset = self._mean_row()  # [D], [] or 0
        factor = self.transform.scale / self.transform.temperature  # [M] or a number
        means = [self.select(rows).rows().to(row.dtype) @ row for rows in self._runs()]
        return (torch.cat(means) + offset) * factor if means else row.new_zeros(0)

    def add_mean_logit(self, gradients: HeadGradients, upstream: Tensor) -> None:  # [M]
        """Add, in place, the gradients of the mean logits: one row to all of dW, a multiple of another to each dH."""
        (dh, dw, db), (row, _) = gradients, self._mean_row()
        upstream = upstream * (self.transform.scale / self.transform.temperature)  # [M]
        total = torch.zeros_like(row)  # [D] the hidden states' sum
        for rows in self._runs():
            part = self.select(rows)
            total.addmv_(part.rows().to(row.dtype).T, upstream[rows])
            if dh is not None:
                at = rows if self.tokens is None else self.tokens[rows]
                dh[at] = torch.addr(dh[at].to(row.dtype), upstream[rows], row).to(dh.dtype)
        if dw is not None:
            dw.add_(total / len(self.weight))
        if db is not None:
            db.add_(upstream.sum() / len(self.weight))

    def _mean_row(self) -> tuple[Tensor, Tensor | float]:
        """Mean row of the weight [D] and mean bias []."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.weight.mean(0, dtype=wide), 0.0 if self.bias is None else self.bias.mean(dtype=wide)

    def _runs(self) -> list[slice]:
        """The M tokens, a thousand at a time, so that little is widened at once."""
        return [slice(i, min(i + 1024, len(self.targets))) for i in range(0, len(self.targets), 1024)]

    def no_gradient(self, wide: bool = False) -> Tensor:
        """Zeros [N, D]."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32) if wide else self.hidden.dtype
        return self.hidden.new_zeros(self.hidden.shape[:-1].numel(), self.hidden.shape[-1], dtype=dtype)
