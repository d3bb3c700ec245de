"""How the routed backward is divided: tile shapes, work items of up to block_n pairs, runs that fit the workspace.

A `Work` holds where the pairs of every vocabulary block begin, twice: on the host, which sizes launches, and on the
device, where kernels read it. Items of block b begin at b + offsets[b] // block_n, on either side.
Tiles have 64 pairs, or 128 where blocks have so many that few places stay empty: a flop then reads two thirds as much.
They compile without spills and within 64 KiB (AMD) or 96 KiB (NVIDIA) of shared memory, so a row serves every
architecture. Operands that miss 16-byte alignment are read element by element, hence the smaller tiles of `_UNALIGNED`;
float32 is multiplied without tensor cores, in short steps.
Left out: an order of blocks that balances their loads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.routed.kernels import items_kernel
from lad_kernels.head.records import MANY, LogitTransform, Routing


class Schedule(NamedTuple):
    """How one kernel runs, and the columns of D in its tile."""

    block_d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RoutedTiles:
    """Tiles of the three products."""

    block_n: int  # pairs of an item at most
    pairs: Schedule  # z [block_n, BLOCK], in steps of block_d columns of D
    weight: Schedule  # dW [BLOCK, block_d], in steps of block_n pairs, at most STEP
    hidden: Schedule  # dR W [block_n, block_d], in steps of block_d vocabulary entries


STEP = 64  # pairs that weight_kernel multiplies at a time, at most
_MANY = RoutedTiles(128, Schedule(64, 8, 3), Schedule(128, 8, 3), Schedule(128, 8, 1))
_ALIGNED = RoutedTiles(64, Schedule(64, 4, 3), Schedule(128, 8, 3), Schedule(128, 4, 1))
_SOFTCAP = RoutedTiles(64, Schedule(64, 8, 3), Schedule(128, 8, 3), Schedule(128, 4, 1))
_UNALIGNED = RoutedTiles(64, Schedule(32, 8, 2), Schedule(64, 8, 2), Schedule(64, 8, 2))
_FLOAT32 = RoutedTiles(64, Schedule(32, 8, 2), Schedule(32, 8, 1), Schedule(32, 8, 1))


def tiles_for(hidden: Tensor, weight: Tensor, pairs: float, transform: LogitTransform) -> RoutedTiles:
    """Tiles for hidden [N, D] and weight [V, D], by their alignment in memory and the mean `pairs` of a block.

    A softcap's slope takes registers: with 4 warps, or with 128 pairs, its kernels would spill on sm_80.
    """
    if hidden.dtype == torch.float32:
        return _FLOAT32
    pointers = tile_table.select(hidden.device, hidden.dtype, aligned=False)
    if not (tile_table.fits(hidden, pointers) and tile_table.fits(weight, pointers)):
        return _UNALIGNED
    if transform.softcap is not None:
        return _SOFTCAP
    return _MANY if pairs >= MANY else _ALIGNED


class Run(NamedTuple):
    """Pairs that are processed together: those of whole blocks, or some of one block's."""

    blocks: slice
    pairs: slice
    items: slice
    first: bool  # no earlier run holds pairs of these blocks
    last: bool


@dataclass(frozen=True)
class Work:
    """Where the pairs and items of each block lie."""

    block_n: int  # pairs of an item at most
    offsets: list[int]  # [blocks + 1] first pair of each block
    table: Tensor  # [blocks + 1] int64, the same on the device
    items: Tensor  # [items, 3] int32: block, first pair, pairs; none in some blocks' last

    @classmethod
    def plan(cls, routing: Routing, block_n: int) -> Work:
        """The items are listed on the device."""
        offsets, table, device = routing.offsets, routing.table, routing.rows.device
        if offsets[-1] >= 2**31:
            raise ValueError(f"routing: expected fewer than 2^31 pairs, got {offsets[-1]}; pass fewer tokens")
        if table is None:
            table = torch.tensor(offsets).to(device, non_blocking=True)  # [blocks + 1]
        items = torch.empty(routing.blocks + offsets[-1] // block_n, 3, dtype=torch.int32, device=device)  # [items, 3]
        with tile_table.current(device):
            items_kernel[(routing.blocks,)](table, items, BLOCK_N=block_n)
        return cls(block_n, offsets, table, items)

    def item(self, block: int) -> int:
        """The block's first item: known without a sum over blocks, and never too few for its pairs."""
        return block + self.offsets[block] // self.block_n

    def runs(self, blocks: slice, capacity: int) -> Iterator[Run]:
        """Cut `blocks` into runs of at most `capacity` pairs, a multiple of block_n."""
        block = blocks.start
        while block < blocks.stop:
            start = self.offsets[block]
            stop = bisect_right(self.offsets, start + capacity, block + 2, blocks.stop + 1) - 1
            end = self.offsets[stop]
            for pair in range(start, max(end, start + 1), capacity):
                last = pair + capacity >= end
                item = self.item(block) + (pair - start) // self.block_n
                items = slice(item, self.item(stop) if last else item + capacity // self.block_n)
                yield Run(slice(block, stop), slice(pair, min(pair + capacity, end)), items, pair == start, last)
            block = stop


class ByToken(NamedTuple):
    """The pairs sorted by token."""

    order: Tensor  # [P] int32 numbers of the pairs, by token, then ascending
    bounds: Tensor  # [N, runs + 1] int32: where in `order` a token's pairs of each run begin, and where all end


def by_token(tokens: Tensor, N: int, runs: list[Run]) -> ByToken:
    """One sort of all pairs `tokens` [P] by their token, in about 40 bytes a pair, and one search for all runs."""
    pairs, device = len(tokens), tokens.device
    keys, order = torch.sort(tokens.to(torch.int32), stable=True)  # [P], [P]
    if len(runs) == 1:
        every = torch.arange(N + 1, dtype=torch.int32, device=device)  # [N + 1]
        bounds = torch.searchsorted(keys, every, out_int32=True).unfold(0, 2, 1)  # [N, 2]
        return ByToken(order.to(torch.int32), bounds)
    begins = torch.tensor([run.pairs.start for run in runs] + [pairs]).to(device, non_blocking=True)  # [runs + 1]
    keys = keys.long().mul_(pairs).add_(order)  # [P] ascending
    order = order.to(torch.int32)
    at = torch.arange(N, device=device).mul_(pairs)[:, None] + begins  # [N, runs + 1]
    return ByToken(order, torch.searchsorted(keys, at, out_int32=True))
