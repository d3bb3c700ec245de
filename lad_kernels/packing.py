"""From padded or packed tokens to the M tokens that take part, and back.

Masked tokens are dropped before the first matrix product. Learning how many remain costs one host sync on an
accelerator; without `loss_mask` there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which of the given positions take part, and where sequences begin among them."""

    shape: torch.Size  # of the tensors that hold one value per token: [N] or [B, T]
    kept: Tensor | None  # [M] flat positions that take part, ascending; None: all of them
    cu_seqlens: Tensor | None  # [B + 1] boundaries of the sequences among the kept tokens; None: no sequences

    @property
    def tokens(self) -> int:
        return self.shape.numel() if self.kept is None else len(self.kept)

    def take(self, x: Tensor) -> Tensor:
        """[N, ...] or [B, T, ...] -> [M, ...]."""
        flat = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def source(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states [N, D] or [B, T, D], not copied, and the flat rows [M] that take part; None: all of [N, D]."""
        kept = self.kept
        flat = hidden.ndim == 2 or 1 in hidden.shape[:2] or hidden.stride(0) == hidden.shape[1] * hidden.stride(1)
        if flat:
            return hidden.reshape(self.shape.numel(), hidden.shape[-1]), kept
        return hidden, torch.arange(self.shape.numel(), device=hidden.device) if kept is None else kept

    def place(self, x: Tensor) -> Tensor:
        """[M, ...] -> [N, ...] or [B, T, ...], exactly zero where nothing was kept."""
        if self.kept is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.kept, x)
        return x.reshape(*self.shape, *x.shape[1:])


def pack(like: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> Packing:
    """Packing of tensors shaped like `like`, [N] or [B, T]."""
    if like.ndim == 2:
        sequences, length = like.shape
        cu_seqlens = torch.arange(sequences + 1, device=like.device) * length
    if loss_mask is None:
        return Packing(like.shape, None, cu_seqlens)
    mask = loss_mask.reshape(-1) != 0  # [N]
    if cu_seqlens is not None:
        kept_before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])  # [N + 1]
        cu_seqlens = kept_before[cu_seqlens.long()]
    return Packing(like.shape, mask.nonzero()[:, 0], cu_seqlens)
