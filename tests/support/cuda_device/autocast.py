"""`torch.autocast("cuda")`: what it does to the arguments of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from cuda_device.lists import FLOAT32, LOWER, WIDEST


def cast(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments as `function` gets them under the autocast in force; with `out=` or a `dtype` they stay."""
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
