"""The tensors that stages sent in an observed step, each whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.worker.observers import ACTIVATION, Sight

Array = np.ndarray[Any, Any]


def sent_whole(seen: Mapping[Sight, Array | None]) -> dict[tuple[int, str], Array]:
    """{(stage, tensor): what it sent (n, ...)}, all microbatches joined, of a batch that is not cut in time.

    Args:
        seen: What the workers saw, as `Driver.seen` gives it.
    """
    parts: dict[tuple[int, str], dict[int, Array]] = {}
    for sight, array in seen.items():
        if sight.what == ACTIVATION and sight.sent and array is not None:
            parts.setdefault((sight.producer, sight.tensor), {})[sight.microbatch] = array
    return {place: np.concatenate([array for _, array in sorted(some.items())]) for place, some in parts.items()}


__all__ = ["sent_whole"]
