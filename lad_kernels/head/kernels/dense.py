"""Exact backward of the head: every logit gradient once, vocabulary slab by vocabulary slab.

    dZ[n, j] = onehot[n] 1[j = y_n] + p[n, j] (prob[n] - entropy[n] (z[n, j] - lse[n])),   p = e^(z - lse)
    dR = dZ * dz/draw            (raw = h W^T + b; scale, softcap and temperature: tile.py)
    dH = dR W,   dW = dR^T H,   db = column sums of dR

For each slab of Vc vocabulary rows a kernel recomputes z from the stored lse and writes dR [N, Vc]; the library then
multiplies. Vocabulary-major order means that every row of dW is complete after its slab: it is accumulated over all
tokens in fp32 and cast once, without a V x D float32 buffer. dH is accumulated over the slabs in a float32 [N, D]
buffer and cast once.
Workspace: Vc columns of dR. When even 1,024 columns of N tokens exceed it, rows are split too, and the slab of dW is
accumulated over the row runs, in float32; that of whole rows in 16 bits leaves its product rounded, unless the caller
adds to it (`then`) or float16 is scaled. In addition: float32 dH; a caller without memory for all of it passes token
chunks and a float32 dW to add them to (`sums`).

Exact: nothing is dropped, no atomics, fixed order; two runs agree bitwise. The slab width depends on N, so the last
bits of dH may depend on N (those of the forward do not). A token with three zero coefficients gets a dH of exactly 0.
Precision is lost once, where dR is rounded to the dtype of the inputs for the tensor cores; db sums the un-rounded
dR. In 16 bits the targets' columns of dR are written apart (target_columns.py); db still takes their terms in the tile.
float16 has too few exponents for dR (p c / N is soon below its smallest number, 6e-8), so the three vectors are
multiplied by a power of two chosen on the device, and the float32 products divided by it. fp32 products run at
torch's present matmul precision; this module never turns tf32 on.
Left out: fusing dR with the products (6 N D V stays 6 N D V), and skipping tokens with zero coefficients (the caller
removes them first).
Cost: 2 N D V flops per recomputation, dH and dW; 2 N V elements of dR, 2 N D V / Vc float32 of dH; 8 V D bytes of
a 16-bit dW that passes through float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import target_columns, tile_table
from lad_kernels.head.kernels.forward import target_logits
from lad_kernels.head.kernels.tile import LN_2, LOG2_E, add_at, logit_tile, row_levels, tile_order
from lad_kernels.head.kernels.tile_table import Tiles
from lad_kernels.head.records import BLOCK, GradientSums, HeadGradients, LogitGradient, LogitTransform, Needs, select

_MIN_COLUMNS = 1024  # narrower slabs would starve the products: split the rows instead
_ROW_STEP = 256  # rows are split at multiples of this, hence of every block_n
_library_flags = threading.Lock()  # the flags are the process's: threads take turns to set and restore them
_UPCAST_ROWS, _UPCAST_K = 2048, 1024  # of factors that have to be float32: 8 MiB of the one, 16 of a [K, 4096]
_HALF_TARGET = 2.0**13  # what the largest float16 dR is scaled to: 8 times below overflow


@triton.jit(do_not_specialize=["N", "column0"])
def _logit_gradient_kernel(
    h,  # [N, D]
    w,  # [V, D] the slab's rows
    bias,  # [V] the slab's part, or None
    inv_temperature,  # [N] or a number
    targets,  # [N]
    lse,  # [N]
    onehot,  # [N], or None: the targets' columns are written afterwards, and not summed
    prob,  # [N]
    entropy,  # [N] or None
    dr,  # [N, >= V] out, pointer or descriptor, or None
    column_sums,  # [token tiles, >= V] out, or None
    N,
    V,
    D,
    column0,
    h_stride,
    w_stride,
    dr_stride,
    sums_stride,
    scale,
    softcap,
    zero,  # 0, or None: see tile_table
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    THREAD: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=TMA):
        tile_n, tile_v = tile_order(tile, tiles_n, tiles_v, GROUP_N)
        row, column = tile_n * BLOCK_N, tile_v * BLOCK_V
        x, factor, slope, rows, columns, in_n, in_v = logit_tile(
            h, w, bias, inv_temperature, row, column, N, V, D, h_stride, w_stride, scale, softcap, zero,
            BLOCK_N, BLOCK_V, BLOCK_K, EVEN_K, TMA, PER_TOKEN,
        )  # [BLOCK_N, BLOCK_V], [BLOCK_N, 1], like either  # fmt: skip

        # p = 2^(x f - level - r). Rows beyond N get p = 0, so that they add nothing to column sums; columns beyond V
        # hold logits of no entry, maybe infinite, and are never stored.
        f = factor * LOG2_E  # [BLOCK_N, 1]
        level, r = row_levels(tl.load(lse + rows, mask=in_n, other=0.0)[:, None], factor, f)  # [BLOCK_N, 1] each
        d = tl.fma(x, f, -tl.where(in_n[:, None], level, 1e30))  # [BLOCK_N, BLOCK_V] log2 p + r
        by_row = slope if softcap is None else tl.full((BLOCK_N, 1), 1.0, tl.float32)  # [BLOCK_N, 1]
        to_mass = by_row * tl.exp2(-r)  # [BLOCK_N, 1]
        weight = tl.load(prob + rows, mask=in_n, other=0.0)[:, None] * to_mass  # [BLOCK_N, 1]
        if entropy is not None:
            g_entropy = tl.load(entropy + rows, mask=in_n, other=0.0)[:, None] * to_mass * LN_2  # [BLOCK_N, 1]
            weight = tl.fma(r - d, g_entropy, weight)  # [BLOCK_N, BLOCK_V]
        g = tl.exp2(d) * weight  # [BLOCK_N, BLOCK_V] dR without the target's term, over a softcap's slope
        if onehot is not None:
            at_target = tl.load(onehot + rows, mask=in_n, other=0.0)[:, None] * by_row  # [BLOCK_N, 1]
            y = (tl.load(targets + rows, mask=in_n, other=-1) - column0).to(tl.int32) - column  # [BLOCK_N] in the tile
            g = add_at(g, y[:, None], at_target, BLOCK_V, THREAD)  # [BLOCK_N, BLOCK_V]
        if softcap is not None:
            g *= slope

        if column_sums is not None:
            tl.store(column_sums + tile_n.to(tl.int64) * sums_stride + columns, tl.sum(g, axis=0), mask=in_v)
        if isinstance(dr, tl.tensor):
            at = rows[:, None].to(tl.int64) * dr_stride + columns[None, :]  # [BLOCK_N, BLOCK_V]
            tl.store(dr + at, g.to(dr.dtype.element_ty), mask=in_n[:, None] & in_v[None, :])
        elif dr is not None:
            dr.store([row, column], g.to(dr.dtype))


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out [R, C] float32 = a [R, K] b [K, C], added to what out holds unless `first`; fp32 accumulation.

    The library's mixed form (16-bit factors, float32 result) is NVIDIA's; elsewhere parts of the factors are upcast.
    """
    (R, K), C = a.shape, b.shape[1]
    flops.product(R, K, C)
    if a.dtype == torch.float32 or (a.is_cuda and torch.version.hip is None):
        mixed = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
        _add_product(out, a, b, first=first, **mixed)
        return
    for k in range(0, max(K, 1), _UPCAST_K):
        part = b[k : k + _UPCAST_K].float()  # [K', C]
        for r in range(0, R, _UPCAST_ROWS):
            some = a[r : r + _UPCAST_ROWS, k : k + _UPCAST_K]  # [R', K']
            _add_product(out[r : r + _UPCAST_ROWS], some.float(), part, first=first and k == 0)
        del part  # before the next is made


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool, **mixed: torch.dtype) -> None:
    if first:
        torch.mm(a, b, out=out, **mixed)
    else:
        torch.addmm(out, a, b, out=out, **mixed)


