"""Measured costs: known sizes, every kind of call, a model that is as it was, and times that mean something."""

import os
import re
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.cutting.cores import few_cores
from pipeline.cutting.costs import Transfer
from pipeline.cutting.measure import measure
from pipeline.cutting.optimise import balanced_cuts
from pipeline.cutting.transfer import measure_transfer
from pipeline.errors import DataError, SplitError
from pipeline.model.call_graph import read_graph
from stages.tape.graph_split import Traced, split_functions

layers = keras.layers


def costs_of(model, sample, **options):
    return measure(read_graph(model), sample, **({"repeats": 1} | options))


def kept(costs, name):
    """Bytes that the calls of a layer keep."""
    return sum(dict(pair for call in costs.calls if call.name == name for pair in call.kept).values())


def stack(*inside, shape=(6,), dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *inside])


# -- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_of_a_chain_are_those_that_one_can_count():
    model = stack(layers.Dense(8, "relu", name="a"), layers.Dense(3, name="b"))
    costs = costs_of(model, np.ones((4, 6)))
    a, b = costs.calls
    assert (costs.samples, costs.inputs, costs.outputs) == (4, (0,), (2,))
    assert [(call.name, call.reads, call.makes) for call in costs.calls] == [("a", (0,), (1,)), ("b", (1,), (2,))]
    assert [costs.tensors[t].bytes for t in range(3)] == [6 * 4, 8 * 4, 3 * 4]
    assert (a.parameters, b.parameters) == (6 * 8 + 8, 8 * 3 + 3)
    assert [weight.bytes for weight in a.weights] == [6 * 8 * 4, 8 * 4]
    # a keeps its input (for dL/dkernel) and its output (for relu); b keeps that output, which is the same memory.
    assert kept(costs, "a") == 4 * (6 + 8) * 4
    assert [size for _, size in b.kept] == [4 * 8 * 4] and set(b.kept) < set(a.kept)


def test_between_the_halves_a_dense_layer_keeps_its_input_and_the_gradient_of_its_output():
    """dL/dkernel is input times gradient; what only dL/dinput needed, relu's output, is free by then."""
    model = stack(layers.Dense(8, "relu", name="a"), layers.Dense(5, name="b"), layers.Dense(3, name="c"))
    a, b, c = costs_of(model, np.ones((4, 6))).calls
    for call, inputs, outputs in ((b, 8, 5), (c, 5, 3)):
        assert sum(size for _, size in call.left) == 4 * 4 * (inputs + outputs)
    assert sum(size for _, size in a.left) == 4 * 4 * (
        6 + 2 * 8
    )  # all is weights: the input's gradient is not asked for
    assert costs_of(model, np.ones((4, 6))).scaled(8).calls[1].left == tuple((name, 2 * n) for name, n in b.left)


def test_both_halves_of_a_backward_take_time():
    """Two products of matrices of the same size each; the layer below has one."""
    model = stack(*(layers.Dense(256, name=name) for name in "ab"), shape=(256,))
    a, b = costs_of(model, np.ones((64, 256)), repeats=5).calls
    assert 0.1 * b.backward < b.weight_half < 0.9 * b.backward
    assert a.weight_half > 0.9 * a.backward


@pytest.mark.gate
def test_a_loop_leaves_finished_sums_to_its_weight_half():
    """A recurrent layer's gradients come out of one loop: nothing of what the loop keeps is needed any more."""
    model = stack(layers.LSTM(8, return_sequences=True, name="r"), layers.LSTM(8, name="s"), shape=(20, 6))
    _, second = costs_of(model, np.ones((3, 20, 6))).calls
    assert sum(size for _, size in second.left) < kept(costs_of(model, np.ones((3, 20, 6))), "s") / 4


