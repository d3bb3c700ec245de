"""What the runs of the routed backward launch: dR of the pairs of a run, and their part of dW, db and dH.

A `Call` holds what does not change from run to run, and cuts the call into runs; launch.py puts the runs in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels.head import flops
from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.routed.kernels import (
    bias_kernel,
    hidden_kernel,
    pairs_kernel,
    token_kernel,
    weight_kernel,
)
from lad_kernels.head.kernels.routed.work import STEP, ByToken, RoutedTiles, Run, Work
from lad_kernels.head.records import BLOCK, LogitGradient, LogitTransform

_SLICE = 128  # the workspace holds slices of D's columns that are multiples of this wide
_TOKEN_COLUMNS = 512  # columns of D that a program of token_kernel adds, at most


class Whole(NamedTuple):
    """dR of the dense tokens in some columns, whose product with their hidden states is to be added."""

    hidden: Tensor  # [Nd, D] contiguous
    dr: Tensor  # [Nd, V of the columns] scaled
    ratio: Tensor | None  # [] from its scaling to that of the pairs


@dataclass(frozen=True)
class Call:
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
    need_hidden: bool
    need_weight: bool
    atomics: bool
    workspace_bytes: int

    @property
    def pair_bytes(self) -> int:
        """Memory of a pair's column sums and dR."""
        size = BLOCK * self.hidden.element_size() if self.need_hidden or self.need_weight else 0
        return size + 4 * BLOCK // self.tiles.block_n

    @property
    def packed(self) -> bool:
        """Whether rows of dR W are float16 with a factor for each tile: their 11 bits are 3 more than dH will have."""
        return self.hidden.dtype == torch.bfloat16

    @property
    def part_bytes(self) -> int:
        """Memory of a pair's row of dR W in a slice of D's columns: float16 with a factor a tile, or float32."""
        return 2 * _SLICE + 4 * (_SLICE // self.tiles.hidden.block_d) if self.packed else 4 * _SLICE

    def plan(self, dense_tokens: bool) -> tuple[list[Run], int, int]:
        """(runs, bytes that pairs may take, bytes that the dense tokens may take meanwhile)."""
        pairs, all_blocks = len(self.tokens), slice(0, len(self.work.offsets) - 1)
        slices = self.part_bytes if self.need_hidden and not self.atomics else 0
        room, held = self.workspace_bytes, self.pair_bytes * pairs
        if dense_tokens and (held + slices * pairs > room or held > room // 2):
            room, held = room // 2, room // 2  # else dR W comes when the dense tokens are done
        capacity = max(room // (self.pair_bytes + slices) // self.tiles.block_n, 1) * self.tiles.block_n
        return list(self.work.runs(all_blocks, capacity)), room, self.workspace_bytes - held

    def count(self, pairs: slice, blocks: slice, D: int) -> None:
        """A product of each pair of `blocks` with D columns; the vocabulary's last block may be partial."""
        width = min(BLOCK, len(self.weight) - (blocks.stop - 1) * BLOCK)
        last = pairs.stop - max(pairs.start, self.work.offsets[blocks.stop - 1])
        flops.product(pairs.stop - pairs.start - last, D, BLOCK)
        flops.product(last, D, width)


def pair_gradients(call: Call, run: Run, need_dr: bool, need_sums: bool) -> tuple[Tensor | None, Tensor | None]:
    """dR [pairs, BLOCK] of the run and, by item, its column sums [items, BLOCK]."""
    (N, D), pairs, items, device = call.hidden.shape, run.pairs, call.work.items[run.items], call.hidden.device
    dr = sums = None
    if need_dr:
        dr = torch.empty(pairs.stop - pairs.start, BLOCK, dtype=call.hidden.dtype, device=device)
    if need_sums:
        sums = torch.empty(len(items), BLOCK, dtype=torch.float32, device=device)
    if pairs.start == pairs.stop:
        return dr, sums
    call.count(pairs, run.blocks, D)
    schedule, transform = call.tiles.pairs, call.transform
    inv_temperature = tile_table.inverse_temperature(transform)
    with tile_table.current(device):
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
            THREAD=tile_table.thread_bits(device),
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )
    return dr, sums


def add_bias(call: Call, run: Run, column_sums: Tensor, db: Tensor) -> None:
    """Add the items' sums [items, BLOCK] to db [V]."""
    blocks = run.blocks.stop - run.blocks.start
    db = db[run.blocks.start * BLOCK : run.blocks.stop * BLOCK]  # [V of the run]
    with tile_table.current(db.device):
        bias_kernel[(blocks,)](
            column_sums, call.work.table, call.down, db, len(db), run.blocks.start, run.items.start, run.items.stop,
            BLOCK_N=call.tiles.block_n,
        )  # fmt: skip


def weight_gradient(
    call: Call,
    run: Run,
    blocks: slice,  # of the run
    dr: Tensor,  # [pairs of the run, BLOCK]
    out: Tensor,  # [V of `blocks`, D]
    base: Tensor | None,  # [V of `blocks`, D] float32
    whole: Whole | None,  # in `blocks`
) -> None:
    """out = base + products of the dense tokens + products of the run's pairs."""
    D, schedule, offsets = call.hidden.shape[1], call.tiles.weight, call.work.offsets
    pairs = slice(max(offsets[blocks.start], run.pairs.start), min(offsets[blocks.stop], run.pairs.stop))
    call.count(pairs, blocks, D)
    hidden, whole_dr, ratio = whole or (None, None, None)  # [Nd, D], [Nd, V of `blocks`], []
    with tile_table.current(out.device):
        weight_kernel[((blocks.stop - blocks.start) * -(-D // schedule.block_d),)](
            call.hidden,
            dr,
            call.tokens,
            call.work.table[blocks.start :],
            hidden,
            whole_dr,
            ratio,
            call.down,
            base,
            out,
            len(out),
            D,
            0 if hidden is None else len(hidden),
            run.pairs.start,
            run.pairs.stop,
            call.hidden.stride(0),
            0 if whole_dr is None else whole_dr.stride(0),
            BLOCK_N=min(call.tiles.block_n, STEP),
            BLOCK_D=schedule.block_d,
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )


def add_hidden(
    call: Call,
    run: Run,
    dr: Tensor,  # [pairs, BLOCK]
    dh: Tensor,  # [N, D]
    ordered: ByToken,
    number: int,  # of the run
    room: int,  # bytes for dR and for the workspace allocated here
    alone: bool,  # the run has all pairs, and dh still holds anything
) -> None:
    """Add each pair's row of dR W to its token's row of dh, in ascending order of blocks; `alone`: dh is their sum."""
    pairs, (N, D), bounds = len(dr), dh.shape, ordered.bounds
    if not pairs:
        return
    columns = max((room - dr.nbytes - bounds.nbytes) // (call.part_bytes * pairs), 1) * _SLICE  # that fit
    slices = -(-D // columns)
    width = -(-D // (slices * _SLICE)) * _SLICE  # of about one size
    tile, new = call.tiles.hidden.block_d, {"device": dh.device}
    parts = torch.empty(pairs, width, dtype=torch.float16 if call.packed else torch.float32, **new)  # [pairs, width]
    scales = torch.empty(pairs, width // tile, dtype=torch.float32, **new) if call.packed else None  # [pairs, tiles]
    block_d = min(1 << (width - 1).bit_length(), _TOKEN_COLUMNS)
    for d0 in range(0, D, width):
        columns = slice(d0, min(d0 + width, D))
        hidden_rows(call, run, dr, columns, parts, scales)
        grid = (N * -(-(columns.stop - d0) // block_d),)
        with tile_table.current(dh.device):
            token_kernel[grid](
                parts,
                scales,
                ordered.order,
                bounds[:, number:],
                call.down if alone else None,
                dh[:, columns],
                columns.stop - d0,
                run.pairs.start,
                width,
                bounds.stride(0),
                dh.stride(0),
                ALONE=alone,
                BLOCK_D=block_d,
                TILE=tile,
                num_warps=max(block_d // 128, 1),
            )


def hidden_rows(call: Call, run: Run, dr: Tensor, columns: slice, out: Tensor, scales: Tensor | None = None) -> None:
    """dR W[:, columns]: to out [pairs, >= columns] over scales [pairs, tiles], or with atomics added to out [N, D]."""
    D, schedule, items = columns.stop - columns.start, call.tiles.hidden, call.work.items[run.items]
    if run.pairs.start == run.pairs.stop:
        return
    call.count(run.pairs, run.blocks, D)
    with tile_table.current(out.device):
        hidden_kernel[(len(items) * -(-D // schedule.block_d),)](
            dr,
            call.weight[:, columns],
            items,
            call.tokens if call.atomics else None,
            out,
            scales,
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
