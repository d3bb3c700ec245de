"""Records that the head's modules pass to each other: how a product becomes logits, and what comes back.

Letters: N tokens given, M that take part, A active (with a gradient), D hidden size, V vocabulary size, P active pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BLOCK = 128  # vocabulary columns of a block: the unit of probability mass that the forward reports
MANY = 96  # pairs of a block, on average, from which 16-bit kernels multiply 128 of them together rather than 64
JOINT = 768  # dense tokens of a routing, at most, that kernels multiply with its pairs; the library is faster with more
SLACK = 32  # rounding steps by which 1 - p_y may be wrong: added to the norm of the target's block


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap(scale * (h W^T + b)) / temperature, with softcap(x) = c tanh(x / c); in this order.

    `scale` is Cohere's logit_scale (Granite: 1 / logits_scaling), `softcap` is Gemma's final_logit_softcapping.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a number, or [N] float32: one temperature per token

    @property
    def temperatures(self) -> Tensor | None:  # [N]
        """One per token, for autograd to save, which then detects an in-place change before the backward."""
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def select(self, tokens: Tensor | slice) -> LogitTransform:  # [A]
        """Of some of the tokens."""
        temperatures = select(self.temperatures, tokens)
        return self if temperatures is None else replace(self, temperature=temperatures)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
        """Those of inputs that require one, none under torch.no_grad()."""
        grad = torch.is_grad_enabled()
        return cls(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)))


class HeadForward(NamedTuple):
    """One pass over the vocabulary. All float32, on the device of the hidden states.

    A bias of -inf excludes a vocabulary entry: probability 0, no part in the entropy and no gradient, unless it is the
    target. Then the log-prob is -inf and its gradient the usual one: 1[j = y] - p_j, with p_y = 0.
    """

    logprobs: Tensor  # [N] z_y - lse, never above 0
    lse: Tensor  # [N]
    entropy: Tensor | None  # [N]
    block_lse: Tensor | None  # [ceil(V / BLOCK), N]: log of the un-normalised mass of each vocabulary block
    lse_rest: Tensor | None = None  # [N] rounding error of lse, 0 of a NaN; None after one pass, which needs none
    correct: Tensor | None = None  # [N] bool: no logit is larger than the target's, by more than its rounding


@dataclass(frozen=True)
class LogitGradient:
    """The gradient of any loss with respect to the logits z, as three numbers per token.

    dZ[n, j] = onehot[n] * 1[j = y_n] + p[n, j] * (prob[n] - entropy[n] * (z[n, j] - lse[n]))

    For upstream gradients g_logp, g_lse and g_H of the log-probability, lse and entropy H:
    onehot = g_logp, entropy = g_H, prob = g_lse - g_logp - g_H * H, since dH/dz_j = -p_j (z_j - lse + H).
    """

    onehot: Tensor  # [N] float32
    prob: Tensor  # [N] float32
    entropy: Tensor | None = None  # [N] float32; None stands for zeros

    @classmethod
    def of_logprobs(cls, c: Tensor) -> LogitGradient:
        """That of a loss with c = d loss / d logp [N]."""
        return cls(c, -c)

    def is_active(self) -> Tensor:
        """[N] bool: the token has a coefficient that is not zero."""
        active = (self.onehot != 0) | (self.prob != 0)  # [N]
        return active if self.entropy is None else active | (self.entropy != 0)

    def active(self, other: Tensor | None = None) -> Tensor | None:  # [N]
        """Tokens [A] with a coefficient that is not zero, or `other`, ascending; None: all. One host sync."""
        active = self.is_active()  # [N]
        if other is not None:
            active = active | (other != 0)
        tokens = active.nonzero()[:, 0]  # [A]
        return None if len(tokens) == len(active) else tokens

    def select(self, tokens: Tensor | slice | None) -> LogitGradient:  # [A]
        """The gradient of some tokens; None stands for all."""
        return LogitGradient(select(self.onehot, tokens), select(self.prob, tokens), select(self.entropy, tokens))

    def where(self, mask: Tensor) -> LogitGradient:  # [N] bool
        """The gradient of the tokens in `mask`, and zeros."""
        return LogitGradient(*(None if x is None else x.where(mask, 0.0) for x in vars(self).values()))

    def scaled(self, factor: Tensor) -> LogitGradient:  # []
        """Multiplied by `factor`."""
        return LogitGradient(*(None if x is None else factor * x for x in (self.onehot, self.prob, self.entropy)))

    def with_rest(self, rest: Tensor) -> LogitGradient:  # [N]
        """The same gradient for code that computes p and log p from the rounded lse instead of lse + rest.

        When all logits of a token share a large offset, rounding lse would scale all its p by the same error.
        """
        scale = (-rest).exp()  # [N] p over the p of the rounded lse
        if self.entropy is None:
            return LogitGradient(self.onehot, self.prob * scale)
        return LogitGradient(self.onehot, (self.prob + self.entropy * rest) * scale, self.entropy * scale)


class HeadGradients(NamedTuple):
    """Gradients in the dtypes of their inputs; None for whatever was not asked for."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]

    def shaped(self, hidden: Tensor) -> HeadGradients:
        """dH [N, D] in the shape of the hidden states."""
        return self if self.hidden is None else self._replace(hidden=self.hidden.view(hidden.shape))


