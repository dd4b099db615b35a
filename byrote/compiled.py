"""Whether loops can be compiled here. numba is a dependency, but nothing that a GPU runs needs it: where it cannot be
installed, every compiled loop gives way to its plain twin, which gives the same numbers.
"""

from functools import cache
from importlib.util import find_spec


@cache
def numba_is_there() -> bool:
    return find_spec("numba") is not None
