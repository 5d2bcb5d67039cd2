"""An operation that fails inside a stage is told with its layer and the tensors that it took."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline, Segment, WorkerError
from stages import HandoffError, Stage

layers = keras.layers
TOLD = (
    r"stage 'readout', forward of microbatch 0: the layer 'masked' \(Multiply\) cannot take float32 \(5, 480, 2\) from "
    r"'reshape.*' and float32 \(32, 75, 1\) from 'mask' together"
)


def impossible(nested: bool = False) -> Any:
    steps, mask = keras.Input((75, 4), name="steps"), keras.Input((75, 1), name="mask")
    y = layers.Dense(2)(layers.Dropout(0.5, name="drop")(steps))
    model = keras.Model([steps, mask], layers.Multiply(name="masked")([keras.ops.reshape(y, (5, -1, 2)), mask]))
    return keras.Model([steps, mask], model([steps, mask])) if nested else model


def batch() -> list[Any]:
    return [np.ones((32, 75, 4), "float32"), np.ones((32, 75, 1), "float32")]


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_the_layer_and_its_tensors_are_told(run_eagerly: bool, training: bool, nested: bool) -> None:
    model = impossible(nested)
    stage = Stage(model, "readout", run_eagerly=run_eagerly)
    with pytest.raises(HandoffError, match=TOLD) as told:
        stage.forward(batch(), training=training)
    assert "\x1b" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_worker_tells_it_too(run_eagerly: bool) -> None:
    with Pipeline([Segment(model=impossible(), name="readout")], microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=run_eagerly)
        with pytest.raises(WorkerError, match=TOLD):
            pipe.predict_on_batch(batch())


def test_an_error_of_the_loss_is_told_with_its_target_and_is_no_layers_fault() -> None:
    stage = Stage(keras.Sequential([keras.Input((2,)), layers.Dense(3)]), loss="sparse_categorical_crossentropy")
    with pytest.raises(HandoffError, match=r"the loss cannot take the target float64 \(4, 5\).*(shape|logits)") as told:
        stage.forward_loss(np.ones((4, 2), "float32"), np.zeros((4, 5)))
    assert "the layer" not in str(told.value)