def compiled_keeps(model, x):
    """Bytes that a compiled stage keeps between forward and backward, by the cut of its traced graph."""

    def joint(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = model(inputs, training=True)
        seed = tf.compat.v1.placeholder(outputs.dtype, outputs.shape)
        sources = [variable.value for variable in model.trainable_variables]
        return Traced([outputs], [seed], tape.gradient(outputs, sources, output_gradients=seed))

    buffers = {}
    for tensor in split_functions(joint, [tf.TensorSpec(x.shape, x.dtype)], lambda gradients: gradients).kept:
        while tensor.op.type in ("Reshape", "Identity"):
            tensor = tensor.op.inputs[0]
        if tensor.op.type != "ReadVariableOp":
            buffers[tensor.name] = tensor.shape.num_elements() * tensor.dtype.size
    return sum(buffers.values())


def test_calls_keep_together_what_a_compiled_stage_keeps():
    model = stack(
        layers.Conv2D(4, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(20, "gelu"),
        layers.Dropout(0.5),
        layers.LayerNormalization(),
        layers.Dense(3, "softmax"),
        shape=(12, 12, 3),
    )
    x = np.ones((4, 12, 12, 3), "float32")
    costs = costs_of(model, x)
    found = sum({name: size for call in costs.calls for name, size in call.kept}.values())
    assert found == pytest.approx(compiled_keeps(model, x), abs=32)  # scalars, such as a dropout's rate


def test_half_precision_crosses_in_half_the_bytes():
    with_policy = stack(layers.Dense(8, dtype="mixed_bfloat16", name="a"), layers.Dense(3, name="b"))
    costs = costs_of(with_policy, np.ones((4, 6), "float32"))
    assert costs.tensors[1].bytes == 8 * 2
    assert [weight.bytes for weight in costs.calls[0].weights] == [6 * 8 * 4, 8 * 4]


def test_what_a_loop_keeps_grows_with_its_turns():
    def bytes_kept(steps):
        return kept(costs_of(stack(layers.LSTM(8, name="r"), shape=(steps, 6)), np.ones((3, steps, 6))), "r")

    # For each turn at least the four gates and two states of 8 floats of 3 samples.
    assert bytes_kept(20) - bytes_kept(10) >= 10 * 3 * 6 * 8 * 4


def test_frozen_weights_are_no_trainable_ones():
    model = stack(layers.Dense(8, name="a"), layers.BatchNormalization(name="n"), layers.Dense(3, name="b"))
    model.get_layer("a").trainable = False
    a, n, _ = costs_of(model, np.ones((4, 6))).calls
    assert [weight.trainable for weight in a.weights] == [False, False]
    assert sorted(weight.trainable for weight in n.weights) == [False, False, True, True]


# -- every kind of call -------------------------------------------------------------------------------------------


def with_everything():
    """Inputs in a dict, masks, attention, loops, operations, a shared layer, several results, a nested model."""
    keras.utils.set_random_seed(6)
    words, extra = keras.Input((5,), dtype="int32", name="words"), keras.Input((8,), name="extra")
    h = layers.Embedding(20, 8, mask_zero=True, name="embedding")(words)
    h = layers.LSTM(8, return_sequences=True, name="lstm")(h)
    h = layers.Add(name="sum")([h, layers.MultiHeadAttention(2, 4, name="attention")(h, value=h, key=h)])
    h = layers.Bidirectional(layers.GRU(4), name="both_ways")(keras.ops.relu(h))
    shared = layers.Dense(8, "tanh", activity_regularizer="l2", kernel_regularizer="l2", name="shared")
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="inside"), layers.Dropout(0.5, name="drop")])
    h = inner(shared(shared(h) + extra))
    left, right = keras.ops.split(h, 2, axis=-1)
    chosen = keras.ops.argmax(right, axis=-1)
    return keras.Model(
        {"words": words, "extra": extra}, [layers.Dense(3, name="y")(left), layers.Embedding(4, 2, name="z")(chosen)]
    )


def everything_sample(n=4):
    rng = np.random.default_rng(7)
    return {"words": rng.integers(0, 20, (n, 5)), "extra": rng.normal(size=(n, 8))}


def test_every_kind_of_call_is_measured():
    model = with_everything()
    graph = read_graph(model)
    costs = measure(graph, everything_sample(), repeats=1)
    assert [call.name for call in costs.calls] == [call.name for call in graph.calls]
    assert {call.name for call in costs.calls} >= {"embedding", "lstm", "attention", "both_ways", "inside", "drop"}
    assert all(np.isfinite(call.seconds) and call.forward >= 0 and call.backward >= 0 for call in costs.calls)
    assert set(costs.tensors) == {*graph.inputs, *(tensor for call in graph.calls for tensor in call.makes)}
    uses = [call for call in costs.calls if call.name == "shared"]
    assert len(uses) == 2 and uses[0].weights == uses[1].weights
    named = {re.sub(r"_\d+$", "", call.name): call for call in costs.calls}  # operations are numbered by Keras
    assert len(named["split"].makes) == 2
    (compared,) = (call for call in costs.calls if call.name.startswith("not_equal"))  # numbered by Keras
    assert not any(costs.tensors[t].differentiable for t in (*named["argmax"].makes, *compared.makes))
    assert costs.tensors[named["split"].makes[0]].differentiable
    assert kept(costs, "drop") > 0  # its mask: dropout was on


@pytest.mark.gate
def test_a_list_in_the_models_order_is_as_good_as_a_dict():
    sample = everything_sample()
    graph = read_graph(with_everything())
    order = [graph.tensor_names()[tensor] for tensor in graph.inputs]
    as_list = measure(graph, [sample[name] for name in order], repeats=1)
    assert as_list.tensors == measure(graph, sample, repeats=1).tensors


class Watched(layers.Layer):
    """Notes which training flags it was called with."""

    def __init__(self, note, **options):
        super().__init__(**options)
        self.note = note

    def call(self, x, training=False):
        self.note(training)
        return x * 2.0

    def compute_output_spec(self, x, training=False):
        return keras.KerasTensor(x.shape, x.dtype)


def test_layers_run_in_training_mode():
    seen = []
    model = stack(layers.Dense(3), Watched(seen.append))
    seen.clear()
    costs_of(model, np.ones((4, 6)))
    assert seen == [True]


# -- the model is as it was -----------------------------------------------------------------------------------------


def bits(model):
    return [np.array(variable.value.read_value()).tobytes() for variable in model.variables]


