"""Log-probabilities and the gradient of the loss in one pass: 6 N D V flops, where forward and backward take 8.

It serves losses whose gradient c_n = d loss / d logp_n is known as soon as log-probabilities up to token n are.
Tokens pass in chunks, for which the exponentials of all logits are stored. z as in tile.py, y the target:

    s_n  = z_ny - prior_n        prior: an earlier log-probability of the target, or 0. No maximum is looked for:
                                 any s near lse will do, since a shift cancels
    E_nj = e^(z_nj - s_n)        S_n = sum_j E_nj,  A_n = sum_j E_nj (z_nj - s_n)
    lse  = s + log S             logp = (z_y - s) - log S          H = log S - A / S
    p    = E / S                 dR_nj = (b_n p_nj + a_n 1[j = y]) z'_nj = r_n F_nj,   z' = dz / draw
    F    = E, but S (p_y + a / b) in the target's column, and r_n = b_n z'_n / S_n: without a softcap z' is a row's
    F    = E z', ... z'_ny there, and r_n = b_n / S_n, with one

a and b are `onehot` and `prob` of records.LogitGradient; of a loss of log-probs alone a = c, b = -c. All of F but one
element a row is without them: tiles write it before they are known, and b enters as a factor per row:

    dH = diag(r) (F W),   dW = F^T (diag(r) H),   db = F^T r

1. `target_logits` of forward.py: raw products of the targets, hence z_y, z'_y and s.
2. `_exponentials_kernel` (2 C D V flops): F [C, V] without the target's term; sums of E and E (z - s) per tile. Here s
   is the rounded level of `tile.levels`, which cancels in p; the finalize kernel knows the rest.
3. `_finalize_kernel`: those sums over the tiles in ascending order -> S, lse, logp, H; then a, b and F_ny.
4. the library: dH of the chunk, complete at once; dW into one float32 [V, D] over all chunks, cast once.

Range: F and r H live in the dtype of the inputs, so S must stay within 2^-64 .. 2^64: the prior may be off by 44 nats;
without one, the target's log-probability must be above -44. Else, and for a target outside [0, V), the call returns
None and the caller takes two passes: one number, the only host sync, read while the last products run. So does a NaN,
which would reach dW even from a token without a gradient. float16 has too few exponents for F and is refused.
Exact: nothing is dropped, no atomics, fixed order; two runs agree bitwise. A log-probability, lse or entropy is
bitwise independent of N and of the chunks; gradients depend on the chunks in their last bits.
Precision: S, A and p_y come from unrounded numbers. 16-bit inputs round F and r H once each, so dW has one rounding
more than in dense.py: 1.75 times the error of the final cast alone where dense.py has 1.4. db has the rounding of F,
which sums over rows of mixed signs can magnify; dense.py's has none. H subtracts terms of the size of |log S|: its
absolute error is up to 6e-7 |log S| (measured) on top of forward.py's; without a prior |log S| = |logp|.
Cost: C V elements of F written once and read twice; 8 V D bytes of float32 dW per chunk, hence chunks as long as
memory allows. A single chunk needs no float32 dW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import dense, target_columns, tile_table
from lad_kernels.head.kernels.forward import target_logits
from lad_kernels.head.kernels.tile import LN_2, LOG2_E, below, is_largest, logit_tile, tile_order
from lad_kernels.head.kernels.tile_table import Tiles
from lad_kernels.head.kernels.waiting import Later
from lad_kernels.head.records import BLOCK, HeadForward, HeadGradients, LogitGradient, LogitTransform, Needs, gather

_LARGEST_SUM = 2.0**64  # F, F W and r H stay far inside the exponents of bfloat16 and float32
_BLOCK = tl.constexpr(BLOCK)
_FINAL_TILES, _FINAL_TOKENS = 64, 32  # tile of the reduction over vocabulary tiles


@triton.jit
def _by_row(x, column, V, WHOLE_BLOCKS: tl.constexpr, LARGEST: tl.constexpr):
    """Sums, or largest numbers, [R] of a tile [R, C] that starts at `column`; whole blocks beyond V do not count."""
    if WHOLE_BLOCKS:
        parts: tl.constexpr = x.shape[1] // _BLOCK
        x = tl.reshape(x, (x.shape[0], parts, _BLOCK))  # [R, parts, BLOCK]
        x = tl.max(x, axis=2) if LARGEST else tl.sum(x, axis=2)  # [R, parts]
        inside = column + tl.arange(0, parts) * _BLOCK < V  # [parts]
        x = tl.where(inside[None, :], x, -1e30 if LARGEST else 0.0)
    return tl.max(x, axis=1) if LARGEST else tl.sum(x, axis=1)


@triton.jit(do_not_specialize=["N", "sums_stride"])
def _exponentials_kernel(
    h,  # [N, D]
    w,  # [V, D]
    bias,  # [V] or None
    inv_temperature,  # [N] or a number
    levels,  # [N] of the shift
    out,  # [N, >= V] F, pointer or descriptor
    sums,  # [vocabulary tiles, >= N] out
    moments,  # [vocabulary tiles, >= N] out, or None; in units of log 2, as
    tops,  # [vocabulary tiles, >= N] out, or None
    N,
    V,
    D,
    h_stride,
    w_stride,
    out_stride,
    sums_stride,
    scale,
    softcap,
    zero,  # 0, or None: see tile_table
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    TMA: tl.constexpr,
    THREAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    # Where a rich epilogue leaves no registers for it (Blackwell's), loads do not cross tiles.
    FLATTEN: tl.constexpr = TMA and (WHOLE_BLOCKS or softcap is None or not isinstance(out, tl.tensor))
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_n, tile_v = tile_order(tile, tiles_n, tiles_v, GROUP_N)
        row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
        x, factor, slope, rows, columns, in_n, _ = logit_tile(
            h, w, bias, inv_temperature, row, column, N, V, D, h_stride, w_stride, scale, softcap, zero,
            BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, TMA, PER_TOKEN,
        )  # [BLOCK_N, BLOCK_V], [BLOCK_N, 1], like either  # fmt: skip

        # Rows beyond N get e = 0. (Their f of 0, and 32-bit offsets in the tile, keep ptxas from spilling on sm_100.)
        f = tl.where(in_n[:, None], factor * LOG2_E, 0.0)  # [BLOCK_N, 1]
        level = tl.load(levels + rows, mask=in_n, other=1e30)[:, None]  # [BLOCK_N, 1]
        d = tl.fma(x, f, -level)  # [BLOCK_N, BLOCK_V] (z - shift) log2 e + the level's rounding
        if not WHOLE_BLOCKS:  # else a block is complete, or beyond V
            d = tl.where(below(V - column, BLOCK_V, THREAD), d, -1e30)
        at = sums_stride * tile_v.to(tl.int64) + rows  # [BLOCK_N]
        if tops is not None:
            tl.store(tops + at, _by_row(d, column, V, WHOLE_BLOCKS, True), mask=in_n)
        e = tl.exp2(d)  # [BLOCK_N, BLOCK_V]
        tl.store(sums + at, _by_row(e, column, V, WHOLE_BLOCKS, False), mask=in_n)
        if moments is not None:
            tl.store(moments + at, _by_row(e * d, column, V, WHOLE_BLOCKS, False), mask=in_n)
        if softcap is not None:
            e *= slope
        if isinstance(out, tl.tensor):
            # The mask is as wide as a row of out, not as V: its bound divides by 16, so that the stores stay wide.
            at = tl.arange(0, BLOCK_N)[:, None] * out_stride + columns[None, :]  # [BLOCK_N, BLOCK_V]
            mask = in_n[:, None] & (columns < out_stride)[None, :]  # [BLOCK_N, BLOCK_V]
            tl.store(out + row.to(tl.int64) * out_stride + at, e.to(out.dtype.element_ty), mask=mask)
        else:
            out.store([row, column], e.to(out.dtype))


@triton.jit(
    do_not_specialize=["N", "tiles", "sums_stride"],
    do_not_specialize_on_alignment=["row_sums", "logprobs", "lse", "entropy", "correct"],  # a chunk starts anywhere
)
def _finalize_kernel(
    roundings,  # [N]
    sums,  # [tiles, >= N]
    moments,  # [tiles, >= N] or None
    tops,  # [tiles, >= N] or None
    target_logits,  # [N]
    shift,  # [N]
    row_sums,  # [N] out
    logprobs,  # [N] out
    lse,  # [N] out
    entropy,  # [N] out, or None
    correct,  # [N] out, or None
    N,
    tiles,
    sums_stride,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    inside = rows < N  # [TOKENS]
    total = tl.zeros((TILES, TOKENS), tl.float32)  # [TILES, TOKENS]
    moment = tl.zeros((TILES, TOKENS), tl.float32)  # [TILES, TOKENS]
    top = tl.full((TILES, TOKENS), -1e30, tl.float32)  # [TILES, TOKENS]
    for first in range(0, tiles, TILES):
        at = first + tl.arange(0, TILES)  # [TILES]
        mask = (at[:, None] < tiles) & inside[None, :]  # [TILES, TOKENS]
        offsets = at[:, None].to(tl.int64) * sums_stride + rows[None, :]  # [TILES, TOKENS]
        total += tl.load(sums + offsets, mask, other=0.0)
        if moments is not None:
            moment += tl.load(moments + offsets, mask, other=0.0)
        if tops is not None:
            top = tl.maximum(top, tl.load(tops + offsets, mask, other=-1e30))
    total = tl.where(inside, tl.sum(total, axis=0), 1.0)  # [TOKENS]
    rounding = tl.load(roundings + rows, mask=inside, other=0.0) * LN_2  # [TOKENS]
    log_total = tl.log(total) - rounding  # [TOKENS]
    s = tl.load(shift + rows, mask=inside, other=0.0)  # [TOKENS]
    logp = (tl.load(target_logits + rows, mask=inside, other=0.0) - s) - log_total  # [TOKENS]
    tl.store(row_sums + rows, total, mask=inside)
    tl.store(logprobs + rows, tl.minimum(logp, 0.0), mask=inside)
    tl.store(lse + rows, s + log_total, mask=inside)
    if moments is not None:
        spread = log_total - (tl.sum(moment, axis=0) / total * LN_2 - rounding)  # [TOKENS]
        tl.store(entropy + rows, tl.where(spread < 0, 0.0, spread), mask=inside)
    if tops is not None:
        z_y = tl.load(target_logits + rows, mask=inside, other=0.0)  # [TOKENS]
        tl.store(correct + rows, is_largest(z_y, s + (tl.max(top, axis=0) * LN_2 - rounding)), mask=inside)


def _padded(V: int) -> int:
    """Elements of a row of F: rows start on aligned addresses whatever V is."""
    return -(-V // BLOCK) * BLOCK


@torch.no_grad()
def one_pass(
    hidden: Tensor,  # [N, D]; with `tokens` also [B, T, D], see `gather`
    weight: Tensor,  # [V, D], same dtype
    targets: Tensor,  # [M] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    prior: Tensor | None,  # [M]
    gradient: Callable[[slice, HeadForward], LogitGradient],
    *,
    chunks: Sequence[slice],
    want_entropy: bool,
    want_correct: bool = False,
    needs: Needs,
    tokens: Tensor | None = None,  # [M] rows of hidden; None: all, M = N
    tiles: Tiles | None = None,
) -> tuple[HeadForward, HeadGradients] | None:
    """Outputs and gradients, or None where a row of exponentials left its range. `tiles` overrides tile_table.py.

    `chunks` are ascending and cover 0..M. `gradient(rows, outputs)` returns that of these rows [C], without a part by
    the entropy, given outputs [M] that are filled up to rows.stop. dH is [N, D], zero for all other tokens.
    """
    if hidden.dtype == torch.float16:
        raise ValueError("float16 has too few exponents for one pass; use forward and backward")
    hidden = tile_table.by_rows(hidden) if tokens is None else hidden
    weight, targets = tile_table.by_rows(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    M, (V, D) = len(targets), weight.shape

    new = {"dtype": torch.float32, "device": hidden.device}
    entropy = torch.empty(M, **new) if want_entropy else None  # [M]
    correct = torch.empty(M, dtype=torch.bool, device=hidden.device) if want_correct else None  # [M]
    outputs = HeadForward(torch.empty(M, **new), torch.empty(M, **new), entropy, None, None, correct)
    row_sums = torch.empty(M, **new)  # [M]
    dh = hidden.new_zeros(hidden.shape[:-1].numel(), D) if needs.hidden else None  # [N, D]
    once = len(chunks) == 1 and hidden.element_size() == 2  # the library rounds the only product itself
    dw = None  # [V, D]
    if needs.weight:
        kind = hidden.dtype if once else torch.float32
        dw = (torch.empty if M else torch.zeros)(V, D, dtype=kind, device=hidden.device)
    db = torch.zeros(V, 2, **new) if needs.bias and bias is not None else None  # [V, 2]
    longest = max((rows.stop - rows.start for rows in chunks), default=0)
    workspace, fine = hidden.new_empty(longest, _padded(V)), None  # [longest chunk, >= V]
    for rows in chunks:
        at = rows if tokens is None else tokens[rows]  # of hidden
        states = hidden[at] if tokens is None else gather(hidden, at)  # [C, D]
        part = _Chunk(states, weight, targets[rows], bias, transform, rows)
        f = workspace[: rows.stop - rows.start, :V]  # [C, V]
        chosen = tiles or tile_table.tiles_for(part.hidden, weight, bias, transform)
        slope = _exponentials(part, prior, f, row_sums, outputs, chosen)  # [C]
        if rows.stop == M:
            fine = Later(((row_sums >= 1 / _LARGEST_SUM) & (row_sums <= _LARGEST_SUM)).all())  # []
        given = gradient(rows, outputs)  # [C]
        # F_ny cannot hold a / b for b = 0; b = 2^-24 a is below its rounding.
        prob = torch.where(given.prob == 0, given.onehot * 2.0**-24, given.prob)  # [C]
        sums, capped = row_sums[rows], transform.softcap is not None  # [C]
        r = prob / sums if capped else prob / sums * slope  # [C]
        _fill_targets(f, part.targets, given.onehot, prob, sums * slope if capped else sums, outputs.logprobs[rows])
        if needs.hidden:
            dh_chunk = torch.empty(len(f), D, **new)  # [C, D]
            dense.accumulate(dh_chunk, f, weight, first=True)
            dh[at] = dh_chunk.mul_(r[:, None]).to(dh.dtype)
            del dh_chunk
        if needs.weight:
            scaled = torch.mul(part.hidden, r[:, None], out=torch.empty_like(part.hidden))  # [C, D], from float32
            if once:
                dense.rounded_product(dw, f.t(), scaled)
            else:
                dense.accumulate(dw, f.t(), scaled, first=rows.start == 0)
        if db is not None:
            high = r.to(f.dtype)  # [C]
            pair = torch.stack([high, (r - high).to(f.dtype)], dim=1)  # [C, 2]: two 16-bit numbers hold r to 2^-17
            dense.accumulate(db, f.t(), pair, first=False)
    workspace = f = states = part = scaled = None  # freed before dW is rounded
    if fine is not None and not fine.read():
        return None
    dw, db = None if dw is None else dw.to(weight.dtype), None if db is None else db.sum(1).to(bias.dtype)
    return outputs, HeadGradients(dh, dw, db)


class _Chunk(NamedTuple):
    """Tokens that are processed together."""

    hidden: Tensor  # [C, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [C]
    bias: Tensor | None  # [V]
    transform: LogitTransform  # of all tokens
    rows: slice  # which of them these are


def _exponentials(
    part: _Chunk,
    prior: Tensor | None,  # [M]
    f: Tensor,  # [C, V] out
    row_sums: Tensor,  # [M] out, its rows of the chunk
    outputs: HeadForward,  # [M] out, the same
    tiles: Tiles,
) -> Tensor:  # [C]
    """Fill f, the row sums and the outputs of the tokens of a chunk; returns dz / draw of the targets."""
    rows, targets, (C, V), device = part.rows, part.targets, f.shape, f.device
    tiles_v = -(-V // tiles.block_v)
    sums = torch.empty(tiles_v, C, dtype=torch.float32, device=device)  # [vocabulary tiles, C]
    moments = torch.empty_like(sums) if outputs.entropy is not None else None  # [vocabulary tiles, C]
    tops = torch.empty_like(sums) if outputs.correct is not None else None  # [vocabulary tiles, C]
    inv_temperature = tile_table.inverse_temperature(part.transform.select(rows))  # [C] or a number
    prior = None if prior is None else prior[rows].float().contiguous()  # [C]
    with tile_table.current(device):
        given = (part.hidden, part.weight, targets, part.bias, inv_temperature, part.transform, tiles)
        z_y, shift, levels, roundings, slope = target_logits(*given, prior=prior, levels=True)  # [C] each
        _launch(part, inv_temperature, levels, f, sums, moments, tops, tiles)
        _finalize_kernel[(-(-C // _FINAL_TOKENS),)](
            roundings,
            sums,
            moments,
            tops,
            z_y,
            shift,
            row_sums[rows],
            outputs.logprobs[rows],
            outputs.lse[rows],
            None if moments is None else outputs.entropy[rows],
            None if tops is None else outputs.correct[rows],
            C,
            tiles_v,
            C,
            TILES=_FINAL_TILES,
            TOKENS=_FINAL_TOKENS,
            **tile_table.SAME_BITS,
        )
    return slope


def _fill_targets(
    f: Tensor,  # [C, V]
    targets: Tensor,  # [C]
    onehot: Tensor,  # [C] a
    prob: Tensor,  # [C] b
    sums: Tensor,  # [C] S, times z'_y if r is without it
    logprobs: Tensor,  # [C]
) -> None:
    """S (p_y + a / b) z'_y: where F is float32, from the tile's own E_y, whose error S shares; else from logp."""
    ratio = torch.where(prob == 0, -1.0, onehot / prob)  # [C]; b = 0 here where a = 0
    if f.dtype == torch.float32:
        column = targets.clamp(0, f.shape[1] - 1)[:, None]  # [C, 1]
        f.scatter_(1, column, f.gather(1, column) + (ratio * sums)[:, None])
    else:
        target_columns.write(f, targets, logprobs, sums, LogitGradient(ratio, torch.ones_like(ratio)), 0)


def _launch(
    part: _Chunk,
    inv_temperature: Tensor | float,  # [C] or a number
    levels: Tensor,  # [C]
    f: Tensor,  # [C, V] out
    sums: Tensor,  # [vocabulary tiles, C] out
    moments: Tensor | None,  # [vocabulary tiles, C] out
    tops: Tensor | None,  # [vocabulary tiles, C] out
    tiles: Tiles,
) -> None:
    hidden, weight, transform = part.hidden, part.weight, part.transform
    (C, D), V = hidden.shape, weight.shape[0]
    flops.product(C, D, V)
    grid = tile_table.programs(hidden.device, -(-C // tiles.block_n) * -(-V // tiles.block_v))
    _exponentials_kernel[(grid,)](
        tile_table.operand(hidden, tiles.block_n, tiles),
        tile_table.operand(weight, tiles.block_v, tiles),
        part.bias,
        inv_temperature,
        levels,
        tile_table.output(f, tiles),
        sums,
        moments,
        tops,
        C,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        f.stride(0),
        sums.stride(0),
        float(transform.scale),
        None if transform.softcap is None else float(transform.softcap),
        tile_table.zero(hidden.device),
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        BLOCK_K=tiles.block_k,
        GROUP_N=tiles.group_n,
        EVEN_K=D % tiles.block_k == 0,
        WHOLE_BLOCKS=V % BLOCK == 0,
        TMA=tiles.tma,
        THREAD=tile_table.thread_bits(hidden.device),
        PER_TOKEN=isinstance(inv_temperature, Tensor),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **tile_table.SAME_BITS,
    )
