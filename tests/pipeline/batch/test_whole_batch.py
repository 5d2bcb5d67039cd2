"""A batch of microbatches means the whole batch: every Keras loss, reduction and weighting equals the unsplit tape.

The other side is one tape over the unsplit model on the *whole* batch: no microbatches, no weights of ours. The batch
of 11 is cut into microbatches of 3, 3, 3 and 2 samples, so dividing by their number would show.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from tests.levels import LEVEL, in_turn
from tests.models import part
from tests.one_tape import difference

layers = keras.layers
losses = keras.losses

SAMPLES, MICROBATCHES, CLASSES, TIME = 11, 4, 3, 4
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "none")
COUPLED = {"Circle", "Dice", "Tversky"}


def _real(rng: Any) -> Any:
    return rng.normal(size=(SAMPLES, CLASSES)).astype("float32")


def _positive(rng: Any) -> Any:
    return rng.uniform(0.5, 2.0, (SAMPLES, CLASSES)).astype("float32")


def _labels(rng: Any) -> Any:
    return rng.integers(0, CLASSES, SAMPLES).astype("int32")


def _one_hot(rng: Any) -> Any:
    return np.eye(CLASSES, dtype="float32")[_labels(rng)]


def _binary(rng: Any) -> Any:
    return rng.integers(0, 2, (SAMPLES, CLASSES)).astype("float32")


def _series(rng: Any) -> Any:
    return rng.integers(0, CLASSES, (SAMPLES, TIME)).astype("int32")


def _words(rng: Any) -> Any:
    """Label sequences of one to three symbols, padded with the blank 0."""
    words = rng.integers(1, CLASSES, (SAMPLES, 3))
    return np.where(np.arange(3) < rng.integers(1, 4, (SAMPLES, 1)), words, 0).astype("int32")


@dataclass(frozen=True)
class Case:
    """A loss, the output it wants and targets for it.

    Attributes:
        loss: The class.
        output: Activation of the model's output.
        target: From a random generator.
        options: Of the loss, besides its reduction.
        series: Whether outputs and targets have a time axis.
        element_weights: Whether sample weights have the loss's shape, not one per sample.
        unweighted: The loss has no element per sample that a weight could belong to.
    """

    loss: Any
    output: Any = None
    target: Callable[[Any], Any] = _real
    options: dict[str, Any] = field(default_factory=dict)
    series: bool = False
    element_weights: bool = False
    unweighted: bool = False

    @property
    def name(self) -> str:
        options = "-".join(f"{key}={value}" for key, value in self.options.items())
        return "-".join(word for word in (self.loss.__name__, options) if word)

    @property
    def coupled(self) -> bool:
        """Whether the loss of a sample depends on other samples."""
        axis = self.options.get("axis")
        return axis == 0 or (axis is None and self.loss.__name__ in COUPLED)

    def make(self, reduction: Any) -> Any:
        return self.loss(reduction=reduction, **self.options)

    def parts(self) -> list[Any]:
        """Two segments without anything random or statistical."""
        keras.utils.set_random_seed(3)
        shape = (TIME, 4) if self.series else (4,)
        last = layers.Dense(CLASSES, self.output) if isinstance(self.output, str | None) else None
        top = [last] if last is not None else [layers.Dense(CLASSES), self.output()]
        return [part(shape, layers.Dense(5, "tanh")), part((*shape[:-1], 5), *top)]

    def data(self) -> tuple[Any, Any, Any]:
        """x, y and sample weights."""
        rng = np.random.default_rng(4)
        shape = (SAMPLES, TIME, 4) if self.series else (SAMPLES, 4)
        x, y = rng.normal(size=shape).astype("float32"), self.target(rng)
        weights = rng.uniform(0.2, 3.0, y.shape if self.element_weights else SAMPLES).astype("float32")
        return x, y, weights


CASES = [
    Case(losses.BinaryCrossentropy, "sigmoid", _binary),
    Case(losses.BinaryCrossentropy, None, _binary, {"from_logits": True, "label_smoothing": 0.1}),
    Case(losses.BinaryFocalCrossentropy, "sigmoid", _binary),
    Case(losses.CTC, None, _words, series=True),
    Case(losses.CategoricalCrossentropy, "softmax", _one_hot),
    Case(losses.CategoricalFocalCrossentropy, "softmax", _one_hot),
    Case(losses.CategoricalGeneralizedCrossEntropy, "softmax", _labels, {"q": 0.3}),
    Case(losses.CategoricalHinge, "tanh", _one_hot),
    # The default gamma of 80 multiplies the rounding of predictions above the tolerance.
    Case(losses.Circle, layers.UnitNormalization, _labels, {"gamma": 8.0}),
    Case(losses.CosineSimilarity, None, _real),
    Case(losses.CosineSimilarity, None, _real, {"axis": 0}, unweighted=True),
    Case(losses.Dice, "sigmoid", _binary),
    Case(losses.Dice, "sigmoid", _binary, {"axis": 1}),
    Case(losses.Dice, "sigmoid", _binary, {"axis": 0}, unweighted=True),
    Case(losses.Hinge, "tanh", _binary),
    Case(losses.Huber, None, _real),
    Case(losses.Huber, None, _real, {"delta": 0.1}),
    Case(losses.KLDivergence, "softmax", _one_hot),
    Case(losses.LogCosh, None, _real),
    Case(losses.MeanAbsoluteError, None, _real),
    Case(losses.MeanAbsolutePercentageError, "softplus", _positive),
    Case(losses.MeanSquaredError, None, _real),
    Case(losses.MeanSquaredLogarithmicError, "softplus", _positive),
    Case(losses.Poisson, "softplus", _positive),
    Case(losses.SparseCategoricalCrossentropy, "softmax", _labels),
    Case(losses.SparseCategoricalCrossentropy, None, _labels, {"from_logits": True, "ignore_class": 1}),
    Case(
        losses.SparseCategoricalCrossentropy,
        None,
        _series,
        {"from_logits": True, "ignore_class": 0},
        series=True,
        element_weights=True,
    ),
    Case(losses.SquaredHinge, "tanh", _binary),
    Case(losses.Tversky, "sigmoid", _binary, {"alpha": 0.3, "beta": 0.7}),
    Case(losses.Tversky, "sigmoid", _binary, {"axis": 1}),
]


def full_batch(parts: list[Any], loss: Any, x: Any, y: Any, weights: Any) -> tuple[list[Any], float]:
    """Gradients and value of a loss of the unsplit model on the whole batch; a vector counts as its sum."""
    variables = [variable for part in parts for variable in part.trainable_variables]
    with tf.GradientTape() as tape:
        h = tf.constant(x)
        own = []
        for model in parts:
            h = model(h, training=True)
            own += model.losses
        value = tf.reduce_sum(loss(y, h, sample_weight=weights))
        value += sum(own)
    return [None if g is None else g.numpy() for g in tape.gradient(value, variables)], float(value)


def assert_whole_batch(pipe: Pipeline, parts: list[Any], loss: Any, x: Any, y: Any, weights: Any = None) -> None:
    """The pipeline's gradients, and its loss, are those of the unsplit model on the whole batch."""
    expected, value = full_batch(parts, loss, x, y, weights)
    found = list(pipe.gradients(x, y, weights).values())
    assert difference(found, expected) <= 1e-6
    assert pipe.test_on_batch(x, y, weights) == pytest.approx(value, rel=3e-6)


