"""Chooses the pairs of a routing: head/routing.py's `choose`, in five kernels instead of a dozen operations a slice.

With L[b, n] the masses of the forward, m = min(e^(L - lse), 1) and a gradient (onehot, prob, g_H) of each token,

    E[b, n] = |prob| m (+ |g_H| m (log BLOCK - log m))      but what `_token_kernel` makes of it in the target's block
    kept    = not E <= threshold * u[b, n]                  u a draw in [0, 1), or 1 where the tail is dropped

A token whose coefficients are all 0 has no pairs and no part in any sum, whatever its masses are.

1. `_token_kernel`: of every token E in the target's block, and its size |c|, whose mean gives the threshold.
2. `_mark_kernel`, a program for (TOKENS tokens, BLOCKS blocks): a bit for each active pair; how many pairs of each
   token are expected, in these blocks.
3. `_count_kernel`: tokens with too many expected pairs are dense; how many tokens each row of the lists takes from each
   group of tokens. Row b < blocks holds the pairs of block b, the last one the dense tokens. Where rows begin, by a
   prefix sum, is read on the host, once: the only sync.
4. `_drop_kernel` sums up the norms e of what is left out,

       of a token   sum_b E of what is dropped,   sum_b e w_b         (w_b: the longest row of W in the block)
       of a block   sum_n e r_n                                       (r_n: |dz/draw| times the length of h_n)

   e = E of a dropped pair, threshold - E of one that its draw keeps, 0 in dense tokens. The host makes room meanwhile.
5. `_list_kernel`: writes tokens, and scales threshold / E, at their places.

Memory layout: bits are int32 [blocks, words] with TOKENS / 32 words for each group of tokens; sums are kept for each
token by groups of blocks, for each block by groups of tokens. 0.56 bytes a pair with the lists' ends, 12 an active one.
Exact: a pair is kept or dropped by its bit, so that counts and lists agree whatever the compiler makes of E. No
atomics, and every sum has a fixed order. NaN is kept, and reaches the sums as it does in routing.py.
Draws are the numbers of routing.py bit for bit. E is the same up to a few roundings of its exponentials: only a pair so
close to its bar, or a token so close to being dense, may be judged otherwise than in PyTorch.
Cost: L is read twice and where a pair is kept: 8.6 bytes a pair and up to 32 a kept one. PyTorch moves 116 to 354.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.tile import one_minus_exp
from lad_kernels.head.kernels.waiting import Later
from lad_kernels.head.records import BLOCK, SLACK, Bound, Dropped, LogitGradient, Routing

_BLOCKS, _TOKENS, _WARPS = 64, 64, 8  # tile of pairs
_SUMS = 32  # groups of blocks whose expected pairs are read together

_BLOCK = tl.constexpr(BLOCK)
_LOG_BLOCK = tl.constexpr(math.log(BLOCK))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_MARGIN = tl.constexpr(SLACK * torch.finfo(torch.float32).eps)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _mix(x):
    """Finaliser of murmur3: a permutation of 32 bits in which every bit of x moves half of the others."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _draws(lse, tokens, blocks):
    """Numbers in [0, 1) [BLOCKS, TOKENS] from lse [TOKENS], tokens [TOKENS] and blocks [BLOCKS], as in routing.py."""
    x = _mix(lse.to(tl.uint32, bitcast=True) + tokens.to(tl.uint32) * 0x9E3779B1)  # [TOKENS]
    x = _mix(x[None, :] ^ (blocks.to(tl.uint32) * 0x27D4EB2F + 0x165667B1)[:, None])  # [BLOCKS, TOKENS]
    return (x >> 8).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _norm(mass, prob, entropy, tokens, inside):
    """Bound on the L1 norm of p (prob - entropy log p) over columns that hold `mass` together; the last axis is tokens.

    prob and entropy are pointers [A], entropy may be None.
    """
    norm = tl.abs(tl.load(prob + tokens, inside, other=0.0)) * mass
    if entropy is not None:
        spread = _LOG_BLOCK - tl.log(tl.maximum(mass, _TINY, propagate_nan=_ALL))
        norm += tl.abs(tl.load(entropy + tokens, inside, other=0.0)) * mass * spread
    return norm


