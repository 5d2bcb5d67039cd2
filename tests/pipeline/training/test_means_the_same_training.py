"""Training means the same: what is trained, by which optimizer, with what kept, as Keras does it on the uncut model."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import numpy as np
import pytest

from pipeline import CompileError, Pipeline
from tests.levels import in_turn
from tests.natural_tape import natural_tape
from tests.one_tape import assert_same_bits, difference
from tests.pipeline.reference.twins import SEED, assert_same_arrays, callback_model, numbers, twins
from tests.pipeline.training.same_models import Counting, chain

layers = keras.layers
optimizers = keras.optimizers
X, Y = numbers(12)


def stack() -> Any:
    """Four layers with weights, statistics and random numbers; the first and the last stage have nothing to train."""
    return chain(
        (6,),
        layers.Rescaling(0.9, name="first"),
        layers.Dense(5, "tanh", name="a"),
        layers.BatchNormalization(momentum=0.5, name="norm"),
        layers.Dense(4, "tanh", name="b"),
        layers.Dropout(0.2, name="drop"),
        layers.Dense(1, name="c"),
        layers.Rescaling(0.7, name="scale"),
    )


CUTS = ["first", "norm", "b", "c"]


def adam() -> dict[str, Any]:
    return {"optimizer": optimizers.Adam(0.03), "loss": "mse"}


def set_trainable(pair: Any, names: str, value: bool) -> None:
    """In both twins; the pipeline's layers are the model's that was split."""
    for model in (pair.model, pair.original):
        for name in names:
            model.get_layer(name).trainable = value


@pytest.fixture
def pair():
    """Twins, and the model that the pipeline was split from."""
    made = []

    def build() -> Any:
        made.append(stack())
        return made[-1]

    with twins(build, adam, at=CUTS) as pair:
        pair.original = made[1]
        yield pair


@pytest.mark.gate
def test_trainable_changes_with_compile(pair: Any) -> None:
    """Weights, statistics and random states survive; what is frozen stays, in a stage alone or beside others."""
    pair.assert_fit_alike(X, Y, batch_size=5)
    for names, value in (("ab", False), ("a", True), ("c", False)):
        set_trainable(pair, names, value)
        before = pair.pipe.get_weights()
        pair.both(lambda twin: twin.compile(**adam(), run_eagerly=True))
        assert_same_arrays(pair.pipe.get_weights(), before)
        pair.assert_fit_alike(X, Y, batch_size=5)
        after = pair.pipe.get_weights()
        assert [(a == b).all() for a, b in zip(after, before, strict=True)].count(True) >= (2 if value else 4)
        found = list(pair.pipe.gradients(X, Y))
        assert len(found) == len(pair.model.trainable_variables)
        pair.pipe.verify(X, Y).raise_if_failed()


def test_a_single_variable_may_be_frozen(tmp_path: Any) -> None:
    """`layer.bias.trainable = False`, of which Keras's configuration of a layer says nothing, as in Keras."""

    def build() -> Any:
        model = stack()
        for variable in (model.get_layer("a").bias, model.get_layer("norm").gamma, model.get_layer("c").kernel):
            variable.trainable = False
        return model

    with twins(build, adam, at=CUTS) as pair:
        pair.assert_fit_alike(X, Y, batch_size=5)
        assert len(pair.pipe.gradients(X, Y)) == len(pair.model.trainable_variables) == 5
        pair.pipe.verify(X, Y).raise_if_failed()
        assert len(pair.pipe.merge().trainable_variables) == 5
        pair.pipe.save(tmp_path / "here")
        with Pipeline.load(tmp_path / "here", stages=2, transport="inproc") as again:
            last = again.train_on_batch(X, Y)
            assert len(again.gradients(X, Y)) == 5
            assert pair.pipe.microbatches == again.microbatches
        # Dropout goes on from the saved states in both.
        assert pair.pipe.train_on_batch(X, Y) == last


def test_freezing_keeps_the_optimizers_state_of_the_others(pair: Any) -> None:
    """Adam's moments stay with their variables when variables before them are frozen; unknown ones are refused."""
    pair.assert_fit_alike(X, Y, batch_size=5)
    set_trainable(pair, "a", False)
    pair.both(lambda twin: twin.compile(optimizer=twin.optimizer, loss="mse", run_eagerly=True))
    pair.assert_fit_alike(X, Y, batch_size=5)
    assert int(pair.pipe.optimizer.iterations) == int(pair.model.optimizer.iterations) == 6
    set_trainable(pair, "a", True)
    with pytest.raises(CompileError, match="compile with a new optimizer"):
        pair.pipe.compile(optimizer=pair.pipe.optimizer, loss="mse")


def test_trainable_changed_without_compile_changes_nothing(pair: Any, tmp_path: Any) -> None:
    """Training goes on as compiled, as in Keras's documentation; what would mix up variables says what to do."""
    pair.pipe.train_on_batch(X, Y)
    pair.original.get_layer("a").trainable = False
    before, gradients = pair.pipe.get_weights(), pair.pipe.gradients(X, Y)
    pair.pipe.train_on_batch(X, Y)
    assert (pair.pipe.get_weights()[0] != before[0]).any()
    for act in (
        lambda: pair.pipe.verify(X, Y),
        lambda: pair.pipe.save(tmp_path / "here"),
        lambda: callback_model(pair.pipe).save(tmp_path / "whole.keras"),
    ):
        with pytest.raises(CompileError, match=r"trainable was changed after compile\(\).*call compile"):
            act()
    pair.original.get_layer("a").trainable = True
    assert pair.pipe.gradients(X, Y).keys() == gradients.keys()
    pair.pipe.verify(X, Y).raise_if_failed()


