"""In which order the PyTorch backward multiplies: a slab of the vocabulary at a time, in runs.

A run is either some tokens by all columns of the slab, or active pairs of successive blocks: what each pair needs is
gathered once a run, and only the products are made block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lad_kernels.head.records import BLOCK, Routing


class Run(NamedTuple):
    """Logits [R, v] whose gradient is multiplied together."""

    rows: slice | Tensor  # [R] tokens
    first: int | Tensor  # [R] the first column of each
    scale: Tensor | None  # [R] factors on dZ
    sizes: list[int]  # of its parts: tokens with the same columns, R together
    columns: list[slice]  # of each part, all of one width
    written: list[bool]  # whether dW has the gradient of earlier tokens in these columns


class Runs:
    """The runs of a backward, and the memory for what they gather."""

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        chunks: list[slice],  # of the N tokens
        routing: Routing | None,  # None: all tokens take all columns
        most: int,  # tokens of a run
        most_bytes: int,  # of the hidden states that a run of pairs gathers
        few_dense: int,  # dense tokens that do not pay for products of their own
    ):
        if routing is not None and 0 < len(routing.dense) <= few_dense and len(routing.rows) >= routing.blocks:
            routing = _all_as_pairs(routing)
        self.hidden, self.routing = hidden, routing
        self.dense: list[tuple[slice | Tensor, int]] = [(c, c.stop - c.start) for c in chunks]  # tokens [c], c
        if routing is not None:
            self.dense = [(rows, len(rows)) for rows in routing.dense.split(most) if len(rows)]
            blocks = torch.repeat_interleave(torch.tensor(routing.offsets).diff())  # [P]
            self.first = (blocks * BLOCK).to(hidden.device)  # [P]
            self.most = max(1, min(most, most_bytes // hidden[0].nbytes, len(routing.rows)))  # pairs of a run
            longest = max([self.most, *(size for _, size in self.dense)])
            self._gathered, self._products = hidden.new_empty(2, longest, hidden.shape[1])  # [R, D] each

    def of(self, slab: slice) -> Iterator[Run]:
        """Those of a slab's columns; first the tokens that take all of them."""
        for i, (rows, size) in enumerate(self.dense):
            yield Run(rows, slab.start, None, [size], [slab], [i > 0])
        if self.routing is None:
            return
        starts = self.routing.offsets  # [blocks + 1]
        begin = end = starts[slab.start // BLOCK]
        parts: list[tuple[int, slice, bool]] = []  # size, columns, written
        for first in range(slab.start, slab.stop, BLOCK):
            columns, stop = slice(first, min(first + BLOCK, slab.stop)), starts[first // BLOCK + 1]
            for i, start in enumerate(range(end, stop, self.most)):
                end = min(start + self.most, stop)
                if parts and (end - begin > self.most or columns.stop - first < BLOCK):
                    yield self._pairs(slice(begin, start), parts)
                    begin, parts = start, []
                parts.append((end - start, columns, bool(self.dense) or i > 0))
        if parts:
            yield self._pairs(slice(begin, end), parts)

    def _pairs(self, pairs: slice, parts: list[tuple[int, slice, bool]]) -> Run:
        scale = None if self.routing.scale is None else self.routing.scale[pairs]
        return Run(self.routing.rows[pairs], self.first[pairs], scale, *(list(x) for x in zip(*parts)))

    def absent(self, slab: slice) -> list[slice]:
        """Columns in no run, counted from the slab's first."""
        if self.dense:
            return []
        starts = self.routing.offsets[slab.start // BLOCK : -(-slab.stop // BLOCK) + 1]
        return [slice(i * BLOCK, (i + 1) * BLOCK) for i, (a, b) in enumerate(pairwise(starts)) if a == b]

    def hidden_states(self, rows: slice | Tensor) -> Tensor:
        """Of a run [R, D], valid until the next."""
        if isinstance(rows, slice):
            return self.hidden[rows]
        return torch.index_select(self.hidden, 0, rows, out=self._gathered[: len(rows)])

    def add_hidden(self, dh: Tensor, rows: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Add to dh [N, D] a run's dZ, parts [r, v] of `rows` [R], times their rows of W [v, D]."""
        sizes = [len(dz) for dz in parts]
        products = self._products[: len(rows)]  # [R, D]
        for dz, w, out in zip(parts, weights, products.split(sizes)):
            torch.mm(dz, w, out=out)
        # Tokens of a part differ. A CPU adds equal ones in their order; an accelerator would in none.
        together = [len(rows)] if dh.device.type == "cpu" else sizes
        for some, x in zip(rows.split(together), products.split(together)):
            dh.index_add_(0, some, x)


def _all_as_pairs(routing: Routing) -> Routing:
    """The same with each dense token [Nd] in the pairs of every block, before the others."""
    rows, scale, offsets, dense, _ = routing
    of_blocks = torch.tensor(offsets, device=rows.device).diff()  # [blocks]
    index = torch.arange(len(of_blocks), device=rows.device)  # [blocks]
    pairs = torch.arange(len(rows), device=rows.device)  # [P]
    pairs += len(dense) * (1 + index.repeat_interleave(of_blocks, output_size=len(rows)))  # where they are in the new
    every = rows.new_empty(len(rows) + len(index) * len(dense))  # [P + blocks Nd]
    starts = of_blocks.cumsum(0) - of_blocks + len(dense) * index  # [blocks]
    every[starts[:, None] + torch.arange(len(dense), device=rows.device)] = dense
    every[pairs] = rows
    if scale is not None:
        scale = scale.new_ones(len(every)).index_copy_(0, pairs, scale)
    return Routing(every, scale, [offset + b * len(dense) for b, offset in enumerate(offsets)], dense[:0])