def rounded_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [R, C] = a [R, K] b [K, C] in 16 bits, every sum in float32 and rounded once."""
    flops.product(a.shape[0], a.shape[1], b.shape[1])
    library = torch.backends.cuda.matmul
    with _library_flags:
        split_k = library.allow_bf16_reduced_precision_reduction_split_k
        before = library.allow_bf16_reduced_precision_reduction, split_k
        library.allow_bf16_reduced_precision_reduction = False, split_k  # else parts of a sum may be added in 16 bits
        try:
            torch.mm(a, b, out=out)
        finally:
            library.allow_bf16_reduced_precision_reduction = before


def split(N: int, D: int, V: int, itemsize: int, workspace_bytes: int, *, staged: bool = True) -> tuple[int, int]:
    """(rows, columns) of a slab of dR that, with its float32 [columns, D] of dW if `staged`, fits the workspace.

    Columns are a multiple of BLOCK and even out over the slabs; rows are N whenever _MIN_COLUMNS columns fit.
    """
    whole = -(-V // BLOCK) * BLOCK
    stage = 4 * D if staged else 0  # bytes of a column
    columns = min(workspace_bytes // (N * itemsize + stage) // BLOCK * BLOCK, whole)
    if columns >= min(_MIN_COLUMNS, whole):
        slabs = -(-whole // columns)
        return N, -(-whole // (slabs * BLOCK)) * BLOCK
    columns = min(_MIN_COLUMNS, whole)
    rows = (workspace_bytes - stage * columns) // (columns * itemsize) // _ROW_STEP * _ROW_STEP
    return min(max(rows, _ROW_STEP), N), columns


def scaled(
    gradient: LogitGradient, transform: LogitTransform, dtype: torch.dtype
) -> tuple[LogitGradient, Tensor | None]:
    """Contiguous coefficients, for float16 times a power of two that centres dR in its range, and the inverse [].

    |dR| <= (|onehot| + |prob| + |entropy| / e) |scale| / T, since p <= 1 and p |log p| <= 1 / e. Computed on the
    device, without a host sync. The exponents of bfloat16 and float32 suffice.
    """
    vectors = [gradient.onehot, gradient.prob] + ([] if gradient.entropy is None else [gradient.entropy])  # [N] each
    down = None
    if dtype == torch.float16:
        bound = sum(x.abs() for x in vectors) * (abs(transform.scale) / transform.temperature)  # [N]
        up = (_HALF_TARGET / bound.amax().clamp(1e-20, 1e20)).log2().floor().exp2()  # []
        vectors, down = [x * up for x in vectors], up.reciprocal()
    return LogitGradient(*(x.contiguous() for x in vectors)), down


class Handed(NamedTuple):
    """What `backward` passes to `then` for some columns of dZ: whole blocks, except for the last."""

    columns: slice
    dr: Tensor | None  # [N, width] scaled, if its product with the hidden states is left to `then`
    down: Tensor | None  # [] what undoes the scaling of dr
    base: Tensor | None  # [width, D] float32, unscaled: dW so far; None: nothing, or dW is not needed
    out: Tensor | None  # [width, D] receives all of dW, in its own dtype; maybe `base` itself
    db: Tensor | None  # [width] float32, unscaled, may be added to


@torch.no_grad()
def backward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D], same dtype
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    lse: Tensor,  # [N] of the forward
    gradient: LogitGradient,
    *,
    needs: Needs,
    workspace_bytes: int = 512 << 20,
    tiles: Tiles | None = None,
    then: Callable[[Handed], None] | None = None,
    leave_weight: bool = False,
    sums: GradientSums | None = None,
) -> HeadGradients:
    """Gradients with respect to hidden, weight and bias. `tiles` overrides the table of tile_table.py.

    `then` is called for each slab and writes its dW: `base` plus what it adds, rounded once. With `leave_weight` it
    multiplies dR itself; the workspace then has to hold 1,024 columns of all rows. With `sums` dW and
    db are added to it, and dH stays float32.
    """
    N, D = hidden.shape
    needs = needs._replace(bias=needs.bias and bias is not None)
    if N == 0 and sums is not None:
        return HeadGradients(hidden.float() if needs.hidden else None, sums.weight, sums.bias)
    if N == 0:
        return HeadGradients(*(torch.zeros_like(x) if need else None for x, need in zip((hidden, weight, bias), needs)))
    hidden, weight = tile_table.by_rows(hidden), tile_table.by_rows(weight)
    targets, lse, bias = (None if x is None else x.contiguous() for x in (targets, lse, bias))
    gradient, down = scaled(gradient, transform, hidden.dtype)
    dh = torch.empty(N, D, dtype=torch.float32, device=hidden.device) if needs.hidden else None  # [N, D]
    dw, db = accumulators(weight, needs, sums)  # [V, D], [V]
    whole = _Slab(hidden, weight, targets, bias, transform, lse, gradient, 0)
    tiles = tiles or tile_table.tiles_for(hidden, weight, bias, transform)
    _slabs(whole, down, HeadGradients(dh, dw, db), sums is not None, workspace_bytes, tiles, then, leave_weight)
    if down is not None and needs.hidden:
        dh.mul_(down)
    if sums is not None:
        return HeadGradients(dh, dw, db)
    return HeadGradients(None if dh is None else dh.to(hidden.dtype), dw, None if db is None else db.to(bias.dtype))


def accumulators(weight: Tensor, needs: Needs, sums: GradientSums | None) -> tuple[Tensor | None, Tensor | None]:
    """Buffers for dW [V, D] and db [V]: new ones, db of zeros; or float32 sums over other tokens so far."""
    if sums is not None:
        return sums.weight, sums.bias
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs.weight else None  # [V, D]
    return dw, torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if needs.bias else None


class _Slab(NamedTuple):
    """One run of tokens against one slab of the vocabulary."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N], numbered over the whole vocabulary
    bias: Tensor | None  # [V]
    transform: LogitTransform
    lse: Tensor  # [N], over the whole vocabulary
    gradient: LogitGradient  # scaled
    column0: int  # the slab's first vocabulary row
    logprobs: Tensor | None = None  # [N] of the targets, if their columns are written afterwards
    slopes: Tensor | None = None  # [N] dz/draw of the targets, likewise

    def part(self, run: slice, columns: slice) -> _Slab:
        bias = None if self.bias is None else self.bias[columns]
        hidden, weight, targets, lse = self.hidden[run], self.weight[columns], self.targets[run], self.lse[run]
        transform, gradient = self.transform.select(run), self.gradient.select(run)
        known = (select(self.logprobs, run), select(self.slopes, run))
        return _Slab(hidden, weight, targets, bias, transform, lse, gradient, columns.start, *known)

    def with_targets(self, tiles: Tiles) -> _Slab:
        """The same with what `target_columns` writes."""
        inv_temperature = tile_table.inverse_temperature(self.transform)  # [N] or a number
        given = (self.hidden, self.weight, self.targets, self.bias, inv_temperature, self.transform, tiles)
        with tile_table.current(self.hidden.device):
            _, logprobs, _, _, slopes = target_logits(*given, prior=self.lse, levels=True)  # [N] each
        return self._replace(logprobs=logprobs, slopes=slopes)