@triton.jit
def _norms(
    block_lse,  # [blocks, A]
    lse,  # [A]
    prob,  # [A]
    entropy,  # [A] or None
    target_norm,  # [A]
    targets,  # [A]
    at,  # [BLOCKS, 1]
    tokens,  # [1, TOKENS]
    wanted,  # [BLOCKS, TOKENS]
    A,
    stride,
):
    """E [BLOCKS, TOKENS] of the `wanted` pairs; of others it stands for nothing."""
    inside = tokens < A  # [1, TOKENS]
    level = tl.load(lse + tokens, inside, other=0.0)  # [1, TOKENS]
    log_mass = tl.load(block_lse + at.to(tl.int64) * stride + tokens, wanted, other=0.0) - level
    mass = tl.minimum(tl.exp(log_mass), 1.0, propagate_nan=_ALL)  # [BLOCKS, TOKENS]
    norm = _norm(mass, prob, entropy, tokens, inside)  # [BLOCKS, TOKENS]
    y = tl.load(targets + tokens, inside, other=-1)  # [1, TOKENS]
    own = tl.load(target_norm + tokens, inside, other=0.0)  # [1, TOKENS]
    return tl.where((y // _BLOCK == at) & (y >= 0), own, norm)


@triton.jit
def _listed(
    bits,  # [blocks, words]
    many,  # [1, TOKENS] whether a token is dense; false beyond A
    at,  # [BLOCKS, 1]
    tokens,  # [1, TOKENS]
    blocks,
    words,
):
    """Whether each token is in each row of the lists [BLOCKS, TOKENS]: active pairs, then one row of dense tokens."""
    word = tl.load(bits + at.to(tl.int64) * words + tokens // 32, at < blocks, other=0)
    pair = ((word >> (tokens % 32)) & 1) == 1  # [BLOCKS, TOKENS]
    return (pair & (many == 0)) | ((at == blocks) & many)


@triton.jit(do_not_specialize=["A", "blocks", "stride"])
def _token_kernel(
    block_lse,  # [blocks, A]
    lse,  # [A]
    logprobs,  # [A]
    onehot,  # [A]
    prob,  # [A]
    entropy,  # [A] or None
    targets,  # [A]
    target_norm,  # [A] out
    size,  # [A] out
    A,
    blocks,
    stride,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    inside = tokens < A  # [TOKENS]
    logp, y = tl.load(logprobs + tokens, inside, other=0.0), tl.load(targets + tokens, inside, other=-1)
    c, p = tl.load(onehot + tokens, inside, other=0.0), tl.load(prob + tokens, inside, other=0.0)
    most, rest = tl.maximum(tl.abs(c), tl.abs(p), propagate_nan=_ALL), p + c  # [TOKENS]
    if entropy is not None:
        g = tl.load(entropy + tokens, inside, other=0.0)  # [TOKENS]
        rest -= g * tl.maximum(logp, -1e30, propagate_nan=_ALL)
        most += tl.abs(g)
    tl.store(size + tokens, most, inside)
    at_target = tl.exp(logp)  # [TOKENS]
    own = tl.abs(rest * at_target + c * one_minus_exp(logp)) + tl.abs(c) * _MARGIN  # [TOKENS] dZ at the target
    block = y.to(tl.int64) // _BLOCK  # [TOKENS]
    known = inside & (y >= 0) & (block < blocks)  # [TOKENS]
    log_mass = tl.load(block_lse + block * stride + tokens, known, other=0.0)  # [TOKENS]
    log_mass -= tl.load(lse + tokens, inside, other=0.0)
    others = tl.minimum(tl.exp(log_mass), 1.0, propagate_nan=_ALL) - at_target  # [TOKENS]
    others = tl.maximum(others, 0.0, propagate_nan=_ALL)
    tl.store(target_norm + tokens, _norm(others, prob, entropy, tokens, inside) + own, inside)


@triton.jit(do_not_specialize=["A", "blocks", "stride", "words"])
def _mark_kernel(
    block_lse,  # [blocks, A]
    lse,  # [A]
    prob,  # [A]
    entropy,  # [A] or None
    target_norm,  # [A]
    size,  # [A] 0 of a token without a gradient, whose masses may be NaN
    targets,  # [A]
    threshold,  # []
    bits,  # [blocks, words] int32 out
    expected,  # [block groups, A] out
    A,
    blocks,
    stride,
    words,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    at = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    there = (at[:, None] < blocks) & (tokens[None, :] < A)  # [BLOCKS, TOKENS]
    norm = _norms(
        block_lse, lse, prob, entropy, target_norm, targets, at[:, None], tokens[None, :], there, A, stride
    )  # [BLOCKS, TOKENS]
    active = tl.load(size + tokens, tokens < A, other=0.0) != 0  # [TOKENS]
    valid = there & active[None, :]  # [BLOCKS, TOKENS]
    limit = tl.load(threshold)
    if UNBIASED:
        bar = limit * _draws(tl.load(lse + tokens, tokens < A, other=0.0), tokens, at)  # [BLOCKS, TOKENS]
        keep = ((norm <= bar) == 0) & valid  # [BLOCKS, TOKENS]; NaN is kept
        share = tl.minimum(tl.div_rn(norm, limit), 1.0, propagate_nan=_ALL)  # [BLOCKS, TOKENS]
    else:
        keep = ((norm <= limit) == 0) & valid
        share = keep.to(tl.float32)
    WORDS: tl.constexpr = TOKENS // 32
    lanes = tl.reshape(keep.to(tl.int32), (BLOCKS, WORDS, 32)) << tl.arange(0, 32)[None, None, :]  # [BLOCKS, WORDS, 32]
    places = at[:, None].to(tl.int64) * words + tl.program_id(0) * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(bits + places, tl.sum(lanes, axis=2), at[:, None] < blocks)  # distinct bits: a union
    total = tl.sum(tl.where(valid, share, 0.0), axis=0)  # [TOKENS]
    tl.store(expected + tl.program_id(1).to(tl.int64) * A + tokens, total, tokens < A)


@triton.jit(do_not_specialize=["A", "blocks", "words", "block_groups"])
def _count_kernel(
    bits,  # [blocks, words]
    expected,  # [block groups, A]
    dense,  # [A] int8 out
    counts,  # [blocks + 1, token groups] int32 out
    A,
    blocks,
    words,
    block_groups,
    most,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    at = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    total = tl.zeros((SUMS, TOKENS), tl.float32)  # [SUMS, TOKENS]
    for first in range(0, block_groups, SUMS):
        group = (first + tl.arange(0, SUMS))[:, None]  # [SUMS, 1]
        mask = (group < block_groups) & (tokens[None, :] < A)  # [SUMS, TOKENS]
        total += tl.load(expected + group.to(tl.int64) * A + tokens[None, :], mask, other=0.0)
    many = ((tl.sum(total, axis=0) <= most) == 0) & (tokens < A)  # [TOKENS]; NaN is dense
    tl.store(dense + tokens, many.to(tl.int8), (tokens < A) & (tl.program_id(1) == 0))
    listed = _listed(bits, many[None, :], at[:, None], tokens[None, :], blocks, words)  # [BLOCKS, TOKENS]
    places = at.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)  # [BLOCKS]
    tl.store(counts + places, tl.sum(listed.to(tl.int32), axis=1), at <= blocks)


@triton.jit(do_not_specialize=["A", "blocks", "stride", "words"])
def _drop_kernel(
    block_lse,  # [blocks, A]
    lse,  # [A]
    prob,  # [A]
    entropy,  # [A] or None
    target_norm,  # [A]
    size,  # [A]
    targets,  # [A]
    threshold,  # []
    bits,  # [blocks, words]
    dense,  # [A] int8
    longest,  # [blocks]
    reach,  # [A]
    by_token,  # [2, block groups, A] out: of what is dropped, and of what is left out times w
    by_block,  # [blocks, token groups] out
    A,
    blocks,
    stride,
    words,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    at = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    inside = tokens < A  # [TOKENS]
    many = tl.load(dense + tokens, inside, other=0) != 0  # [TOKENS]
    there = (at[:, None] < blocks) & inside[None, :]  # [BLOCKS, TOKENS]
    norm = _norms(
        block_lse, lse, prob, entropy, target_norm, targets, at[:, None], tokens[None, :], there, A, stride
    )  # [BLOCKS, TOKENS]
    kept = _listed(bits, many[None, :], at[:, None], tokens[None, :], blocks, words)  # [BLOCKS, TOKENS]
    active = tl.load(size + tokens, inside, other=0.0) != 0  # [TOKENS]
    gone = there & (active & (many == 0))[None, :]  # [BLOCKS, TOKENS] pairs of tokens that are routed
    dropped = tl.where(gone & (kept == 0), norm, 0.0)  # [BLOCKS, TOKENS]
    e = dropped  # [BLOCKS, TOKENS]
    if UNBIASED:
        e = tl.where(gone & kept, tl.maximum(tl.load(threshold) - norm, 0.0, propagate_nan=_ALL), dropped)
    by_token += tl.program_id(1).to(tl.int64) * A + tokens  # [TOKENS]
    tl.store(by_token, tl.sum(dropped, axis=0), inside)
    w = tl.load(longest + at, at < blocks, other=0.0)  # [BLOCKS]
    tl.store(by_token + tl.num_programs(1).to(tl.int64) * A, tl.sum(e * w[:, None], axis=0), inside)
    r = tl.load(reach + tokens, active, other=0.0)  # [TOKENS]
    places = at.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)  # [BLOCKS]
    tl.store(by_block + places, tl.sum(e * r[None, :], axis=1), at < blocks)


@triton.jit(do_not_specialize=["A", "blocks", "stride", "words"])
def _list_kernel(
    block_lse,  # [blocks, A]
    lse,  # [A]
    prob,  # [A]
    entropy,  # [A] or None
    target_norm,  # [A]
    targets,  # [A]
    threshold,  # []
    bits,  # [blocks, words]
    dense,  # [A] int8
    ends,  # [blocks + 1, token groups] int64: prefix sum of counts
    rows,  # [P + Nd] int64 out
    scale,  # [P] out, or None
    A,
    blocks,
    stride,
    words,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    at = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    many = tl.load(dense + tokens, tokens < A, other=0) != 0  # [TOKENS]
    listed = _listed(bits, many[None, :], at[:, None], tokens[None, :], blocks, words)  # [BLOCKS, TOKENS]
    one = listed.to(tl.int32)  # [BLOCKS, TOKENS]
    places = at.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)  # [BLOCKS]
    first = tl.load(ends + places, at <= blocks, other=0) - tl.sum(one, axis=1) - 1  # [BLOCKS]
    position = first[:, None] + tl.cumsum(one, axis=1)  # [BLOCKS, TOKENS]
    tl.store(rows + position, tokens[None, :].to(tl.int64), listed)
    if scale is not None:
        listed = listed & (at[:, None] < blocks)  # [BLOCKS, TOKENS]
        norm = _norms(
            block_lse, lse, prob, entropy, target_norm, targets, at[:, None], tokens[None, :], listed, A, stride
        )  # [BLOCKS, TOKENS]
        factor = tl.maximum(tl.div_rn(tl.load(threshold), norm), 1.0, propagate_nan=_ALL)  # [BLOCKS, TOKENS]
        tl.store(scale + position, factor, listed)


@torch.no_grad()
def choose(
    targets: Tensor,  # [A]
    lse: Tensor,  # [A] float32, as all that follows
    logprobs: Tensor,  # [A]
    block_lse: Tensor,  # [blocks, A]
    gradient: LogitGradient,
    theta: float,
    lengths: Callable[[], tuple[Tensor, Tensor]],  # longest [blocks] and reach [A]
    bound: Callable[[Dropped], Bound],
    *,
    dense_share: float,
    unbiased: bool,
    most_pairs: int | None,
) -> tuple[Routing, int, Bound]:
    """As routing.choose; one host sync."""
    (blocks, A), device = block_lse.shape, lse.device
    block_lse = block_lse if block_lse.stride(1) == 1 else block_lse.contiguous()
    onehot, prob, entropy = (None if x is None else x.contiguous() for x in vars(gradient).values())  # [A] each
    lse, targets, stride = lse.contiguous(), targets.contiguous(), block_lse.stride(0)
    groups, block_groups = -(-A // _TOKENS), -(-blocks // _BLOCKS)
    list_grid, words = (groups, -(-(blocks + 1) // _BLOCKS)), groups * _TOKENS // 32
    new, tile = {"dtype": torch.float32, "device": device}, {"BLOCKS": _BLOCKS, "TOKENS": _TOKENS, "num_warps": _WARPS}
    target_norm, size = torch.empty(A, **new), torch.empty(A, **new)  # [A], [A]
    bits = torch.empty(blocks, words, dtype=torch.int32, device=device)  # [blocks, words]
    expected = torch.empty(block_groups, A, **new)  # [block groups, A]
    dense = torch.empty(A, dtype=torch.int8, device=device)  # [A]
    counts = torch.empty(blocks + 1, groups, dtype=torch.int32, device=device)  # [blocks + 1, token groups]
    with tile_table.current(device):
        _token_kernel[(groups,)](
            block_lse, lse, logprobs.contiguous(), onehot, prob, entropy, targets, target_norm, size, A, blocks, stride,
            TOKENS=_TOKENS,
        )  # fmt: skip
        active = size != 0  # [A]
        count = active.sum()  # []
        some = count.clamp(min=1)  # []
        threshold = theta * size.sum() / some  # []
        masses, sizes = (block_lse, lse, prob, entropy, target_norm), (A, blocks, stride, words)
        given = (*masses, size, targets, threshold, bits)
        _mark_kernel[(groups, block_groups)](*given, expected, *sizes, UNBIASED=unbiased, **tile)
        most = block_groups, dense_share * float(blocks)
        _count_kernel[list_grid](bits, expected, dense, counts, A, blocks, words, *most, SUMS=_SUMS, **tile)
        ends = counts.flatten().cumsum(0)  # [(blocks + 1) * token groups]
        table = torch.cat([ends.new_zeros(1), ends[groups - 1 :: groups], count[None]])  # [blocks + 3] starts of rows
        asked = Later(table)
        del expected

        def left_out() -> Bound:
            by_token = torch.empty(2, block_groups, A, **new)  # [2, block groups, A]
            by_block = torch.empty(blocks, groups, **new)  # [blocks, token groups]
            _drop_kernel[(groups, block_groups)](
                *given, dense, longest, reach, by_token, by_block, *sizes, UNBIASED=unbiased, **tile
            )
            lost, error = by_token.sum(1)  # [A], [A]
            return bound(Dropped(some, torch.where(active, lost / size, 0.0), error, by_block.sum(1)))

        longest, reach = (x.contiguous() for x in lengths())  # [blocks], [A]
        error_bound = left_out()
        *offsets, listed, active_tokens = asked.read().tolist()
        pairs = offsets[-1]
        if most_pairs is not None and pairs > most_pairs:
            dense.fill_(1)
            everything = torch.arange(A, device=device)  # [A]
            nothing = Routing(everything[:0], lse[:0] if unbiased else None, [0] * len(offsets), everything)
            return nothing, active_tokens, left_out()
        rows = torch.empty(listed, dtype=torch.int64, device=device)  # [P + Nd]
        scale = torch.empty(pairs, **new) if unbiased else None  # [P]
        _list_kernel[list_grid](*masses, targets, threshold, bits, dense, ends, rows, scale, *sizes, **tile)
    return Routing(rows[:pairs], scale, offsets, rows[pairs:], table[: blocks + 1]), active_tokens, error_bound
