"""Multiply gradients by a number on the device, usually 1: then nothing but that number is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head.kernels import tile_table
from lad_kernels.head.records import HeadGradients

_SIZE = 8192  # elements that a program scales


@triton.jit
def _scale_kernel(
    x,  # [size], in place
    factor,  # []
    size,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        scaled = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * by  # [BLOCK]
        tl.store(x + at, scaled.to(x.dtype.element_ty), mask=at < size)


@torch.no_grad()
def scale(gradients: HeadGradients, factor: Tensor) -> None:
    """Multiply contiguous gradients by factor [] in place; one more rounding unless it is 1."""
    with tile_table.current(factor.device):
        for x in (x for x in gradients if x is not None and x.numel()):
            _scale_kernel[(-(-x.numel() // _SIZE),)](x, factor, x.numel(), BLOCK=_SIZE)
