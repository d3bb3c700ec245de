"""How far a result moves when its inputs are rounded: the allowance where the truth nearly cancels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

WIDENING = 16.0  # roundings of a result for one of each input; 6.4 used at most in 4,000 cases


def rounded_inside(rounding: float, gen: torch.Generator, units: float = 0.0) -> Any:
    """A patch for the specification: the log-sum-exp of each token is off by up to one rounding of itself.

    So then is its log-prob, and every probability that the gradient holds, relatively: where a policy is certain,
    z_y - lse and 1 - p_y cancel. dZ is off by `units`, the rounding of 16-bit matrix units (0 without).
    """
    right = Tensor.logsumexp

    def logsumexp(z: Tensor, dim: int) -> Tensor:
        lse = right(z, dim)
        if dim != -1:
            return lse
        if z.requires_grad and units:
            z.register_hook(
                lambda dz: dz * (1 + units * (2 * torch.randint(2, dz.shape, generator=gen) - 1).to(dz.device))
            )
        off = (2 * torch.rand(lse.shape, generator=gen, dtype=lse.dtype) - 1).to(lse.device)  # [M]
        off = rounding * off * lse.detach().abs()
        return lse * (1 - off) + (lse.detach() * off + off)  # lse + off, with the gradient p (1 - off)

    return mock.patch.object(Tensor, "logsumexp", logsumexp)
