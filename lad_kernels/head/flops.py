"""A count of the floating-point operations of the head's matrix products, taken where each product is launched.

A product [R, K] x [K, C] counts 2 R K C, the multiplications and additions of its result; padding of tiles and
element-wise work do not count. Without `counting` around it `product` does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_tally: ContextVar[list[int] | None] = ContextVar("tally", default=None)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Yield a list of one number, the operations launched inside so far. An inner count also goes to the outer."""
    outer, inner = _tally.get(), [0]
    token = _tally.set(inner)
    try:
        yield inner
    finally:
        _tally.reset(token)
        if outer is not None:
            outer[0] += inner[0]


def product(rows: int, inner: int, columns: int, times: int = 1) -> None:
    """Products [rows, inner] x [inner, columns], or others of these three sizes, are being launched."""
    tally = _tally.get()
    if tally is not None:
        tally[0] += 2 * rows * inner * columns * times
