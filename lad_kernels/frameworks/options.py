"""Settings that adapters refuse by name, because the framework does that part itself and would ignore them."""

from __future__ import annotations

import warnings
from typing import Any

HEAD_SETTINGS, NO_HEAD = ("backward", "tail_mass", "tail"), "the framework's own head makes the log-probs"


def refuse(settings: dict[str, Any], why: str, *names: str) -> None:
    """Raises ValueError for a setting of `names` that is set."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name}: expected it unset, got {settings[name]!r}; {why}")


def ratio_bounds(
    own: tuple[float | None, float | None], theirs: tuple[float, float], usual: float, flag: str
) -> tuple[float | None, float | None]:
    """epsilon_low and epsilon_high: the framework's clip range, or LAD's own where that is the framework's default.

    Args:
        own: LAD's epsilon_low and epsilon_high.
        theirs: the framework's offsets, as it reads them.
        usual: its default of both, which cannot be told from a value that was set, and so sets no bound.
        flag: what sets them there.

    Raises:
        ValueError: both are set, to different values.
    """
    if theirs == (usual, usual):
        return own
    for name, mine, value in zip(("epsilon_low", "epsilon_high"), own, theirs):
        if mine not in (None, value):
            raise ValueError(f"{name}: expected {value!r} as {flag} has it, got {mine!r}; set one of both")
    return theirs


def say_bounds(who: str, low: float | None, high: float | None, unset: str) -> None:
    """Warn of the bound in effect, which Python shows once; `unset` names what seems to set one and does not."""
    if low is None and high is None:
        text = f"no bound on the ratio; {unset} sets none, epsilon_low and epsilon_high do"
    else:
        least, most = 0 if low is None else max(0, 1 - low), "infinity" if high is None else f"{1 + high:g}"
        text = f"no step pushes a ratio out of [{least:g}, {most}]; epsilon_low={low}, epsilon_high={high}"
    warnings.warn(f"{who}: {text}", stacklevel=3)
