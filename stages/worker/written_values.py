"""The values that a worker wrote down (`stages.worker.boundary`), as its driver reads them once it is dead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.process.boundary_memory import BoundaryMemory, Region
from transport.dtypes import DTYPES

Array = np.ndarray[Any, Any]
ByGroup = dict[str, dict[int, list[Array]]]
"""{group: {stage: values of its variables}}, in the order in which they are to be written."""

GROUPS: Mapping[int, Sequence[str]] = {
    Region.LARGE: ("model", "optimizer"),
    Region.SMALL: ("states", "metrics", "besides", "layer states", "kept states"),
}
"""What lies in which region; a group of the second is part of one of the first, and newer, or is in none."""


def read_boundary(memory: BoundaryMemory, latest: int | None) -> tuple[ByGroup, dict[int, Any]] | None:
    """What a worker wrote down.

    Args:
        memory: The worker's.
        latest: The number of the order behind which the values were so; None: the last ones.

    Returns:
        The values, and {stage: for each of its heads what its metrics were built from}; None if there is nothing.
    """
    found: ByGroup = {group: {} for groups in GROUPS.values() for group in groups}
    examples: dict[int, Any] = {}
    for region in GROUPS:
        entry = memory.read(region, latest)
        if entry is None:
            return None
        head, data = json.loads(entry[0]), entry[1]
        place = 0
        for stage, group, kinds in head["groups"]:
            arrays = found[group].setdefault(stage, [])
            for name, shape in kinds:
                dtype = DTYPES[name]
                size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
                arrays.append(data[place : place + size].view(dtype).reshape(shape))
                place += size
        examples |= {int(stage): some for stage, some in head["examples"].items()}
    return found, examples


__all__ = ["GROUPS", "ByGroup", "read_boundary"]
