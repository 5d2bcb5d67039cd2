"""`fit`, `evaluate`, `predict` and the `*_on_batch` methods return what Keras returns for the unsplit model."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CompileError, DataError, Pipeline, PipelineClosedError
from tests.levels import in_turn
from tests.pipeline.reference.twins import (
    assert_same_arrays,
    assert_same_logs,
    classes,
    classifier,
    numbers,
    regressor,
    twins,
)


def crossentropy():
    return {"optimizer": "adam", "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def squares():
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse", "metrics": ["mae"]}


X, Y = classes(20)
XV, YV = classes(9, seed=1)


@pytest.fixture(scope="module")
def pair():
    """Twins that tests train on from one to the next: state carries over in both alike."""
    with twins(classifier, crossentropy) as made:
        yield made


class Batches(keras.utils.PyDataset):
    def __init__(self, weighted=False):
        super().__init__()
        self.weighted = weighted

    def __len__(self):
        return 4

    def __getitem__(self, index):
        part = slice(index * 5, index * 5 + 5)
        return (X[part], Y[part], np.full(5, 0.5, "float32")) if self.weighted else (X[part], Y[part])


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


def endless():
    return dataset().repeat()


def weighted_dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y, np.linspace(0, 1, 20, dtype="float32"))).batch(8)


def generator():
    for start in itertools.cycle(range(0, 20, 5)):
        yield X[start : start + 5], Y[start : start + 5]


ARGUMENTS = [
    pytest.param({"x": X, "y": Y, "batch_size": 8, "epochs": 2}, id="arrays, shuffled"),
    pytest.param({"x": weighted_dataset, "shuffle": False}, id="tf.data with weights"),
    pytest.param({"x": generator, "shuffle": False, "steps_per_epoch": 4, "epochs": 2}, id="generator"),
    pytest.param({"x": Batches, "shuffle": True}, id="PyDataset, shuffled"),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 8, "validation_split": 0.25, "validation_batch_size": 3},
        id="validation split",
    ),
    pytest.param({"x": X, "y": Y, "batch_size": 8, "class_weight": {0: 2.0, 2: 0.25}}, id="class weights"),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 8, "sample_weight": np.linspace(0, 2, 20, dtype="float32")},
        id="sample weights",
    ),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 8, "validation_data": (XV, YV, np.linspace(0, 1, 9, dtype="float32"))},
        id="weighted validation data",
    ),
    pytest.param({"x": X, "y": Y, "batch_size": 10, "epochs": 4, "initial_epoch": 2}, id="initial epoch"),
    pytest.param({"x": X, "y": Y}, id="default batch size"),
    pytest.param({"x": X, "y": Y, "batch_size": 8, "shuffle": False}, id="in order"),
    pytest.param({"x": tf.constant(X), "y": tf.constant(Y), "batch_size": 8}, id="tensors"),
    pytest.param({"x": X.astype("float64"), "y": Y[:, None], "batch_size": 20}, id="float64 and a column"),
    pytest.param({"x": dataset, "epochs": 2, "shuffle": False}, id="tf.data"),
    pytest.param({"x": endless, "steps_per_epoch": 2, "epochs": 2, "shuffle": False}, id="endless tf.data"),
    pytest.param({"x": lambda: Batches(weighted=True), "shuffle": False}, id="PyDataset with weights"),
    pytest.param({"x": X, "y": Y, "batch_size": 5, "epochs": 2, "steps_per_epoch": 2}, id="steps_per_epoch"),
    pytest.param({"x": X, "y": Y, "batch_size": 8, "validation_data": (XV, YV)}, id="validation data"),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 8, "validation_data": dataset, "validation_steps": 2}, id="validation steps"
    ),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 10, "epochs": 3, "validation_data": (XV, YV), "validation_freq": 2},
        id="validation every second epoch",
    ),
    pytest.param({"x": X, "y": Y, "batch_size": 10, "epochs": 2, "initial_epoch": 2}, id="no epoch at all"),
    pytest.param(
        {"x": X, "y": Y, "batch_size": 8, "sample_weight": np.linspace(0, 2, 20), "validation_split": 0.2},
        id="sample weights and split",
    ),
]


@pytest.mark.parametrize("arguments", in_turn(ARGUMENTS, 9, len(ARGUMENTS)))
def test_history_and_weights_are_those_of_keras(pair, arguments):
    pair.assert_fit_alike(**arguments)


def test_stages_and_transport_do_not_matter():
    with twins(classifier, crossentropy, stages=3, transport="ipc", schedule="gpipe") as pair:
        pair.assert_fit_alike(X, Y, batch_size=8, epochs=2, validation_data=(XV, YV))
        assert_same_arrays([pair.pipe.predict(XV, verbose=0)], [pair.model.predict(XV, verbose=0)])


def test_regression_over_many_microbatches_is_keras_up_to_the_order_of_sums():
    with twins(regressor, squares, microbatches=7) as pair:
        theirs, ours = pair.fit(*numbers(20), batch_size=8, epochs=3)
        assert list(ours) == list(theirs)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5)


@pytest.mark.gate
def test_compiled_training_is_keras_up_to_rounding():
    with twins(regressor, lambda: squares() | {"run_eagerly": False}) as pair:
        theirs, ours = pair.fit(*numbers(20), batch_size=8, epochs=3)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5)


def test_history_object_is_keras_own(pair):
    _, history = pair.both(lambda twin: twin.fit(X, Y, batch_size=10, epochs=3, initial_epoch=1, verbose=0))
    assert isinstance(history, keras.callbacks.History)
    assert history.epoch == [1, 2]
    assert history.params["epochs"] == 3 and history.params["steps"] == 2


@pytest.mark.parametrize(
    "arguments", in_turn([{}, {"batch_size": 7}, {"sample_weight": np.linspace(0, 1, 20)}, {"steps": 1}], 2, 4)
)
def test_evaluate_gives_loss_first_or_a_dict(pair, arguments):
    theirs, ours = pair.both(lambda twin: twin.evaluate(X, Y, verbose=0, **arguments))
    assert ours == theirs
    theirs, ours = pair.both(lambda twin: twin.evaluate(X, Y, verbose=0, return_dict=True, **arguments))
    assert_same_logs(ours, theirs)


def test_evaluate_takes_a_data_set(pair):
    theirs, ours = pair.both(lambda twin: twin.evaluate(dataset(), verbose=0))
    assert ours == theirs


def test_evaluate_without_metrics_gives_the_loss_alone():
    with twins(regressor, lambda: {"optimizer": "sgd", "loss": "mse"}) as pair:
        x, y = numbers()
        theirs, ours = pair.both(lambda twin: twin.evaluate(x, y, verbose=0))
        assert ours == theirs and isinstance(ours, float)
        assert pair.pipe.train_on_batch(x, y) == pair.model.train_on_batch(x, y)
        assert isinstance(pair.pipe.test_on_batch(x, y), float)


@pytest.mark.parametrize("given", [X, tf.constant(X), dataset().map(lambda x, y: x)], ids=["array", "tensor", "data"])
def test_predict_joins_batches_with_a_smaller_last_one(pair, given):
    theirs, ours = pair.both(lambda twin: twin.predict(given, batch_size=None if given is not X else 7, verbose=0))
    assert ours.shape == (20, 3)
    assert_same_arrays([ours], [theirs])


def test_predict_works_before_compile_and_after():
    model = classifier()
    with Pipeline.split(model, stages=2, transport="inproc") as pipe:
        before = pipe.predict(X, batch_size=7, verbose=0)
        np.testing.assert_allclose(before, model.predict(X, verbose=0), rtol=1e-5)
        pipe.compile("sgd", "mse", run_eagerly=True)
        np.testing.assert_allclose(pipe.predict(X, verbose=0), before, rtol=1e-5)


def of_this_batch(model, method, *arguments, **named):
    """What Keras gives since it forgets the batches before by itself; older ones are told to, and give arrays."""
    model.reset_metrics()
    return keras.tree.map_structure(float, getattr(model, method)(*arguments, **named))


@pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch"])
@pytest.mark.parametrize("arguments", [{}, {"sample_weight": np.linspace(0, 1, 20, dtype="float32")}])
def test_on_batch_methods_return_what_keras_returns(pair, method, arguments):
    for return_dict in (False, True):
        ours = getattr(pair.pipe, method)(X, Y, return_dict=return_dict, **arguments)
        theirs = of_this_batch(pair.model, method, X, Y, return_dict=return_dict, **arguments)
        assert ours == theirs
        assert type(ours) is type(theirs)
    pair.assert_weights_alike()


def test_train_on_batch_takes_class_weights(pair):
    ours = pair.pipe.train_on_batch(X, Y, class_weight={1: 3.0})
    assert ours == of_this_batch(pair.model, "train_on_batch", X, Y, class_weight={1: 3.0})
    pair.assert_weights_alike()
    with pytest.raises(CompileError, match="without sample_weight"):
        pair.pipe.train_on_batch(X, Y, sample_weight=np.ones(20), class_weight={1: 3.0})


def test_predict_on_batch_is_keras_own(pair):
    assert_same_arrays([pair.pipe.predict_on_batch(X)], [pair.model.predict_on_batch(X)])


def test_callbacks_of_evaluate_and_predict_are_called(pair):
    seen = []
    watch = keras.callbacks.LambdaCallback()
    watch.on_test_batch_end = lambda batch, logs: seen.append(("test", batch, sorted(logs)))
    watch.on_predict_batch_end = lambda batch, logs: seen.append(("predict", batch, logs["outputs"].shape[0]))
    pair.pipe.evaluate(X, Y, batch_size=10, verbose=0, callbacks=[watch])
    pair.pipe.predict(X, batch_size=16, verbose=0, callbacks=[watch])
    assert seen == [
        ("test", 0, ["accuracy", "loss"]),
        ("test", 1, ["accuracy", "loss"]),
        ("predict", 0, 16),
        ("predict", 1, 4),
    ]


@pytest.mark.parametrize("verbose", in_turn([0, 1, 2, "auto"], 2, 4))
def test_verbose_shows_what_keras_shows(pair, capsys, verbose):
    shown = []

    def act(twin):
        twin.fit(X, Y, batch_size=10, verbose=verbose)
        text = re.sub(r"[\d.]+(m?s)", r"\1", capsys.readouterr().out)  # times differ, and with them the padding
        shown.append("\n".join(" ".join(line.split()) for line in text.splitlines()))

    pair.both(act)
    last = [text.splitlines()[-1:] for text in shown]
    assert last[1] == last[0]
    assert bool(shown[1]) == (verbose != 0)


def test_a_fit_that_fails_leaves_the_pipeline_usable(pair):
    with pytest.raises(DataError, match="'n', 6"):
        pair.pipe.fit(X[:, :5], Y, verbose=0)
    pair.assert_fit_alike(X, Y, batch_size=10)


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch", "gradients", "verify"])
def test_what_needs_compile_says_so(method):
    with (
        Pipeline.split(regressor(), stages=2, transport="inproc") as pipe,
        pytest.raises(CompileError, match="compile"),
    ):
        getattr(pipe, method)(*numbers())


def test_a_closed_pipeline_says_so():
    pipe = Pipeline.split(regressor(), stages=2, transport="inproc")
    pipe.compile("sgd", "mse")
    pipe.close()
    pipe.close()
    for use in (lambda: pipe.predict(X, verbose=0), pipe.get_weights, lambda: pipe.fit(*numbers(), verbose=0)):
        with pytest.raises(PipelineClosedError, match="closed"):
            use()


def drawn():
    return random.random(), float(np.random.rand()), keras.random.uniform(()).numpy()


def seeded():
    keras.backend.clear_session()  # older releases of Keras keep their generator of random numbers under a new seed
    keras.utils.set_random_seed(5)


def test_making_a_pipeline_draws_none_of_the_users_random_numbers():
    seeded()
    regressor()
    expected = drawn()
    seeded()
    with Pipeline.split(regressor(), stages=2, transport="ipc") as pipe:
        pipe.compile("adam", "mse")
        pipe.get_weights()
        assert drawn() == expected


SCRIPT = """
import json, numpy as np, keras
from pipeline import Pipeline
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
pipe = Pipeline.split(model, stages=2, microbatches=2)
pipe.compile("sgd", "mse")
x = np.ones((8, 3), "float32")
print(json.dumps(pipe.fit(x, x[:, :1], epochs=2, verbose=0).history["loss"]))
"""


@pytest.mark.gate
def test_a_script_without_a_main_guard_trains_and_ends(tmp_path, request):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ran = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(request.config.rootpath)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    losses = json.loads(ran.stdout.splitlines()[-1])
    assert len(losses) == 2 and losses[1] < losses[0]
