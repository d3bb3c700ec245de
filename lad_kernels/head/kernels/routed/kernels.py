"""Kernels of the routed backward; launch.py says how they fit together.

A pair is a token and a vocabulary block of 128 columns; pairs are numbered by block, then token. `items` cuts the pairs
of each block into tiles of up to BLOCK_N; a block's last item may have none. dR of the pairs that pass together starts
at `pair0`.
Nothing out of bounds is read: places beyond an item repeat its last pair and are not stored; columns beyond V repeat
the last entry, meet zeros in the place of W's rows in dH, and belong to rows of dW and db that are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lad_kernels.head.kernels.tile import LN_2, LOG2_E, add_at, biases, exponents, inverse_temperatures, row_levels
from lad_kernels.head.records import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_READ = tl.constexpr(4)  # pairs of a token whose rows token_kernel waits for together


@triton.jit
def items_kernel(
    offsets,  # [blocks + 1] first pair of each block
    items,  # [items, 3] out: block, first pair, pairs
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    pair, stop = tl.load(offsets + block).to(tl.int32), tl.load(offsets + block + 1).to(tl.int32)
    for item in range(block + pair // BLOCK_N, block + 1 + stop // BLOCK_N):
        tl.store(items + 3 * item, block)
        tl.store(items + 3 * item + 1, pair)
        tl.store(items + 3 * item + 2, tl.maximum(tl.minimum(stop - pair, BLOCK_N), 0))
        pair += BLOCK_N


@triton.jit(do_not_specialize=["N", "pair0"], do_not_specialize_on_alignment=["items"])
def pairs_kernel(
    h,  # [N, D]
    w,  # [V, D]
    bias,  # [V] or None
    inv_temperature,  # [N] or a number
    targets,  # [N]
    lse,  # [N]
    onehot,  # [N]
    prob,  # [N]
    entropy,  # [N] or None
    tokens,  # [P] of each pair
    pair_scale,  # [P] or None
    items,  # [items, 3] block, first pair, pairs
    dr,  # [pairs of the run, BLOCK] out, or None
    column_sums,  # [items, BLOCK] out, or None
    N,
    V,
    D,
    pair0,
    h_stride,
    w_stride,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    THREAD: tl.constexpr,
):
    item = tl.program_id(0)
    block, first, count = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    if count == 0:
        return
    column = block * _BLOCK
    places = tl.arange(0, BLOCK_N)  # [BLOCK_N] in the item
    columns = tl.arange(0, _BLOCK)  # [BLOCK] in the block
    in_n, entries = places < count, tl.minimum(columns, V - 1 - column)  # [BLOCK_N], [BLOCK] beyond V: the last again
    pairs = first + tl.minimum(places, count - 1)  # [BLOCK_N] beyond the item: its last pair once more
    rows = tl.load(tokens + pairs)  # [BLOCK_N]

    w += column.to(tl.int64) * w_stride
    ks = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    h_rows = h + rows[:, None] * h_stride  # [BLOCK_N, 1]
    w_offsets = entries[None, :] * w_stride + ks[:, None]  # [BLOCK_D, BLOCK]
    raw = tl.zeros((BLOCK_N, _BLOCK), tl.float32)  # [BLOCK_N, BLOCK]
    for k in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(h_rows + (k + ks)[None, :])  # [BLOCK_N, BLOCK_D]
            b = tl.load(w + k + w_offsets)  # [BLOCK_D, BLOCK]
        else:
            a = tl.load(h_rows + (k + ks)[None, :], mask=ks[None, :] < D - k, other=0.0)
            b = tl.load(w + k + w_offsets, mask=ks[:, None] < D - k, other=0.0)
        raw = tl.dot(a, b, raw, input_precision="ieee")
    if bias is not None:
        raw += biases(bias + column, entries, entries >= 0, softcap)[None, :]
    inv_t = inverse_temperatures(inv_temperature, rows, N, PER_TOKEN)  # [BLOCK_N]
    x, factor, slope = exponents(raw, scale, softcap, inv_t[:, None])  # [BLOCK_N, BLOCK], [BLOCK_N, 1], like either

    # p = 2^(x f - level - r). What a whole row is multiplied by is multiplied once: the pair's scale, 2^-r, and the
    # slope where the row has one. Places beyond the item get p = 0, so that they add nothing to column sums.
    f = factor * LOG2_E  # [BLOCK_N, 1]
    level, r = row_levels(tl.load(lse + rows)[:, None], factor, f)  # [BLOCK_N, 1] each
    d = tl.fma(x, f, -tl.where(in_n[:, None], level, 1e30))  # [BLOCK_N, BLOCK] log2 p + r
    by_row = slope if softcap is None else tl.full((BLOCK_N, 1), 1.0, tl.float32)  # [BLOCK_N, 1]
    if pair_scale is not None:
        by_row *= tl.load(pair_scale + pairs)[:, None]
    at_target = tl.load(onehot + rows, mask=in_n, other=0.0)[:, None] * by_row  # [BLOCK_N, 1]
    by_row *= tl.exp2(-r)
    weight = tl.load(prob + rows)[:, None] * by_row  # [BLOCK_N, 1]
    if entropy is not None:
        weight = tl.fma(r - d, tl.load(entropy + rows)[:, None] * by_row * LN_2, weight)  # [BLOCK_N, BLOCK]
    g = tl.exp2(d) * weight  # [BLOCK_N, BLOCK] dR without the target's term, over a softcap's slope
    y = (tl.load(targets + rows) - column).to(tl.int32)  # [BLOCK_N] column in the block
    g = add_at(g, y[:, None], at_target, _BLOCK, THREAD)  # [BLOCK_N, BLOCK] dR
    if softcap is not None:
        g *= slope

    if column_sums is not None:
        tl.store(column_sums + item.to(tl.int64) * _BLOCK + columns, tl.sum(g, axis=0))
    if dr is not None:
        at = (first - pair0 + places)[:, None].to(tl.int64) * _BLOCK + columns[None, :]  # [BLOCK_N, BLOCK]
        tl.store(dr + at, g.to(dr.dtype.element_ty), mask=in_n[:, None])


@triton.jit(do_not_specialize=["V", "wholes", "pair0", "pair1"], do_not_specialize_on_alignment=["offsets"])
def weight_kernel(
    h,  # [N, D]
    dr,  # [pairs of the run, BLOCK]
    tokens,  # [P] of each pair
    offsets,  # [blocks + 1] first pair of each block
    whole_h,  # [wholes, D] of the tokens with all blocks, or None
    whole_dr,  # [wholes, >= V, in whole blocks] of the same, or None
    whole_ratio,  # [] factor on whole_dr, or None
    down,  # [] factor, or None
    base,  # [V, D] float32, or None
    dw,  # [V, D] of the blocks, out
    V,
    D,
    wholes,
    pair0,
    pair1,
    h_stride,
    whole_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    block, tile_d = tl.program_id(0) // tiles_d, tl.program_id(0) % tiles_d
    start = tl.maximum(tl.load(offsets + block).to(tl.int32), pair0)
    stop = tl.minimum(tl.load(offsets + block + 1).to(tl.int32), pair1)
    entries = tl.arange(0, _BLOCK)  # [BLOCK] in the block
    columns = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    acc = tl.zeros((_BLOCK, BLOCK_D), tl.float32)  # [BLOCK, BLOCK_D]
    if whole_dr is not None:  # its columns beyond V hold anything, which stays in rows that are not stored
        for row in range(0, wholes, BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            inside = rows < wholes  # [BLOCK_N]
            at = rows[None, :].to(tl.int64) * whole_stride + (block * _BLOCK + entries)[:, None]  # [BLOCK, BLOCK_N]
            a = tl.load(whole_dr + at, mask=inside[None, :], other=0.0)  # [BLOCK, BLOCK_N]
            mask = inside[:, None] & (columns[None, :] < D)  # [BLOCK_N, BLOCK_D]
            b = tl.load(whole_h + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if whole_ratio is not None:
            acc *= tl.load(whole_ratio)
    for pair in range(start, stop, BLOCK_N):
        pairs = pair + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = pairs < stop  # [BLOCK_N]
        rows = tl.load(tokens + pairs, mask=inside, other=0)  # [BLOCK_N]
        at = (pairs - pair0)[None, :].to(tl.int64) * _BLOCK + entries[:, None]  # [BLOCK, BLOCK_N]
        a = tl.load(dr + at, mask=inside[None, :], other=0.0)  # [BLOCK, BLOCK_N]
        mask = inside[:, None] & (columns[None, :] < D)  # [BLOCK_N, BLOCK_D]
        b = tl.load(h + rows[:, None] * h_stride + columns[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if down is not None:
        acc *= tl.load(down)
    entries += block * _BLOCK
    at = entries[:, None].to(tl.int64) * D + columns[None, :]  # [BLOCK, BLOCK_D]
    mask = (entries[:, None] < V) & (columns[None, :] < D)  # [BLOCK, BLOCK_D]
    if base is not None:
        acc += tl.load(base + at, mask=mask, other=0.0)
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["V", "block0", "item0", "item1"])
def bias_kernel(
    column_sums,  # [items of the run, BLOCK]
    offsets,  # [all blocks + 1] first pair of each block
    down,  # [] factor, or None
    db,  # [V] of the run's blocks, added to
    V,
    block0,  # the run's first
    item0,
    item1,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    offsets += block0 + block
    pair, pairs = tl.load(offsets).to(tl.int32), (tl.load(offsets + 1) - tl.load(offsets)).to(tl.int32)
    first = block0 + block + pair // BLOCK_N
    start, stop = tl.maximum(first, item0), tl.minimum(first + tl.cdiv(pairs, BLOCK_N), item1)
    columns = tl.arange(0, _BLOCK)  # [BLOCK]
    acc = tl.zeros((_BLOCK,), tl.float32)  # [BLOCK]
    for item in range(start, stop):
        acc += tl.load(column_sums + (item - item0).to(tl.int64) * _BLOCK + columns)
    if down is not None:
        acc *= tl.load(down)
    columns += block * _BLOCK
    acc += tl.load(db + columns, mask=columns < V, other=0.0)
    tl.store(db + columns, acc, mask=columns < V)


@triton.jit(do_not_specialize=["pair0"], do_not_specialize_on_alignment=["items"])
def hidden_kernel(
    dr,  # [pairs of the run, BLOCK]
    w,  # [V, D] a slice of the columns
    items,  # [items, 3] block, first pair, pairs
    tokens,  # [P] of each pair, or None
    out,  # [pairs of the run, D] out; with tokens [N, D], added to
    scales,  # [pairs of the run, tiles of D] out: what a tile of out is to be multiplied by; None: out is float32
    V,
    D,
    pair0,
    w_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    item, tile_d = tl.program_id(0) // tiles_d, tl.program_id(0) % tiles_d
    block, first, count = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    if count == 0:
        return
    pairs = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = pairs < first + count  # [BLOCK_N]
    columns = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dr += (pairs - pair0)[:, None].to(tl.int64) * _BLOCK  # [BLOCK_N, 1]
    w += (block * _BLOCK).to(tl.int64) * w_stride + columns[None, :]  # [1, BLOCK_D]
    part = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # [BLOCK_N, BLOCK_D]
    for entry in range(0, _BLOCK, BLOCK_D):
        entries = entry + tl.arange(0, BLOCK_D)  # [BLOCK_D] in the block
        a = tl.load(dr + entries[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_N, BLOCK_D]
        mask = (entries[:, None] < V - block * _BLOCK) & (columns[None, :] < D)  # [BLOCK_D, BLOCK_D]
        b = tl.load(w + entries[:, None] * w_stride, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_D]
        part = tl.dot(a, b, part, input_precision="ieee")
    mask = inside[:, None] & (columns[None, :] < D)  # [BLOCK_N, BLOCK_D]
    if scales is not None:  # a power of two takes the largest of a row's tile to 2^14, float16 keeps 11 bits of each
        size = tl.abs(part)  # [BLOCK_N, BLOCK_D]
        largest = tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)  # [BLOCK_N]
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)  # [BLOCK_N] its own + 127
        part *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)  # [BLOCK_N]
        tl.store(scales + (pairs - pair0).to(tl.int64) * tiles_d + tile_d, down, mask=inside)
    if tokens is None:
        part = part.to(out.dtype.element_ty)
        tl.store(out + (pairs - pair0)[:, None].to(tl.int64) * out_stride + columns[None, :], part, mask=mask)
    else:
        rows = tl.load(tokens + pairs, mask=inside, other=0)  # [BLOCK_N]
        tl.atomic_add(out + rows[:, None] * out_stride + columns[None, :], part, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["pair0", "bounds_stride"], do_not_specialize_on_alignment=["bounds"])
def token_kernel(
    parts,  # [pairs of the run, D] a slice of the columns
    scales,  # [pairs of the run, tiles of D] factors on its tiles, or None
    order,  # [P] pairs by token, then ascending
    bounds,  # [N, >= 2] places in order where the token's pairs of the run begin and end
    down,  # [] factor, or None
    dh,  # [N, D] the same slice, written; unless ALONE added to
    D,
    pair0,
    parts_stride,
    bounds_stride,
    dh_stride,
    ALONE: tl.constexpr,  # the run has all pairs
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,  # columns of a tile
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    token, tile_d = tl.program_id(0) // tiles_d, tl.program_id(0) % tiles_d
    TILES: tl.constexpr = BLOCK_D // TILE
    bounds += token.to(tl.int64) * bounds_stride
    start, stop = tl.load(bounds), tl.load(bounds + 1)
    if (start < stop) | ALONE:
        tiles = tile_d * TILES + tl.arange(0, TILES)[:, None]  # [TILES, 1]
        columns = tiles * TILE + tl.arange(0, TILE)[None, :]  # [TILES, TILE]
        mask, all_tiles = columns < D, tl.cdiv(D, TILE)  # [TILES, TILE]
        at = dh + token.to(tl.int64) * dh_stride + columns  # [TILES, TILE]
        if ALONE:
            acc = tl.zeros((TILES, TILE), tl.float32)  # [TILES, TILE]
        else:
            acc = tl.load(at, mask=mask, other=0.0)
        for position in range(start, stop, _READ):  # read together, added one by one
            for i in tl.static_range(_READ):
                there = position + i < stop
                pair = (tl.load(order + position + i, mask=there, other=pair0) - pair0).to(tl.int64)
                part = tl.load(parts + pair * parts_stride + columns, mask=mask & there, other=0.0).to(tl.float32)
                if scales is not None:
                    part *= tl.load(scales + pair * all_tiles + tiles, mask=(tiles < all_tiles) & there, other=0.0)
                acc += part
        if down is not None:
            acc *= tl.load(down)
        tl.store(at, acc.to(dh.dtype.element_ty), mask=mask)
