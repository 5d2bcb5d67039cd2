"""The states of the generators that a user's program draws from: Python's, NumPy's, Keras's, and TensorFlow's seeds.

TensorFlow's own generators inside operations have no state that can be read; with a global seed they draw the same in
every process.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from stages.keras_training_internals import global_seed_state
from stages.tensorflow_internals import drawn_seeds, global_seed, set_drawn_seeds


def read_random_states() -> dict[str, Any]:
    """The states as plain data."""
    keras_state = global_seed_state()
    version, words, drawn = random.getstate()
    return {
        "python": (version, np.array(words, np.uint32), drawn),
        "numpy": np.random.get_state(),
        "keras": None if keras_state is None else np.asarray(keras_state.numpy()),
        "tensorflow": None if global_seed() is None else (global_seed(), drawn_seeds()),
    }


def write_random_states(states: dict[str, Any]) -> None:
    """Let the generators go on from states that `read_random_states` gave, also in another process."""
    if states["keras"] is not None:
        global_seed_state(make=True).assign(states["keras"])  # type: ignore[union-attr]
    if states["tensorflow"] is not None:
        set_drawn_seeds(*states["tensorflow"])
    version, words, drawn = states["python"]
    random.setstate((version, tuple(map(int, words)), drawn))  # last: Keras's is made from it
    np.random.set_state(states["numpy"])


__all__ = ["read_random_states", "write_random_states"]
