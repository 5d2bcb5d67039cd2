"""What people reported of schedules elsewhere, hangs, refusals and wrong gradients: each trains as plain Keras does.

The right values are those of `keras.Model.train_on_batch` over the whole batch, with the model uncut.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import ScheduleError
from tests.levels import in_turn

layers, ops = keras.layers, keras.ops
STEPS = 3

ORDERS = [
    # pytorch/torchtitan#775, pytorch/pytorch#144702: 1F1B hangs, then refuses, with fewer microbatches than stages
    ("1f1b", 4, 1, 6),
    ("zb-h1", 4, 2, 6),
    # pytorch/torchtitan#774: a V over 4 ranks with 8 microbatches ends in KeyError: 6
    ("zb-v", 8, 8, 8),
    # pytorch/PiPPy#1064: GPipe hangs with one microbatch
    ("gpipe", 3, 1, 6),
    # pytorch/pytorch#129597, pytorch/PiPPy#1048: interleaved refuses what the number of ranks does not divide
    ("interleaved", 4, 3, 7),
    # hpcaitech/ColossalAI#2156: a deadlock where there are as many microbatches as stages
    ("zb-h2", 3, 3, 6),
    # NVIDIA/Megatron-LM#5100: send and receive wait for each other from 4 ranks on; with chunks
    ("interleaved", 8, 8, 8),
    # the last microbatch is smaller, and the last batch has fewer samples than microbatches
    ("zb-h1", 3, 4, 7),
    ("zb-v", 4, 4, 3),
    # pytorch/pytorch#138925: one stage only
    ("zb-h1", 1, 4, 6),
    ("zb-v", 2, 3, 6),
]


def row(stages: int) -> Any:
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((3,)), *(layers.Dense(3, "tanh", name=f"d{i}") for i in range(stages))])


def data(samples: int, width: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(samples)
    return tuple(rng.normal(size=(samples, width)).astype("float32") for _ in range(2))


def assert_trains_as_keras(model: Any, x: Any, y: Any, *, at: Any, eager: bool, **options: Any) -> None:
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=eager)
    with Pipeline.split(model, at=at, transport="inproc", threads=1, **options) as pipe:
        pipe.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=eager)
        for _ in range(STEPS):
            assert pipe.train_on_batch(x, y) == pytest.approx(twin.train_on_batch(x, y), rel=2e-6)
        for ours, theirs in zip(pipe.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("schedule", "stages", "microbatches", "samples"), in_turn(ORDERS, 0, 5, several=True))
def test_any_number_of_microbatches_trains(schedule: str, stages: int, microbatches: int, samples: int) -> None:
    at = [f"d{i}" for i in range(stages - 1)]
    x, y = data(samples)
    assert_trains_as_keras(row(stages), x, y, at=at, eager=True, schedule=schedule, microbatches=microbatches)


class Steep(layers.Layer):
    """The identity with three times its gradient, by a gradient function of its own."""

    def call(self, x: Any) -> Any:
        @ops.custom_gradient
        def steep(x: Any) -> Any:
            def grad(*args: Any, upstream: Any = None) -> Any:
                return (args[0] if upstream is None else upstream) * 3.0

            return x * 1.0, grad

        return steep(x)


def with_traps() -> Any:
    """Between two cuts: a layer used twice on one path, a tensor split in two alike, a gradient function of its own."""
    keras.utils.set_random_seed(4)
    x = keras.Input((4,))
    h = layers.Dense(4, "tanh", name="low")(x)
    twice = layers.Dense(4, name="twice")
    h = twice(twice(h))
    left, right = ops.split(h, 2, axis=-1)
    h = layers.Concatenate()([layers.Dense(2, "tanh")(right), layers.Dense(2)(left * right)])
    h = Steep(name="steep")(layers.Dense(4)(h))
    return keras.Model(x, layers.Dense(4, name="top")(layers.Dense(4, "tanh")(h)))


@pytest.mark.parametrize(("schedule", "eager"), in_turn([("zb-h1", False), ("zb-h1", True)], 0, 1, several=True))
def test_what_split_backwards_get_wrong_elsewhere_is_right(schedule: str, eager: bool) -> None:
    """pytorch/pytorch#180952 counts shared weights twice, #170277 adds up gradients of several outputs, #166577."""
    x, y = data(7, 4)
    assert_trains_as_keras(with_traps(), x, y, at=["low", "steep"], eager=eager, schedule=schedule, microbatches=4)


def test_what_cannot_be_is_said_before_anything_starts() -> None:
    """Odd numbers of stages in pairs, and windows with halves: a sentence, and no hang."""
    for schedule in ("interleaved", "zb-v"):
        with pytest.raises(ScheduleError, match=r"3 stage\(s\) cannot be .* such as 4"):
            Pipeline.split(row(3), stages=3, schedule=schedule, transport="inproc")