class GradientSums(NamedTuple):
    """dW and dbias added up over token chunks, in float32 (float64 for float64); None for what is not asked for."""

    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]

    @classmethod
    def zeros(cls, weight: Tensor, bias: Tensor | None, needs: Needs) -> GradientSums:
        """Zeros, before the first chunk."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(
            weight.new_zeros(weight.shape, dtype=dtype) if needs.weight else None,
            bias.new_zeros(bias.shape, dtype=dtype) if needs.bias and bias is not None else None,
        )

    def rounded(self, weight: Tensor, bias: Tensor | None, wide: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """(dW, dbias) in the dtypes of (weight, bias), after the last chunk; `wide`: as they are."""
        if wide:
            return self.weight, self.bias
        dw = None if self.weight is None else self.weight.to(weight.dtype)
        return dw, None if self.bias is None else self.bias.to(bias.dtype)


class Routing(NamedTuple):
    """Which (token, vocabulary block) pairs of the logit gradient are multiplied; see routing.py.

    Every token belongs to exactly one of two groups: those of `dense` take all blocks, the others the pairs of `rows`.
    """

    rows: Tensor  # [P] int64: the token of each active pair, by block, then ascending
    scale: Tensor | None  # [P] float32: factor on the pair's block of dZ; None stands for ones
    offsets: list[int]  # [blocks + 1] first pair of each block, and P: block b has rows[offsets[b] : offsets[b + 1]]
    dense: Tensor  # [Nd] int64, ascending
    table: Tensor | None = None  # [blocks + 1] int64: offsets on the device, if they are there

    @property
    def blocks(self) -> int:
        return len(self.offsets) - 1

    def part(self, tokens: slice) -> Routing:
        """The routing of some consecutive tokens, numbered from the first of them; four host syncs on a GPU."""
        inside = ((self.rows >= tokens.start) & (self.rows < tokens.stop)).nonzero()[:, 0]  # [p] indices into rows
        offsets = torch.tensor(self.offsets, device=inside.device)  # [blocks + 1]
        dense = self.dense[(self.dense >= tokens.start) & (self.dense < tokens.stop)]
        return Routing(
            self.rows[inside] - tokens.start,
            None if self.scale is None else self.scale[inside],
            torch.searchsorted(inside, offsets).tolist(),
            dense - tokens.start,
        )


Bound = TypeVar("Bound")  # what is made of the norms below


class Dropped(NamedTuple):
    """Norms of the part of dZ that a routing drops, as routing.py bounds them."""

    active: Tensor  # [] tokens with a gradient, 1 if there are none
    mass: Tensor  # [A] L1 norm over |c| of what is dropped of a token, from 0 to 2; 0 without a gradient
    by_token: Tensor  # [A] bound on the norm of what its row of dZ / (dz/draw) W loses
    by_block: Tensor  # [blocks] bound on the norm of what the block's rows of dW lose


def gather(hidden: Tensor, tokens: Tensor | None) -> Tensor:
    """Flat rows `tokens` [M] of hidden states [N, D] or [B, T, D]: [M, D]; None: hidden itself."""
    if tokens is None:
        return hidden
    if hidden.ndim == 2:
        return hidden.index_select(0, tokens)
    length = hidden.shape[1]
    return hidden[tokens // length, tokens % length]


def select(x: Tensor | None, tokens: Tensor | slice | None) -> Tensor | None:
    """Per-token values [M] of some tokens [A]; None stands for all, or for no values."""
    return x if x is None or tokens is None else x[tokens]


def scatter(dh: Tensor, hidden: Tensor, tokens: Tensor | None) -> Tensor:
    """dH [M, D] of flat rows `tokens` -> [N, D], zero elsewhere; None: all of them already."""
    if tokens is None:
        return dh
    return dh.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1]).index_copy_(0, tokens, dh)
