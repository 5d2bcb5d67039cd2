"""Ragged steps that cannot be: each refusal says what was expected, what came, and what to do."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from stages.errors import HandoffError, SegmentError
from stages.layers.ragged.steps import NormAbove, RaggedSteps

layers = keras.layers


def cell():
    return layers.SimpleRNNCell(4)


def given(**keywords):
    return RaggedSteps(cell(), max_steps=4, **keywords)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RaggedSteps(layers.GRU(4), [1]), "the layer GRU, which keeps its state to itself; pass its cell"),
        (
            lambda: RaggedSteps(layers.Dense(4), [1]),
            "received Dense, which has no explicit state; give it a `state_size`",
        ),
        (lambda: RaggedSteps(len, [1]), "received builtin_function_or_method, which has no explicit state"),
        (lambda: RaggedSteps(cell(), [3, -1]), "at least 0, one per element of the series, received -1 at place 1"),
        (lambda: RaggedSteps(cell(), [3, True]), "received True at place 1"),
        (lambda: RaggedSteps(cell(), [3, 1.5]), r"received \[3, 1.5\]; for example steps=\[3, 4, 2\]"),
        (lambda: RaggedSteps(cell(), 3), "a list of whole numbers .* received 3; for example"),
        (lambda: RaggedSteps(cell(), [0, 0]), r"not all of them 0, received \[0, 0\]; there would be no output"),
        (lambda: RaggedSteps(cell(), []), r"not all of them 0, received \[\]"),
        (
            lambda: RaggedSteps(cell(), [3, 5], max_steps=4),
            "at most max_steps=4, received 5 at place 1; raise max_steps",
        ),
        (lambda: RaggedSteps(cell(), [3], max_steps=0), r"max_steps=\.\.\.\) expects a whole number .* received 0"),
        (lambda: RaggedSteps(cell()), "steps that come as a tensor expects max_steps, .* received None; set it"),
        (
            lambda: RaggedSteps(cell(), stop=NormAbove(1)),
            "with a stop rule expects max_steps, .* received None; set it",
        ),
        (lambda: given(steps=[1], stop=NormAbove(1, name="n")), r"either steps or a stop rule, .*=\[1\] and stop='n'"),
        (
            lambda: given(stop=lambda state: state),
            r"stop=\.\.\.\) expects a Keras layer, .* received function; .*NormA",
        ),
        (lambda: given(stop=NormAbove(1), read_out=3), r"read_out=\.\.\.\) expects a Keras layer, .* received int"),
        (lambda: given(emit="state"), "expects 'output' or 'read_out', received 'state'"),
        (lambda: given(emit="read_out"), "expects a read_out layer, received None; pass one"),
        (lambda: given(read_out=layers.Dense(1)), "neither a stop rule nor emit='read_out'; add one"),
    ],
    ids=lambda value: "" if callable(value) else None,
)
def test_a_layer_that_cannot_be(make, message):
    with pytest.raises(SegmentError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (lambda: RaggedSteps(cell(), [3, 4]), (3, 4), r"a series of 2 elements, .*=\[3, 4\], received .* with 3; give"),
        (
            lambda: RaggedSteps(cell(), [3, 4]),
            (4,),
            r"received the shape \(None, 4\); a layer below .*return_sequences",
        ),
        (
            lambda: RaggedSteps(cell(), [3, 4]),
            (None, 4),
            r"a fixed number of elements, received the shape \(None, None, 4",
        ),
    ],
    ids=["elements", "rank", "unknown"],
)
def test_a_series_that_does_not_fit(layer, inputs, message):
    with pytest.raises(SegmentError, match=message):
        layer()(keras.Input(inputs))


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (given, lambda x: x, r"so it expects \[series, steps\], received the series alone; call it with a list"),
        (lambda: given(steps=[1, 1]), lambda x: [x, np.array([1, 1])], r"it was made with steps=\[\.\.\.\]; call it"),
        (lambda: given(stop=NormAbove(1)), lambda x: [x, np.array([1, 1])], "it was made with a stop rule; call it"),
        (
            given,
            lambda x: [x, np.array([1, 2, 3])],
            r"steps of the shape \(2,\), or \(3, 2\) for each sample, received \(3",
        ),
        (given, lambda x: [x, np.ones((2, 2), int)], r"or \(3, 2\) for each sample, received \(2, 2\) for a series"),
        (
            given,
            lambda x: [x, np.ones((3, 2))],
            r"must be whole numbers, received float32 \(3, 2\); .*astype\('int32'\)",
        ),
        (
            given,
            lambda x: [x, np.array([2, 5])],
            "between 0 and max_steps=4, received values from 2 to 5; raise max_steps",
        ),
        (given, lambda x: [x, np.array([2, -1])], "between 0 and max_steps=4, received values from -1 to 2"),
        (
            lambda: given(stop=layers.Dense(1, name="d")),
            lambda x: x,
            r"the stop rule 'd' must give one bool per sample, shape \(batch,\), received float32 \(3, 1\); reduce it",
        ),
    ],
    ids=["missing", "two", "both", "length", "batch", "floats", "above", "below", "rule"],
)
def test_tensors_that_do_not_fit(layer, inputs, message):
    with pytest.raises(HandoffError, match=message):
        layer()(inputs(tf.zeros((3, 2, 4))))


def test_steps_above_the_most_are_refused_in_a_compiled_stage_too():
    inputs = [keras.Input((2, 4)), keras.Input((2,), dtype="int32")]
    stage = Stage(keras.Model(inputs, given()(inputs)), run_eagerly=False)
    x = tf.zeros((3, 2, 4))
    stage.forward([x, tf.constant([[4, 0]] * 3)], microbatch=0)
    with pytest.raises(
        Exception, match=r"between 0 and max_steps=4; received from, to:\] \[4\] \[7\] \[raise max_steps"
    ):
        stage.forward([x, tf.constant([[4, 7]] * 3)], microbatch=1)


def test_a_call_that_failed_leaves_no_dropout_masks():
    """A mask of a graph that is gone would end the next call."""

    @tf.function(autograph=False)
    def compiled(x):
        return layer(x)

    class Rule(NormAbove):
        broken = True

        def call(self, watched):
            return watched if self.broken else super().call(watched)

    rule = Rule(0.1, name="rule")
    layer = RaggedSteps(layers.GRUCell(4, dropout=0.5), max_steps=3, stop=rule)
    layer.build((3, 2, 4))
    with pytest.raises(HandoffError):
        compiled(tf.zeros((3, 2, 4)))
    rule.broken = False
    assert layer(tf.ones((3, 2, 4)), training=True).shape == (3, 2, 3, 4)
