"""Randomised response: labels that are true with a known chance only, for the side that has them.

A label is kept with chance e^ε / (e^ε + K - 1), else it becomes one of the K - 1 others. That is ε-differential privacy
of labels if it is drawn once. Drawn anew in every epoch, the majority of 5 epochs tells 88 of 100 labels where one draw
tells 73, and ε counts once for each draw.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.parties.defences.ranges import positive, whole

Array = np.ndarray[Any, Any]


def chance_kept(epsilon: float, classes: int) -> float:
    """The chance that a label stays what it is."""
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def randomised_response(labels: Any, epsilon: float, classes: int, seed: int) -> Array:
    """Labels to train on in place of the true ones. Draw once, and keep them: each draw costs ε again.

    Args:
        labels: (n,) or (n, 1) classes 0 to `classes` - 1.
        epsilon: ε of differential privacy, positive.
        classes: K, at least 2.
        seed: Equal seeds give equal labels; to be kept as secret as the true ones.

    Returns:
        Classes of the shape and dtype of `labels`.

    Raises:
        DataError: Labels are no such classes.
        SplitError: ε or the number of classes is out of its range.
    """
    epsilon = positive("randomised_response", "epsilon", epsilon)
    classes = whole("randomised_response", "classes", classes)
    true = np.asarray(labels)
    if true.ndim not in (1, 2) or (true.ndim == 2 and true.shape[1] != 1):
        raise DataError(f"labels must be (n,) or (n, 1) numbers of classes, not one-hot, received {true.shape}")
    if classes < 2 or true.dtype.kind not in "biuf" or not np.isin(true, np.arange(classes)).all():
        raise DataError(f"labels must be whole numbers from 0 to {classes - 1}, of at least two classes")
    random = np.random.Generator(np.random.Philox(seed))
    kept = random.random(true.shape) < chance_kept(epsilon, classes)
    other = (true.astype(np.int64) + random.integers(1, classes, true.shape)) % classes
    return np.where(kept, true, other.astype(true.dtype))
