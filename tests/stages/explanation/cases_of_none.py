"""The forms in which "my gradient is None" is asked most often, each written as people write it.

Each case runs in `explaining()`. Its docstring says what was believed; `reason`, `operation` and so on what is so.
Collected from the questions that come back in TensorFlow's and Keras's issues, guides and question sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers


@dataclass(frozen=True)
class Case:
    """A piece of code that asks for a gradient and gets None, and the right explanation.

    Attributes:
        run: The code.
        source: What it asked for.
        reason: Why there is none.
        operation: The operation that is to blame, if one is.
        layer: The layer that it is in.
        code: A part of the user's line that is to blame.
        raises: What the code ends with.
    """

    run: Callable[[], Any]
    source: str
    reason: str
    operation: str = ""
    layer: str = ""
    code: str = ""
    raises: type[Exception] | None = None

    @property
    def name(self) -> str:
        return self.run.__name__


CASES: list[Case] = []


def case(source: str, reason: str, operation: str = "", **more: Any) -> Callable[..., Any]:
    def note(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES.append(Case(run, source, reason, operation, **more))
        return run

    return note


def small_model() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="hidden"), layers.Dense(2, name="scores")], name="net"
    )


X = np.linspace(-1, 1, 12).reshape(4, 3).astype("float32")
Y = np.array([0, 1, 1, 0])


@case("x", "tensor not watched")
def a_constant_is_not_watched():
    """The tape records what is computed from x, so it can differentiate by x."""
    x = tf.constant([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(x * x)
    return tape.gradient(loss, x)


@case("w", "replaced", "Sub", code="w = w - 0.1 * gradient")
def a_variable_becomes_a_tensor():
    """A step of gradient descent by hand: the second step finds no gradient."""
    w = tf.Variable([1.0, 2.0], name="w")
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * w)
        gradient = tape.gradient(loss, w)
        if gradient is not None:
            w = w - 0.1 * gradient
    return gradient


@case("w", "NumPy", "np.mean", code="np.mean(w * w)")
def the_loss_is_computed_with_numpy():
    """NumPy functions take tensors, so they can be used in a loss."""
    w = tf.Variable([1.0, 2.0], name="w")
    with tf.GradientTape() as tape:
        mean = np.mean(w * w)
        loss = tf.sqrt(mean)
    return tape.gradient(loss, w)


@case("hidden/kernel", "predict", "Model.predict", code="model.predict")
def predict_in_place_of_a_call():
    """predict gives the model's output, so a loss can be computed from it."""
    model = small_model()
    with tf.GradientTape() as tape:
        scores = model.predict(X, verbose=0)
        loss = tf.reduce_mean(tf.square(scores))
    return tape.gradient(loss, model.trainable_variables)


@case("scores/kernel", "argmax", "ArgMax", code="tf.argmax")
def the_loss_compares_classes():
    """The predicted class is compared with the right one: that is what should become better."""
    model = small_model()
    with tf.GradientTape() as tape:
        classes = tf.cast(tf.argmax(model(X), axis=-1), tf.float32)
        loss = tf.reduce_mean(tf.square(classes - tf.cast(Y, tf.float32)))
    return tape.gradient(loss, model.trainable_variables)


@case("hidden/kernel", "comparison", "GreaterEqual", code="tf.where(p >= 0.5")
def predictions_are_cut_at_a_half():
    """A mask should have zeros and ones only, so the loss gets it so."""
    model = small_model()
    with tf.GradientTape() as tape:
        p = tf.sigmoid(model(X))
        mask = tf.where(p >= 0.5, 1.0, 0.0)
        loss = tf.reduce_mean(tf.square(mask - 1.0))
    return tape.gradient(loss, model.trainable_variables)


