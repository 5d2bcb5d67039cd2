"""Situations that people asked about in public: each gives on a pipeline what it gives on the plain Keras model.

One model and one pipeline live through all of them, so a situation also meets what those before it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from tests.pipeline.reference.twins import SEED, classes

pytestmark = pytest.mark.filterwarnings(
    "ignore:Your input ran out of data", "ignore:`shuffle=True` was passed", "ignore:__array__ implementation"
)
X, Y = classes(24)
W = np.linspace(0.5, 2, 24, dtype="float32")
WEIGHTS = {0: 1.0, 1: 2.0, 2: 0.5}
QUIET = {"verbose": 0, "shuffle": False}


class Reordered(keras.utils.PyDataset):
    """Batches of 6 whose order turns at the end of an epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.order, self.said = [0, 1, 2, 3], []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        rows = slice(6 * self.order[place], 6 * self.order[place] + 6)
        return X[rows], Y[rows], W[rows]

    def on_epoch_end(self) -> None:
        self.order = self.order[::-1]
        self.said.append("end")


def data() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(6)


def batches(count: int) -> Iterator[tuple[Any, Any]]:
    for number in range(count):
        rows = slice(6 * number % 24, 6 * number % 24 + 6)
        yield X[rows], Y[rows]


def two_fits(model: Any) -> Any:
    """keras-team/keras 6697, 1872: the history of a second fit is its own, its epochs go on."""
    first = model.fit(X, Y, batch_size=6, epochs=2, **QUIET)
    second = model.fit(X, Y, batch_size=6, epochs=3, initial_epoch=2, **QUIET)
    return first.history, first.epoch, second.history, second.epoch, model.history is second


def weights_of_samples_or_classes(model: Any) -> Any:
    """keras-team/keras 2298, 2071: neither weighs what validation_split takes away; a class not named weighs 1."""
    one = model.fit(X, Y, batch_size=6, class_weight={0: 3.0}, validation_split=0.25, **QUIET)
    other = model.fit(X, Y, batch_size=6, sample_weight=W, validation_split=0.25, **QUIET)
    weighed = model.evaluate(X, Y, batch_size=6, sample_weight=W, verbose=0, return_dict=True)
    return one.history, other.history, weighed


def weights_of_both(model: Any) -> str:
    """keras-team/keras 497."""
    with pytest.raises(ValueError, match="class_weight") as raised:
        model.fit(X, Y, batch_size=6, sample_weight=W, class_weight={0: 3.0}, **QUIET)
    return str(raised.value)


def weights_of_classes_for_a_dataset(model: Any) -> Any:
    columns = tf.data.Dataset.from_tensor_slices((X, Y[:, None])).batch(6)
    return model.fit(columns, class_weight=WEIGHTS, **QUIET).history


def a_dataset_that_runs_out(model: Any) -> Any:
    """tensorflow 25254: fewer batches than steps_per_epoch times epochs."""
    history = model.fit(data(), steps_per_epoch=3, epochs=4, verbose=0)
    return history.history, history.epoch


def a_dataset_of_unknown_length(model: Any) -> Any:
    """keras-team/keras 15708."""
    return model.fit(data().filter(lambda x, y: tf.reduce_sum(x) > -4.0), epochs=3, verbose=0).history


def a_generator_that_runs_out(model: Any) -> Any:
    history = model.fit(
        batches(4), steps_per_epoch=3, epochs=3, validation_data=batches(9), validation_steps=2, **QUIET
    )
    return history.history, history.epoch


def validation_at_some_epochs(model: Any) -> Any:
    """keras-team/keras 12065: as a list."""
    given = {"validation_data": (X[:6], Y[:6], W[:6]), "validation_freq": [1, 3]}
    return model.fit(X, Y, batch_size=6, epochs=3, **given, **QUIET).history


def a_pydataset_with_threads(model: Any) -> Any:
    """tensorflow 45962, keras-team/keras 20032: `on_epoch_end` once an epoch, also with steps_per_epoch."""
    batches_of = Reordered(workers=2)
    history = model.fit(batches_of, epochs=2, **QUIET)
    return (
        history.history,
        batches_of.said,
        model.fit(Reordered(workers=2), epochs=2, steps_per_epoch=2, **QUIET).history,
    )


def predicting_from_a_generator(model: Any) -> Any:
    """tensorflow 45459: so many steps; how many more batches are made ahead is for TensorFlow to say."""
    return model.predict(((batch[0],) for batch in batches(6)), steps=2, verbose=0)


def predicting_in_steps(model: Any) -> Any:
    return model.predict(X, batch_size=5, verbose=0), model.predict(X, batch_size=5, steps=2, verbose=0)


def single_batches(model: Any) -> Any:
    """keras-team/keras 22617: numbers of the batch alone."""
    first = model.train_on_batch(X[:6], Y[:6])
    second = model.train_on_batch(X[6:12], Y[6:12], class_weight=WEIGHTS, return_dict=True)
    return first, second, model.test_on_batch(X[:6], Y[:6], sample_weight=W[:6])


def compiled_without_metrics(model: Any) -> Any:
    """keras-cv 1794: metrics of the compile before stay, and so does a loss that is left out."""
    model.compile(keras.optimizers.SGD(0.05), run_eagerly=True)
    return model.fit(X, Y, batch_size=6, **QUIET).history


SITUATIONS: list[Callable[[Any], Any]] = [
    two_fits,
    weights_of_samples_or_classes,
    weights_of_both,
    weights_of_classes_for_a_dataset,
    a_dataset_that_runs_out,
    a_dataset_of_unknown_length,
    a_generator_that_runs_out,
    validation_at_some_epochs,
    a_pydataset_with_threads,
    predicting_from_a_generator,
    predicting_in_steps,
    single_batches,
    compiled_without_metrics,
]


def lived_through(model: Any) -> list[Any]:
    """What every situation gives, and the weights behind it."""
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["sparse_categorical_crossentropy"],
        run_eagerly=True,
    )
    return [(situation(model), model.get_weights()) for situation in SITUATIONS]


def plain() -> keras.Model:
    keras.utils.set_random_seed(SEED)
    widths = [keras.layers.Dense(4, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    return keras.Sequential([keras.Input((6,)), *widths])


@pytest.mark.gate
def test_what_people_asked_about_is_on_a_pipeline_what_it_is_in_keras() -> None:
    expected = lived_through(plain())
    with Pipeline.split(plain(), stages=2, microbatches=1, transport="inproc") as pipe:
        found = lived_through(pipe)
    apart = [s.__name__ for s, a, b in zip(SITUATIONS, found, expected, strict=True) if repr(a) != repr(b)]
    assert apart == []
