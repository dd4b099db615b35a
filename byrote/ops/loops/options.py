"""How the loops are compiled, and the exponential that their vectors share."""

# No `from __future__ import annotations` here: numba reads the signatures.
from typing import Any

import numpy as np

from byrote.compiled.loops import compiled

ONE, TWO, THREE = "float32[::1]", "float32[:,::1]", "float32[:,:,::1]"
# Sums may be reordered, NaN and infinity stay. A division by zero is infinite: a check would keep loops from vectors.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}

LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LEAST, MOST = np.float32(-87), np.float32(88)
# exp on [-ln 2 / 2, ln 2 / 2], to a rounding of float32 (Cephes, expf)
C5, C4, C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C2, C1, C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
HALF, UNIT = np.float32(0.5), np.float32(1)


@compiled(inline="always", error_model="numpy", fastmath={"contract", "nsz"})
def exp(x):
    """e^x within 2 roundings, of x cut to [-87, 88]; NaN stays. Arithmetic alone, which becomes vectors."""
    value = min(max(x, LEAST), MOST) if x == x else x
    whole = np.floor(value * LOG2_E + HALF)
    r = value - whole * LN2_HIGH - whole * LN2_LOW
    series = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * r * r + r + UNIT) * power
