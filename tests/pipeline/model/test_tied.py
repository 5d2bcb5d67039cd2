"""Layers with weights used in several stages: one value, one gradient, one update, as in one process."""

import keras
import numpy as np
import pytest

from pipeline import Pipeline, SplitError, WiringError
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED, assert_same_arrays, twins

layers = keras.layers
WORDS, WIDTH, LENGTH = 11, 4, 5


@keras.saving.register_keras_serializable("tests")
class Project(layers.Layer):
    """Logits from an embedding's own table."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def build(self, shape):
        self.built = True

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

    def get_config(self):
        return {**super().get_config(), "embedding": keras.saving.serialize_keras_object(self.embedding)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("embedding")), **config)


def siamese():
    """One tower over two inputs, compared at the end; the tower's calls can land in different stages."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    low, high = layers.Dense(4, activation="tanh", name="low"), layers.Dense(4, name="high")
    first = high(layers.ReLU(name="a_low")(low(a)))
    second = high(layers.ReLU(name="b_low")(low(layers.Dense(3, name="turn")(b))))
    first, second = layers.ReLU(name="a_high")(first), layers.ReLU(name="b_high")(second)
    return keras.Model([a, b], layers.Dense(1, name="end")(layers.Subtract(name="minus")([first, second])))


def deep():
    """One layer called in three places, one after the other."""
    x = keras.Input((4,), name="x")
    same = layers.Dense(4, activation="tanh", kernel_regularizer="l2", name="same")
    h = x
    for i in range(3):
        h = layers.Dense(4, name=f"own{i}")(same(h))
    return keras.Model(x, h)


def pairs(samples=9):
    random = np.random.default_rng(1)
    return [random.normal(size=(samples, 3)).astype("float32") for _ in range(2)], random.normal(size=(samples, 1))


def rows(samples=9):
    random = np.random.default_rng(1)
    return random.normal(size=(samples, 4)).astype("float32"), random.normal(size=(samples, 4)).astype("float32")


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.02),
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=2),
    "global norm": lambda: keras.optimizers.Adam(0.02, global_clipnorm=0.05),
}
CASES = {
    "siamese in two": (siamese, pairs, [["a_low", "turn"]]),
    "siamese in four": (siamese, pairs, ["a_low", "a_high", "b_low"]),
    "three uses in three stages": (deep, rows, ["own0", "own1"]),
    "three uses in two stages": (deep, rows, ["own1"]),
}


TRAINED = [(case, "sgd") for case in CASES] + [("siamese in two", "global norm")]
TRAINED += [(case, optimizer) for optimizer in ("adamw", "global norm", "adam") for case in CASES]


@pytest.mark.parametrize(("case", "optimizer"), in_turn(list(dict.fromkeys(TRAINED)), 5, 12, several=True))
def test_training_is_keras(case, optimizer):
    """One microbatch a batch, eagerly: bit for bit where a weight has two uses and clipping takes no sum over all."""
    build, data, at = CASES[case]
    x, y = data()
    with twins(build, lambda: {"optimizer": OPTIMIZERS[optimizer](), "loss": "mse"}, at=at) as pair:
        theirs, ours = pair.fit(x, y, batch_size=4, epochs=2)
        assert len(pair.pipe.get_weights()) == len(pair.model.get_weights())
        for a, b in zip(pair.pipe.get_weights(), pair.model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        if build is siamese and optimizer != "global norm":
            assert_same_arrays(pair.pipe.get_weights(), pair.model.get_weights())
            assert ours == theirs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", in_turn(["1f1b", "gpipe"], 1, 1))
@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2))
def test_microbatches_are_one_tape_and_copies_stay_equal(case, schedule, run_eagerly):
    build, data, at = CASES[case]
    x, y = data()
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(build(), at=at, microbatches=4, schedule=schedule, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.02, clipnorm=0.1), "mse", run_eagerly=run_eagerly)
        pipe.verify(x, y).raise_if_failed()
        for _ in range(3):
            pipe.train_on_batch(x, y)
        pipe.verify(x, y).raise_if_failed()
        assert copies_differ(pipe) == []


def copies_differ(pipe):
    """Names of variables that stages have different values of."""
    values = pipe.session.values.read("weights")
    first, differ = {}, []
    for i, segment in enumerate(pipe.segments):
        for weight, value in zip(segment.model.weights, values[i], strict=True):
            if not np.array_equal(first.setdefault(id(weight), value), value):
                differ.append(f"{i}/{weight.path}")
    return differ


def test_a_tied_gradient_is_reported_once_under_its_first_stage():
    x, y = pairs()
    with Pipeline.split(siamese(), at=["a_low", "a_high", "b_low"], transport="inproc") as pipe:
        pipe.compile("sgd", "mse")
        names = [name for name in pipe.gradients(x, y) if "low" in name or "high" in name]
        assert names == ["stage0/low/kernel", "stage0/low/bias", "stage1/high/kernel", "stage1/high/bias"]


