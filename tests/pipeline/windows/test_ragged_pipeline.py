"""Ragged inner steps in stages of their own: gradients of one tape, whatever says how many steps there are."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline, Segment
from stages.layers.ragged.layout import elements_first, steps_per_sample
from stages.layers.ragged.steps import NormAbove, RaggedSteps
from tests.levels import in_turn
from tests.natural_steps import CELLS, loop, masked_mean_square, one_by_one, pad

layers = keras.layers
STEPS, LONGEST = [3, 4, 2], 4


def lower() -> keras.Model:
    """Model A of case D."""
    return keras.Sequential([keras.Input((3, 4)), layers.SimpleRNN(4, return_sequences=True, name="a")], name="lower")


def upper(how: str, cell=None, carry: bool = True, **keywords) -> keras.Model:
    """Model B of case D with a head; `how` the steps are known."""
    cell = layers.SimpleRNNCell(4) if cell is None else cell
    inputs = [keras.Input((3, 4), name="ir")]
    if how == "list":
        keywords["steps"] = STEPS
    if how == "tensor":
        inputs.append(keras.Input((3,), dtype="int32", name="steps"))
    if how == "stop":
        keywords |= {"stop": NormAbove(0.8), "read_out": layers.Dense(3, name="read"), "emit": "read_out"}
    steps = RaggedSteps(cell, **keywords, max_steps=LONGEST, carry_state=carry, name="b")
    out = steps(inputs if how == "tensor" else inputs[0])
    return keras.Model(inputs, layers.Dense(2, name="head")(out), name="upper")


def segments(how: str, bottom: keras.Model, top: keras.Model) -> list[Segment]:
    given = ("ir", "steps") if how == "tensor" else ("ir",)
    return [
        Segment(model=bottom, inputs=("x",), outputs=("ir",), name="A"),
        Segment(model=top, inputs=given, outputs=("y",), name="B"),
    ]


def data(how: str, samples: int = 7):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 3, 4)).astype("float32")
    y = rng.normal(size=(samples, 3, LONGEST, 2)).astype("float32")
    steps = rng.integers(0, LONGEST + 1, (samples, 3)).astype("int32")
    return ({"x": x, "steps": steps} if how == "tensor" else x), y


def close(found, expected) -> bool:
    largest = max(np.abs(g).max() for g in expected)
    assert largest > 0
    return all(np.abs(a - b).max() <= 1e-6 * largest for a, b in zip(found, expected, strict=True))


def of_the_tape(tape, value, models) -> list[np.ndarray]:
    variables = [variable.value for model in models for variable in model.trainable_variables]
    return [g.numpy() for g in tape.gradient(value, variables)]


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
@pytest.mark.parametrize("how", in_turn(["list", "tensor", "stop"], 1, 3))
@pytest.mark.parametrize("carry", in_turn([True, False], 1, 1), ids=["runs on", "anew"])
def test_both_stages_have_the_gradients_of_one_tape(how, carry, eager):
    keras.utils.set_random_seed(3)
    bottom, top = lower(), upper(how, carry=carry)
    x, y = data(how)
    with Pipeline(segments(how, bottom, top), microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        pipe.verify(x, y).raise_if_failed()
        found = list(pipe.gradients(x, y).values())
    with tf.GradientTape() as tape:  # of the whole batch: microbatches of unequal numbers of steps count as one
        out = top([bottom(x["x"]), tf.constant(x["steps"])] if how == "tensor" else bottom(x))
        value = keras.losses.MeanSquaredError()(y, out)
    assert how == "list" or len(np.unique(np.asarray(out._keras_mask).sum(-1))) > 2
    assert close(found, of_the_tape(tape, value, [bottom, top]))


def test_case_d1_in_two_processes_equals_a_loop_written_by_hand():
    """A and B in processes of their own; one tape over the loop of Python in this one."""
    keras.utils.set_random_seed(0)
    bottom = lower()
    top = keras.Sequential([keras.Input((3, 4)), RaggedSteps(layers.SimpleRNNCell(4), STEPS, name="b")], name="upper")
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype("float32")
    with tf.GradientTape() as tape:
        rows = loop(top.layers[0].cell, bottom(x), STEPS, carry=True)
        real = tf.stack([output for row in rows for output in row])
        wanted = tf.stack([y[:, i, j] for i, count in enumerate(STEPS) for j in range(count)])
        value = tf.reduce_mean(tf.square(wanted - real))
    expected = of_the_tape(tape, value, [bottom, top])
    with Pipeline([bottom, top], microbatches=1, transport="ipc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.verify(x, y).raise_if_failed()
        assert close(list(pipe.gradients(x, y).values()), expected)
        shown = elements_first(pipe.predict(x, verbose=0))
    assert shown.shape == (3, 4, 2, 4)
    np.testing.assert_array_equal(shown, pad(rows, 4))


@pytest.mark.gate
@pytest.mark.parametrize("how", in_turn(["tensor", "stop"], 1, 1))
def test_steps_that_differ_by_sample_cross_processes(how):
    keras.utils.set_random_seed(3)
    x, y = data(how)
    with Pipeline(segments(how, lower(), upper(how)), microbatches=3, transport="ipc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=False)
        pipe.verify(x, y).raise_if_failed()


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_each_sample_as_if_it_were_alone(eager):
    """Samples of unequal steps in unequal microbatches against loops over one sample at a time."""
    keras.utils.set_random_seed(0)
    bottom, (x, y) = lower(), data("tensor", 5)
    inputs = [keras.Input((3, 4)), keras.Input((3,), dtype="int32")]
    top = keras.Model(inputs, RaggedSteps(layers.SimpleRNNCell(2), max_steps=LONGEST, name="b")(inputs))
    with tf.GradientTape() as tape:
        outputs, lengths = one_by_one(
            top.get_layer("b").cell, bottom(x["x"]), lambda b, i, made, state: made >= x["steps"][b, i], LONGEST
        )
        value = masked_mean_square(y, outputs, lengths)
    np.testing.assert_array_equal(lengths, x["steps"])
    with Pipeline(segments("tensor", bottom, top), microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        assert close(list(pipe.gradients(x, y).values()), of_the_tape(tape, value, [bottom, top]))


@pytest.mark.gate
@pytest.mark.parametrize("cell", [name for name in CELLS if name != "simple"])
@pytest.mark.parametrize("how", in_turn(["list", "stop"], 0, 1))
def test_other_cells(cell, how):
    keras.utils.set_random_seed(3)
    x, y = data(how)
    with Pipeline(segments(how, lower(), upper(how, CELLS[cell]())), microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=False)
        pipe.verify(x, y).raise_if_failed()


@pytest.mark.gate
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 1), ids=["eager", "compiled"])
def test_dropout_inside_the_cell_draws_what_one_tape_draws(eager):
    keras.utils.set_random_seed(0)
    cell = layers.StackedRNNCells([layers.GRUCell(3, dropout=0.3), layers.LSTMCell(4, recurrent_dropout=0.4)])
    parts = [lower(), upper("list", cell)]
    x, y = data("list")
    with Pipeline(parts, microbatches=3, transport="inproc", recompute=[True, not eager]) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        pipe.verify(x, y).raise_if_failed()


def test_split_cuts_between_the_series_and_its_steps():
    keras.utils.set_random_seed(0)
    bottom, top = lower(), upper("tensor")
    x, steps = keras.Input((3, 4), name="x"), keras.Input((3,), dtype="int32", name="steps")
    given, y = data("tensor")
    model = keras.Model([x, steps], top([bottom(x), steps]))
    with Pipeline.split(model, at=["a"], microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.verify([given["x"], given["steps"]], y).raise_if_failed()


@pytest.mark.gate
def test_training_and_the_row_lengths_as_an_output():
    """The head learns to count the steps; the lengths come along."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 4))
    out, lengths = RaggedSteps(layers.GRUCell(8), STEPS, return_lengths=True)(inputs)
    top = keras.Model(inputs, [layers.Dense(1)(out), lengths])
    x, _ = data("list", 16)
    y = np.tile(np.arange(LONGEST, dtype="float32")[:, None], (16, 3, 1, 1))
    y[:, 1:] += 1
    with Pipeline([lower(), top], microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.05), ["mse", None], run_eagerly=False)
        losses = pipe.fit(x, y=[y, None], batch_size=16, epochs=25, verbose=0).history["loss"]
        _, found = pipe.predict(x, verbose=0)
    assert losses[-1] < 0.2 * losses[0]
    np.testing.assert_array_equal(found, steps_per_sample(STEPS, 16))


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_targets_in_the_padding_do_not_matter(eager):
    keras.utils.set_random_seed(3)
    x, y = data("stop")
    bottom, top = lower(), upper("stop")
    padding = ~np.asarray(top(bottom(x))._keras_mask)
    assert 0 < padding.sum() < padding.size
    results = []
    with Pipeline(segments("stop", bottom, top), microbatches=3, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"], run_eagerly=eager)
        for noise in (0.0, 1e6):
            other = y + np.float32(noise) * padding[..., None]
            results.append((pipe.train_on_batch(x, other), [g.tobytes() for g in pipe.gradients(x, other).values()]))
    assert results[0] == results[1]


def test_steps_above_the_most_name_the_stage():
    x, y = data("tensor")
    x["steps"][6, 2] = 9
    with Pipeline(segments("tensor", lower(), upper("tensor")), microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        with pytest.raises(Exception, match=r"(?s)stage 'B'.*between 0 and max_steps=4, received values from \d to 9"):
            pipe.train_on_batch(x, y)