@case("x", "integer source")
def the_input_is_an_integer():
    """A number is a number, with or without a decimal point."""
    x = tf.constant([[2, 2], [1, 3]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.cast(x, tf.float32) ** 2)
    return tape.gradient(loss, x)


@case("w", "assignment", "AssignVariableOp", code="total.assign(")
def the_value_goes_through_a_variable():
    """A variable holds the result, and the loss is computed from the variable."""
    w = tf.Variable(3.0, name="w")
    total = tf.Variable(0.0, name="total")
    with tf.GradientTape() as tape:
        total.assign(w * 2.0)
        loss = total * total
    return tape.gradient(loss, w)


@case("hidden/kernel", "metric", code="metric.update_state(")
def a_metric_in_place_of_a_loss():
    """Metrics and losses have the same names and are called alike."""
    model = small_model()
    metric = keras.metrics.MeanSquaredError()
    with tf.GradientTape() as tape:
        metric.update_state(tf.one_hot(Y, 2), model(X))
        loss = metric.result()
    return tape.gradient(loss, model.trainable_variables)


@case("x", "outside the tape", "Square", code="tf.square(x)")
def the_target_is_computed_behind_the_tape():
    """The tape watches x; the function is called when its gradient is wanted."""
    x = tf.constant(9.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
    return tape.gradient(tf.square(x), x)


@case("v[0]", "made beside", "StridedSlice")
def the_gradient_of_a_slice():
    """v has a gradient, so its first element has one."""
    v = tf.Variable([1.0, 2.0], name="v")
    first = v[0]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v * v)
    return tape.gradient(loss, {"v[0]": first})


@case("hidden output", "made beside", "BiasAdd", layer="hidden")
def the_layer_is_called_a_second_time():
    """Grad-CAM: the layer's output, and the score of a class, are both computed from the image."""
    model = small_model()
    with tf.GradientTape() as tape:
        features = model.layers[0](X)
        score = model(X)[:, 0]
    return tape.gradient(score, {"hidden output": features})


@case("aux/kernel", "no dependence", "BiasAdd", layer="aux")
def an_output_that_the_loss_does_not_use():
    """A model with two heads, trained with the loss of one: "gradients do not exist for variables"."""
    body, head = layers.Dense(4, name="body"), layers.Dense(2, name="head")
    aux = layers.Dense(2, name="aux")
    with tf.GradientTape() as tape:
        features = body(X)
        scores, extra = head(features), aux(features)
        loss = tf.reduce_mean(tf.square(scores))
    variables = [*body.trainable_variables, *head.trainable_variables, *aux.trainable_variables]
    return tape.gradient(loss, variables), extra


@case("x", "outside the tape", code="inner.gradient(")
def a_gradient_penalty_outside_of_the_outer_tape():
    """The gradient's norm is a loss; the tape that should differentiate it is closed already."""
    x = tf.Variable([1.0, 2.0], name="x")
    with tf.GradientTape() as outer, tf.GradientTape() as inner:
        y = tf.reduce_sum(x**3)
    gradient = inner.gradient(y, x)
    penalty = tf.reduce_sum(gradient**2)
    return outer.gradient(penalty, x)


@case("hidden/kernel", "variable not watched")
def a_tape_that_watches_nothing():
    """watch_accessed_variables=False was set to save memory."""
    model = small_model()
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        loss = tf.reduce_mean(model(X))
    return tape.gradient(loss, model.trainable_variables)


@case("step", "trainable=False")
def a_variable_that_is_not_trainable():
    """The variable is used in the loss."""
    step = tf.Variable(1.0, trainable=False, name="step")
    with tf.GradientTape() as tape:
        loss = step * step
    return tape.gradient(loss, step)


@case("w", "numpy_function", "numpy_function", code="tf.numpy_function(")
def a_numpy_function():
    """tf.numpy_function makes a TensorFlow operation of it."""
    w = tf.Variable([1.0, 2.0], name="w")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.numpy_function(np.sin, [w * 2.0], tf.float32))
    return tape.gradient(loss, w)


@case("first", "stateful layer", "AssignVariableOp", layer="rnn")
def a_stateful_layer_hands_its_state_on():
    """stateful=True keeps the state from one call to the next, so the first window should learn from the second."""
    rnn = layers.SimpleRNN(2, stateful=True, name="rnn")
    windows = tf.reshape(tf.range(24, dtype=tf.float32), (2, 2, 2, 3)) / 24
    first, second = windows[0], windows[1]
    with tf.GradientTape() as tape:
        tape.watch(first)
        rnn(first)
        loss = tf.reduce_sum(rnn(second))
    return tape.gradient(loss, {"first": first})