def test_every_loss_of_keras_is_covered() -> None:
    """A loss class that Keras adds fails here until there is a case for it."""
    classes = {
        name
        for name, found in inspect.getmembers(losses, inspect.isclass)
        if issubclass(found, losses.Loss) and found is not losses.Loss
    }
    assert classes == {case.loss.__name__ for case in CASES}


def kinds_first(case: Case) -> bool:
    """Losses with options (logits, ignored classes, axes, sequences) and those that couple samples come first."""
    return not (case.options or case.series or case.coupled or case.loss is losses.MeanSquaredError)


FEW = sum(not kinds_first(case) for case in CASES)


@pytest.mark.gate
@pytest.mark.parametrize("case", in_turn(sorted(CASES, key=kinds_first), FEW, 20), ids=lambda case: case.name)
def test_every_loss_and_reduction(case: Case) -> None:
    """Gradients and loss of the pipeline are those of the unsplit model on the whole batch, weighted and not."""
    x, y, weights = case.data()
    parts = case.parts()
    with Pipeline(parts, MICROBATCHES, "gpipe" if case.coupled else "1f1b", "inproc") as pipe:
        for reduction in REDUCTIONS[::2] if LEVEL == "check" else REDUCTIONS:
            pipe.compile("sgd", case.make(reduction), run_eagerly=True)
            for given in (None,) if case.unweighted else (None, weights):
                assert_whole_batch(pipe, parts, case.make(reduction), x, y, given)


COMPILED = [case for case in CASES if case.options or case.loss.__name__ in ("CTC", "MeanSquaredError", "Dice")]


@pytest.mark.parametrize("case", in_turn(COMPILED, 1, len(COMPILED)), ids=lambda case: case.name)
def test_compiled_losses(case: Case) -> None:
    """The same in compiled stages, where the weight of a microbatch enters a traced function."""
    x, y, weights = case.data()
    parts = case.parts()
    with Pipeline(parts, MICROBATCHES, "gpipe" if case.coupled else "1f1b", "inproc") as pipe:
        pipe.compile("sgd", case.make("mean_with_sample_weight"))
        assert_whole_batch(
            pipe, parts, case.make("mean_with_sample_weight"), x, y, None if case.unweighted else weights
        )


