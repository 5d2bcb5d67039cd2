"""Mixed precision means the same: what crosses a cut keeps its precision, and loss scaling is decided by all stages.

The other side is Keras's own LossScaleOptimizer on the uncut model, over steps of which some overflow.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import in_turn
from tests.pipeline.reference.twins import assert_same_arrays, callback_model, numbers, twins
from tests.pipeline.training.same_models import chain

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

layers = keras.layers
optimizers = keras.optimizers
X, Y = numbers(12)
LOUD = np.full_like(X, 6e4)
"""Finite in float16, but the gradient of the first kernel is this much as large, and that is not."""
BROKEN = np.where(np.arange(12)[:, None] == 7, np.float32(1e30), X)
"""One sample is infinite in float16, and with it the loss."""
BATCHES = (LOUD, X, X, BROKEN, X, X, X, BROKEN, BROKEN, X)
CUTS = ["a", "b"]


@pytest.fixture(params=in_turn(["mixed_float16", "mixed_bfloat16"], 1, 2))
def policy(request: Any) -> Any:
    yield from set_policy(request.param)


@pytest.fixture
def half() -> Any:
    yield from set_policy("mixed_float16")


def set_policy(name: str) -> Any:
    """Keras's global policy while a test runs."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    yield name
    keras.config.set_dtype_policy(before)


def stack() -> Any:
    """The first kernel is zero, so that only its gradient depends on how large the inputs are."""
    return chain(
        (6,),
        layers.Dense(5, "tanh", kernel_initializer="zeros", bias_initializer="ones", name="a"),
        layers.Dense(4, "tanh", name="b"),
        layers.Dropout(0.2, name="drop"),
        layers.Dense(1, dtype="float32", name="c"),
    )


def plain() -> dict[str, Any]:
    return {"optimizer": optimizers.Adam(0.02), "loss": "mse"}


def growing() -> dict[str, Any]:
    """The scale doubles after two good steps."""
    inner = optimizers.SGD(0.1, momentum=0.9)
    return {"optimizer": optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=2), "loss": "mse"}


def scaling(twin: Any) -> tuple[float, int, int]:
    """Scale, good steps since it changed, updates."""
    optimizer = twin.optimizer
    return float(optimizer.dynamic_scale), int(optimizer.step_counter), int(optimizer.iterations)


