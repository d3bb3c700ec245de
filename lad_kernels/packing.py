"""From padded or packed tokens to the M tokens that take part, and back.

Masked tokens are dropped before the first matrix product, and so are those beyond the last bound of packed input.
Learning how many remain costs one host sync on an accelerator. Without `loss_mask` there is none: tokens beyond the
last bound then stay among the M and are marked instead, so that they count nowhere and have coefficient 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which of the given positions take part, and where sequences begin among them."""

    shape: torch.Size  # of the tensors that hold one value per token: [N] or [B, T]
    kept: Tensor | None  # [M] flat positions that take part, ascending; None: all of them
    cu_seqlens: Tensor | None  # [B + 1] boundaries of the sequences among the kept tokens; None: no sequences
    inside: Tensor | None = None  # [M] False beyond the last bound, where no host could read it; None: all inside

    @property
    def tokens(self) -> int:
        return self.shape.numel() if self.kept is None else len(self.kept)

    @functools.cached_property
    def sequence(self) -> Tensor:  # [M]
        """The sequence that each token belongs to; any beyond the last bound."""
        return sequence_of(self.tokens, self.cu_seqlens)

    def select(self, x: Tensor) -> Tensor:
        """[N, ...] or [B, T, ...] -> [M, ...]."""
        flat = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def flatten(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states [N, D] or [B, T, D], not copied, and the flat rows [M] that take part; None: all of [N, D]."""
        if hidden.ndim == 2 or 1 in hidden.shape[:2] or hidden.stride(0) == hidden.shape[1] * hidden.stride(1):
            return hidden.reshape(self.shape.numel(), hidden.shape[-1]), self.kept
        return hidden, torch.arange(self.shape.numel(), device=hidden.device) if self.kept is None else self.kept

    def scatter_back(self, x: Tensor) -> Tensor:
        """[M, ...] -> [N, ...] or [B, T, ...], exactly zero where nothing was kept."""
        if self.inside is not None:
            x = x.masked_fill(~self.inside.reshape(-1, *[1] * (x.ndim - 1)), 0)
        if self.kept is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.kept, x)
        return x.reshape(*self.shape, *x.shape[1:])


def sequence_of(tokens: int, cu_seqlens: Tensor) -> Tensor:  # [B + 1] -> [M]
    """The sequence of each of `tokens` packed tokens; the last one beyond the last bound. No host sync."""
    places = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)  # [M]
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True).clamp(max=len(cu_seqlens) - 2)


def _host_reads(bounds: Tensor) -> bool:
    """Whether a value of it can be had without waiting for a device."""
    return bounds.device.type == "cpu"


def pack(like: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None) -> Packing:
    """Packing of tensors shaped like `like`, [N] or [B, T]. Tokens beyond the last bound do not take part."""
    inside = None
    if like.ndim == 2:
        sequences, length = like.shape
        cu_seqlens = torch.arange(sequences + 1, device=like.device) * length
    elif cu_seqlens is not None:
        inside = torch.arange(len(like), device=like.device) < cu_seqlens[-1]  # [N]
    if loss_mask is None:
        if inside is None or not _host_reads(inside):
            return Packing(like.shape, None, cu_seqlens, inside)
        return Packing(like.shape, None if bool(inside.all()) else inside.nonzero()[:, 0], cu_seqlens)
    mask = loss_mask.reshape(-1) != 0  # [N]
    if inside is not None:
        mask = mask & inside
    if cu_seqlens is not None:
        kept_before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])  # [N + 1]
        cu_seqlens = kept_before[cu_seqlens.long()]
    return Packing(like.shape, mask.nonzero()[:, 0], cu_seqlens)
