"""What a Keras user reaches for is there and says what plain Keras says of the same model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CheckpointError, CompileError, DataError, Pipeline, Segment
from tests.pipeline import parts
from tests.pipeline.reference.twins import SEED, assert_same_arrays, classes, classifier, numbers, regressor

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

X, Y = classes(12)
INPROC = {"transport": "inproc", "microbatches": 1}
COMPILED = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"], "run_eagerly": True}


def plain() -> keras.Model:
    """The model as Keras trains it."""
    keras.utils.set_random_seed(SEED)
    model = classifier()
    model.compile(keras.optimizers.Adam(0.03), **COMPILED)
    return model


def running(model: keras.Model | None = None, **options: object) -> Pipeline:
    pipe = Pipeline.split(model or plain(), stages=2, **INPROC, **options)
    pipe.compile(keras.optimizers.Adam(0.03), **COMPILED)
    return pipe


def test_after_fit_ones_own_model_is_the_trained_one() -> None:
    """Weights, statistics and seeds, as after `model.fit`: nothing differs, and both go on alike."""
    own, keras_own = plain(), plain()
    with running(own) as pipe:
        history = pipe.fit(X, Y, batch_size=6, epochs=2, verbose=0, shuffle=False)
        keras_own.fit(X, Y, batch_size=6, epochs=2, verbose=0, shuffle=False)
        assert pipe.history is history and history.epoch == [0, 1]
        assert_same_arrays([v.numpy() for v in own.variables], [v.numpy() for v in keras_own.variables])
        np.testing.assert_allclose(own.predict(X, verbose=0), pipe.predict(X, verbose=0), rtol=1e-6)


def test_after_single_batches_it_is_with_close() -> None:
    own = plain()
    before = own.get_weights()
    with running(own) as pipe:
        pipe.train_on_batch(X, Y)
        assert_same_arrays(own.get_weights(), before)
        pipe.merge()
        assert_same_arrays(own.get_weights(), before)
        trained = pipe.get_weights()
    assert_same_arrays(own.get_weights(), trained)
    assert any((a != b).any() for a, b in zip(trained, before, strict=True))


def test_parts_of_ones_own_get_their_values_too() -> None:
    keras.utils.set_random_seed(SEED)
    bottom, top = parts.bottom(), parts.top()
    x = np.random.default_rng(0).normal(size=(4, *bottom.input_shape[1:])).astype("float32")
    with Pipeline([bottom, top], **INPROC) as pipe:
        pipe.set_weights([w + 1 for w in pipe.get_weights()])
        predicted = pipe.predict(x, verbose=0)
    np.testing.assert_allclose(top(bottom(x)), predicted, rtol=1e-5, atol=1e-6)


def test_what_only_looks_leaves_ones_own_model_untouched() -> None:
    own = plain()
    before = [v.numpy() for v in own.variables]
    with running(own) as pipe:
        pipe.gradients(X, Y)
        pipe.evaluate(X, Y, verbose=0)
        pipe.predict(X, verbose=0)
    assert_same_arrays([v.numpy() for v in own.variables], before)


@pytest.fixture(scope="module")
def pipe():
    with running() as pipe:
        yield pipe


def test_calling_it_is_calling_the_model(pipe) -> None:
    model = plain()
    model.set_weights(pipe.get_weights())
    for x in (X, tf.constant(X), X[:1]):
        found = pipe(x)
        assert tf.is_tensor(found) and found.dtype == "float32"
        np.testing.assert_allclose(found, model(x), rtol=1e-6)


def test_a_gradient_through_it_is_refused(pipe) -> None:
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = tf.reduce_sum(pipe(x))
    with pytest.raises(DataError, match="no gradient through pipe"):
        tape.gradient(out, x)


def test_what_only_a_model_can_do_is_refused(pipe) -> None:
    with pytest.raises(DataError, match="inference mode"):
        pipe(X, training=True)
    with pytest.raises(DataError, match="other processes"):
        pipe(keras.Input((6,)))
    with pytest.raises(Exception, match=r"DataError: .*other processes"):  # TensorFlow wraps what is raised in a trace
        tf.function(pipe)(tf.constant(X))


def test_counts_and_names(pipe) -> None:
    model = plain()
    assert pipe.count_params() == model.count_params()
    given = pipe.evaluate(X, Y, verbose=0)
    assert pipe.metrics_names == ["loss", "accuracy"]
    assert dict(zip(pipe.metrics_names, given, strict=True)) == pipe.evaluate(X, Y, verbose=0, return_dict=True)


def test_before_the_first_batch_and_without_compile() -> None:
    with Pipeline.split(plain(), stages=2, **INPROC) as pipe:
        assert pipe.metrics_names == [] and pipe.history is None
        pipe.compile("sgd", "mse")
        assert pipe.metrics_names == ["loss"]


def test_summary_has_stages_layers_parameters_and_what_crosses(pipe) -> None:
    said: list[str] = []
    pipe.summary(line_length=110, print_fn=said.append, show_trainable=True)
    text = "\n".join(said)
    model = plain()
    for layer in model.layers:
        [line] = [line for line in text.splitlines() if f" {layer.name} (" in line]
        assert f"{layer.count_params():,}" in line
    assert f"Total params: {model.count_params():,}" in text
    trained = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert f" Trainable params: {trained:,}" in text
    [crossing] = [line for line in text.splitlines() if "(None, 8)" in line and "float32" in line]
    assert {"stage0", "stage1", "32"} <= set(crossing.replace("│", " ").split())


def test_a_summary_of_some_layers(pipe) -> None:
    said: list[str] = []
    pipe.summary(print_fn=said.append, layer_range=("norm", "dr.*"), line_length=100)
    assert " norm (" in said[0] and " drop (" in said[0] and " a (" not in said[0]
    with pytest.raises(DataError, match="layer_range"):
        pipe.summary(layer_range=("nope", "drop"))


def test_the_columns_of_a_summary_end_where_positions_says(pipe) -> None:
    said: list[str] = []
    pipe.summary(print_fn=said.append, line_length=100, positions=(0.2, 0.6, 0.8, 1.0))
    head = next(line for line in said[0].splitlines() if "Layer (type)" in line)
    edges = [place for place, letter in enumerate(head) if letter in "┃│"]
    assert edges[1:4] == pytest.approx([20, 60, 80], abs=2)
    with pytest.raises(DataError, match="positions says where 4 columns end, received 2 numbers"):
        pipe.summary(positions=(0.5, 1.0))


def test_a_summary_lists_the_layers_of_nested_models_if_asked() -> None:
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="deep")], name="inner")
    outer = keras.Sequential([keras.Input((6,)), inner], name="outer")
    top = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="top")])
    with Pipeline([outer, top], **INPROC) as pipe:
        said: list[str] = []
        for expand in (False, True):
            pipe.summary(print_fn=said.append, line_length=110, expand_nested=expand)
    assert ["deep (Dense)" in text for text in said] == [False, True]
    assert all("inner (Sequential)" in text for text in said)


def test_a_part_that_its_worker_builds_is_counted_and_listed() -> None:
    bottom = Segment(parts.bottom)
    with Pipeline([bottom, Segment(parts.top)], **INPROC) as pipe:
        said: list[str] = []
        pipe.summary(print_fn=said.append, line_length=110)
        assert pipe.count_params() == parts.bottom().count_params() + parts.top().count_params()
        assert "built in its worker" in said[0]


def test_a_keras_file_is_kerass_and_comes_back_trained(tmp_path) -> None:
    """`load_model` opens it, and a pipeline that is loaded from it over other cuts goes on as Keras does."""
    path, (x, y) = tmp_path / "m.keras", numbers(12)
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(regressor(), at=["a"], **INPROC) as pipe:
        pipe.compile(keras.optimizers.Adam(0.03), "mse", run_eagerly=True)
        pipe.fit(x, y, batch_size=6, verbose=0, shuffle=False)
        pipe.save(path)
        predicted = pipe.predict(x, verbose=0)
    model = keras.models.load_model(path)
    np.testing.assert_allclose(model.predict(x, verbose=0), predicted, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="how many stages"):
        Pipeline.load(path)
    with Pipeline.load(path, stages=1, **INPROC) as again:
        assert_same_arrays(again.get_weights(), model.get_weights())
        assert again.optimizer.iterations == model.optimizer.iterations == 2
        assert again.train_on_batch(x, y) == pytest.approx(model.train_on_batch(x, y), rel=1e-6)
        for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    with Pipeline.load(path, stages=2, compile=False, **INPROC) as again:
        np.testing.assert_allclose(again.predict(x, verbose=0), predicted, rtol=1e-5, atol=1e-6)
        with pytest.raises(CompileError):
            again.train_on_batch(x, y)


def test_weights_files_are_kerass(pipe, tmp_path) -> None:
    path, model = tmp_path / "m.weights.h5", classifier()
    pipe.save_weights(path)
    model.load_weights(path)
    assert_same_arrays(model.get_weights(), pipe.get_weights())
    model.set_weights([w + 1 for w in model.get_weights()])
    model.save_weights(tmp_path / "n.weights.h5")
    with running() as other:
        other.load_weights(tmp_path / "n.weights.h5")
        assert_same_arrays(other.get_weights(), model.get_weights())
        other.save(tmp_path / "o.weights.h5")
    model.load_weights(tmp_path / "o.weights.h5")
    with pytest.raises(CheckpointError, match="holds weights and no model"):
        Pipeline.load(path)
    with pytest.raises(CheckpointError, match="takes no options"):
        pipe.save(tmp_path / "folder", zipped=True)
