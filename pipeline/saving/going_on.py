"""A training that was saved in the middle: what its next `fit` goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Resumed:
    """The state of a training behind one of its batches, as far as workers do not have it when they start.

    Attributes:
        path: The checkpoint that it was read from.
        progress: As `pipeline.training.fit_run.FitRun` wrote it.
        between: {group of variables: {stage: their values}} that one step leaves for the next.
        begins: The same of the workers' ``model`` and ``optimizer``, which they start with.
        compiled: What the pipeline was compiled with; under another `compile` training cannot go on exactly.
        rates: Those of its optimizers, as `Compiled.rates` gives them.
    """

    path: Path
    progress: Mapping[str, Any]
    between: Mapping[str, Mapping[int, Sequence[Array]]]
    begins: Mapping[str, Mapping[int, Sequence[Array]]]
    compiled: Any
    rates: Sequence[float | None]


__all__ = ["Resumed"]
