"""The check "own": the user's own model, loss and optimizer judge the pipeline, and get every bit back."""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline, Segment, VerificationError
from pipeline.own.model import OwnModel
from pipeline.testing import SingleTapeError, assert_matches_single_tape
from pipeline.verify.by_own import ByOwn
from pipeline.verify.every import VerifyEvery
from stages import put_back
from tests.levels import in_turn
from tests.one_tape import assert_same_bits
from tests.pipeline.parts import Counted

layers = keras.layers


def batch(samples: int = 11) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(samples, 5)).astype("float32"), draw.integers(0, 3, samples)


def model() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, kernel_regularizer="l2", kernel_constraint="non_neg", name="low"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.4, name="drop"),
            layers.Dense(6, activation="relu", name="middle"),
            layers.Dense(3, name="top"),
        ]
    )


def loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def running(whole: Any, optimizer: Any = "adam", eager: bool = True, **options: Any) -> Pipeline:
    pipe = Pipeline.split(whole, at=["drop"], microbatches=3, transport="inproc", **options)
    pipe.compile(optimizer, loss(), metrics=["accuracy"], run_eagerly=eager)
    return pipe


def made(report: Any) -> Any:
    (check,) = [check for check in report.checks if check.name == "own"]
    return check


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_it_is_made_unasked_and_compares_outputs_losses_gradients_and_an_update(eager: bool) -> None:
    with running(model(), eager=eager) as pipe:
        pipe.train_on_batch(*batch())
        report = pipe.verify(*batch())
    report.raise_if_failed()
    kinds = {row.kind for row in report.rows if row.check == "own"}
    assert kinds == {"prediction", "loss", "gradient", "statistics", "weight", "optimizer"}
    assert made(report).ran and "own" in report.summary()


def test_what_a_layer_counts_when_it_is_called_for_this_is_no_change_of_the_users() -> None:
    whole = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="low"), Counted(name="drop"), layers.Dense(3)])
    with running(whole) as pipe:
        pipe.fit(*batch(), epochs=2, verbose=0, verify_every=VerifyEvery(1, "own"))
        pipe.verify(*batch(), checks="own").raise_if_failed()
        pipe.fit(*batch(), verbose=0)


def test_asked_for_alone_it_needs_no_reference() -> None:
    with running(model()) as pipe:
        report = pipe.verify(*batch(), checks="own")
        assert pipe.session.reference.driver is None
        assert report.ok and {row.check for row in report.rows} == {"own", "hand-off", "undisturbed"}
        assert len(report.gradients) == 8


@pytest.mark.filterwarnings("ignore:the metric .* inside of a layer counts every microbatch")
def test_the_users_objects_keep_every_bit() -> None:
    """Of a model and an optimizer that have trained: weights, slots, iterations, statistics, metrics, seeds, draws."""
    counting = keras.metrics.Mean(name="counted")
    first = layers.Dense(6, name="first")
    first.counted = counting
    whole = keras.Sequential([keras.Input((5,)), first, *model().layers[1:]])
    optimizer = keras.optimizers.Adam(0.01, use_ema=True)
    whole.compile(optimizer, loss())
    whole.fit(*batch(), verbose=0)
    counting.update_state(3.0)
    variables = [*whole.variables, *optimizer.variables, *counting.variables]
    keras.random.normal((1,))
    with running(whole, optimizer) as pipe:
        pipe.train_on_batch(*batch())
        pipe.verify(*batch(), checks="own")
        before = [variable.numpy() for variable in variables]
        drawn = random.getstate(), np.random.get_state()[1].tobytes(), vars(optimizer).keys()
        report = pipe.verify(*batch(), checks="own")
        report.raise_if_failed()
        assert_same_bits(before, [variable.numpy() for variable in variables], "own variables")
        assert drawn == (random.getstate(), np.random.get_state()[1].tobytes(), vars(optimizer).keys())
    assert [row.verdict for row in report.of("left as it was") if not row.stage] == ["equal bits"]


def test_what_would_not_get_its_bits_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful:
        def __init__(self, variable: Any) -> None:
            self.variable = variable

        def read_value(self) -> Any:
            return self.variable.value.read_value()

        def assign(self, value: Any) -> None:
            self.variable.value.assign(value + 1)

    right = put_back.held_by
    low = "low/bias"
    monkeypatch.setattr(
        put_back, "held_by", lambda v: Forgetful(v) if getattr(v, "path", "").endswith(low) else right(v)
    )
    with running(model()) as pipe:
        report = pipe.verify(*batch(), checks="own")
    assert "did not put everything back in your own objects" in report.summary()


def test_a_model_in_parts_is_the_users_own_as_well() -> None:
    keras.utils.set_random_seed(0)
    bottom = keras.Sequential([keras.Input((5,)), layers.Dense(6, "tanh")], name="bottom")
    top = keras.Sequential([keras.Input((6,)), layers.Dense(3)], name="top")
    with Pipeline([bottom, top], microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss(), run_eagerly=True)
        report = pipe.verify(*batch(), checks="own")
    report.raise_if_failed()
    assert made(report).ran


def test_masks_go_from_part_to_part_and_the_users_models_stay_as_they_were() -> None:
    keras.utils.set_random_seed(0)
    bottom = keras.Sequential([keras.Input((4,)), layers.Embedding(7, 5, mask_zero=True)], name="bottom")
    top = keras.Sequential([keras.Input((4, 5)), layers.SimpleRNN(3)], name="top")
    said = [sorted(vars(part)) for part in (bottom, top)]
    words = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 2, 3, 4]])
    with Pipeline([bottom, top], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", loss(), run_eagerly=True)
        pipe.verify(words, np.array([0, 1, 2]), checks="own").raise_if_failed()
    assert said == [sorted(vars(part)) for part in (bottom, top)]
    assert not top.supports_masking


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), momentum=0.5),
        lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.01),
        lambda: [keras.optimizers.Lion(0.01), keras.optimizers.Adam(0.01)],
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    ],
    ids=["schedule", "global norm", "one each", "accumulating"],
)
@pytest.mark.gate
def test_every_way_of_updating_raises_no_alarm(optimizer: Any) -> None:
    with running(model(), optimizer(), eager=False) as pipe:
        for _ in range(2):
            pipe.train_on_batch(*batch())
            pipe.verify(*batch(), checks="own").raise_if_failed()


def test_where_there_is_no_model_the_report_says_so() -> None:
    first, second = (Segment(f"tests.pipeline.parts:{name}") for name in ("bottom", "top"))
    with Pipeline([first, second], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
        x, y = np.ones((4, 6), "float32"), np.ones((4, 1), "float32")
        report = pipe.verify(x, y)
        assert report.ok and not made(report).ran
        assert "is built in its worker only" in made(report).reason
        assert "not compared with your own model" in report.summary()
        assert "own: not checked: stage" in str(report) and "is built in its worker only" in report.to_html()
        with pytest.raises(SingleTapeError, match="asked for by name, but not checked: 'own'"):
            assert_matches_single_tape(pipe, x, y, checks=("tape", "own"))
        with pytest.raises(VerificationError, match="'own' could not be made"):
            pipe.verify(x, y, checks="own").raise_if_failed()


def test_a_checkpoints_model_is_nobodys_own(tmp_path: Any) -> None:
    with running(model()) as pipe:
        pipe.train_on_batch(*batch())
        pipe.save(tmp_path / "saved")
    with Pipeline.load(tmp_path / "saved", transport="inproc") as pipe:
        report = pipe.verify(*batch())
    assert (
        report.ok and made(report).reason == "the models in this process were read from saved, none of them is your own"
    )


@keras.saving.register_keras_serializable("tests.own")
class Noisy(layers.Layer):
    """Draws from TensorFlow's own generator."""

    def call(self, x: Any) -> Any:
        return x + tf.random.normal(tf.shape(x))


def test_a_model_that_gives_other_numbers_each_time_is_not_judged() -> None:
    keras.utils.set_random_seed(0)
    noisy = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="drop"), Noisy(), layers.Dense(3)])
    with running(noisy) as pipe:
        for _ in range(2):
            report = pipe.verify(*batch(), checks="own")
            assert not report.ok and not report.failed
            assert "other numbers each time" in made(report).reason
            assert (
                "layer 'noisy' (RandomStandardNormal) draws random numbers that are not Keras's" in made(report).reason
            )


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_no_verdict_is_given_that_a_second_run_would_turn_round(eager: bool) -> None:
    """The reference is run twice where it deviates, or hardly could, and then says which layer draws."""
    keras.utils.set_random_seed(0)
    noisy = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="drop"), Noisy(name="hiss"), layers.Dense(3)])
    with running(noisy, eager=eager) as pipe:
        for _ in range(2):
            report = pipe.verify(*batch(), checks=("tape", "steps"))
            assert not report.failed and not report.ok
            reasons = {check.name: check.reason for check in report.checks if not check.ran}
            assert reasons.keys() == {"tape", "steps", "own"}
            assert "two runs of one tape from the same values give other numbers" in reasons["tape"]
            assert all("'hiss'" in reason for reason in reasons.values())


def test_an_own_check_that_compared_the_pipeline_with_itself_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own model is what is called: another value in its hands is another verdict."""
    right = OwnModel.run

    def run(self: OwnModel, *given: Any, **named: Any) -> Any:
        for variable in self.variables:
            if variable.path.endswith("middle/bias"):
                variable.assign(variable + 0.1)
        return right(self, *given, **named)

    monkeypatch.setattr(OwnModel, "run", run)
    with running(model()) as pipe:
        report = pipe.verify(*batch())
    assert {row.check for row in report.failed} == {"own"} and report.first.stage == "stage1"
    assert isinstance(ByOwn, type)


def test_training_ends_where_the_own_model_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OwnModel.run
    monkeypatch.setattr(
        OwnModel, "disturb", lambda self, seed: None
    )  # rounding is no excuse: what is measured is exactly nothing

    def run(self: OwnModel, batch: Any, training: bool, **named: Any) -> Any:
        found = right(self, batch, training, **named)
        return found if not named else type(found)(found.loss * 1.01, found.outputs, found.gradients, found.losses)

    monkeypatch.setattr(OwnModel, "run", run)
    with running(model()) as pipe, pytest.raises(VerificationError, match=r"step 1.*NOT equal to your own model"):
        pipe.fit(*batch(), verbose=0, verify_every=1)