@pytest.mark.parametrize("where", in_turn([{"stages": 1}, {}, {"at": ["a"]}], 1, 3), ids=str)
def test_stages_with_nothing_to_train_do_not_stop_the_count(where: dict[str, Any], tmp_path: Any) -> None:
    """Their optimizers never update; loaded, the others must not start their bias corrections anew."""
    with Pipeline.split(stack(), at=CUTS, microbatches=2, transport="inproc") as pipe:
        pipe.compile(**adam(), run_eagerly=True)
        for _ in range(3):
            pipe.train_on_batch(X, Y)
        pipe.save(tmp_path / "here")
        last = [pipe.train_on_batch(X, Y) for _ in range(2)]
        weights = pipe.get_weights()
    with Pipeline.load(tmp_path / "here", transport="inproc", **where) as again:
        assert int(again.optimizer.iterations) == 3
        assert [again.train_on_batch(X, Y) for _ in range(2)] == last
        assert_same_arrays(again.get_weights(), weights)


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_steps_that_reach_nothing_in_a_stage_count_there(run_eagerly: bool) -> None:
    """A loss that one stage's variables have no part in, then one that has; averages too begin with the first step."""

    def build() -> Any:
        x = keras.Input((6,), name="x")
        early = layers.Dense(1, name="early")(layers.Dense(4, "tanh", name="low")(x))
        late = layers.Dense(1, name="late")(layers.Dense(4, "tanh", name="high")(early))
        return keras.Model(x, [early, late])

    def train(twin: Any) -> None:
        optimizer = optimizers.Adam(0.03, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3)
        for losses in (["mse", None], ["mse", "mse"]):
            twin.compile(optimizer, losses, run_eagerly=run_eagerly)
            for _ in range(2):
                twin.train_on_batch(X, [Y, Y])

    def compiled() -> dict[str, Any]:
        return {"optimizer": "sgd", "loss": "mse"} | {"loss": ["mse", "mse"]}

    with twins(build, compiled, at=["early"]) as pair, pytest.warns(UserWarning, match="Gradients do not exist"):
        pair.both(train)
        if run_eagerly:
            pair.assert_weights_alike()
        assert difference(pair.pipe.get_weights(), pair.model.get_weights()) <= 1e-5


@pytest.mark.parametrize("recompute", in_turn([False, True], 1, 2))
def test_batches_of_any_size_need_no_new_trace(recompute: bool) -> None:
    """Batches of 7, 5, 8 and 3 samples, cut into unequal microbatches: Python runs for the first one only."""
    model = chain(
        (6,), layers.Dense(4, name="a"), Counting(name="one"), layers.Dense(4, name="b"), Counting(name="two")
    )
    options = {"microbatches": 3, "recompute": recompute, "transport": "inproc"}
    x, y = numbers(8)
    y = np.repeat(y, 4, axis=1)
    with Pipeline.split(model, at=["one"], **options) as pipe:
        pipe.compile("adam", "mse")
        runs = []
        for size in (7, 5, 8, 3):
            pipe.train_on_batch(x[:size], y[:size])
            pipe.test_on_batch(x[:size], y[:size])
            pipe.predict_on_batch(x[:size])
            runs.append(Counting.runs)
        assert runs == [runs[0]] * 4
        pipe.verify(x[:7], y[:7]).raise_if_failed()


class Recording(optimizers.SGD):
    """Notes what kind of gradients it is given."""

    kinds: ClassVar[set[str]] = set()

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        Recording.kinds.add(type(gradient).__name__)
        super().update_step(gradient, variable, learning_rate)


def words() -> Any:
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(9, 3, name="table"),
            layers.Flatten(name="flat"),
            layers.Dense(1, name="end"),
        ]
    )


EMBEDDING = {
    "sgd": lambda: optimizers.SGD(0.3, momentum=0.9),
    "adam": lambda: optimizers.Adam(0.03),
    "adagrad": lambda: optimizers.Adagrad(0.3),
    "clipped": lambda: optimizers.SGD(0.3, clipnorm=0.1),
    "recording": lambda: Recording(0.3),
}


@pytest.mark.parametrize("name", in_turn(list(EMBEDDING), 1, 5))
def test_sparse_gradients_of_embeddings(name: str) -> None:
    """With one microbatch the optimizer gets the rows that were read, as in Keras, and rounds as Keras does."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, (12, 4)).astype("int32"), rng.normal(size=(12, 1)).astype("float32")
    with twins(words, lambda: {"optimizer": EMBEDDING[name](), "loss": "mse"}, at=["flat"]) as pair:
        pair.assert_fit_alike(x, y, batch_size=5, epochs=2)
    if name == "recording":
        assert Recording.kinds == {"IndexedSlices", "EagerTensor"}
        return
    for schedule in ("gpipe", "1f1b"):
        keras.utils.set_random_seed(SEED)
        model = words()
        _, expected = natural_tape(model, x, [y], [keras.losses.MeanSquaredError()], 5)
        with Pipeline.split(model, at=["flat"], microbatches=5, schedule=schedule, transport="inproc") as pipe:
            pipe.compile(EMBEDDING[name](), "mse", run_eagerly=schedule == "gpipe")
            found = list(pipe.gradients(x, y).values())
            if schedule == "gpipe":
                assert_same_bits(found, expected, "gradient")
            assert difference(found, expected) <= 1e-6
