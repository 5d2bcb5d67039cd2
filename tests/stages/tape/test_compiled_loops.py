"""Compiled stages with loops inside: the functions of a loop must live as long as the halves of the cut graph."""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest

from stages import Stage
from tests.levels import in_turn

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer", in_turn(["LSTM", "GRU"], 0, 1))
def test_a_loop_of_any_length_survives_a_garbage_collection(layer: str, recompute: bool) -> None:
    model = keras.Sequential([keras.Input((None, 3)), getattr(keras.layers, layer)(4, return_sequences=True)])
    eager, compiled = Stage(model), Stage(model, run_eagerly=False, recompute=recompute)
    for steps in (5, 2):
        x = np.random.default_rng(steps).normal(size=(2, steps, 3)).astype("float32")
        for stage in (eager, compiled):
            stage.forward(x)
            gc.collect()
            stage.backward(np.ones((2, steps, 4), "float32"))
            gc.collect()
    for ours, theirs in zip(compiled.gradients().values(), eager.gradients().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
