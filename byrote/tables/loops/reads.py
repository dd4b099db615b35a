"""Compiled loops of `preads.py`: system calls without the GIL. All addresses and counts are integers."""

# No `from __future__ import annotations` here: numba reads the signatures.
import os
from typing import Any

from numba.core import types

from byrote.compiled.loops import compiled

_long, _int = types.int64, types.int32
# Of libc, found when the code is linked; addresses and lengths are passed as int64.
pread: Any = types.ExternalFunction("pread", _long(_int, _long, _long, _long))
preadv2: Any = types.ExternalFunction("preadv2", _long(_int, _long, _int, _long, _int))
NOWAIT = getattr(os, "RWF_NOWAIT", 0)


@compiled()
def _run_end(places, size, begin, most):
    """The end of the run of neighbours that begins here, `most` records at most."""
    end = begin + 1
    while end < len(places) and end - begin < most and places[end] == places[end - 1] + size:
        end += 1
    return end


@compiled()
def without_waiting(fd, places, size, out, vector_place, vector, misses, most):
    """Read what is in memory; how many runs are not, where they begin goes to `misses`.

    `vector`: two int64 at address `vector_place`, a struct iovec. `most` = 0: record by record, all to vector[0].
    """
    missed, i = 0, 0
    while i < len(places):
        end = i + 1
        if most:
            end = _run_end(places, size, i, most)
            vector[0], vector[1] = out + i * size, (end - i) * size
        if preadv2(fd, vector_place, 1, places[i], NOWAIT) != vector[1]:
            misses[missed] = i
            missed += 1
        i = end
    return missed


@compiled()
def waiting(fd, places, size, out, misses, most):
    """Read the runs that begin at `misses`; whether any of them could not be read to its end."""
    for j in range(len(misses)):
        i = misses[j]
        length, done = (_run_end(places, size, i, most) - i) * size, 0
        while done < length:
            got = pread(fd, out + i * size + done, length - done, places[i] + done)
            if got <= 0:
                return True
            done += got
    return False