def test_training_is_keras(policy: str) -> None:
    """Bit for bit, with the optimizer wrapped where Keras wraps it, and unequal microbatches are one tape."""
    with twins(stack, plain, at=CUTS) as pair:
        assert pair.pipe.segments[1].model.inputs[0].dtype == policy.removeprefix("mixed_")
        pair.assert_fit_alike(X, Y, batch_size=5, epochs=2)
        assert type(pair.pipe.optimizer) is type(pair.model.optimizer)
        assert isinstance(pair.pipe.optimizer, optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        theirs, ours = pair.both(lambda twin: twin.predict(X, verbose=0))
        assert_same_arrays([ours], [theirs])
    for schedule, recompute in (("gpipe", True), ("1f1b", False)):
        options = {"microbatches": 5, "schedule": schedule, "recompute": recompute, "transport": "inproc"}
        with Pipeline.split(stack(), at=CUTS, **options) as pipe:
            pipe.compile(**plain(), run_eagerly=True)
            pipe.verify(X, Y).raise_if_failed()
            pipe.compile(**plain())
            rounding = {"mixed_float16": 2**-9, "mixed_bfloat16": 2**-6}[policy]
            pipe.verify(X, Y, tolerance=rounding).raise_if_failed()  # fused operations do not round in between


@pytest.mark.parametrize("compiled", [plain, growing], ids=["plain", "growing"])
def test_overflow_skips_the_update_in_every_stage(compiled: Any, half: str) -> None:
    """After every step: the weights, the scale, the count of good steps and that of updates are Keras's."""
    with twins(stack, compiled, at=CUTS) as pair:
        found = pair.pipe.gradients(LOUD, Y)
        lost = [name for name, gradient in found.items() if not np.isfinite(gradient).all()]
        original = pair.pipe.session.setup.original
        assert [name.partition("/")[2] for name in lost] == [original.trainable_variables[0].path]
        scales = []
        for x in BATCHES:
            before = pair.pipe.get_weights()
            theirs, ours = pair.both(lambda twin, x=x: twin.train_on_batch(x, Y))
            np.testing.assert_array_equal(ours, theirs)
            assert scaling(pair.pipe) == scaling(pair.model)
            scales.append(float(pair.pipe.optimizer.dynamic_scale))
            if x is LOUD:
                assert_same_arrays(pair.pipe.get_weights(), before)
            assert_trainable_alike(pair)
        assert scales[:2] == [2.0**14, 2.0**14] and scales[-1] < scales[3]
        assert int(pair.pipe.optimizer.iterations) == 6


def assert_trainable_alike(pair: Any) -> None:
    """Bit for bit; NaNs, which moving statistics keep of a batch that overflowed, equal one another."""
    for ours, theirs in zip(pair.pipe.get_weights(), pair.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_compiled_stages_skip_together() -> None:
    """Compiled, with several microbatches of which one overflows, and with averages of the weights."""
    for _ in set_policy("mixed_float16"):
        optimizer = optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        with Pipeline.split(stack(), at=CUTS, microbatches=4, transport="inproc") as pipe:
            pipe.compile(optimizer, "mse")
            pipe.train_on_batch(X, Y)
            before = [v.numpy() for v in pipe.merge().trainable_variables]
            pipe.train_on_batch(BROKEN, Y)
            assert scaling(pipe) == (2.0**14, 0, 1)
            assert_same_arrays([v.numpy() for v in pipe.merge().trainable_variables], before)
            pipe.fit(X, Y, batch_size=12, verbose=0)
            assert scaling(pipe) == (2.0**14, 1, 2)
            averages = [v.numpy() for v in pipe.merge().trainable_variables]
            assert all(np.isfinite(a).all() for a in averages)
            assert any((a != b).any() for a, b in zip(averages, before, strict=True))


@pytest.mark.parametrize("where", in_turn([{"stages": 1}, {}, {"at": ["drop"]}], 1, 3), ids=str)
def test_checkpoints_keep_the_scale(where: dict[str, Any], half: str, tmp_path: Any) -> None:
    """Loaded, also in a program with another policy, training goes on as if never stopped, overflow included."""
    with Pipeline.split(stack(), at=CUTS, microbatches=2, transport="inproc") as pipe:
        pipe.compile(**growing(), run_eagerly=True)
        for x in (LOUD, X, X, X):
            pipe.train_on_batch(x, Y)
        pipe.save(tmp_path / "here")
        saved = scaling(pipe)
        last = [pipe.train_on_batch(x, Y) for x in (X, LOUD * 0 + 1e5, X)]
        weights, end = pipe.get_weights(), scaling(pipe)
    keras.config.set_dtype_policy("float32")
    with Pipeline.load(tmp_path / "here", transport="inproc", **where) as again:
        assert saved == scaling(again) == (2.0**15, 1, 3)
        np.testing.assert_array_equal([again.train_on_batch(x, Y) for x in (X, LOUD * 0 + 1e5, X)], last)
        assert scaling(again) == end
        for ours, theirs in zip(again.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_keras_files_keep_the_scale(half: str, tmp_path: Any) -> None:
    """A `.keras` file goes on in Keras, and a `.weights.h5` file in the pipeline, both with scale and moments."""
    arguments = {"batch_size": 12, "verbose": 0, "shuffle": False}
    with twins(lambda: chain((6,), layers.Dense(5, "tanh", name="a"), layers.Dense(1, name="c")), growing) as pair:
        savers = [
            keras.callbacks.ModelCheckpoint(tmp_path / "whole.keras"),
            keras.callbacks.ModelCheckpoint(tmp_path / "some.weights.h5", save_weights_only=True),
        ]
        pair.pipe.train_on_batch(BROKEN, Y)
        pair.pipe.fit(X, Y, epochs=3, callbacks=savers, **arguments)
        state = scaling(pair.pipe)
        assert state == (2.0**15, 1, 3)
        model = keras.models.load_model(tmp_path / "whole.keras")
        model.run_eagerly = True
        assert scaling(model) == state
        ours, theirs = (twin.fit(X, Y, **arguments).history for twin in (pair.pipe, model))
        assert ours == theirs
        assert_same_arrays(pair.pipe.get_weights(), model.get_weights())
        assert scaling(pair.pipe) == scaling(model) != state
        callback_model(pair.pipe).load_weights(tmp_path / "some.weights.h5")
        assert scaling(pair.pipe) == state
        assert pair.pipe.fit(X, Y, **arguments).history == theirs
        assert_same_arrays(pair.pipe.get_weights(), model.get_weights())


def test_a_model_whose_loss_is_not_to_be_scaled(half: str, tmp_path: Any) -> None:
    """`auto_scale_loss=False` leaves the optimizer as it is, also in files and checkpoints."""
    with Pipeline.split(stack(), at=CUTS, transport="inproc") as pipe:
        pipe.compile(**plain(), auto_scale_loss=False)
        pipe.save(tmp_path / "here")
        callback_model(pipe).save(tmp_path / "whole.keras")
        assert isinstance(pipe.optimizer, optimizers.Adam)
    with Pipeline.load(tmp_path / "here", transport="inproc") as again:
        assert isinstance(again.optimizer, optimizers.Adam)
