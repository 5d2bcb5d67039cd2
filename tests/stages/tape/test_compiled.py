"""Compiled tapes: one trace for all batch sizes, the eager tapes' results within rounding, states moved once."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from tests.levels import in_turn
from tests.models import STACKS, Stack, cross_entropy, grouped, part
from tests.one_tape import assert_same_bits, difference

layers = keras.layers


def run(parts: list[Any], x: Any, y: Any, run_eagerly: bool, recompute: bool) -> tuple[list[Any], list[Any]]:
    """Gradients of two unequal microbatches through stages, and all states after them."""
    stages = [
        Stage(model, loss=cross_entropy() if model is parts[-1] else None, run_eagerly=run_eagerly, recompute=recompute)
        for model in parts
    ]
    for k, rows in enumerate((slice(0, 3), slice(3, 8))):
        h = x[rows]
        for stage in stages[:-1]:
            h = stage.forward(h, microbatch=k)
        stages[-1].forward_loss(h, y[rows], microbatch=k, weight=(3 / 8, 5 / 8)[k])
    for k in range(2):
        gradient = None
        for stage in reversed(stages):
            gradient = stage.backward(gradient, microbatch=k)
    found = [gradient for stage in stages for gradient in stage.gradients().values()]
    return found, [v.numpy() for model in parts for v in model.non_trainable_variables]


@pytest.mark.parametrize("recompute", in_turn([False, True], 1, 2))
@pytest.mark.parametrize("chosen", in_turn(STACKS, 4, len(STACKS)), ids=str)
def test_compiled_stages_are_eager_stages(chosen: Stack, recompute: bool) -> None:
    """Gradients within 1e-6 of the largest, statistics within rounding, seeds exactly where eager ones are."""
    x, y = chosen.data(8)
    eager, states = run(grouped(chosen.build(), 2), x, y, True, False)
    compiled, moved = run(grouped(chosen.build(), 2), x, y, False, recompute)
    assert difference(compiled, eager) <= 1e-6
    for a, b in zip(moved, states, strict=True):
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)


class Counting(layers.Layer):  # type: ignore[misc]
    """Counts how often its Python runs: once a trace when compiled."""

    runs = 0

    def call(self, inputs: Any) -> Any:
        Counting.runs += 1
        return inputs * 2.0


@pytest.mark.parametrize("recompute", [False, True])
def test_another_batch_size_needs_no_new_trace(recompute: bool) -> None:
    """Python runs for the first batch only; the results for the others are theirs."""
    stage = Stage(part((3,), Counting(), layers.Dense(2)), run_eagerly=False, recompute=recompute)
    for k, size in enumerate((4, 1, 7)):
        x = np.full((size, 3), k + 1.0, "float32")
        y = stage.forward(x, microbatch=k)
        dx = stage.backward(tf.ones_like(y), microbatch=k)
        assert dx.shape == x.shape
        if k == 0:
            traced = Counting.runs
    assert Counting.runs == traced > 0
    stage.forward(np.ones((2, 3), "float32"), training=False)
    traced = Counting.runs
    stage.forward(np.ones((5, 3), "float32"), training=False)
    assert Counting.runs == traced


def test_the_last_stage_traces_once_for_every_weight() -> None:
    """Weights and shares of microbatches are arguments, not constants of the trace."""
    stage = Stage(part((3,), Counting(), layers.Dense(2)), loss="mse", run_eagerly=False)
    x, y = np.ones((2, 3), "float32"), np.zeros((2, 2), "float32")
    full = float(stage.forward_loss(x, y, microbatch=0))
    traced = Counting.runs
    half = float(stage.forward_loss(x, y, microbatch=1, weight=0.5))
    assert Counting.runs == traced
    assert half == pytest.approx(full / 2)


def test_recomputing_leaves_states_as_they_are_now() -> None:
    """Forward 0, forward 1, backward 0: the backward draws mask 0 again, and the state stays behind mask 1."""
    keras.utils.set_random_seed(3)
    model = part((50,), layers.Dropout(0.5))
    stage = Stage(model, run_eagerly=False, recompute=True)
    x = np.ones((2, 50), "float32")
    masks = [stage.forward(x, microbatch=k).numpy() for k in range(2)]
    (state,) = model.non_trainable_variables
    before = state.numpy()
    for k in range(2):
        np.testing.assert_array_equal(stage.backward(np.ones((2, 50), "float32"), microbatch=k), masks[k])
    np.testing.assert_array_equal(state.numpy(), before)
    assert not np.array_equal(*masks)


def test_sums_start_anew_after_apply_and_when_other_variables_train() -> None:
    """Nothing of one step is left in the next; freezing a layer makes the next traces leave it out."""
    model = part((3,), layers.Dense(4), layers.Dense(2))
    stage = Stage(model, run_eagerly=False)
    x, dy = np.ones((2, 3), "float32"), np.ones((2, 2), "float32")
    seen = []
    for _ in range(2):
        stage.forward(x)
        stage.backward(dy)
        seen.append(list(stage.gradients().values()))
        stage.apply(keras.optimizers.SGD(0.0))
    assert_same_bits(seen[0], seen[1], "gradient")
    model.layers[0].trainable = False
    assert all(gradient is None for gradient in stage.gradients().values())
    stage.forward(x)
    stage.backward(dy)
    assert_same_bits(list(stage.gradients().values()), seen[0][2:], "gradient")