def with_states():
    keras.utils.set_random_seed(9)  # before the layers: they draw their seeds when they are made
    return stack(
        layers.BatchNormalization(name="n"),
        layers.Dense(8, activity_regularizer="l1", name="a"),
        layers.Dropout(0.5, name="d"),
        layers.GaussianNoise(0.5, name="g"),
        layers.SpectralNormalization(layers.Dense(3), name="s"),
    )


def test_measuring_leaves_no_trace():
    x = np.random.default_rng(8).normal(size=(4, 6)).astype("float32")
    measured, untouched = with_states(), with_states()
    before = bits(measured)
    assert before == bits(untouched)
    costs_of(measured, x, repeats=2)
    assert bits(measured) == before
    assert all(not isinstance(loss, tf.Tensor) or hasattr(loss, "numpy") for loss in measured.losses)
    ours, theirs = measured(x, training=True), untouched(x, training=True)
    assert np.array(ours).tobytes() == np.array(theirs).tobytes()  # the same statistics, the same random numbers
    assert [float(a) for a in measured.losses] == [float(b) for b in untouched.losses]
    assert bits(measured) == bits(untouched) != before


class Untraceable(layers.Layer):
    """Looks at values, which a traced function has none of."""

    def call(self, x):
        return x.numpy()

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def test_a_layer_that_cannot_be_traced_is_named_and_nothing_is_changed():
    model = stack(layers.BatchNormalization(), layers.Dropout(0.5), Untraceable(name="odd"))
    before = bits(model)
    with pytest.raises(SplitError, match=r"(?s)the layer 'odd' cannot be measured.*balance by 'parameters'"):
        costs_of(model, np.ones((4, 6)))
    assert bits(model) == before


def test_a_sample_that_does_not_fit_is_refused():
    model = stack(layers.Dense(3))
    with pytest.raises(DataError, match="must have the shape"):
        costs_of(model, np.ones((4, 5)))
    with pytest.raises(DataError, match="no samples"):
        costs_of(model, np.ones((0, 6)))
    with pytest.raises(SplitError, match="at least one repeat, received 0"):
        costs_of(model, np.ones((4, 6)), repeats=0)


# -- times ----------------------------------------------------------------------------------------------------------


class Heavy(layers.Layer):
    """A hundred times the arithmetic of a Dense layer of the same width."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    def call(self, x):
        for _ in range(100):
            x = keras.ops.tanh(x @ self.kernel)
        return x


def test_a_hundredfold_call_is_the_most_expensive_and_gets_a_stage_of_its_own():
    inside = [layers.Dense(96, name=f"light{i}") for i in range(5)]
    model = stack(*inside[:2], Heavy(name="heavy"), *inside[2:], shape=(96,))
    costs = costs_of(model, np.ones((128, 96), "float32"), repeats=3)
    for what in ("forward", "backward"):
        most = max(costs.calls, key=lambda call: getattr(call, what))
        assert most.name == "heavy"
    assert balanced_cuts(costs, 3, "time", transfer=Transfer(0.0, 0.0)) == (2, 3)


def test_a_model_of_one_call_is_measured():
    (call,) = costs_of(stack(layers.Dense(3)), np.ones((4, 6))).calls
    assert call.parameters == 21


def test_other_microbatches_cost_in_proportion():
    costs = costs_of(stack(layers.Dense(8, "relu"), layers.Dense(3)), np.ones((4, 6)))
    twice = costs.scaled(8)
    assert costs.scaled(4) is costs
    assert (twice.samples, twice.forward) == (8, pytest.approx(2 * costs.forward))
    assert twice.backward == pytest.approx(2 * costs.backward)
    assert [size for _, size in twice.calls[0].kept] == [2 * size for _, size in costs.calls[0].kept]
    assert twice.tensors == costs.tensors


def where_threads_may_run():
    return {task.name: os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()}


def test_a_process_is_kept_to_few_cores_and_then_to_none():
    before = where_threads_may_run()
    cores = os.sched_getaffinity(0)
    taken = []
    with few_cores(1) as others:
        for _ in range(3):
            others()
            taken.append(os.sched_getaffinity(0))
    if len(cores) > 1:
        assert all(len(each) == 1 and each < cores for each in taken)
        assert all(a != b for a, b in pairwise(taken))
    after = where_threads_may_run()
    assert all(after[thread] == before[thread] for thread in before.keys() & after.keys())


def test_cores_are_given_back_after_an_error():
    cores = os.sched_getaffinity(0)
    with pytest.raises(KeyError), few_cores(1) as others:
        others()
        raise KeyError
    assert os.sched_getaffinity(0) == cores


def test_as_many_cores_as_there_are_changes_nothing():
    cores = os.sched_getaffinity(0)
    for count in (None, len(cores), len(cores) + 1):
        with few_cores(count) as others:
            others()
            assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("scheme", ["inproc", "local", "ipc"])
def test_transfers_are_measured(scheme):
    found = measure_transfer(scheme, repeats=3)
    assert 0 < found.seconds([1e6]) < found.seconds([1e9])
    assert found.seconds([]) == 0
    assert found.seconds([10.0, 20.0]) == pytest.approx(2 * found.per_message + 30 * found.per_byte)
