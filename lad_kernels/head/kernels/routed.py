"""Backward of the head over chosen (token, vocabulary block) pairs of the logit gradient; all other pairs are zero.

    dZ[n, j] = scale[n, b] (onehot[n] 1[j = y_n] + p[n, j] (prob[n] - entropy[n] (z[n, j] - lse[n]))),   j in block b
    dR = dZ * dz/draw,   dH = dR W,   dW = dR^T H,   db = column sums of dR              (logits as in blocks.py)

A block of 128 vocabulary rows is what an expert is to a mixture: it multiplies the tokens routed to it. Pairs come
sorted by block. A work item is up to block_n pairs of one block; items are listed on the device from the host's counts.
1. `pairs_kernel`, a program per item: gathers the tokens' hidden rows, recomputes z, writes dR [pairs, 128].
2. `weight_kernel`, a program per (block, columns of D): dW of the block over all its pairs, in fp32, written once. A
   block without pairs writes zeros. `bias_kernel` sums the items' column sums of the un-rounded dR.
3. `hidden_kernel`, a program per (item, columns of D): the pair's row of dR W_b. By default it goes to a float32
   workspace, for a slice of D's columns at a time, and `token_kernel` adds each token's rows in ascending order of
   blocks. With `atomics` it is added to dH [N, D] in memory: no workspace, but not bitwise reproducible.

Memory: pairs pass in runs of whole blocks whose dR, sort and rows of dR W fit workspace_bytes; a block with more pairs
passes in pieces, its dW kept in float32 meanwhile. Beside that: float32 dH [N, D].
Tokens of `routing.dense` take all blocks in dense.backward, which hands over each slab of float32 dW before it is
cast; the pairs of the slab's blocks are added there. Each of the two then has half of workspace_bytes.

Exact: every kept pair. Without `atomics` two runs agree bitwise, and dH of routed tokens does not depend on the
workspace. A token without pairs gets a dH of exactly 0. Precision is lost where it is in dense.py: dR is rounded to the
dtype of the inputs, outputs are cast once from float32. float16 is scaled as there; what crosses to or from the dense
part is unscaled float32, since each part finds its own power of two.
Left out: TMA (rows are gathered), and an order of blocks that balances their loads.
Cost: 6 * 128 D flops a pair; 2 D elements of H and, without atomics, 8 D bytes of dR W a pair.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import configs, dense
from lad_kernels.head.kernels.forward import inverse_temperature
from lad_kernels.head.kernels.routed_kernels import (
    bias_kernel,
    hidden_kernel,
    pairs_kernel,
    token_kernel,
    weight_kernel,
)
from lad_kernels.head.kernels.routed_work import RoutedTiles, Run, Work, tiles_for
from lad_kernels.head.logits import BLOCK, HeadGradients, LogitGradient, LogitTransform, Routing

_SLICE = 128  # the workspace holds slices of D's columns that are multiples of this wide
_SORT = 40  # bytes a pair, of sorting a run's pairs by token
_TOKEN_COLUMNS = 512  # columns of D that a program of token_kernel adds


@dataclass(frozen=True)
class _Call:
    """What does not change from run to run."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    lse: Tensor  # [N]
    gradient: LogitGradient  # scaled
    down: Tensor | None  # [] what undoes the scaling
    tokens: Tensor  # [P]
    pair_scale: Tensor | None  # [P]
    work: Work
    tiles: RoutedTiles
    workspace_bytes: int
    atomics: bool

    def capacity(self, need_hidden: bool, need_weight: bool) -> int:
        """Pairs whose column sums, dR, sort and narrowest slice of dR W fit the workspace; whole items, one or more."""
        size = BLOCK * self.hidden.element_size() if need_hidden or need_weight else 0
        size += 4 * BLOCK // self.tiles.block_n + (4 * _SLICE + _SORT if need_hidden and not self.atomics else 0)
        return max(self.workspace_bytes // size // self.tiles.block_n, 1) * self.tiles.block_n

    def count(self, run: Run, D: int) -> None:
        """A product of each pair with D columns of its block; the vocabulary's last block may be partial."""
        words = min(BLOCK, len(self.weight) - (run.blocks.stop - 1) * BLOCK)
        last = run.pairs.stop - max(run.pairs.start, self.work.pair_offsets[run.blocks.stop - 1])
        flops.product(run.pairs.stop - run.pairs.start - last, D, BLOCK)
        flops.product(last, D, words)


@torch.no_grad()
def backward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D], same dtype
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    lse: Tensor,  # [N] of the forward
    gradient: LogitGradient,
    routing: Routing,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int = 512 << 20,
    atomics: bool = False,
    tiles: RoutedTiles | None = None,
    into: HeadGradients | None = None,
) -> HeadGradients:
    """Gradients with respect to hidden, weight and bias. `tiles` overrides the table of routed_work.py.

    With `into` dW and db are added to its float32 tensors, and dH stays float32.
    """
    (N, D), device = hidden.shape, hidden.device
    need_bias = need_bias and bias is not None
    needs = {"need_hidden": need_hidden, "need_weight": need_weight, "need_bias": need_bias}
    if N == 0 or not any(needs.values()):
        return dense.backward(hidden[:0], weight, targets[:0], bias, transform, lse[:0], gradient, **needs, into=into)
    hidden, weight = configs.by_rows(hidden), configs.by_rows(weight)
    targets, lse, bias = (None if x is None else x.contiguous() for x in (targets, lse, bias))
    tiles = tiles or tiles_for(hidden, weight)
    scaled, down = dense.scaled(gradient, transform, hidden.dtype)
    room = workspace_bytes // 2 if len(routing.dense) else workspace_bytes
    work = Work.plan(routing.counts, tiles.block_n, device)
    call = _Call(
        hidden, weight, targets, bias, transform, lse, scaled, down,
        routing.rows, routing.scale, work, tiles, room, atomics,
    )  # fmt: skip
    dh = torch.zeros(N, D, dtype=torch.float32, device=device) if need_hidden else None  # [N, D]
    if len(routing.dense):
        rows = routing.dense  # [Nd]

        def then(slab: slice, dw: Tensor | None, db: Tensor | None) -> None:
            _backward(call, slice(slab.start // BLOCK, triton.cdiv(slab.stop, BLOCK)), dh, dw, db, add=True)

        part = None if gradient.entropy is None else gradient.entropy[rows]  # [Nd]
        if isinstance(transform.temperature, Tensor):
            transform = dataclasses.replace(transform, temperature=transform.temperature[rows])
        whole = dense.backward(
            hidden[rows], weight, targets[rows], bias, transform, lse[rows],
            LogitGradient(gradient.onehot[rows], gradient.prob[rows], part),
            **needs, workspace_bytes=room, then=then, into=into,
        )  # fmt: skip
        dw, db = whole.weight, whole.bias  # [V, D], [V]
    else:
        dw, db = dense.accumulators(weight, need_weight, need_bias, into)  # [V, D], [V]
        _backward(call, slice(0, len(routing.counts)), dh, dw, db, add=into is not None)
    if dh is not None:
        dh = dh if down is None else dh.mul_(down)  # [N, D]
        dh = dh if into is not None else dh.to(hidden.dtype)  # [N, D]
    if dh is not None and len(routing.dense):
        dh.index_copy_(0, routing.dense, whole.hidden)
    return HeadGradients(dh, dw, None if db is None or into is not None else db.to(bias.dtype))


def _backward(
    call: _Call,
    blocks: slice,
    dh: Tensor | None,  # [N, D] float32, added to, scaled
    dw: Tensor | None,  # [V, D] rows of `blocks`, out
    db: Tensor | None,  # [V] of `blocks`, float32, added to
    *,
    add: bool,  # to what dw holds, which is float32 then
) -> None:
    """Every pair of `blocks`."""
    total = None
    for run in call.work.runs(blocks, call.capacity(dh is not None, dw is not None)):
        dr, column_sums = _pair_gradients(call, run, dh is not None or dw is not None, db is not None)
        words = slice((run.blocks.start - blocks.start) * BLOCK, (run.blocks.stop - blocks.start) * BLOCK)
        if db is not None:
            _add_bias(call, run, column_sums, db[words])
        if dw is not None:
            out = dw[words]  # [V of the run, D]
            if dw.dtype != torch.float32 and not (run.first and run.last):
                total = torch.empty_like(out, dtype=torch.float32) if run.first else total
                out = total
            _weight_gradient(call, run, dr, out, add=add or not run.first)
            if out is total and run.last:
                dw[words] = total
        if dh is not None and call.atomics:
            _hidden_rows(call, run, dr, slice(0, dh.shape[1]), dh)
        elif dh is not None:
            _add_hidden(call, run, dr, dh)


def _pair_gradients(call: _Call, run: Run, need_dr: bool, need_sums: bool) -> tuple[Tensor | None, Tensor | None]:
    """dR [pairs, BLOCK] of the run and, by item, its column sums [items, BLOCK]."""
    (N, D), (pairs, items), device = call.hidden.shape, (run.pairs, call.work.items[run.items]), call.hidden.device
    dr = sums = None
    if need_dr:
        dr = torch.empty(pairs.stop - pairs.start, BLOCK, dtype=call.hidden.dtype, device=device)
    if need_sums:
        sums = torch.empty(len(items), BLOCK, dtype=torch.float32, device=device)
    if not len(items):
        return dr, sums
    call.count(run, D)
    schedule, transform = call.tiles.pairs, call.transform
    inv_temperature = inverse_temperature(transform, 0, N)
    with configs.current(device):
        pairs_kernel[(len(items),)](
            call.hidden,
            call.weight,
            call.bias,
            inv_temperature,
            call.targets,
            call.lse,
            call.gradient.onehot,
            call.gradient.prob,
            call.gradient.entropy,
            call.tokens,
            call.pair_scale,
            items,
            dr,
            sums,
            N,
            len(call.weight),
            D,
            pairs.start,
            call.hidden.stride(0),
            call.weight.stride(0),
            float(transform.scale),
            None if transform.softcap is None else float(transform.softcap),
            BLOCK_N=call.tiles.block_n,
            BLOCK_D=schedule.block_d,
            EVEN_D=D % schedule.block_d == 0,
            PER_TOKEN=isinstance(inv_temperature, Tensor),
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )
    return dr, sums


def _add_bias(call: _Call, run: Run, column_sums: Tensor, db: Tensor) -> None:
    """Add the items' sums [items, BLOCK] to db [V of the run]."""
    offsets, blocks = call.work.item_table[run.blocks.start :], run.blocks.stop - run.blocks.start
    with configs.current(db.device):
        bias_kernel[(blocks,)](column_sums, offsets, call.down, db, len(db), run.items.start, run.items.stop)


def _weight_gradient(call: _Call, run: Run, dr: Tensor, dw: Tensor, *, add: bool) -> None:
    """dw [V of the run, D] = products of the run's pairs, added to what it holds with `add`."""
    D, schedule = call.hidden.shape[1], call.tiles.weight
    call.count(run, D)
    with configs.current(dw.device):
        weight_kernel[((run.blocks.stop - run.blocks.start) * triton.cdiv(D, schedule.block_d),)](
            call.hidden,
            dr,
            call.tokens,
            call.work.pair_table[run.blocks.start :],
            call.down,
            dw,
            len(dw),
            D,
            run.pairs.start,
            run.pairs.stop,
            call.hidden.stride(0),
            BLOCK_N=call.tiles.block_n,
            BLOCK_D=schedule.block_d,
            ADD=add,
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )


def _add_hidden(call: _Call, run: Run, dr: Tensor, dh: Tensor) -> None:
    """Add each pair's row of dR W to its token's row of dh [N, D], by tokens, then in ascending order of blocks."""
    pairs, (N, D) = len(dr), dh.shape
    if not pairs:
        return
    tokens, order = torch.sort(call.tokens[run.pairs], stable=True)  # [pairs], [pairs]
    starts = torch.searchsorted(tokens, torch.arange(N + 1, device=dh.device))  # [N + 1]
    room = call.workspace_bytes - dr.nbytes - _SORT * pairs
    width = min(max(room // (4 * pairs) // _SLICE, 1), triton.cdiv(D, _SLICE)) * _SLICE
    parts = torch.empty(pairs, width, dtype=torch.float32, device=dh.device)  # [pairs, width]
    for d0 in range(0, D, width):
        columns = slice(d0, min(d0 + width, D))
        _hidden_rows(call, run, dr, columns, parts)
        grid = (N * triton.cdiv(columns.stop - d0, _TOKEN_COLUMNS),)
        with configs.current(dh.device):
            token_kernel[grid](
                parts, order, starts, dh[:, columns], columns.stop - d0, width, dh.stride(0), BLOCK_D=_TOKEN_COLUMNS
            )


def _hidden_rows(call: _Call, run: Run, dr: Tensor, columns: slice, out: Tensor) -> None:
    """dR W[:, columns]: to out [pairs, >= columns], or with atomics added to out [N, D]."""
    D, schedule, items = columns.stop - columns.start, call.tiles.hidden, call.work.items[run.items]
    if not len(items):
        return
    call.count(run, D)
    with configs.current(out.device):
        hidden_kernel[(len(items) * triton.cdiv(D, schedule.block_d),)](
            dr,
            call.weight[:, columns],
            items,
            call.tokens if call.atomics else None,
            out,
            len(call.weight),
            D,
            run.pairs.start,
            call.weight.stride(0),
            out.stride(0),
            BLOCK_N=call.tiles.block_n,
            BLOCK_D=schedule.block_d,
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )
