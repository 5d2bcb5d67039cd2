"""What a user gives or does to a stage in the hand: right, as Keras under one tape, or refused in one sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from stages.errors import HandoffError
from stages.loss.head import Head

layers, ops = keras.layers, keras.ops
MODES = pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])
X, ONES = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def values(*shape: int) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def plain(*more: Any) -> Any:
    return keras.Sequential([keras.Input((3,)), *(more or [layers.Dense(2, name="top")])])


def two_outputs() -> Any:
    x = keras.Input((3,), name="x")
    return keras.Model(x, {"b": layers.Dense(2, name="first")(x), "a": layers.Dense(2, name="second")(x)})


class Named(keras.Model):
    """Takes a dict, and does not say so before it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.one = layers.Dense(2, "tanh")

    def call(self, given: Any) -> Any:
        return {"sum": self.one(given["right"]) + 3.0 * self.one(given["left"]), "left": given["left"]}


class Pair(keras.Model):
    """Takes two tensors side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = layers.Dense(2)

    def call(self, left: Any, right: Any) -> Any:
        return self.one(left) - self.one(right)


def forward(given: Any, model: Callable[[], Any] = plain) -> Callable[[bool], Any]:
    return lambda eager: Stage(model(), "one", run_eagerly=eager).forward(given)


def backward(given: Any, model: Callable[[], Any] = plain, **options: Any) -> Callable[[bool], Any]:
    def run(eager: bool) -> Any:
        stage = Stage(model(), "one", run_eagerly=eager)
        stage.forward(X, **options)
        return stage.backward(given, **options)

    return run


def judged(target: Any, weight: Any = None, **options: Any) -> Callable[[bool], Any]:
    return lambda eager: Stage(plain(), "one", loss="mse", run_eagerly=eager, **options).forward_loss(X, target, weight)


def update(optimizer: Any) -> Callable[[bool], Any]:
    def run(eager: bool) -> None:
        stage = Stage(plain(), "one", run_eagerly=eager)
        stage.backward(stage.forward(X))
        stage.apply(optimizer() if callable(optimizer) else optimizer)

    return run


def built_elsewhere() -> Any:
    optimizer = keras.optimizers.Adam()
    optimizer.build(plain().trainable_variables)
    return optimizer


def inside_a_function(call: Callable[[Stage], Any]) -> Callable[[bool], Any]:
    def run(eager: bool) -> None:
        stage = Stage(plain(), "one", run_eagerly=eager)
        stage.backward(stage.forward(X))
        tf.function(lambda: call(stage), autograph=False)()

    return run


MISTAKES = {
    "ragged": (forward(tf.ragged.constant([[1.0], [2.0, 3.0]])), "ragged tensor.*x.to_tensor"),
    "sparse": (forward(tf.sparse.from_dense(X)), "sparse tensor.*tf.sparse.to_dense"),
    "nothing": (forward(None), "an input must be a tensor or an array of numbers, received NoneType"),
    "objects": (forward(np.array([[1, "a", None]], object)), "array of numbers, received ndarray"),
    "symbolic": (forward(keras.KerasTensor((4, 3))), "symbolic tensor, which has no values"),
    "text": (forward(np.array([["a", "b", "c"]])), "text cannot cross.*tf.data"),
    "rows of numbers": (
        forward([[1.0, 2.0, 3.0]] * 2),
        "takes 1 tensor.s., received 6; a list of numbers.*numpy.asarray",
    ),
    "keys": (forward({"y": X}), "inputs must be a dict with the keys 'keras_tensor.*', received 'y'"),
    "another key": (
        backward({"a": ONES, "c": ONES}, two_outputs),
        r"nested like the outputs, \{'b': ., 'a': .\}, received",
    ),
    "a list for a dict": (backward([ONES, ONES], two_outputs), r"nested like the outputs.*received \[., .\]"),
    "only one": (backward({"a": ONES}, two_outputs), "None stands for an output without a gradient"),
    "none at all": (backward({"a": None, "b": None}, two_outputs), "there is nothing to go backward from"),
    "a listed none": (backward([None]), "there is nothing to go backward from"),
    "no gradient": (backward(object()), "an output gradient must be a tensor or an array, received object"),
    "doubles": (backward(ONES.astype("float64")), r"like the output, float32 \(4, 2\), received float64"),
    "a word": (backward(ONES, microbatch="a"), "microbatch= must be a whole number from 0, received 'a'"),
    "below zero": (backward(ONES, window=-1), "window= must be a whole number from 0, received -1"),
    "one target": (judged(ONES[:1]), r"target must have one entry for each of 4 samples, received float32 \(1, 2\)"),
    "weights": (judged(ONES, np.ones(3)), "sample_weight must have one entry for each of 4 samples"),
    "another width": (judged(np.ones((4, 5))), r"forward_loss of microbatch 0: the loss cannot take the target"),
    "uneven target": (judged([[1.0], [1.0, 2.0]]), "a target or weight is no tensor or array"),
    "several losses": (lambda e: Stage(plain(), loss={"a": "mse"}), "one loss for one output.*received dict.*heads="),
    "several outputs": (lambda e: Stage(two_outputs(), loss="mse"), "one loss for one output, and the model .* has 2"),
    "a name": (update("sgd"), "apply takes a Keras optimizer object, .* received str"),
    "another's": (update(built_elsewhere), "built on other variables, not on .*; give each stage one of its own"),
    "apply": (inside_a_function(lambda s: s.apply(keras.optimizers.SGD())), "inside of a tf.function"),
    "gradients": (inside_a_function(lambda s: s.gradients()), r"gradients\(\) was called inside of a tf.function"),
    "zeros": (
        inside_a_function(lambda s: s.zero_gradients()),
        r"zero_gradients\(\) was called inside of a tf.function",
    ),
    "copy": (lambda e: copy.deepcopy(Stage(plain(), run_eagerly=e)), "cannot be copied or pickled; make another Stage"),
    "pickle": (lambda e: pickle.dumps(Stage(plain(), run_eagerly=e)), "cannot be copied or pickled"),
}
"""{what is wrong: (what does it, the sentence)}."""


@MODES
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_by_hand_is_one_sentence(what: str, run_eagerly: bool) -> None:
    make, message = MISTAKES[what]
    with pytest.raises(HandoffError, match=message):
        make(run_eagerly)


def test_a_model_of_two_arguments_is_refused_with_the_way_round() -> None:
    model = Pair()
    model(X, X)
    with pytest.raises(HandoffError, match=r"called with several arguments \(left, right\).*keras.Model\(\[a, b\]"):
        Stage(model)


@MODES
def test_nestings_are_those_of_the_model_by_key(run_eagerly: bool) -> None:
    """A subclassed model gets the dict that it is given; outputs and their gradients go by key, not by order."""
    model, given = Named(), {"right": values(4, 3), "left": values(4, 3) + 1}
    model(given)
    tensors = {name: tf.constant(value) for name, value in given.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        out = model(tensors)["sum"]
    sources = [tensors["left"], tensors["right"], *[v.value for v in model.trainable_variables]]
    expected = tape.gradient(out, sources, output_gradients=2 * out)
    stage = Stage(model, run_eagerly=run_eagerly)
    found = stage.forward(given)
    assert list(found) == ["sum", "left"]
    dx = stage.backward({"left": None, "sum": 2 * found["sum"]})
    for ours, theirs in zip([*dx, *stage.gradients().values()], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(HandoffError, match="nested in another way than in the first forward"):
        stage.forward([X, X])
    two = two_outputs()
    stage = Stage(two, run_eagerly=run_eagerly)
    found = stage.forward(X)
    assert list(found) == ["b", "a"]
    stage.backward({"b": ONES, "a": None})
    assert {path.split("/")[-2] for path, g in stage.gradients().items() if g is not None} == {"first"}


@MODES
def test_a_dict_goes_by_name_to_the_inputs_of_a_list(run_eagerly: bool) -> None:
    """As Keras; in the order of its keys it would be another model."""
    z, a = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    model = keras.Model([z, a], ops.subtract(z, a))
    out = Stage(model, run_eagerly=run_eagerly).forward({"a": X, "z": 3 * X})
    np.testing.assert_array_equal(out, 2 * X)


class Scaled(keras.losses.Loss):
    """With a number that a user may change."""

    by = 1.0

    def call(self, y: Any, p: Any) -> Any:
        return self.by * ops.square(y - p)


@MODES
def test_what_is_changed_counts_from_the_next_call_on(run_eagerly: bool) -> None:
    """A layer's rate and activation, a number in the loss and in the optimizer: as in Keras, run eagerly."""
    keras.utils.set_random_seed(2)
    model, x = plain(layers.Dropout(0.5, seed=1), layers.Dense(2, name="top")), values(4, 3)
    loss, optimizer = Scaled(), keras.optimizers.SGD(0.1, momentum=0.9)
    stage = Stage(model, loss=loss, run_eagerly=run_eagerly)
    twin, twins = keras.models.clone_model(model), keras.optimizers.SGD(0.1, momentum=0.9)
    twin.set_weights(model.get_weights())
    for change in range(5):
        for one, its in ((model, optimizer), (twin, twins)):
            drop, top = one.layers
            if change == 0:
                drop.rate = 0.0
            elif change == 2:
                top.activation = keras.activations.tanh
            elif change == 3:
                loss.by = 5.0
            elif change == 4:
                its.momentum = 0.1
        stage.forward_loss(x, ONES)
        stage.backward()
        stage.apply(optimizer)
        with tf.GradientTape() as tape:
            expected = loss(ONES, twin(x, training=True))
        twins.apply(tape.gradient(expected, twin.trainable_variables), twin.trainable_variables)
        np.testing.assert_allclose(stage.forward(x, training=False), twin(x), rtol=1e-5, atol=1e-6)


@MODES
def test_a_setting_that_changes_before_a_recomputed_backward_is_named(run_eagerly: bool) -> None:
    """Compiled, the backward is that of the forward; eagerly it would be another, unless the layer counts its calls."""
    drop = layers.Dropout(0.5, seed=1)
    stage, x = Stage(plain(drop), recompute=True, run_eagerly=run_eagerly), np.ones((40, 3), "float32")
    out = stage.forward(x)
    drop.rate = 0.1
    if run_eagerly:
        with pytest.raises(HandoffError, match=r"the layer 'dropout.*' got rate=0.1 .it was 0.5. since its forward"):
            stage.backward(x)
        drop.rate = 0.5
    np.testing.assert_array_equal(stage.backward(x), out)


class Counts(layers.Layer):
    """Counts its own calls, which is no change of the user's."""

    calls = 0

    def call(self, x: Any) -> Any:
        self.calls = self.calls + 1
        return x * 2.0


@MODES
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_counts_its_calls_is_let_be(recompute: bool, run_eagerly: bool) -> None:
    layer = Counts()
    stage = Stage(plain(layer), recompute=recompute, run_eagerly=run_eagerly)
    for k in range(3):
        stage.forward(X, microbatch=k)
    if not run_eagerly:
        traced = layer.calls
        stage.forward(X, microbatch=3)
        assert layer.calls == traced
    np.testing.assert_array_equal(stage.backward(X, microbatch=1), 2 * X)


class Own(layers.Layer):
    """Has a private number, a list of numbers, and notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self._rate, self.factors, self._seen = 1.0, [1.0], 0

    def call(self, x: Any) -> Any:
        self._seen = self._seen + 1
        return x * self._rate * self.factors[0]


@pytest.mark.gate
@MODES
def test_numbers_within_settings_count_from_the_next_call_on(run_eagerly: bool) -> None:
    """Of regularisers, constraints and schedules, of private names and lists of the user's classes: as by hand."""
    decay, regulariser = keras.optimizers.schedules.ExponentialDecay, keras.regularizers.L2(0.0)
    top = layers.Dense(2, name="top", kernel_regularizer=regulariser, kernel_constraint=keras.constraints.MaxNorm(99.0))
    own, optimizer = Own(), keras.optimizers.SGD(decay(0.1, 1, 1.0))
    stage = Stage(plain(top, own), loss="mse", run_eagerly=run_eagerly)

    def gradient() -> Any:
        stage.forward_loss(X, np.zeros((4, 2), "float32"))
        stage.backward()
        return np.asarray(next(iter(stage.gradients().values())))

    def moved() -> Any:
        before = np.asarray(top.kernel)
        expected, _ = gradient(), stage.apply(optimizer)
        return (before - np.asarray(top.kernel)) / expected

    np.testing.assert_allclose(moved(), 0.1, rtol=1e-3)
    first, kernel = gradient(), np.asarray(top.kernel)
    stage.zero_gradients()
    regulariser.l2 = 10.0
    np.testing.assert_allclose(gradient(), first + 20 * kernel, rtol=1e-5)
    stage.zero_gradients()
    regulariser.l2 = 0.0
    own._rate = 2.0
    np.testing.assert_allclose(gradient(), 4 * first, rtol=1e-5)
    stage.zero_gradients()
    own.factors[0] = 0.5
    np.testing.assert_allclose(gradient(), first, rtol=1e-5)
    stage.zero_gradients()
    optimizer.learning_rate = decay(0.2, 1, 1.0)
    np.testing.assert_allclose(moved(), 0.2, rtol=1e-3)
    optimizer._learning_rate.initial_learning_rate = 0.3
    np.testing.assert_allclose(moved(), 0.3, rtol=1e-3)
    gradient()
    top.kernel.constraint.max_value = 0.1
    stage.apply(optimizer)
    assert np.linalg.norm(top.kernel, axis=0) == pytest.approx(0.1, rel=1e-4)
    gradient()
    top.kernel.constraint = keras.constraints.MaxNorm(0.01)
    stage.apply(optimizer)
    assert np.linalg.norm(top.kernel, axis=0) == pytest.approx(0.01, rel=1e-4)
    gradient()
    seen = own._seen
    gradient()
    assert own._seen == seen + run_eagerly, "a note that a call makes is no setting"


@MODES
def test_threads_take_turns(run_eagerly: bool) -> None:
    """No microbatch of another thread's is lost."""
    stage, x = Stage(plain(), run_eagerly=run_eagerly), values(12, 3)

    def work(k: int) -> None:
        for _ in range(10):
            stage.backward(stage.forward(x[3 * k : 3 * k + 3], microbatch=k), microbatch=k)

    threads = [Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kernel = next(iter(stage.gradients().values()))
    np.testing.assert_allclose(kernel, 10 * x.T @ np.asarray(stage.model(x)), rtol=1e-5)


def test_several_heads_judge_several_outputs() -> None:
    """What the refusal of one loss for them advises."""
    stage = Stage(two_outputs(), heads=[Head("mse", place=0), Head("mae", place=1)])
    with pytest.raises(HandoffError, match="target must be a list with one entry for each of 2 heads"):
        stage.forward_loss(X, ONES)
    stage.forward_loss(X, [ONES, ONES])
    stage.backward()
    assert all(gradient is not None for gradient in stage.gradients().values())
