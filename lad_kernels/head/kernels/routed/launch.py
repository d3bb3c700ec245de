"""Backward of the head over chosen (token, vocabulary block) pairs of the logit gradient; all other pairs are zero.

    dZ[n, j] = scale[n, b] (onehot[n] 1[j = y_n] + p[n, j] (prob[n] - entropy[n] (z[n, j] - lse[n]))),   j in block b
    dR = dZ * dz/draw,   dH = dR W,   dW = dR^T H,   db = column sums of dR              (logits as in tile.py)

A block of 128 vocabulary rows is like an expert of a mixture: it multiplies the tokens routed to it. Pairs come
sorted by block. A work item is up to block_n pairs of one block; the device lists them from where blocks begin.
1. `pairs_kernel`, a program per item: gathers the tokens' hidden rows, recomputes z, writes dR [pairs, 128].
2. `weight_kernel`, a program per (block, columns of D): dW of the block over all its pairs, in fp32, written once. A
   block without pairs writes zeros. `bias_kernel` sums the items' column sums of the un-rounded dR.
3. `hidden_kernel`, a program per (item, columns of D): the pair's row of dR W_b. By default it goes to a workspace, for
   a slice of D's columns at a time, and `token_kernel` adds each token's rows in float32, in ascending order of blocks.
   With `atomics` it is added to dH [N, D] in memory: no workspace, but not bitwise reproducible.

Memory: pairs are processed in runs of whole blocks, one run if all their dR and a slice of dR W fit workspace_bytes; a
block with more pairs takes several runs, with its dW in float32 in between, and with a float32 dH [N, D]; of one run dH
is summed up in registers, and that room is the workspace's too. Pairs are sorted by token in about 40 bytes a pair, of
which 4 are kept: before all that if there are several runs, else in the room of dR W.
Tokens of `routing.dense` take all blocks in dense.backward, slab by slab. Up to JOINT of them are multiplied in
weight_kernel with the slab's pairs, and dW leaves it rounded. The library multiplies more of them faster; its float32
is then what weight_kernel begins with. The dense part may use what dR of one run leaves, or half of the workspace.

Exact: every active pair. Without `atomics` two runs agree bitwise, and dH of routed tokens does not depend on the
workspace. A token without pairs gets a dH of exactly 0. Precision is lost where it is in dense.py: dR is rounded to the
dtype of the inputs, outputs are cast once from float32. float16 is scaled as there, each part by its own power of two.
With bfloat16 inputs rows of dR W are float16 with a power of two for each tile: 3 bits more than dH will have.
Left out: TMA (rows are gathered), and an order of blocks that balances their loads.
Cost: 6 * 128 D flops a pair; 2 D elements of H and, without atomics, 4 to 8 D bytes of dR W a pair; 8 N D for each of
several runs. A call of one run launches some thirty kernels and two for each slice of D; dense tokens add eleven and
five a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import dense, tile_table
from lad_kernels.head.kernels.routed.runs import (
    Call,
    Whole,
    add_bias,
    add_hidden,
    hidden_rows,
    pair_gradients,
    weight_gradient,
)
from lad_kernels.head.kernels.routed.work import RoutedTiles, Run, Work, by_token, tiles_for
from lad_kernels.head.records import (
    BLOCK,
    JOINT,
    GradientSums,
    HeadGradients,
    LogitGradient,
    LogitTransform,
    Needs,
    Routing,
)


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
    needs: Needs,
    workspace_bytes: int = 512 << 20,
    atomics: bool = False,
    tiles: RoutedTiles | None = None,
    sums: GradientSums | None = None,
) -> HeadGradients:
    """Gradients with respect to hidden, weight and bias. `tiles` overrides the table of work.py.

    With `sums` dW and db are added to it, and dH stays float32.
    """
    N, device, whole = len(hidden), hidden.device, None
    needs = needs._replace(bias=needs.bias and bias is not None)
    if N == 0 or not any(needs):
        nothing = (hidden[:0], weight, targets[:0], bias, transform, lse[:0], gradient)
        return dense.backward(*nothing, needs=needs, sums=sums)
    hidden, weight = tile_table.by_rows(hidden), tile_table.by_rows(weight)
    targets, lse, bias = (None if x is None else x.contiguous() for x in (targets, lse, bias))
    scaled, down = dense.scaled(gradient, transform, hidden.dtype)
    tiles = tiles or tiles_for(hidden, weight, len(routing.rows) / routing.blocks, transform)
    call = Call(
        hidden, weight, targets, bias, transform, lse, scaled, down, routing.rows, routing.scale,
        Work.plan(routing, tiles.block_n), tiles, needs.hidden, needs.weight, atomics, workspace_bytes,
    )  # fmt: skip
    runs, room, dense_room = call.plan(len(routing.dense) > 0)
    if len(routing.dense):
        db = torch.zeros(len(weight), dtype=torch.float32, device=device) if needs.bias else None  # [V]
        pairs = _Pairs(call, runs, room, db, sums is not None)
        if not needs.weight:
            pairs.finish()
        whole = _dense(pairs, gradient, routing.dense, dense_room, sums)
        dw, db = whole.weight, whole.bias  # [V, D], [V]
    else:
        dw, db = dense.accumulators(weight, needs, sums)  # [V, D], [V]
        pairs = _Pairs(call, runs, room, db, sums is not None)
        if needs.weight:
            pairs.weight(slice(0, len(weight)), dw, None if sums is None else dw)
    pairs.finish()
    dh = pairs.dh  # [N, D]
    if dh is not None and not pairs.alone:
        dh = dh if down is None else dh.mul_(down)  # [N, D]
        dh = dh if sums is not None else dh.to(hidden.dtype)  # [N, D]
    if dh is not None and whole is not None:
        dh.index_copy_(0, routing.dense, whole.hidden)
    return HeadGradients(dh, dw, None if db is None or sums is not None else db.to(bias.dtype))


def _dense(
    pairs: _Pairs,
    gradient: LogitGradient,
    rows: Tensor,  # [Nd]
    workspace_bytes: int,
    sums: GradientSums | None,
) -> HeadGradients:
    """Gradients of the dense tokens [Nd, D], and of weight and bias over them and the pairs."""
    call, V = pairs.call, len(pairs.call.weight)
    hidden, (Nd, D) = call.hidden[rows], (len(rows), call.hidden.shape[1])  # [Nd, D]

    def then(slab: dense.Handed) -> None:
        if slab.out is not None:
            whole = None
            if slab.dr is not None:
                flops.product(Nd, D, slab.columns.stop - slab.columns.start)
                whole = Whole(hidden, slab.dr, None if call.down is None else slab.down / call.down)
            pairs.weight(slab.columns, slab.out, slab.base, whole)
        if slab.db is not None:
            slab.db.add_(pairs.db[slab.columns])

    fits = dense.split(Nd, D, V, hidden.element_size(), workspace_bytes, staged=False)[0] == Nd
    return dense.backward(
        hidden,
        call.weight,
        call.targets[rows],
        call.bias,
        call.transform.select(rows),
        call.lse[rows],
        gradient.select(rows),
        needs=Needs(call.need_hidden, call.need_weight, pairs.db is not None),
        workspace_bytes=workspace_bytes,
        then=then if len(call.tokens) else None,
        leave_weight=len(call.tokens) > 0 and Nd <= JOINT and fits,
        sums=sums,
    )


class _Pairs:
    """Contribution of the routed pairs to the gradients, run after run."""

    def __init__(self, call: Call, runs: list[Run], room: int, db: Tensor | None, wide: bool):
        self.call, self.room = call, room
        self.ordered, self.dh, self.db = None, None, db  # db [V] float32, added to
        self.alone = len(runs) == 1 and len(call.tokens) > 0 and not call.atomics and not wide  # dH leaves rounded
        (N, D), item = call.hidden.shape, call.hidden.element_size()
        if call.need_hidden and self.alone:
            self.dh = call.hidden.new_empty(N, D)  # [N, D]
            self.room += 4 * N * D if item == 2 else 0  # what it would take in float32
        elif call.need_hidden:
            if len(runs) > 1 and not call.atomics:
                self.ordered = by_token(call.tokens, N, runs)
            self.dh = torch.zeros(N, D, dtype=torch.float32, device=call.hidden.device)  # scaled, added to
        self.runs = iter(enumerate(runs))
        self.number, self.run, self.dr = -1, None, None  # of the current run, dR [pairs, BLOCK]
        self.total = None  # [BLOCK, D] float32, dW of a block with several runs

    def _advance(self) -> bool:
        """Finish the current run with its dH, begin the next with its dR and db; False if there is none."""
        call, dh = self.call, self.dh
        if dh is not None and self.dr is not None and call.atomics:
            hidden_rows(call, self.run, self.dr, slice(0, dh.shape[1]), dh)
        elif dh is not None and self.dr is not None:  # of a single run the device has dR to make meanwhile
            ordered = self.ordered or by_token(call.tokens, len(dh), [self.run])
            add_hidden(call, self.run, self.dr, dh, ordered, self.number, self.room, self.alone)
        self.dr = None
        self.number, self.run = next(self.runs, (-1, None))
        if self.run is None:
            return False
        self.dr, column_sums = pair_gradients(call, self.run, dh is not None or call.need_weight, self.db is not None)
        if self.db is not None:
            add_bias(call, self.run, column_sums, self.db)
        return True

    def finish(self) -> None:
        """Process all remaining runs; blocks that `weight` was not called for get no dW."""
        while self._advance():
            pass

    def weight(
        self,
        rows: slice,  # of the weight
        out: Tensor,  # [rows, D]
        base: Tensor | None,  # [rows, D] float32, maybe `out`
        whole: Whole | None = None,  # of all dense tokens in `rows`
    ) -> None:
        """Write the pairs' dW of ascending whole blocks, with `base` and the dense tokens' added."""
        block, stop = rows.start // BLOCK, -(-rows.stop // BLOCK)
        while block < stop:
            while self.run is None or self.run.blocks.stop <= block:
                self._advance()
            run, call = self.run, self.call
            end = min(stop, run.blocks.stop)
            at = slice(block * BLOCK - rows.start, min(end * BLOCK, rows.stop) - rows.start)
            to, start = out[at], None if base is None else base[at]
            part = None if whole is None else whole._replace(dr=whole.dr[:, at])
            if not run.first:
                start, part = self.total, None
            if run.first and not run.last:
                self.total = torch.empty_like(to, dtype=torch.float32)  # [V of the block, D]
            weight_gradient(call, run, slice(block, end), self.dr, to if run.last else self.total, start, part)
            if run.last:
                block, self.total = end, None
            else:
                self._advance()
