"""torch.autocast ends at the public functions: it casts their inputs, and inside each operation has its own dtype.

Under autocast products and some sums would be rounded to 16 bits, also in a backward that is called inside the block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_accelerator = torch.accelerator.current_accelerator()
_KINDS = ("cpu",) if _accelerator is None else ("cpu", _accelerator.type)  # of the devices that tensors may be on


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with torch.autocast off while it runs."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run
