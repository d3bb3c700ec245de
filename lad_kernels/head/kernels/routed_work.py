"""How the routed backward is cut up: tile shapes, work items of up to block_n pairs, runs that fit the workspace.

A `Work` knows where the pairs and items of every vocabulary block lie, twice: on the host, which sizes launches, and on
the device, where kernels read it. The host knows the counts already, so nothing waits for the device.
Tiles have 64 pairs, because a block has about a hundred. They compile without spills and within 48 KiB (AMD) or 73 KiB
(NVIDIA) of shared memory, so one row serves every architecture. Operands that miss 16-byte alignment are read element
by element, hence the smaller tiles of `_UNALIGNED`; float32 is multiplied without tensor cores, in short steps.
Left out: an order of blocks that balances their loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lad_kernels.head.kernels import configs


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
    weight: Schedule  # dW [BLOCK, block_d], in steps of block_n pairs
    hidden: Schedule  # dR W [block_n, block_d], in steps of block_d words


_ALIGNED = RoutedTiles(64, Schedule(64, 4, 3), Schedule(128, 8, 3), Schedule(128, 4, 1))
_UNALIGNED = RoutedTiles(64, Schedule(32, 8, 2), Schedule(64, 8, 2), Schedule(64, 8, 2))
_FLOAT32 = RoutedTiles(64, Schedule(32, 8, 2), Schedule(32, 8, 1), Schedule(32, 8, 1))


def tiles_for(hidden: Tensor, weight: Tensor) -> RoutedTiles:
    """Tiles for hidden [N, D] and weight [V, D] as they lie in memory; the same for every architecture."""
    if hidden.dtype == torch.float32:
        return _FLOAT32
    pointers = configs.select(hidden.device, hidden.dtype, *weight.shape[::-1], aligned=False)
    return _ALIGNED if configs.fits(hidden, pointers) and configs.fits(weight, pointers) else _UNALIGNED


class Run(NamedTuple):
    """Pairs that pass together: those of whole blocks, or a piece of one block's."""

    blocks: slice
    pairs: slice
    items: slice
    first: bool  # no earlier run holds pairs of these blocks
    last: bool


@dataclass(frozen=True)
class Work:
    """Where the pairs and items of each block lie."""

    block_n: int  # pairs of an item at most
    pair_offsets: list[int]  # [blocks + 1] first pair of each block
    item_offsets: list[int]  # [blocks + 1] first item of each block
    pair_table: Tensor  # [blocks + 1] int32
    item_table: Tensor  # [blocks + 1] int32
    items: Tensor  # [items, 3] int32: block, first pair, pairs (at least 1)

    @classmethod
    def plan(cls, counts: list[int], block_n: int, device: torch.device) -> Work:
        """One small copy to the device, where the items are listed."""
        pair_offsets = list(accumulate(counts, initial=0))
        item_offsets = list(accumulate((triton.cdiv(count, block_n) for count in counts), initial=0))
        total, whole = item_offsets[-1], {"dtype": torch.int32, "device": device}
        tables = torch.tensor([pair_offsets, item_offsets], dtype=torch.int32)  # [2, blocks + 1]
        pair_table, item_table = tables.to(device, non_blocking=True)
        block = torch.arange(len(counts), **whole).repeat_interleave(item_table.diff(), output_size=total)  # [items]
        first = pair_table[block] + (torch.arange(total, **whole) - item_table[block]) * block_n  # [items]
        count = (pair_table[block + 1] - first).clamp(max=block_n)  # [items]
        items = torch.stack([block, first, count], dim=1)  # [items, 3]
        return cls(block_n, pair_offsets, item_offsets, pair_table, item_table, items)

    def runs(self, blocks: slice, capacity: int) -> Iterator[Run]:
        """Cut `blocks` into runs of at most `capacity` pairs, a multiple of block_n."""
        block = blocks.start
        while block < blocks.stop:
            start, stop = self.pair_offsets[block], block + 1
            while stop < blocks.stop and self.pair_offsets[stop + 1] - start <= capacity:
                stop += 1
            end = self.pair_offsets[stop]
            for pair in range(start, max(end, start + 1), capacity):
                last = pair + capacity >= end
                item = self.item_offsets[block] + (pair - start) // self.block_n
                items = slice(item, self.item_offsets[stop] if last else item + capacity // self.block_n)
                yield Run(slice(block, stop), slice(pair, min(pair + capacity, end)), items, pair == start, last)
            block = stop
