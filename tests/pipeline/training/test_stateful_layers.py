"""Layers with stateful=True: trained and reset as under Keras, verified without a false alarm, and not too kindly."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from stages.tape.model_call import states_of_layers
from tests.faults.live import recorded_workers, replaced
from tests.levels import in_turn

layers = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore:the layer .* is stateful")
SAMPLES, STEPS = 3, 2


def model() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((STEPS, 2), batch_size=SAMPLES),
            layers.SimpleRNN(3, stateful=True, return_sequences=True, name="low"),
            layers.SimpleRNN(2, stateful=True, name="high"),
            layers.Dense(1, name="out"),
        ]
    )


def data(batches: int = 2) -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    shapes = (batches * SAMPLES, STEPS, 2), (batches * SAMPLES, 1)
    return draw.normal(size=shapes[0]).astype("float32"), draw.normal(size=shapes[1]).astype("float32")


class ResetsByHand(keras.callbacks.Callback):
    """What books on stateful layers advise between epochs."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for layer in self.own.layers[:2]:
            layer.reset_state()


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_states_go_on_stop_and_begin_anew_as_under_keras(eager: bool) -> None:
    whole, plain, (x, y) = model(), model(), data()
    plain.compile("sgd", "mse", run_eagerly=eager)
    held: list[tuple[Any, Any]] = []
    with Pipeline.split(whole, at=["low"], microbatches=1, recompute=True, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        for epochs, callbacks in ((1, False), (1, True)):
            given = {"batch_size": SAMPLES, "epochs": epochs, "shuffle": False, "verbose": 0}
            ours = pipe.fit(x, y, **given, verify_every=2, callbacks=[ResetsByHand(whole)] * callbacks)
            theirs = plain.fit(x, y, **given, callbacks=[ResetsByHand(plain)] * callbacks)
            held.append((ours.history["loss"], theirs.history["loss"]))
        held.append((pipe.predict(x, batch_size=SAMPLES, verbose=0), plain.predict(x, batch_size=SAMPLES, verbose=0)))
        pipe.compile("sgd", "mse", run_eagerly=eager)  # the states stay
        held.append((pipe.train_on_batch(x[:SAMPLES], y[:SAMPLES]), plain.train_on_batch(x[:SAMPLES], y[:SAMPLES])))
        pipe.reset_state()
        ResetsByHand(plain).on_epoch_begin(0)
        held.append((pipe.train_on_batch(x[:SAMPLES], y[:SAMPLES]), plain.train_on_batch(x[:SAMPLES], y[:SAMPLES])))
    held += zip(states(whole), states(plain), strict=True)
    for ours, theirs in held:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if eager else 2e-6)


def states(own: Any) -> list[Any]:
    return [np.asarray(state) for state in states_of_layers(own)]


def test_looking_for_masks_moves_no_state() -> None:
    """Where a mask may reach the loss, one pass more counts what is not masked."""
    (x, _), made = data(), []
    x[:, 1:] = 0.0
    for _ in range(2):
        keras.utils.set_random_seed(1)
        rows = [layers.GRU(2, stateful=True, return_sequences=True, name=name) for name in ("low", "high")]
        made.append(keras.Sequential([keras.Input((STEPS, 2), batch_size=SAMPLES), layers.Masking(), *rows]))
    target = np.ones((2 * SAMPLES, STEPS, 2), "float32")
    made[1].compile("sgd", "mse", run_eagerly=True)
    given = {"batch_size": SAMPLES, "epochs": 2, "shuffle": False, "verbose": 0}
    with Pipeline.split(made[0], at=["low"], microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        ours = pipe.fit(x, target, **given, verify_every=2)
    assert ours.history["loss"] == made[1].fit(x, target, **given).history["loss"]


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_verify_begins_with_the_states_leaves_them_and_sees_a_stage_that_forgets_them(eager: bool) -> None:
    whole, (x, y) = model(), data()
    asked = {"checks": ("tape", "steps"), "steps": 2}
    with Pipeline.split(whole, at=["low"], microbatches=1, transport="inproc") as pipe:
        pipe.compile("adam", "mse", run_eagerly=eager)
        with recorded_workers() as workers:
            pipe.train_on_batch(x[:SAMPLES], y[:SAMPLES])
        hosted = next(worker.hosted[0] for worker in workers if 0 in worker.hosted)
        before = [np.asarray(state) for state in hosted.variables("layer states")]
        assert all(state.any() for state in before)
        report = pipe.verify(x[SAMPLES : 2 * SAMPLES], y[:SAMPLES], **asked)
        assert report.ok, report
        assert {check.name for check in report.checks if check.ran} >= {"tape", "steps", "own"}
        for state, value in zip(hosted.variables("layer states"), before, strict=True):
            np.testing.assert_array_equal(state, value)

        def forgetful(forward: Any) -> Any:
            def forget(*args: Any, **kwargs: Any) -> Any:
                for state in hosted.variables("layer states"):
                    state.assign(tf.zeros_like(state.value))
                return forward(*args, **kwargs)

            return forget

        with replaced(hosted.stage, "forward_flat", forgetful):
            report = pipe.verify(x[:SAMPLES], y[:SAMPLES])
    assert not report.ok
    assert report.first is not None and report.first.stage == "stage0"
