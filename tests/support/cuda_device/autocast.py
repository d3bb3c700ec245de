"""Which operations `torch.autocast("cuda")` casts: the lists of ATen/autocast_mode.h, by the names of their functions.

Longer than those of a CPU: `mv` and `vecdot` run in 16 bits, and exponentials, sums and powers in float32. An operation
with `out=`, or in place, is not cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

LOWER = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm addmv mv addr linear chain_matmul multi_dot vecdot "
    "linalg_vecdot linalg_multi_dot einsum conv1d conv2d conv3d prelu scaled_dot_product_attention".split()
)
FLOAT32 = frozenset(
    "acos asin cosh erfinv exp expm1 log log10 log1p log2 logsumexp reciprocal rsqrt sinh tan pow __pow__ __rpow__ "
    "__rdiv__ __rtruediv__ softplus softmax log_softmax softmin cumsum cumprod prod sum norm renorm dist cdist "
    "cosine_similarity layer_norm group_norm rms_norm nll_loss cross_entropy kl_div mse_loss l1_loss smooth_l1_loss "
    "normalize binary_cross_entropy_with_logits".split()
)
WIDEST = frozenset("addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put scatter_add tensordot cat stack".split())


def cast(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments as `function` gets them on CUDA under the autocast in force."""
    name = getattr(function, "__name__", "")
    if "out" in kwargs or kwargs.get("dtype") is not None:
        return args, kwargs
    if name in LOWER:
        to = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32:
        to = torch.float32
    elif name in WIDEST:
        flat = [x.dtype for x in tree_flatten((args, kwargs))[0] if _castable(x)]
        to = max(flat, key=lambda dtype: dtype.itemsize, default=torch.float32)
    else:
        return args, kwargs
    return tree_map(lambda x: x.to(to) if _castable(x) else x, (args, kwargs))


def _castable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_cuda and x.is_floating_point() and x.dtype != torch.float64
