"""dR of the targets in 16 bits, written over what the kernel of a slab left in their columns.

    dR[n, y] = (onehot[n] + p_y (prob[n] - entropy[n] log p_y)) dz/draw,   log p_y = z_y - lse      (dense.py, tile.py)

In a slab's kernel the one-hot term costs a comparison and an addition for every four and every one of its elements: 160
of a Hopper's 874 instructions after a tile's products. Here it is one product of a hidden state and a row of W for each
token, then as many numbers a slab. Rounded once; where the policy is certain, 1 - p_y is as good as log p_y.
Cost: 4 N D bytes read once (one_pass.py has log p_y already), 32 N bytes a slab, and a launch for either.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lad_kernels.head.kernels import tile_table
from lad_kernels.head.kernels.tile import one_minus_exp
from lad_kernels.head.records import LogitGradient

_TOKENS = 256  # of a program


@triton.jit(do_not_specialize=["N", "V", "column0", "dr_stride"])
def _target_columns_kernel(
    dr,  # [N, >= V] out, where a target is among the slab's V columns
    targets,  # [N]
    logprobs,  # [N]
    slopes,  # [N]
    onehot,  # [N]
    prob,  # [N]
    entropy,  # [N] or None
    N,
    V,
    column0,
    dr_stride,
    TOKENS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    column = tl.load(targets + rows, mask=rows < N, other=-1) - column0  # [TOKENS]
    mine = (column >= 0) & (column < V) & (rows < N)  # [TOKENS]
    logp = tl.load(logprobs + rows, mask=mine, other=0.0)  # [TOKENS]
    logp = tl.where(logp < -1e30, -1e30, logp)  # [TOKENS] of an excluded entry; a NaN stays
    to_mass = tl.load(prob + rows, mask=mine, other=0.0)  # [TOKENS]
    g = (tl.load(onehot + rows, mask=mine, other=0.0) + to_mass) - to_mass * one_minus_exp(logp)  # [TOKENS] dZ
    if entropy is not None:
        g -= tl.load(entropy + rows, mask=mine, other=0.0) * logp * tl.exp(logp)
    g *= tl.load(slopes + rows, mask=mine, other=0.0)  # [TOKENS] dR
    tl.store(dr + rows * dr_stride + column, g.to(dr.dtype.element_ty), mask=mine)


def write(
    dr: Tensor,  # [N, V] out
    targets: Tensor,  # [N], numbered over the whole vocabulary
    logprobs: Tensor,  # [N]
    slopes: Tensor,  # [N] dz/draw of the targets
    gradient: LogitGradient,
    column0: int,  # the slab's first vocabulary row
) -> None:
    """Write dR of the targets that are in a slab."""
    N, V = dr.shape
    with tile_table.current(dr.device):
        _target_columns_kernel[(-(-N // _TOKENS),)](
            dr,
            targets,
            logprobs,
            slopes,
            gradient.onehot,
            gradient.prob,
            gradient.entropy,
            N,
            V,
            column0,
            dr.stride(0),
            TOKENS=_TOKENS,
        )