def test_a_lost_contribution_is_found(monkeypatch):
    """Verification reads the shared value itself, so copies that are not summed cannot pass."""
    from stages.worker import tied_gradients

    monkeypatch.setattr(
        tied_gradients,
        "summed_uses",
        lambda contributions: tied_gradients.reduce(tied_gradients.plus, contributions[0], None),
    )
    x, y = pairs()
    with Pipeline.split(siamese(), at=[["a_low", "turn"]], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        report = pipe.verify(x, y)
        assert {row.name.partition("/")[2] for row in report.failed} == {"low/bias", "low/kernel"}
        assert {row.stage for row in report.failed} == {"stage0", "stage1"}, "both copies get the wrong sum"


def test_copies_that_drifted_apart_are_found():
    x, y = pairs()
    with Pipeline.split(siamese(), at=[["a_low", "turn"]], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        values = pipe.session.values.read("model")
        pipe.session.workers.driver().set("model", {1: [value + 0.5 for value in values[1]]})
        assert not pipe.verify(x, y).ok


def test_an_embedding_and_its_own_projection_in_hand_made_segments(tmp_path):
    """The first and the last part share a layer object; merging gives a model that shares it too."""
    words = keras.Input((LENGTH,), dtype="int32")
    embedding = layers.Embedding(WORDS, WIDTH, name="embed")
    bottom = keras.Model(words, embedding(words))
    h = keras.Input((LENGTH, WIDTH))
    middle = keras.Model(h, layers.Dense(WIDTH, activation="tanh")(h))
    h = keras.Input((LENGTH, WIDTH))
    top = keras.Model(h, Project(embedding)(h))
    random = np.random.default_rng(0)
    x, y = random.integers(0, WORDS, (8, LENGTH)), random.integers(0, WORDS, (8, LENGTH))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole = keras.Sequential([bottom, middle, top])
    before = whole.get_weights()
    with Pipeline([bottom, middle, top], microbatches=3, transport="inproc") as pipe:
        pipe.compile("adam", loss, run_eagerly=True)
        pipe.verify(x, y).raise_if_failed()
        pipe.train_on_batch(x, y)
        assert copies_differ(pipe) == []
        merged = pipe.merge()
        assert len(merged.trainable_variables) == 3
        pipe.save(tmp_path / "here")
        np.testing.assert_allclose(merged.predict(x, verbose=0), pipe.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    for options in ({}, {"stages": 2}):
        with Pipeline.load(tmp_path / "here", transport="inproc", **options) as again:
            assert len(again.get_weights()) == 3
            again.train_on_batch(x, y)
            assert copies_differ(again) == []
            again.verify(x, y).raise_if_failed()
    whole.set_weights(before)
    whole.compile("adam", loss, run_eagerly=True)
    whole.train_on_batch(x, y)
    for ours, theirs in zip(merged.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", in_turn([{}, {"stages": 1}, {"stages": 2}, {"at": ["b_low"]}], 1, 4))
def test_checkpoints_of_tied_weights_go_on_in_other_cuts(options, tmp_path):
    x, y = pairs()
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(siamese(), at=["a_low", "a_high", "b_low"], transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
        pipe.train_on_batch(x, y)
        pipe.save(tmp_path / "here")
        for _ in range(3):
            last = pipe.train_on_batch(x, y)
        expected = pipe.get_weights()
        merged = pipe.merge()
    with Pipeline.load(tmp_path / "here", transport="inproc", **options) as again:
        for _ in range(3):
            found = again.train_on_batch(x, y)
        assert found == last
        assert_same_arrays(again.get_weights(), expected)
        assert_same_arrays(merged.get_weights(), expected)
        again.set_weights([weight + 1 for weight in expected])
        assert_same_arrays(again.get_weights(), [weight + 1 for weight in expected])
        assert copies_differ(again) == []


@pytest.mark.parametrize(
    "layer", [layers.BatchNormalization, lambda **k: layers.Dropout(0.5, seed=1, **k)], ids=["statistics", "seeds"]
)
def test_a_state_that_two_stages_would_change_is_refused(layer):
    shared = layer(name="shared")
    x = keras.Input((4,))
    h = shared(layers.Dense(4, name="a")(x))
    model = keras.Model(x, layers.Dense(2, name="c")(shared(layers.Dense(4, name="b")(h))))
    with pytest.raises(SplitError, match="'shared' is used in the stages 0 and 1, and every use changes its state"):
        Pipeline.split(model, at=["b"])
    with Pipeline.split(model, stages=2, transport="inproc") as pipe:  # cuts elsewhere
        assert len({stage for stage, names in enumerate(pipe.segments) if "shared" in str(names.model.operations)}) <= 1
    one, other = (keras.Sequential([keras.Input((4,)), shared, layers.Dense(4)]) for _ in range(2))
    with pytest.raises(WiringError, match="'shared' is in the stages 'stage0' and 'stage1'"):
        Pipeline([one, other])


def test_a_frozen_layer_may_be_anywhere():
    """Nothing changes it, so its copies need no exchange."""
    model = siamese()
    model.get_layer("low").trainable = False
    x, y = pairs()
    with Pipeline.split(model, at=["a_low", "a_high", "b_low"], microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.verify(x, y).raise_if_failed()
        assert not any("low" in name for name in pipe.gradients(x, y))


@pytest.mark.parametrize(("dropout", "shares"), [(0.0, True), (0.2, False)])
def test_a_recurrent_cell_is_shared_unless_it_draws_random_numbers(dropout, shares):
    """Keras gives every recurrent cell a seed generator; only one with dropout draws from it."""
    cell = layers.SimpleRNNCell(3, dropout=dropout, name="cell")
    x, h = keras.Input((3,)), keras.Input((3,))
    first, _ = cell(x, [h])
    second, _ = cell(layers.Dense(3, name="middle")(first), [first])
    model = keras.Model([x, h], second)
    if not shares:
        with pytest.raises(SplitError, match="'cell' is used in the stages 0 and 1"):
            Pipeline.split(model, at=["middle"])
        return
    random = np.random.default_rng(0)
    data, y = [random.normal(size=(5, 3)), random.normal(size=(5, 3))], random.normal(size=(5, 3))
    with Pipeline.split(model, at=["middle"], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.verify(data, y).raise_if_failed()