def _slabs(
    whole: _Slab,
    down: Tensor | None,  # [] what undoes the scaling
    out: HeadGradients,  # dH [N, D] float32, still scaled; dW [V, D]; db [V] float32, added to
    add: bool,  # to dW, which is then float32
    workspace_bytes: int,
    tiles: Tiles,
    then: Callable[[Handed], None] | None,
    leave_weight: bool,
) -> None:
    """All slabs; the workspace is freed before the caller rounds a result."""
    (N, D), V, item = whole.hidden.shape, whole.weight.shape[0], whole.hidden.element_size()
    dh, dw, db = out
    left = leave_weight and dw is not None
    rows, columns = split(N, D, V, item, workspace_bytes, staged=False)
    at_once = item == 2 and rows == N and not add and then is None and down is None  # dW leaves its products rounded
    if not (left or at_once):
        rows, columns = split(N, D, V, item, workspace_bytes)
    assert rows == N or not left
    dr = whole.hidden.new_empty(rows, columns) if dh is not None or dw is not None else None  # [rows, columns]
    if dr is not None and item == 2:
        whole = whole.with_targets(tiles)
    staged = dw is not None and not (left or at_once) and (dw.dtype != torch.float32 or (add and down is not None))
    stage = dw.new_empty(columns, D, dtype=torch.float32) if staged else None  # [columns, D]
    for v0 in range(0, V, columns):
        slab = slice(v0, min(v0 + columns, V))
        width = slab.stop - v0
        nothing = dw is None or (left and not add)
        dw_sum = stage[:width] if staged else None if nothing else dw[slab]  # [width, D] float32
        db_sum = None if db is None else db.new_zeros(width)  # [width]
        for n0 in range(0, N, rows):
            run = slice(n0, min(n0 + rows, N))
            part = whole.part(run, slab)
            column_sums = _logit_gradient(part, dr, db is not None, tiles)  # [width]
            tile = None if dr is None else dr[: run.stop - n0, :width]  # [rows, width]
            if dh is not None:
                accumulate(dh[run], tile, part.weight, first=v0 == 0)
            if dw is not None and at_once:
                rounded_product(dw[slab], tile.t(), part.hidden)
            elif dw is not None and not left:
                accumulate(dw_sum, tile.t(), part.hidden, first=n0 == 0 and (staged or not add))
            if db is not None:
                db_sum += column_sums
        if down is not None:
            for x in (dw_sum if staged else None, db_sum):
                if x is not None:
                    x.mul_(down)
        out = None if dw is None else dw_sum if staged and add else dw[slab]  # [width, D]
        if then is not None:
            then(Handed(slab, tile if left else None, down, dw_sum, out, db_sum))
        if staged and add:
            dw[slab] += dw_sum
        elif staged and then is None:
            dw[slab] = dw_sum
        if db is not None:
            db[slab] += db_sum


