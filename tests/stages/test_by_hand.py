"""Stages that a user calls by hand: adversaries that freeze each other in turn, and calls that cannot be."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from stages.errors import HandoffError
from tests.levels import in_turn

layers = keras.layers
MODES = pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])
LOSS = keras.losses.BinaryCrossentropy(from_logits=True)
ONES, ZEROS = np.ones((5, 1), "float32"), np.zeros((5, 1), "float32")
ROUNDS = 3


def gradients(stage: Stage) -> dict[str, Any]:
    """By layer and variable."""
    return {"/".join(path.split("/")[-2:]): gradient for path, gradient in stage.gradients().items()}


def adversaries() -> tuple[Any, Any]:
    keras.utils.set_random_seed(3)
    make = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(3)], name="make")
    judge = [keras.Input((3,)), layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dense(1)]
    return make, keras.Sequential(judge, name="judge")


def batches() -> Any:
    random = np.random.default_rng(0)
    for _ in range(ROUNDS):
        yield random.normal(size=(5, 2)).astype("float32"), random.normal(size=(5, 3)).astype("float32")


def by_plain_tapes() -> list[Any]:
    """The weights after some rounds under `tf.GradientTape`, as Keras users write it."""
    make, judge = adversaries()
    first, second = keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1)
    for noise, real in batches():
        judge.trainable = True
        fake = make(noise, training=False)
        with tf.GradientTape() as tape:
            loss = LOSS(ONES, judge(real, training=True)) + LOSS(ZEROS, judge(fake, training=True))
        first.apply_gradients(zip(tape.gradient(loss, judge.trainable_weights), judge.trainable_weights, strict=True))
        judge.trainable = False
        with tf.GradientTape() as tape:
            loss = LOSS(ONES, judge(make(noise, training=True), training=True))
        second.apply_gradients(zip(tape.gradient(loss, make.trainable_weights), make.trainable_weights, strict=True))
    return [*make.get_weights(), *judge.get_weights()]


@pytest.mark.parametrize("recompute", in_turn([False, True], 1, 2))
@MODES
def test_adversaries_freeze_each_other_and_move_in_their_own_steps(run_eagerly: bool, recompute: bool) -> None:
    """As under plain tapes, round after round; a frozen stage hands dL/dx on and has no gradients of its own."""
    make, judge = adversaries()
    first, second = keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1)
    maker = Stage(make, run_eagerly=run_eagerly, recompute=recompute)
    judging = Stage(judge, loss=LOSS, run_eagerly=run_eagerly, recompute=recompute)
    for noise, real in batches():
        judge.trainable = True
        fake = maker.forward(noise, training=False)
        for k, (x, y) in enumerate([(real, ONES), (fake, ZEROS)]):
            judging.forward_loss(x, y, microbatch=k)
            judging.backward(microbatch=k)
        before = make.get_weights()
        judging.apply(first)
        assert all(map(np.array_equal, before, make.get_weights()))
        judge.trainable = False
        before = [v.numpy() for v in judge.weights]
        judging.forward_loss(maker.forward(noise), ONES)
        maker.backward(judging.backward())
        assert judging.gradients() == {}
        maker.apply(second)
        assert all(map(np.array_equal, before, (v.numpy() for v in judge.weights)))
    for ours, theirs in zip([*make.get_weights(), *judge.get_weights()], by_plain_tapes(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


@MODES
def test_gradients_wait_for_a_layer_that_is_frozen_meanwhile(run_eagerly: bool) -> None:
    """A forward decides what gets gradients, an update changes what is trainable then; the rest is as it was."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="low"), layers.Dense(2, name="high")])
    stage, x, ones = Stage(model, run_eagerly=run_eagerly), np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    low, high = model.layers
    stage.forward(x)
    low.trainable = False
    stage.backward(ones)  # of a forward that began when both were trainable
    assert set(gradients(stage)) == {"high/kernel", "high/bias"}
    low.trainable, high.trainable = True, False
    found = gradients(stage)
    np.testing.assert_allclose(found["low/bias"], 4 * high.kernel.numpy().sum(1), rtol=1e-6)
    expected = low.bias.numpy() - found["low/bias"]
    stage.apply(keras.optimizers.SGD(1.0))
    np.testing.assert_allclose(low.bias.numpy(), expected, rtol=1e-6)
    assert not high.bias.numpy().any()
    high.trainable = True
    assert all(gradient is None for gradient in stage.gradients().values())  # the update cleared them all


