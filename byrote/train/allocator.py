"""Memory that is freed in a step stays with the process, because the next step needs as much.

glibc gives large blocks back to the system at once, and every page of a new one is then a fault that zeroes it: on
`tiny` with four streams thousands a step. Only glibc knows `mallopt`; elsewhere nothing is done. What the process holds
no longer shrinks, so this is for programs that train, not for a library that is imported.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt's names for them
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Whether this C library could be told so."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER)) and bool(mallopt(MMAP_MAX, 0))