def _logit_gradient(
    slab: _Slab,
    dr: Tensor | None,  # [>= N, >= V] out
    need_sums: bool,
    tiles: Tiles,
) -> Tensor | None:
    """Fill dr; return the column sums [V] if wanted."""
    (N, D), V, device = slab.hidden.shape, slab.weight.shape[0], slab.hidden.device
    transform, gradient = slab.transform, slab.gradient
    tiles_n = -(-N // tiles.block_n)
    # [token tiles, V padded to whole blocks]: rows of the partial sums start where rows of dr do
    sums = torch.empty(tiles_n, -(-V // BLOCK) * BLOCK, dtype=torch.float32, device=device) if need_sums else None
    flops.product(N, D, V)
    inv_temperature = tile_table.inverse_temperature(transform)
    with tile_table.current(device):
        _logit_gradient_kernel[(tile_table.programs(device, tiles_n * -(-V // tiles.block_v)),)](
            tile_table.operand(slab.hidden, tiles.block_n, tiles),
            tile_table.operand(slab.weight, tiles.block_v, tiles),
            slab.bias,
            inv_temperature,
            slab.targets,
            slab.lse,
            gradient.onehot if need_sums or slab.logprobs is None else None,
            gradient.prob,
            gradient.entropy,
            None if dr is None else tile_table.output(dr[:N, :V], tiles),
            sums,
            N,
            V,
            D,
            slab.column0,
            slab.hidden.stride(0),
            slab.weight.stride(0),
            dr.stride(0) if dr is not None else 0,
            sums.stride(0) if sums is not None else 0,
            float(transform.scale),
            None if transform.softcap is None else float(transform.softcap),
            tile_table.zero(device),
            BLOCK_N=tiles.block_n,
            BLOCK_V=tiles.block_v,
            BLOCK_K=tiles.block_k,
            GROUP_N=tiles.group_n,
            EVEN_K=D % tiles.block_k == 0,
            TMA=tiles.tma,
            THREAD=tile_table.thread_bits(device),
            PER_TOKEN=isinstance(inv_temperature, Tensor),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    if slab.logprobs is not None:
        target_columns.write(dr[:N, :V], slab.targets, slab.logprobs, slab.slopes, gradient, slab.column0)
    return None if sums is None else sums[:, :V].sum(0)  # [V]
