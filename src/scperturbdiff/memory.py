"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

UNKNOWN = 64 * 2**30
"""Bytes that are assumed where a system does not say."""
CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much a container may use."""


def memory_bytes() -> int:
    """Bytes of memory of this machine, or that this container may use."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        found = UNKNOWN
    try:
        limit = CONTAINER.read_text(encoding="ascii").strip()
    except OSError:
        limit = ""
    return min(found, int(limit)) if limit.isdigit() else found


def check_memory(n_bytes: float, what: str, remedy: str) -> None:
    """Raise a `ValueError` before more memory is asked for than there is."""
    there = memory_bytes()
    if n_bytes > there:
        raise ValueError(f"{what} need {n_bytes / 2**30:,.0f} GB of memory; there are {there / 2**30:,.0f}. {remedy}")
