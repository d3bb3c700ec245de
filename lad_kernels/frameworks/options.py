"""Settings that adapters refuse by name, because the framework does that part itself and would ignore them."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
HEAD_SETTINGS, NO_HEAD = ("backward", "tail_mass", "tail"), "the framework's own head makes the log-probs"


def refuse(settings: dict[str, Any], why: str, *names: str) -> None:
    """Raises ValueError for a setting of `names` that is set."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name}: expected it unset, got {settings[name]!r}; {why}")


@cache
def say_bounds(who: str, low: float | None, high: float | None, unset: str) -> None:
    """Log the bound in effect, once for each.

    Args:
        unset: what does not set one although it looks as if it did.
    """
    if low is None and high is None:
        logger.warning("%s: no bound on the ratio; %s sets none, epsilon_low and epsilon_high do", who, unset)
        return
    least = 0 if low is None else max(0, 1 - low)
    most = "infinity" if high is None else f"{1 + high:g}"
    logger.warning(
        "%s: no step pushes a ratio out of [%g, %s]; epsilon_low=%s, epsilon_high=%s", who, least, most, low, high
    )
