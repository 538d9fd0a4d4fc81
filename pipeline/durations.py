"""Times and sizes as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min``, ``2.5 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
