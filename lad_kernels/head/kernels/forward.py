"""Log-probability, log-sum-exp and entropy of every token without storing a logit.

    lse = log sum_j e^z_j,   logp = z_y - lse,   H = -sum_j p_j log p_j,   z as in tile.py

Three kernels.
1. `_partials_kernel` (2 N D V flops): one tile of z at a time. Each block b of 128 columns leaves one number per token,
   L_b = log sum_{j in b} e^z_j, and if entropy is wanted H_b, the entropy of the softmax inside the block. L_b is both
   the partial of the log-sum-exp and the mass of the block that the routed backward needs. An element costs four
   instructions: maximum, multiply-add, 2^x, sum. The next tile's first operands are on their way meanwhile (flatten).
2. `_target_kernel`: z_y, so that the tiles have no target branch. Rows of W are gathered and multiplied as the tiles
   multiply them, step by step in the same matrix units, although of each product of 64 tokens with 64 targets only the
   diagonal is wanted: z_y then has the rounding that lse contains, which cancels in logp. (A Hopper's units cut off
   what they add: at D = 4,096 logits of 50 lose 1e-4.) For one_pass.py also its shift, the level of that, and dz/draw.
3. `_finalize_kernel`: blocks in ascending order, first their maximum, then
       lse = log sum_b e^L_b,   p_b = e^(L_b - lse),   H = sum_b p_b (H_b - log p_b)      (chain rule)
   Every term of H is non-negative, so peaked distributions do not cancel.

Memory layout: partials are [blocks, N], so that consecutive tokens are consecutive in memory. They are bounded: unless
the caller wants them all, tokens pass in runs of rows whose partials, and hidden states if they are gathered, fit 160
MiB; a run is a multiple of every block_n and only splits the grid, so it cannot change a result.
Exact: nothing is dropped, no atomics, fixed order. Each token's numbers are bitwise independent of N and of its
neighbours: the tile shape does not depend on N, and N is kept out of the specialisation of the kernels.
Precision is lost in fp32 roundings only; the absolute error of z and lse grows with |z| and D, that of logp with the
distance of z_y from the largest z. What logp has above 0 is rounding, hence the clamp.
A target outside [0, V) matches no column: its log-probability is -inf, and nothing out of bounds is read.
Cost: 2 N D V flops; H is read V / block_v times and W N / block_n times, mostly from L2; 4 N V / 128 bytes of partials
written and read twice (8 with entropy).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.tile import (
    LN_2,
    LOG2_E,
    below,
    exponents,
    inverse_temperatures,
    is_largest,
    levels,
    logit_tile,
    row_levels,
    tile_order,
)
from lad_kernels.head.kernels.tile_table import Tiles
from lad_kernels.head.records import BLOCK, HeadForward, LogitTransform, gather

_PARTIAL_BYTES = 160 << 20  # bound on the block partials of one run of rows
_RUN = 1024  # runs are multiples of this, hence of every block_n
_LOWEST = tl.constexpr(-1e38)  # stands for -inf: finite, so that no inf - inf can arise
_NOTHING = tl.constexpr(-1e29)  # no logit of an entry that `biases` keeps is below

_BLOCK = tl.constexpr(BLOCK)
_TARGET_TOKENS = 64  # of the gathered product
_FINAL_BLOCKS, _FINAL_TOKENS = 64, 32  # tile of the reduction over blocks


@triton.jit(do_not_specialize=["N", "lse_stride", "run_stride"])
def _partials_kernel(
    h,  # [N, D]
    w,  # [V, D]
    bias,  # [V] or None
    inv_temperature,  # [N] or a number
    block_lse,  # [blocks, N] out
    block_entropy,  # [blocks, N] out, or None
    block_top,  # [blocks, N] out, or None
    N,
    V,
    D,
    h_stride,
    w_stride,
    lse_stride,
    run_stride,
    scale,
    softcap,
    zero,  # 0, or None: see tile_table
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    TMA: tl.constexpr,
    THREAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_V // _BLOCK
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=TMA):
        tile_n, tile_v = tile_order(tile, tiles_n, tiles_v, GROUP_N)
        row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
        x, factor, _, rows, _, _, _ = logit_tile(
            h, w, bias, inv_temperature, row, column, N, V, D, h_stride, w_stride, scale, softcap, zero,
            BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, TMA, PER_TOKEN,
        )  # [BLOCK_N, BLOCK_V], [BLOCK_N, 1]  # fmt: skip
        if not WHOLE_BLOCKS:  # else a block is complete, or beyond V and not stored
            x = tl.where(below(V - column, BLOCK_V, THREAD), x, 1e30 if NEGATIVE else -1e30)
        x = tl.reshape(x, (BLOCK_N, PARTS, _BLOCK))  # [BLOCK_N, PARTS, BLOCK]
        top = tl.min(x, axis=2) if NEGATIVE else tl.max(x, axis=2)  # [BLOCK_N, PARTS], the largest z over factor
        f = factor * LOG2_E  # [BLOCK_N, 1]
        level, r = levels(top, f)  # [BLOCK_N, PARTS] each
        if bias is not None:
            empty = (top < _NOTHING) & (not NEGATIVE)  # [BLOCK_N, PARTS]; all entries of the block are excluded
            level, r = tl.where(empty, 0.0, level), tl.where(empty, 0.0, r)
        d = tl.fma(x, f[:, :, None], -level[:, :, None])  # [BLOCK_N, PARTS, BLOCK] (z - the largest) log2 e + r
        e = tl.exp2(d)  # [BLOCK_N, PARTS, BLOCK]
        total = tl.sum(e, axis=2)  # [BLOCK_N, PARTS], about 1 or more
        log_total = tl.log2(total)  # [BLOCK_N, PARTS]

        parts = tile_v * PARTS + tl.arange(0, PARTS)  # [PARTS]
        valid = (rows[:, None] < N) & (parts[None, :] * _BLOCK < V)  # [BLOCK_N, PARTS]
        at = parts[None, :].to(tl.int64)  # [1, PARTS]
        mass = tl.fma(log_total - r, LN_2, top * factor)  # [BLOCK_N, PARTS] its logarithm
        if bias is not None:
            mass = tl.where(empty, _LOWEST, mass)
        tl.store(block_lse + at * lse_stride + rows[:, None], mass, mask=valid)
        if block_top is not None:
            tl.store(block_top + at * run_stride + rows[:, None], top * factor, mask=valid)
        if block_entropy is not None:
            inside = (log_total - tl.sum(e * d, axis=2) / total) * LN_2  # [BLOCK_N, PARTS]; r cancels
            inside = tl.where(inside < 0, 0.0, inside)  # [BLOCK_N, PARTS]; a maximum would turn NaN into 0
            if bias is not None:
                inside = tl.where(empty, 0.0, inside)
            tl.store(block_entropy + at * run_stride + rows[:, None], inside, mask=valid)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["prior"])  # a chunk starts anywhere
def _target_kernel(
    h,  # [N, D]
    w,  # [V, D]
    targets,  # [N]
    bias,  # [V] or None
    inv_temperature,  # [N] or a number
    prior,  # [N] or None
    out,  # [1 or 5, N] out
    N,
    V,
    D,
    h_stride,
    w_stride,
    scale,
    softcap,
    LEVELS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    inside = rows < N  # [TOKENS]
    y = tl.load(targets + rows, mask=inside, other=-1)  # [TOKENS]
    known = (y >= 0) & (y < V)  # [TOKENS]
    y = tl.where(known, y, 0)
    h += rows[:, None].to(tl.int64) * h_stride  # [TOKENS, 1]
    w += y[:, None] * w_stride  # [TOKENS, 1]
    acc = tl.zeros((TOKENS, TOKENS), tl.float32)  # [TOKENS, TOKENS] every token with every target
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        mask = known[:, None] & (ks < D)  # [TOKENS, BLOCK_K]
        a = tl.load(h + ks, mask=mask, other=0.0)  # [TOKENS, BLOCK_K]
        b = tl.load(w + ks, mask=mask, other=0.0)  # [TOKENS, BLOCK_K]
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    own = tl.arange(0, TOKENS)[:, None] == tl.arange(0, TOKENS)[None, :]  # [TOKENS, TOKENS]
    raw = tl.sum(tl.where(own, acc, 0.0), axis=1)  # [TOKENS]
    if bias is not None:
        raw += tl.load(bias + y, mask=known, other=0.0).to(tl.float32)
    inv_t = inverse_temperatures(inv_temperature, rows, N, PER_TOKEN)  # [TOKENS]
    x, factor, slope = exponents(raw, scale, softcap, inv_t)  # [TOKENS] each
    z = tl.where(known, x * factor, -float("inf"))  # [TOKENS]
    tl.store(out + rows, z, mask=inside)
    if LEVELS:
        shift = z if prior is None else z - tl.load(prior + rows, mask=inside, other=0.0)  # [TOKENS]
        level, rounding = row_levels(shift, factor, factor * LOG2_E)  # [TOKENS] each
        tl.store(out + N + rows, shift, mask=inside)
        tl.store(out + 2 * N + rows, level, mask=inside)
        tl.store(out + 3 * N + rows, rounding, mask=inside)
        tl.store(out + 4 * N + rows, slope, mask=inside)


@triton.jit(do_not_specialize=["N", "blocks", "lse_stride", "run_stride"])
def _finalize_kernel(
    block_lse,  # [blocks, N]
    block_entropy,  # [blocks, N] or None
    block_top,  # [blocks, N] or None
    target_logits,  # [N]
    logprobs,  # [N] out
    lse,  # [N] out
    lse_rest,  # [N] out
    entropy,  # [N] out, or None
    correct,  # [N] out, or None
    N,
    blocks,
    lse_stride,
    run_stride,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    inside = rows < N  # [TOKENS]
    top = tl.full((BLOCKS, TOKENS), _LOWEST, tl.float32)  # [BLOCKS, TOKENS]
    for first in range(0, blocks, BLOCKS):
        at = first + tl.arange(0, BLOCKS)  # [BLOCKS]
        offsets = at[:, None].to(tl.int64) * lse_stride + rows[None, :]  # [BLOCKS, TOKENS]
        top = tl.maximum(top, tl.load(block_lse + offsets, (at[:, None] < blocks) & inside[None, :], other=_LOWEST))
    top = tl.max(top, axis=0)  # [TOKENS]

    mass = tl.zeros((BLOCKS, TOKENS), tl.float32)  # [BLOCKS, TOKENS] e^(L_b - top)
    spread = tl.zeros((BLOCKS, TOKENS), tl.float32)  # [BLOCKS, TOKENS] e^(L_b - top) (H_b - (L_b - top))
    for first in range(0, blocks, BLOCKS):
        at = first + tl.arange(0, BLOCKS)  # [BLOCKS]
        mask = (at[:, None] < blocks) & inside[None, :]  # [BLOCKS, TOKENS]
        offsets = at[:, None].to(tl.int64) * lse_stride + rows[None, :]  # [BLOCKS, TOKENS]
        below = tl.load(block_lse + offsets, mask, other=_LOWEST) - top[None, :]  # [BLOCKS, TOKENS]
        e = tl.where(mask, tl.exp(below), 0.0)  # [BLOCKS, TOKENS]
        mass += e
        if block_entropy is not None:
            offsets = at[:, None].to(tl.int64) * run_stride + rows[None, :]  # [BLOCKS, TOKENS]
            spread += e * (tl.load(block_entropy + offsets, mask, other=0.0) - below)
    mass = tl.where(inside, tl.sum(mass, axis=0), 1.0)  # [TOKENS], at least 1
    log_mass = tl.where(top < _NOTHING, float("nan"), tl.log(mass))  # [TOKENS]; NaN where a bias excludes every entry
    total = top + log_mass  # [TOKENS]
    tl.store(lse + rows, total, mask=inside)
    rest = log_mass - (total - top)  # [TOKENS]
    tl.store(lse_rest + rows, tl.where(rest == rest, rest, 0.0), mask=inside)  # NaN would spoil a coefficient of 0
    z_y = tl.load(target_logits + rows, mask=inside, other=0.0)  # [TOKENS]
    logp = (z_y - top) - log_mass  # [TOKENS]
    tl.store(logprobs + rows, tl.where(logp > 0, 0.0, logp), mask=inside)  # a minimum would turn NaN into 0
    if block_entropy is not None:
        tl.store(entropy + rows, log_mass + tl.sum(spread, axis=0) / mass, mask=inside)
    if block_top is not None:
        largest = tl.full((BLOCKS, TOKENS), _LOWEST, tl.float32)  # [BLOCKS, TOKENS]
        for first in range(0, blocks, BLOCKS):
            at = first + tl.arange(0, BLOCKS)  # [BLOCKS]
            mask = (at[:, None] < blocks) & inside[None, :]  # [BLOCKS, TOKENS]
            offsets = at[:, None].to(tl.int64) * run_stride + rows[None, :]  # [BLOCKS, TOKENS]
            largest = tl.maximum(largest, tl.load(block_top + offsets, mask, other=_LOWEST))
        tl.store(correct + rows, is_largest(z_y, tl.max(largest, axis=0)), mask=inside)


@torch.no_grad()
def forward(
    hidden: Tensor,  # [N, D]; with `tokens` also [B, T, D], see `gather`
    weight: Tensor,  # [V, D], same dtype
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    *,
    want_entropy: bool,
    want_block_lse: bool,
    want_correct: bool = False,
    tokens: Tensor | None = None,  # [N] rows of hidden; None: all
    tiles: Tiles | None = None,
) -> HeadForward:
    """Run the head. `tiles` overrides the table of tile_table.py."""
    hidden = tile_table.by_rows(hidden) if tokens is None else hidden
    weight, targets = tile_table.by_rows(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    N, V, device = len(targets), weight.shape[0], hidden.device
    blocks = -(-V // BLOCK)

    new = {"dtype": torch.float32, "device": device}
    logprobs, lse, rest = (torch.empty(N, **new) for _ in range(3))  # [N] each
    entropy = torch.empty(N, **new) if want_entropy else None  # [N]
    correct = torch.empty(N, dtype=torch.bool, device=device) if want_correct else None  # [N]
    all_lse = torch.empty(blocks, N, **new) if want_block_lse else None  # [blocks, N]
    row_bytes = 4 * blocks * (want_entropy + want_correct + (not want_block_lse))
    row_bytes += 0 if tokens is None else hidden.shape[-1] * hidden.element_size()
    run = max(_PARTIAL_BYTES // max(row_bytes, 1) // _RUN, 1) * _RUN  # whose partials, and gathered states, fit
    run = min(run, max(N, 1))
    run_lse = None if want_block_lse else torch.empty(blocks, run, **new)  # [blocks, run]
    run_entropy = torch.empty(blocks, run, **new) if want_entropy else None  # [blocks, run]
    run_top = torch.empty(blocks, run, **new) if want_correct else None  # [blocks, run]

    with tile_table.current(device):
        for start in range(0, N, run):
            stop = min(start + run, N)
            block_lse = all_lse[:, start:] if want_block_lse else run_lse  # [blocks, >= stop - start]
            inv_temperature = tile_table.inverse_temperature(transform.select(slice(start, stop)))
            rows = hidden[start:stop] if tokens is None else gather(hidden, tokens[start:stop])  # [<= run, D]
            chosen = tiles or tile_table.tiles_for(rows, weight, bias, transform)
            _partials(rows, weight, bias, inv_temperature, transform, block_lse, run_entropy, run_top, run, chosen)
            (z_y,) = target_logits(rows, weight, targets[start:stop], bias, inv_temperature, transform, chosen)
            _finalize_kernel[(-(-(stop - start) // _FINAL_TOKENS),)](
                block_lse,
                run_entropy,
                run_top,
                z_y,
                logprobs[start:],
                lse[start:],
                rest[start:],
                entropy[start:] if want_entropy else None,
                correct[start:] if want_correct else None,
                stop - start,
                blocks,
                block_lse.stride(0),
                run,
                BLOCKS=_FINAL_BLOCKS,
                TOKENS=_FINAL_TOKENS,
                **tile_table.SAME_BITS,
            )
    return HeadForward(logprobs, lse, entropy, all_lse, rest, correct)


def _partials(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    inv_temperature: Tensor | float,  # [N] or a number
    transform: LogitTransform,
    block_lse: Tensor,  # [blocks, >= N] out
    block_entropy: Tensor | None,  # [blocks, >= N] out
    block_top: Tensor | None,  # [blocks, >= N] out
    run: int,  # stride of the last two
    tiles: Tiles,
) -> None:
    (N, D), V = hidden.shape, weight.shape[0]
    flops.product(N, D, V)
    grid = tile_table.programs(hidden.device, -(-N // tiles.block_n) * -(-V // tiles.block_v))
    _partials_kernel[(grid,)](
        tile_table.operand(hidden, tiles.block_n, tiles),
        tile_table.operand(weight, tiles.block_v, tiles),
        bias,
        inv_temperature,
        block_lse,
        block_entropy,
        block_top,
        N,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        block_lse.stride(0),
        run,
        float(transform.scale),
        None if transform.softcap is None else float(transform.softcap),
        tile_table.zero(hidden.device),
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        BLOCK_K=tiles.block_k,
        GROUP_N=tiles.group_n,
        EVEN_K=D % tiles.block_k == 0,
        WHOLE_BLOCKS=V % BLOCK == 0,
        NEGATIVE=transform.scale < 0 and transform.softcap is None,
        TMA=tiles.tma,
        THREAD=tile_table.thread_bits(hidden.device),
        PER_TOKEN=isinstance(inv_temperature, Tensor),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **tile_table.SAME_BITS,
    )


def target_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    inv_temperature: Tensor | float,  # [N] or a number
    transform: LogitTransform,
    tiles: Tiles,
    *,
    prior: Tensor | None = None,  # [N] float32
    levels: bool = False,
) -> tuple[Tensor, ...]:
    """(z_y [N]), with `levels` (z_y, s = z_y - prior, the level of s and its rounding as in tile.py, dz_y/draw)."""
    (N, D), V = hidden.shape, weight.shape[0]
    out = torch.empty(5 if levels else 1, N, dtype=torch.float32, device=hidden.device)  # [1 or 5, N]
    _target_kernel[(-(-N // _TARGET_TOKENS),)](
        hidden,
        weight,
        targets,
        bias,
        inv_temperature,
        prior,
        out,
        N,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        float(transform.scale),
        None if transform.softcap is None else float(transform.softcap),
        LEVELS=levels,
        TOKENS=_TARGET_TOKENS,
        BLOCK_K=tiles.block_k,
        PER_TOKEN=isinstance(inv_temperature, Tensor),
        num_warps=4 if hidden.element_size() == 2 else 8,
        num_stages=tiles.stages,
        **tile_table.SAME_BITS,
    )
    return out.unbind()