@case("w", "Python", "float()", code="float(tf.reduce_sum(w * w))")
def the_loss_becomes_a_python_number():
    """float() gives the value, and tf.constant makes it a tensor again."""
    w = tf.Variable([1.0, 2.0], name="w")
    with tf.GradientTape() as tape:
        number = float(tf.reduce_sum(w * w))
        loss = tf.constant(number) * 0.5
    return tape.gradient(loss, w)


@case("x", "watched too late", "Mul", code="y = x * 3.0")
def watched_after_it_was_used():
    """tape.watch is called somewhere in the block."""
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        y = x * 3.0
        tape.watch(x)
    return tape.gradient(y, x)


@case("w", "recording stopped", "Mul", code="scale = w * 2.0")
def recording_is_stopped_for_a_while():
    """What is only for reporting was moved out of the tape, and something else with it."""
    w = tf.Variable(2.0, name="w")
    with tf.GradientTape() as tape:
        with tape.stop_recording():
            scale = w * 2.0
        loss = scale * 3.0
    return tape.gradient(loss, w)


@case("images", "no registered gradient", "AdjustHue", raises=LookupError)
def an_operation_that_has_no_gradient():
    """Images are augmented inside the tape, to learn an attack on them."""
    images = tf.Variable(tf.ones((1, 2, 2, 3)) * 0.5, name="images")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.image.adjust_hue(images, 0.1))
    return tape.gradient(loss, images)


@case("w", "py_function", "EagerPyFunc", code="tf.py_function(", raises=tf.errors.InvalidArgumentError)
def numpy_inside_a_py_function():
    """tf.py_function has a gradient, other than tf.numpy_function."""
    w = tf.Variable([[1.0, 2.0]], name="w")
    with tf.GradientTape() as tape:
        biased = tf.nn.bias_add(tf.nn.relu(w * 2.0), [0.5, 0.5])
        loss = tf.py_function(lambda t: np.sum(t.numpy()), [biased], tf.float32)
    return tape.gradient(loss, w)


@case("w", "stop_gradient", "StopGradient", code="tf.stop_gradient")
def a_forgotten_stop_gradient():
    """Copied from a paper's code, where the other branch learned."""
    w = tf.Variable([1.0, 2.0], name="w")
    with tf.GradientTape() as tape:
        target = tf.stop_gradient(w * 2.0)
        loss = tf.reduce_sum(target**2)
    return tape.gradient(loss, w)


@case("w", "rounding", "Round", code="tf.round")
def outputs_are_rounded():
    """Grades are whole numbers, so the prediction is rounded before it is compared."""
    w = tf.Variable([1.2, 2.7], name="w")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.abs(tf.round(w) - 2.0))
    return tape.gradient(loss, w)


@case("w", "cast", "Cast", code="tf.cast(w, tf.int32)")
def a_cast_to_an_integer_and_back():
    """A position is computed and used to weigh."""
    w = tf.Variable([1.2, 2.7], name="w")
    with tf.GradientTape() as tape:
        place = tf.cast(w, tf.int32)
        loss = tf.reduce_sum(tf.cast(place, tf.float32) * 0.5)
    return tape.gradient(loss, w)


@case("w", "average", "AssignVariableOp", code="averages.apply")
def a_moving_average_of_the_weights():
    """The average of the weights is steadier, so the loss is taken of that."""
    w = tf.Variable([1.0, 2.0], name="w")
    averages = tf.train.ExponentialMovingAverage(0.9)
    with tf.GradientTape() as tape:
        averages.apply([w])
        loss = tf.reduce_sum(averages.average(w) ** 2)
    return tape.gradient(loss, w)


@case("w", "assignment", "AssignVariableOp", code="tf.Variable(w * 2.0)")
def a_variable_is_made_anew_in_every_call():
    """What a layer computes with is a variable, so the scaled weights become one."""
    w = tf.Variable([1.0, 2.0], name="w")

    def call(x):
        scaled = tf.Variable(w * 2.0)
        return x * scaled

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(tf.constant([3.0, 4.0])))
    return tape.gradient(loss, w)


@case("w", "custom gradient", code="doubled(w)")
def a_custom_gradient_that_gives_none():
    """The gradient function was written for one input and forgot the other."""

    @tf.custom_gradient
    def doubled(x):
        return x * 2.0, lambda upstream: None

    w = tf.Variable(2.0, name="w")
    with tf.GradientTape() as tape:
        loss = doubled(w) * 3.0
    return tape.gradient(loss, w)
