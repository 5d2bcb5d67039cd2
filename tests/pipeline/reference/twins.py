"""The same training twice: by Keras on the unsplit model, and by a pipeline of the same model; then compare.

With one microbatch a batch, eagerly, everything that Keras returns must be the same to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from pipeline import Pipeline

SEED = 11


def classifier() -> Any:
    """4 layers of what keeps state: statistics, random numbers; three classes."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="a"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.3, name="drop"),
            keras.layers.Dense(3, activation="softmax", name="c"),
        ]
    )


def regressor() -> Any:
    """Two layers, one output."""
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh", name="a"), keras.layers.Dense(1, name="b")]
    )


def classes(samples: int = 20, seed: int = 0) -> tuple[Any, Any]:
    """(samples, 6) and class numbers below 3."""
    random = np.random.default_rng(seed)
    return random.normal(size=(samples, 6)).astype("float32"), random.integers(0, 3, samples)


def numbers(samples: int = 20, seed: int = 0) -> tuple[Any, Any]:
    """(samples, 6) and one number each."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 6)).astype("float32")
    return x, x[:, :1] * 0.5 + 0.1


class Twins:
    """A Keras model and a pipeline from the same seed, compiled alike.

    Args:
        build: Makes the model.
        compiled: A function that gives the arguments of `compile`, called for each twin.
        options: As for `Pipeline.split`.
    """

    def __init__(self, build: Callable[[], Any], compiled: Callable[[], dict[str, Any]], **options: Any) -> None:
        keras.utils.set_random_seed(SEED)
        self.model = build()
        self.model.compile(**{"run_eagerly": True, **compiled()})
        keras.utils.set_random_seed(SEED)
        options = {"stages": 2, "microbatches": 1, "transport": "inproc", **options}
        if "at" in options:
            del options["stages"]
        self.pipe = Pipeline.split(build(), **options)
        self.pipe.compile(**{"run_eagerly": True, **compiled()})

    def both(self, act: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What `act` gives for the Keras model and for the pipeline, from the same seed."""
        results = []
        for twin in (self.model, self.pipe):
            keras.utils.set_random_seed(SEED + 1)
            results.append(act(twin))
        return results[0], results[1]

    def fit(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Both histories; a callable argument is called for each twin."""

        def act(twin: Any) -> Any:
            fresh = {key: value() if callable(value) else value for key, value in kwargs.items()}
            given = [value() if callable(value) else value for value in args]
            return twin.fit(*given, **{"verbose": 0, **fresh}).history

        return self.both(act)

    def assert_fit_alike(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Fit both; keys, their order, values and weights must be equal. Returns the history."""
        theirs, ours = self.fit(*args, **kwargs)
        assert_same_logs(ours, theirs)
        self.assert_weights_alike()
        return theirs

    def assert_weights_alike(self) -> None:
        """Bit for bit, in the same order."""
        assert_same_arrays(self.pipe.get_weights(), self.model.get_weights())


@contextmanager
def twins(build: Callable[[], Any], compiled: Callable[[], dict[str, Any]], **options: Any) -> Iterator[Twins]:
    """`Twins` whose workers end with the block."""
    pair = Twins(build, compiled, **options)
    try:
        yield pair
    finally:
        pair.pipe.close()


def assert_same_logs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same keys in the same order with the same values; NaN equals NaN."""
    assert list(ours) == list(theirs)
    for key in theirs:
        np.testing.assert_array_equal(np.asarray(ours[key]), np.asarray(theirs[key]), err_msg=key)


def assert_same_arrays(ours: list[Any], theirs: list[Any]) -> None:
    """Equal bit for bit, one after the other."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, i
        np.testing.assert_array_equal(a, b, err_msg=str(i))


def crossentropy() -> dict[str, Any]:
    """Adam on class numbers, with a metric."""
    return {
        "optimizer": keras.optimizers.Adam(0.02),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    }


def squares() -> dict[str, Any]:
    """SGD with momentum on a mean of squares."""
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse"}


def callback_model(twin: Any) -> Any:
    """What a callback of this twin knows as self.model."""
    holder = keras.callbacks.Callback()
    twin.predict(numbers(1)[0], verbose=0, callbacks=[holder])
    return holder.model
