"""Settings that adapters refuse by name, because the framework does that part itself and would ignore them."""

from __future__ import annotations

from typing import Any

HEAD_SETTINGS, NO_HEAD = ("backward", "tail_mass", "tail"), "the framework's own head makes the log-probs"


def refuse(settings: dict[str, Any], why: str, *names: str) -> None:
    """Raises ValueError for a setting of `names` that is set."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name}: expected it unset, got {settings[name]!r}; {why}")
