"""Which (token, vocabulary block) pairs of the logit gradient are multiplied, and a bound on what the others hold.

The forward leaves L[b, n], the log of the un-normalised mass of each block of BLOCK columns, so that the probability
mass of a block, m = e^(L - lse), is known before anything is multiplied. With c = d loss / d logp, the block of dZ
of a token has an L1 norm of

    |c| m              in a block without the target
    |c| (m + 1 - 2 p)  in the block of the target, whose probability is p

One rule: keep a pair when that norm exceeds theta * mean|c|, the mean being over tokens with c != 0. What is dropped is
known, so the error is bounded. With E[b, n] the norm of each block that is dropped, w_b the longest row of W in a block
and |dz/draw| <= s = |scale| / T,

    ||error of dH||_F <= sqrt(sum_n (s_n sum_b E[b, n] w_b)^2)
    ||error of dW||_F <= sqrt(sum_b (sum_n s_n E[b, n] ||h_n||)^2)

An entropy term of the gradient adds |g_H| sum_{j in b} p_j |log p_j| <= |g_H| m (log BLOCK - log m) to the norm.

`unbiased` keeps a pair below the threshold with probability q = norm / threshold and multiplies its block by 1 / q:
the expected gradient is exact, and such a pair is off by threshold - norm. At equal pairs it errs 2 to 3.5 times less
in dH than dropping with a lower theta (benchmarks/RESULTS.md). Its draws are a hash of the token's lse, its number and
the block: the same input gives the same bits, and the next step, with other weights, other draws. The hash is of 32
bits, those of a float64 lse folded, so that an accelerator needs no 64-bit products.

The bound covers what is dropped, with masses as the forward computed them; the rounding of what is multiplied is that
of the dense path. Tokens with more pairs than `dense_share` of the blocks are handed to the dense path whole.
Here is the rule in PyTorch, the specification; kernels/routed/route.py has it in Triton, with the same lists.
Source: the rule and its bound are this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels.head.records import BLOCK, SLACK, Bound, Dropped, HeadForward, LogitGradient, LogitTransform, Routing

_SLICE = 1 << 20  # pairs looked at together: 4 MiB of float32, 8 MiB of int64
_WORD = (1 << 32) - 1


class ErrorBound(NamedTuple):
    """What a routing leaves out; every tensor is 0-d on the device of the hidden states."""

    active: int  # tokens with a gradient, among those given
    pairs: int  # kept, those of dense tokens included
    dropped_mass_mean: Tensor  # L1 norm of the dropped part of dZ over |c|, from 0 to 2; mean over active tokens
    dropped_mass_max: Tensor  # the largest of any token
    dhidden_bound: Tensor  # upper bound on the Frobenius norm of the error of dH
    dweight_bound: Tensor  # the same for dW


def _norm(mass: Tensor, prob: Tensor, entropy: Tensor | None) -> Tensor:
    """Upper bound on the L1 norm of p (prob - entropy log p) over columns of a block that hold `mass` together."""
    norm = prob.abs() * mass
    if entropy is not None:
        spread = math.log(BLOCK) - mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
        norm = norm + entropy.abs() * mass * spread
    return norm


class _BlockNorms:
    """Probability masses and L1 norms of the blocks of dZ, a slice of blocks at a time."""

    def __init__(self, block_lse: Tensor, lse: Tensor, logprobs: Tensor, targets: Tensor, gradient: LogitGradient):
        self.block_lse, self.lse, self.gradient = block_lse, lse, gradient  # [blocks, A], [A]
        self.block = targets // BLOCK  # [A]; none of the blocks where a target lies outside [0, V)
        onehot, prob, entropy = gradient.onehot, gradient.prob, gradient.entropy  # [A] each
        rest = prob + onehot if entropy is None else prob + onehot - entropy * logprobs.clamp(min=-1e30)
        own = rest * logprobs.exp() - onehot * torch.expm1(logprobs)  # [A] dZ at the target, without cancellation
        own = own.abs() + onehot.abs() * SLACK * torch.finfo(lse.dtype).eps
        token = torch.arange(len(lse), device=lse.device)  # [A]
        own_block = self.block.clamp(0, len(block_lse) - 1)  # [A]
        others = ((block_lse[own_block, token] - lse).exp().clamp(max=1.0) - logprobs.exp()).clamp(min=0.0)  # [A]
        self.target_norm = _norm(others, prob, entropy) + own  # [A] of the block that holds the target
        self.size = torch.maximum(onehot.abs(), prob.abs())  # [A]; |c| unless there is an entropy term
        if entropy is not None:
            self.size += entropy.abs()

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(blocks, norm [b, A])."""
        prob, entropy = self.gradient.prob, self.gradient.entropy  # [A]
        blocks, tokens = self.block_lse.shape
        step, token = max(1, _SLICE // max(tokens, 1)), torch.arange(tokens, device=self.lse.device)
        for first in range(0, blocks, step):
            part = slice(first, min(first + step, blocks))
            norm = _norm((self.block_lse[part] - self.lse).exp_().clamp_(max=1.0), prob, entropy)  # [b, A]
            inside = (self.block >= part.start) & (self.block < part.stop)  # [A]
            at = (torch.where(inside, self.block - part.start, 0), token)
            norm[at] = torch.where(inside, self.target_norm, norm[at])
            yield part, norm

    def at(self, blocks: Tensor, tokens: Tensor) -> Tensor:
        """Norms of some pairs [P]."""
        prob, entropy = self.gradient.prob, self.gradient.entropy  # [A]
        mass = (self.block_lse[blocks, tokens] - self.lse[tokens]).exp_().clamp_(max=1.0)  # [P]
        norm = _norm(mass, prob[tokens], None if entropy is None else entropy[tokens])  # [P]
        return torch.where(blocks == self.block[tokens], self.target_norm[tokens], norm)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of murmur3, a permutation of 32-bit words held in int64; no product reaches 2^63."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * (factor - (1 << 32))) & _WORD
    return x ^ (x >> 16)


def _draws(lse: Tensor, blocks: slice) -> Tensor:
    """Numbers in [0, 1) for pairs [b, A]: a hash of (bits of lse, token, block), 24 bits of it."""
    bits = lse.view(torch.int32 if lse.dtype == torch.float32 else torch.int64).long()  # [A]
    if lse.dtype == torch.float64:
        bits = bits ^ (bits >> 32)
    token = torch.arange(len(lse), device=lse.device)  # [A]
    block = torch.arange(blocks.start, blocks.stop, device=lse.device)  # [b]
    x = _mix(((bits & _WORD) + token * 0x9E3779B1) & _WORD)  # [A]
    x = _mix(x ^ ((block * 0x27D4EB2F + 0x165667B1) & _WORD)[:, None])  # [b, A]
    return (x >> 8).to(lse.dtype) / 2**24


def block_norms(weight: Tensor) -> Tensor:
    """Length of the longest row of each block of weight [V, D]: [blocks] float32 (float64 for float64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=wide)  # [V]
    padded = torch.nn.functional.pad(norms, (0, -len(norms) % BLOCK))  # [blocks * BLOCK]
    return padded.view(-1, BLOCK).amax(1)


def kept_share(
    out: HeadForward, targets: Tensor, gradient: LogitGradient, theta: float, *, dense_share: float, unbiased: bool
) -> Tensor:  # [S] tokens -> [2]
    """Of S tokens with a gradient, the share of pairs that `route` would keep, by their masses, and that of tokens that
    it would hand to the dense path whole, whose pairs are all among the kept ones; NaN without any.
    """
    norms = _BlockNorms(out.block_lse, out.lse, out.logprobs, targets, gradient)
    active = norms.size != 0  # [S]
    threshold = theta * norms.size.sum() / active.sum().clamp(min=1)  # []
    kept = [(norm / threshold).clamp(max=1.0) if unbiased else norm > threshold for _, norm in norms]  # [b, S] each
    share = torch.cat(kept).to(out.lse.dtype).mean(0)  # [S]
    whole = share > dense_share  # [S]
    return torch.stack([torch.where(whole, 1.0, share), whole.to(share.dtype)])[:, active].mean(1)


def route(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [A]
    transform: LogitTransform,  # its temperature, if a tensor, is [A]
    lse: Tensor,  # [A]
    logprobs: Tensor,  # [A]
    block_lse: Tensor,  # [blocks, A]
    gradient: LogitGradient,
    theta: float,
    *,
    tokens: Tensor | None = None,  # [A] rows of hidden; None: all, A = N
    dense_share: float = 1.0,
    unbiased: bool = False,
    most_pairs: int | None = None,
    triton: bool = False,
) -> tuple[Routing, ErrorBound]:
    """Choose the pairs of A tokens; one without a gradient has none. Host syncs on an accelerator: four in PyTorch, one
    in Triton.

    With more than `most_pairs` active pairs, those of dense tokens apart, all tokens are dense.
    """
    slope = abs(transform.scale) / transform.temperature  # [A] or a number

    def lengths() -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        reach = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide).flatten()  # [N]
        return block_norms(weight), (reach if tokens is None else reach[tokens]) * slope  # [blocks], [A]

    def bound(lost: Dropped) -> tuple[Tensor, ...]:
        mean = lost.mass.sum() / lost.active  # []
        return mean, lost.mass.amax(), (lost.by_token * slope).norm(), lost.by_block.norm()  # [] each

    known, choice = (targets, lse, logprobs, block_lse, gradient), choose
    if triton:
        from lad_kernels.head.kernels.routed.route import choose as choice
    routing, active, bounds = choice(
        *known, theta, lengths, bound, dense_share=dense_share, unbiased=unbiased, most_pairs=most_pairs
    )
    pairs = len(routing.rows) + len(routing.dense) * len(block_lse)
    return routing, ErrorBound(active, pairs, *bounds)


def choose(
    targets: Tensor,  # [A]
    lse: Tensor,  # [A]
    logprobs: Tensor,  # [A]
    block_lse: Tensor,  # [blocks, A]
    gradient: LogitGradient,
    theta: float,
    lengths: Callable[[], tuple[Tensor, Tensor]],  # w_b [blocks] and s_n ||h_n|| [A]
    bound: Callable[[Dropped], Bound],
    *,
    dense_share: float,
    unbiased: bool,
    most_pairs: int | None,
) -> tuple[Routing, int, Bound]:
    """The pairs that `route` keeps, tokens with a gradient, and `bound` of the sums over those that it does not."""
    norms = _BlockNorms(block_lse, lse, logprobs, targets, gradient)
    active = norms.size != 0  # [A]
    some = active.sum().clamp(min=1)  # []
    threshold = theta * norms.size.sum() / some  # []
    keep = torch.empty(block_lse.shape, dtype=torch.bool, device=lse.device)  # [blocks, A]
    expected = torch.zeros_like(lse)  # [A] pairs
    for part, norm in norms:
        keep[part] = ~(norm <= (threshold * _draws(lse, part) if unbiased else threshold))  # NaN is kept
        expected += ((norm / threshold).clamp_(max=1.0) if unbiased else keep[part]).sum(0)
    many = active & ~(expected <= dense_share * len(keep))  # [A]; not by the draw, which would bias what remains
    dense = many.nonzero()[:, 0]  # [Nd]
    aside = many | ~active  # [A] tokens without pairs
    keep &= ~aside
    offsets = [0, *keep.sum(1).cumsum(0).tolist()]  # [blocks + 1]
    if most_pairs is not None and offsets[-1] > most_pairs:
        dense, aside, offsets = torch.arange(len(lse), device=lse.device), torch.ones_like(many), [0] * len(offsets)
        keep.zero_()

    lost, error, by_block = torch.zeros_like(lse), torch.zeros_like(lse), lse.new_empty(len(keep))  # [A] x 2, [blocks]
    longest, reach = lengths()  # [blocks], [A]
    reach = reach.masked_fill(aside, 0.0)  # [A]
    for part, norm in norms:
        kept = keep[part] | aside  # [b, A]
        lost += norm.masked_fill(kept, 0.0).sum(0)
        if unbiased:
            norm = torch.where(keep[part], (threshold - norm).clamp_(min=0.0), norm.masked_fill_(aside, 0.0))
        else:
            norm.masked_fill_(kept, 0.0)
        error += torch.mv(norm.T, longest[part])
        by_block[part] = torch.mv(norm, reach)
    blocks, rows = (x.contiguous() for x in keep.nonzero().unbind(1))  # [P], [P]
    scale = (threshold / norms.at(blocks, rows)).clamp_(min=1.0) if unbiased else None  # [P]
    mass = torch.where(active, lost / norms.size, 0.0)  # [A]
    return Routing(rows, scale, offsets, dense), int(active.sum()), bound(Dropped(some, mass, error, by_block))
