"""The distance of two arrays, as a part of the largest |value|."""

from __future__ import annotations

from typing import Any

import numpy as np


def distance(ours: Any, theirs: Any, scale: float | None = None) -> float:
    """The largest |difference| as a part of the largest |value|; places where neither is finite count as equal.

    Args:
        ours: Numbers: arrays or tensors.
        theirs: The numbers that they should be.
        scale: The largest |value| of what these belong to; default: of `theirs`.

    Returns:
        0 of what is equal, infinity where the shapes differ or one alone is not finite.
    """
    a, b = (np.asarray(one).astype(np.float64) for one in (ours, theirs))
    if a.shape != b.shape:
        return float("inf")
    lost = ~np.isfinite(a) & ~np.isfinite(b)
    a, b = np.where(lost, 0, a), np.where(lost, 0, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    difference = float(np.abs(a - b).max(initial=0.0))
    largest = float(np.abs(b).max(initial=0.0)) if scale is None else scale
    return difference / (largest or 1.0) if difference else 0.0


__all__ = ["distance"]
