"""Scales that float16 holds exactly, so that kernels may keep them in two bytes.

A scale changes by at most 2^-11 of itself, a twentieth of a percent, before codes are computed with it: what is stored
and what is computed stay the same everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LIMITS = np.finfo(np.float16)


def half_scales(scales: Array) -> Array:
    """float32 of any shape: the nearest number that float16 has; what lies outside of its normal numbers stays."""
    inside = (scales >= _LIMITS.tiny) & (scales <= _LIMITS.max)
    rounded = np.where(inside, scales, np.float32(1)).astype(np.float16).astype(np.float32)
    result: Array = np.where(inside, rounded, scales).astype(np.float32)
    return result