@pytest.mark.parametrize("reduction", ["mean", None])
def test_other_names_of_reductions(reduction: str | None) -> None:
    """Keras knows two reductions under two names each; both mean the whole batch."""
    case = next(case for case in CASES if case.options.get("ignore_class") == 0)
    x, y, weights = case.data()
    parts = case.parts()
    with Pipeline(parts, MICROBATCHES, "1f1b", "inproc") as pipe:
        pipe.compile("sgd", case.make(reduction), run_eagerly=True)
        for given in (None, weights):
            assert_whole_batch(pipe, parts, case.make(reduction), x, y, given)


@pytest.mark.parametrize("loss", ["mse", "sparse_categorical_crossentropy", "dice", losses.huber])
def test_losses_by_name_and_function(loss: Any) -> None:
    """A name or a function means the mean over samples, as in `keras.Model.compile`."""
    named = {"mse": "MeanSquaredError", "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy"}
    wanted = named.get(loss, "Dice" if loss == "dice" else "Huber")
    case = next(case for case in CASES if case.loss.__name__ == wanted and not case.options)
    x, y, weights = case.data()
    parts = case.parts()
    with Pipeline(parts, MICROBATCHES, "gpipe", "inproc") as pipe:
        pipe.compile("sgd", loss, run_eagerly=True)
        assert_whole_batch(pipe, parts, case.make("sum_over_batch_size"), x, y, weights)


@pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])
def test_microbatches_in_which_nothing_counts(run_eagerly: bool) -> None:
    """Ignored classes and zero weights leave whole microbatches out, and the others weigh the more."""
    case = next(case for case in CASES if case.options.get("ignore_class") == 1)
    x, y, weights = case.data()
    parts = case.parts()
    y[:3] = 1
    weights[6:9] = 0.0
    with Pipeline(parts, MICROBATCHES, "1f1b", "inproc") as pipe:
        for reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
            pipe.compile("sgd", case.make(reduction), run_eagerly=run_eagerly)
            assert_whole_batch(pipe, parts, case.make(reduction), x, y, weights)


def test_losses_over_the_batch_get_the_schedule_that_they_need() -> None:
    """1F1B goes backward before the last forward, so GPipe runs in its place, which is said once."""
    for name in ("Circle", "Dice", "Tversky", "CosineSimilarity"):
        case = next(case for case in CASES if case.loss.__name__ == name and case.coupled)
        x, y, _ = case.data()
        parts = case.parts()
        with Pipeline(parts, MICROBATCHES, "1f1b", "inproc") as pipe:
            pipe.compile("sgd", case.make("sum_over_batch_size"), run_eagerly=True)
            with pytest.warns(UserWarning, match=rf"the loss {name} is .*schedule='gpipe' in place of '1f1b'") as said:
                assert_whole_batch(pipe, parts, case.make("sum_over_batch_size"), x, y)
            assert len(said) == 1


WEIGHTS = {0: 0.5, 2: 4.0}


@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weight(one_hot: bool) -> None:
    """`class_weight` in `fit` and `train_on_batch` trains as `keras.Model` does on the unsplit model."""
    name = "CategoricalCrossentropy" if one_hot else "SparseCategoricalCrossentropy"
    case = next(case for case in CASES if case.loss.__name__ == name)
    x, y, _ = case.data()
    parts = case.parts()
    whole = keras.Sequential([keras.Input((4,)), *keras.models.clone_model(parts[0]).layers, *parts[1].layers])
    whole.set_weights([weight for part in parts for weight in part.get_weights()])
    start = whole.get_weights()
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0, "class_weight": WEIGHTS}
    with Pipeline(parts, MICROBATCHES, "1f1b", "inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.3), case.make("sum_over_batch_size"), run_eagerly=True)
        ours = pipe.fit(x, y, **fit).history["loss"]
        first = pipe.get_weights()
        pipe.train_on_batch(x, y, class_weight=WEIGHTS)
        second = pipe.get_weights()
    whole.set_weights(start)  # it shares a part with the pipeline, which gave it the trained values
    whole.compile(keras.optimizers.SGD(0.3), case.make("sum_over_batch_size"), run_eagerly=True)
    theirs = whole.fit(x, y, **fit).history["loss"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert difference(first, whole.get_weights()) <= 1e-6
    whole.train_on_batch(x, y, class_weight=WEIGHTS)
    assert difference(second, whole.get_weights()) <= 1e-6
    assert difference(second, start) > 1e-2
