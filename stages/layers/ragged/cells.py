"""Facts of a recurrent cell: the sizes of its state and output, its dropout masks.

Keras's cells tell some of it in one way and stacked cells in another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras


def reset_dropout(cell: Any) -> None:
    """Forget the dropout masks, which a cell keeps from step to step."""
    for name in ("reset_dropout_mask", "reset_recurrent_dropout_mask"):
        reset: Callable[[], None] | None = getattr(cell, name, None)
        if reset is not None:
            reset()
    for inner in getattr(cell, "cells", ()):
        reset_dropout(inner)


def watched_state(cell: Any, state: list[Any]) -> Any:
    """The state that is read out: the first tensor of it; of stacked cells, of the last one's."""
    stacked = isinstance(cell, keras.layers.StackedRNNCells)
    return keras.tree.flatten(state[-1:] if stacked else state)[0]


def state_units(cell: Any) -> int:
    """The size of what is read out."""
    while isinstance(cell, keras.layers.StackedRNNCells):
        cell = cell.cells[-1]
    return int(keras.tree.flatten(cell.state_size)[0])


def output_units(cell: Any) -> int:
    """The size of its output."""
    found = getattr(cell, "output_size", None)
    return state_units(cell) if found is None else int(found)


def cell_takes_training(cell: Any) -> bool:
    """Whether its `call` wants to know the phase."""
    return "training" in inspect.signature(cell.call).parameters


def draw_dropout(cell: Any, element: Any, state: list[Any]) -> None:
    """Draw the dropout masks before a loop of TensorFlow's: drawn inside, they could not be kept from step to step.

    Args:
        cell: The cell.
        element: What it reads, (batch, features).
        state: Its state.
    """
    if hasattr(cell, "get_dropout_mask"):
        cell.get_dropout_mask(element)
        cell.get_recurrent_dropout_mask(keras.tree.flatten(state)[0])
    inner = getattr(cell, "cells", ())
    if any(hasattr(each, "get_dropout_mask") for each in inner):
        for each, own in zip(inner, state, strict=True):
            own = list(own) if isinstance(own, list | tuple) else [own]
            draw_dropout(each, element, own)
            element, _ = each(element, own)