@MODES
def test_what_trains_nothing_or_cannot_be_is_said(run_eagerly: bool) -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="top")])
    stage, x = Stage(model, "one", run_eagerly=run_eagerly), np.ones((4, 3), "float32")
    stage.forward(x)
    with pytest.raises(HandoffError, match=r"stage 'one', backward of microbatch 0: there is nothing to go backward"):
        stage.backward()
    stage.backward(np.ones((4, 2), "float32"))  # and it still waits for the right one
    with pytest.raises(HandoffError, match=r"forward\(\) was called inside of a tf.function.*run_eagerly=False"):
        tf.function(stage.forward)(tf.constant(x))


def test_a_regulariser_alone_is_something_to_go_backward_from() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.5), name="dense")]
    )
    stage = Stage(model)
    stage.forward(np.ones((4, 3), "float32"))
    stage.backward()
    np.testing.assert_allclose(gradients(stage)["dense/kernel"], model.layers[0].kernel.numpy(), rtol=1e-6)


def test_a_tape_of_ones_own_around_a_stage() -> None:
    """It goes through an eager stage; of a compiled one it is told what to do, unless it ends before the stage."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="top")])
    x, kernel = tf.constant(np.ones((4, 3), "float32")), model.layers[0].kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(Stage(model).forward(x))
    np.testing.assert_array_equal(tape.gradient(loss, kernel.value), np.full((3, 2), 4.0))
    compiled = Stage(model, run_eagerly=False)
    for source in (kernel.value, x):
        compiled.zero_gradients()
        with tf.GradientTape() as tape:
            if source is x:
                tape.watch(x)
            loss = tf.reduce_sum(compiled.forward(x))
        with pytest.raises(HandoffError, match=r"through a compiled stage.*stage.backward\(\), or.*run_eagerly=True"):
            tape.gradient(loss, source)
    compiled.zero_gradients()
    with tf.GradientTape() as tape:
        out = compiled.forward(x)
        tape.watch(out)
        loss = tf.reduce_sum(out**2)
    compiled.backward(tape.gradient(loss, out))
    np.testing.assert_allclose(gradients(compiled)["top/kernel"], np.tile(2 * np.sum(out, 0), (3, 1)), rtol=1e-6)


@MODES
def test_weights_that_change_before_a_recomputed_backward_are_named(run_eagerly: bool) -> None:
    """A kept tape has the weights of its forward; a recomputed one would silently have others."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh", name="low"), layers.Dense(1, name="high")])
    x, ones, kernel = np.ones((4, 3), "float32"), np.ones((4, 1), "float32"), model.layers[1].kernel
    stage = Stage(model, "again", recompute=True, run_eagerly=run_eagerly)
    stage.forward(x)
    right = kernel.numpy()
    kernel.assign(right)  # the same bits
    expected = stage.backward(ones)
    stage.forward(x)
    kernel.assign(2 * right)
    with pytest.raises(
        HandoffError, match=r"'again', backward of microbatch 0: '(seq.*/)?high/kernel' changed since its forward"
    ):
        stage.backward(ones)
    kernel.assign(right)
    np.testing.assert_array_equal(stage.backward(ones), expected)
    kept = Stage(model, run_eagerly=run_eagerly)
    kept.forward(x)
    kernel.assign(2 * right)
    np.testing.assert_allclose(kept.backward(ones), expected, rtol=1e-6)
