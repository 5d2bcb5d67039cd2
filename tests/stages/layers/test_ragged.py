"""A cell run steps[i] times on element i: the gradients of a loop of Python, and padding that contributes nothing."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from stages.errors import HandoffError
from stages.layers.ragged.layout import as_ragged, batch_first, elements_first, row_lengths, steps_per_sample
from stages.layers.ragged.steps import NormAbove, RaggedSteps
from stages.recipe.describe import create, describe
from tests import natural_steps
from tests.levels import in_turn
from tests.natural_steps import CELLS, loop, one_by_one, pad

layers = keras.layers
STEPS = [3, 4, 2]
THRESHOLDS = {"simple": 0.7, "gru": 0.7, "lstm": 0.35, "stacked": 0.12}


def series(samples: int = 2, seed: int = 0):
    return tf.constant(np.random.default_rng(seed).normal(size=(samples, 3, 4)), tf.float32)


def lower() -> keras.Model:
    return keras.Sequential([keras.Input((3, 4)), layers.SimpleRNN(4, return_sequences=True, name="a")], name="lower")


def upper(*arguments, **keywords) -> keras.Model:
    return keras.Sequential([keras.Input((3, 4)), RaggedSteps(*arguments, **keywords, name="b")], name="upper")


def bits(tensors) -> list[bytes]:
    return [np.asarray(tf.convert_to_tensor(tensor)).tobytes() for tensor in tensors]


def close(found, expected) -> bool:
    """Within 1e-6 of the largest |gradient|."""
    expected = [np.asarray(tf.convert_to_tensor(g)) for g in expected]
    largest = max(np.abs(g).max() for g in expected)
    assert largest > 0
    return all(np.abs(np.asarray(a) - b).max() <= 1e-6 * largest for a, b in zip(found, expected, strict=True))


def handed(bottom, top, x, seed, eager=True):
    """Outputs and gradients by the hand-off of two stages."""
    below, above = Stage(bottom, run_eagerly=eager), Stage(top, run_eagerly=eager)
    out = above.forward(below.forward(x))
    dx = below.backward(above.backward(seed))
    return out, [dx, *below.gradients().values(), *above.gradients().values()]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("carry", [True, False])
def test_two_stages_have_the_bits_of_a_loop_under_one_tape(cell, carry):
    keras.utils.set_random_seed(0)
    bottom, top = lower(), upper(CELLS[cell](), STEPS, carry_state=carry)
    x, seed = series(), tf.random.normal((2, 3, 4, 4))
    out, found = handed(bottom, top, x, seed)
    with tf.GradientTape() as tape:
        tape.watch(x)
        expected = pad(loop(top.layers[0].cell, bottom(x, training=True), STEPS, carry), 4)
    variables = [v.value for v in (*bottom.trainable_variables, *top.trainable_variables)]
    gradients = tape.gradient(expected, [x, *variables], output_gradients=elements_first(seed))
    assert bits([elements_first(out)]) == bits([expected])
    assert bits(found) == bits(gradients)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("how", in_turn(["list", "tensor", "stop"], 1, 3))
@pytest.mark.parametrize("carry", in_turn([True, False], 1, 1))
def test_compiled_equals_eager(cell, how, carry):
    keras.utils.set_random_seed(0)
    x, seed = series(5), tf.random.normal((5, 3, 6, 4))
    keywords = {"list": {"steps": STEPS}, "tensor": {}, "stop": {"stop": NormAbove(THRESHOLDS[cell])}}[how]
    layer = RaggedSteps(CELLS[cell](), **keywords, max_steps=6, carry_state=carry)
    inputs = [keras.Input((3, 4)), keras.Input((3,), dtype="int32")][: 2 if how == "tensor" else 1]
    top = keras.Model(inputs, layer(inputs if how == "tensor" else inputs[0]))
    steps = tf.constant([[0, 1, 2], [3, 4, 2], [6, 0, 0], [1, 1, 1], [0, 0, 5]])
    results = []
    for eager in (True, False):
        stage = Stage(top, run_eagerly=eager)
        out = stage.forward([x, steps] if how == "tensor" else x)
        dx = keras.tree.flatten(stage.backward(seed))[0]
        results.append((out, [dx, *stage.gradients().values()]))
    (out, expected), (compiled, found) = results
    np.testing.assert_allclose(compiled, out, atol=1e-6)
    np.testing.assert_array_equal(row_lengths(compiled), row_lengths(out))
    assert len(np.unique(row_lengths(out))) > 1
    assert close(found, expected)


def test_steps_of_a_batch_as_a_tensor_are_those_of_a_list():
    keras.utils.set_random_seed(0)
    x, seed = series(), tf.random.normal((2, 3, 4, 4))
    listed = RaggedSteps(layers.GRUCell(4), STEPS)
    given = RaggedSteps(layers.GRUCell(4), max_steps=4)
    results = []
    for layer, inputs in (
        (listed, x),
        (given, [x, tf.constant(STEPS)]),
        (given, [x, tf.constant(STEPS, tf.int64)]),
        (given, [x, steps_per_sample(STEPS, 2)]),
    ):
        layer(inputs)
        layer.set_weights(listed.get_weights())
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = layer(inputs)
        np.testing.assert_array_equal(row_lengths(out), [STEPS] * 2)
        results.append([out, *tape.gradient(out, [x, *(v.value for v in layer.trainable_variables)], seed)])
    assert bits(results[0][:1]) == bits(results[1][:1])
    assert close(results[1], results[0])
    assert bits(results[1]) == bits(results[2]) == bits(results[3])


def test_every_sample_makes_its_own_steps():
    """As if each went through a loop of its own."""
    keras.utils.set_random_seed(0)
    x, target = series(4), tf.random.normal((4, 3, 5, 4))
    steps = np.array([[5, 1, 2], [0, 3, 4], [1, 0, 0], [2, 2, 2]])
    layer = RaggedSteps(layers.SimpleRNNCell(4), max_steps=5)
    layer([x, steps])
    check_against_one_by_one(layer, [x, steps], target, lambda b, i, made, state: made >= steps[b, i], 5)


@pytest.mark.parametrize("threshold", [0.0, 0.8, 0.9, 1e9])
def test_a_stop_rule_ends_the_steps_of_each_sample(threshold):
    """Case D3: until the L2 norm of a dense read-out of the state passes a threshold."""
    keras.utils.set_random_seed(3)
    x, target = series(4), tf.random.normal((4, 3, 5, 4))
    dense = layers.Dense(3)
    layer = RaggedSteps(layers.SimpleRNNCell(4), max_steps=5, stop=NormAbove(threshold), read_out=dense)
    layer(x)

    def stops(b, i, made, state):
        return made > 0 and float(tf.norm(dense(state[None]))) > threshold

    lengths = check_against_one_by_one(layer, x, target, stops, 5)
    expected = {0.0: {1}, 1e9: {5}}.get(threshold)
    assert set(lengths.flat) == expected if expected else len(set(lengths.flat)) > 2


def check_against_one_by_one(layer, inputs, target, stops, most):
    x = inputs[0] if isinstance(inputs, list) else inputs
    variables = [x, *(v.value for v in layer.cell.trainable_variables)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(inputs, training=True)
        loss = keras.losses.MeanSquaredError()(target, out)
    found = tape.gradient(loss, variables)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs, lengths = one_by_one(layer.cell, x, stops, most)
        expected_loss = natural_steps.masked_mean_square(target, outputs, lengths)
    np.testing.assert_array_equal(row_lengths(out), lengths)
    for (b, i), count in np.ndenumerate(lengths):
        np.testing.assert_allclose(out[b, i, :count], np.reshape(outputs[b][i], (count, 4)), atol=1e-6)
        assert not np.any(out[b, i, count:])
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert close(found, tape.gradient(expected_loss, variables))
    return lengths


@pytest.mark.parametrize("how", ["list", "tensor", "stop"])
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_padding_contributes_nothing(how, eager):
    """Other targets and other output gradients in the padding: the same bits."""
    keras.utils.set_random_seed(1)
    keywords = {"list": {"steps": STEPS}, "tensor": {}, "stop": {"stop": NormAbove(0.8)}}[how]
    layer = RaggedSteps(layers.GRUCell(4), **keywords, max_steps=5)
    inputs = [keras.Input((3, 4)), keras.Input((3,), dtype="int32")][: 2 if how == "tensor" else 1]
    model = keras.Model(inputs, layer(inputs if how == "tensor" else inputs[0]))
    x = series(4)
    given = [x, tf.constant([[5, 1, 2], [0, 3, 4], [1, 0, 0], [2, 2, 2]])] if how == "tensor" else x
    target = np.random.default_rng(0).normal(size=(4, 3, 5, 4)).astype("float32")
    padding = ~np.asarray(model(given)._keras_mask)
    assert padding.any() and not padding.all()
    noise = np.where(padding[..., None], np.float32(1e6), 0)
    judged = Stage(model, run_eagerly=eager, loss=keras.losses.MeanSquaredError())
    stage = Stage(model, run_eagerly=eager)
    losses, seeded = [], []
    for extra in (0, noise):
        judged.zero_gradients()
        stage.zero_gradients()
        value = judged.forward_loss(given, target + extra)
        losses.append(bits([value, keras.tree.flatten(judged.backward())[0], *judged.gradients().values()]))
        stage.forward(given)
        dx = stage.backward(tf.constant(target + extra))
        seeded.append(bits([keras.tree.flatten(dx)[0], *stage.gradients().values()]))
    assert losses[0] == losses[1]
    assert seeded[0] == seeded[1]


def test_an_element_without_steps_is_empty_and_leaves_the_state_alone():
    keras.utils.set_random_seed(0)
    x = series()
    layer = RaggedSteps(layers.LSTMCell(4), [2, 0, 3])
    out = layer(x)
    np.testing.assert_array_equal(row_lengths(out), [[2, 0, 3]] * 2)
    np.testing.assert_array_equal(out[:, 1], tf.zeros((2, 3, 4)))
    first, last = loop(layer.cell, tf.gather(x, [0, 2], axis=1), [2, 3], True)
    np.testing.assert_array_equal(out[:, 0, :2], tf.stack(first, axis=1))
    np.testing.assert_array_equal(out[:, 2], tf.stack(last, axis=1))
    per_sample = RaggedSteps(layer.cell, max_steps=3)
    np.testing.assert_array_equal(per_sample([x, np.array([2, 0, 3])]), out)
    assert not np.any(per_sample([x, np.array([0, 0, 0])]))


@pytest.mark.parametrize("how", ["list", "tensor", "stop"])
def test_masked_elements_get_no_steps(how):
    keras.utils.set_random_seed(0)
    x = layers.Masking()(series(3) * tf.constant([[1, 1, 1], [1, 1, 0], [0, 1, 1]], tf.float32)[..., None])
    keywords = {"list": {"steps": STEPS}, "tensor": {}, "stop": {"stop": NormAbove(1e9)}}[how]
    layer = RaggedSteps(layers.SimpleRNNCell(4), **keywords, max_steps=4)
    found = row_lengths(layer([x, np.array(STEPS)] if how == "tensor" else x))
    a, b, c = (4, 4, 4) if how == "stop" else STEPS
    np.testing.assert_array_equal(found, [[a, b, c], [a, b, 0], [0, b, c]])


@pytest.mark.parametrize("carry", [True, False])
def test_state_runs_on_or_begins_anew(carry):
    """Case D2: whether an element hears of the one before."""
    keras.utils.set_random_seed(0)
    x, layer = series(), RaggedSteps(layers.SimpleRNNCell(4), STEPS, carry_state=carry)
    with tf.GradientTape() as tape:
        tape.watch(x)
        later = layer(x)[:, 2]
    gradient = tape.gradient(later, x)
    assert bool(np.any(gradient[:, :2])) == carry
    assert np.any(gradient[:, 2])


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("how", ["list", "tensor"])
def test_steps_can_be_differentiated_with_respect_to_each_other(carry, how):
    """Case D4: is Out[2][0] connected with Out[0][1]?"""
    keras.utils.set_random_seed(0)
    x = series()
    layer = RaggedSteps(
        layers.SimpleRNNCell(4), STEPS if how == "list" else None, max_steps=4, carry_state=carry, name="b"
    )
    inputs = x if how == "list" else [x, np.array([[3, 4, 2], [2, 0, 1]])]
    padded = layer(inputs)
    with tf.GradientTape(persistent=True) as tape:
        rows = layer.rows(inputs)
    assert [len(row) for row in rows] == STEPS
    for i, j in ((0, 0), (0, 1), (1, 3), (2, 1)):
        np.testing.assert_array_equal(rows[i][j][0], padded[0, i, j])
    across, within = tape.gradient(rows[2][0], rows[0][1]), tape.gradient(rows[0][2], rows[0][1])
    assert np.any(within)
    assert np.any(across) if carry else across is None


def test_a_read_out_that_is_emitted_is_trained_and_one_that_only_decides_is_not():
    keras.utils.set_random_seed(0)
    x, cell, dense = series(), layers.LSTMCell(4), layers.Dense(3)
    decides = RaggedSteps(cell, max_steps=4, stop=NormAbove(0.2), read_out=dense)
    emits = RaggedSteps(cell, max_steps=4, stop=NormAbove(0.2), read_out=dense, emit="read_out")
    with tf.GradientTape(persistent=True) as tape:
        hidden, shown = decides(x), emits(x)
    np.testing.assert_array_equal(row_lengths(hidden), row_lengths(shown))
    real = np.asarray(shown._keras_mask)
    np.testing.assert_allclose(shown[real], dense(hidden[real]), atol=1e-6)
    assert not np.any(shown[~real])
    kernel = dense.kernel.value
    assert tape.gradient(hidden, kernel) is None
    assert np.any(tape.gradient(shown, kernel))


def test_the_read_out_of_stacked_cells_is_of_the_last_ones_state():
    keras.utils.set_random_seed(0)
    x = series()
    stacked = layers.StackedRNNCells([layers.GRUCell(3), layers.LSTMCell(5)])
    same = layers.Activation("linear")
    out = RaggedSteps(stacked, STEPS)(x)
    np.testing.assert_array_equal(RaggedSteps(stacked, STEPS, read_out=same, emit="read_out")(x), out)


@pytest.mark.parametrize("eager", [True, False])
def test_a_stack_of_one_cell_is_that_cell(eager):
    """Keras gives its state back with one list less."""
    keras.utils.set_random_seed(0)
    cell, inputs = layers.LSTMCell(4), [series(), tf.constant([[3, 1, 2], [0, 4, 1]])]
    results = []
    for each in (cell, layers.StackedRNNCells([cell])):
        layer = RaggedSteps(each, max_steps=4)
        layer.build([(2, 3, 4), (2, 3)])
        results.append((layer if eager else tf.function(layer, autograph=False))(inputs))
    assert bits(results[:1]) == bits(results[1:])


def test_dropout_masks_last_for_a_call_and_are_new_in_the_next():
    keras.utils.set_random_seed(0)
    cell = layers.SimpleRNNCell(4, activation=None, use_bias=False, recurrent_initializer="zeros", dropout=0.5)
    layer = RaggedSteps(layers.StackedRNNCells([cell]), STEPS)
    x = tf.tile(series(8)[:, :1], [1, 3, 1])  # all elements equal, and no memory: all steps equal, if the masks are
    out, again = layer(x, training=True), layer(x, training=True)
    assert all(np.array_equal(out[:, i, j], out[:, 0, 0]) for i, count in enumerate(STEPS) for j in range(count))
    assert not np.array_equal(out, again)
    assert not np.array_equal(out, layer(x))


def test_dtypes():
    assert (
        RaggedSteps(layers.LSTMCell(4, dtype="float64"), [1, 2], dtype="float64")(np.ones((2, 2, 3))).dtype == "float64"
    )
    layer = RaggedSteps(layers.LSTMCell(4, dtype="mixed_bfloat16"), [1, 2], dtype="mixed_bfloat16")
    out = layer(tf.ones((2, 2, 3)))
    assert out.dtype == tf.bfloat16 and layer.cell.kernel.dtype == "float32"
    assert layer.compute_output_spec(keras.KerasTensor((None, 2, 3))).dtype == "bfloat16"


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: RaggedSteps(layers.GRUCell(4, dropout=0.1), np.array(STEPS), carry_state=False, return_lengths=True),
        lambda: RaggedSteps(layers.StackedRNNCells([layers.LSTMCell(4), layers.GRUCell(2)]), STEPS, max_steps=7),
        lambda: RaggedSteps(
            layers.SimpleRNNCell(4), max_steps=5, stop=NormAbove(0.5), read_out=layers.Dense(2), emit="read_out"
        ),
    ],
    ids=["list", "stacked", "stop"],
)
def test_a_recipe_makes_the_same_layer_again(make, tmp_path):
    keras.utils.set_random_seed(0)
    x, inputs = series(), keras.Input((3, 4))
    model = keras.Model(inputs, make()(inputs))
    recipe = json.loads(json.dumps(describe(model, "the model")))
    again = create(recipe)
    again.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for twin in (again, loaded):
        settings = [each.layers[-1].get_config() for each in (model, twin)]
        plain = ("steps", "max_steps", "carry_state", "emit", "return_lengths")
        assert [settings[0][name] for name in plain] == [settings[1][name] for name in plain]
        expected, found = (keras.tree.flatten(each(x)) for each in (model, twin))
        assert bits(found) == bits(expected)
        assert [tuple(t.shape[1:]) for t in found] == [tuple(t.shape[1:]) for t in model.outputs]
        assert [t.dtype.name for t in found] == [t.dtype for t in model.outputs]


def test_layouts():
    keras.utils.set_random_seed(0)
    out, lengths = RaggedSteps(layers.SimpleRNNCell(4), STEPS, return_lengths=True)(series())
    case = elements_first(out)
    assert case.shape == (3, 4, 2, 4)
    np.testing.assert_array_equal(batch_first(case), out)
    np.testing.assert_array_equal(lengths, row_lengths(out))
    ragged = as_ragged(out, lengths)
    assert ragged.shape.as_list() == [2, 3, None, 4]
    np.testing.assert_array_equal(ragged.to_tensor(), out)
    assert [row.shape[0] for sample in ragged for row in sample] == STEPS * 2
    by_element = as_ragged(case, STEPS)
    assert by_element.shape.as_list() == [3, None, 2, 4]
    np.testing.assert_array_equal(by_element.to_tensor(), case)
    np.testing.assert_array_equal(by_element[1][3], out[:, 1, 3])


def test_gradients_pass_through_a_ragged_tensor_and_not_through_padding():
    out = tf.random.normal((2, 3, 4, 4))
    lengths = tf.constant([[3, 4, 2], [1, 0, 4]])
    with tf.GradientTape() as tape:
        tape.watch(out)
        value = tf.reduce_sum(as_ragged(out, lengths).flat_values ** 2)
    real = tf.cast(tf.sequence_mask(lengths, 4), tf.float32)[..., None]
    np.testing.assert_array_equal(tape.gradient(value, out), 2 * out * real)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_lengths(tf.zeros((2, 3, 4, 1))), "without one; take the lengths from"),
        (lambda: as_ragged(tf.zeros((2, 3, 4, 1)), [3, 4, 2]), r"leading axes of \(2, 3, 4, 1\), received \(3,\)"),
        (
            lambda: elements_first(tf.zeros((2, 3))),
            r"\(batch, elements, longest, \.\.\.\), received the shape \(2, 3\)",
        ),
        (lambda: steps_per_sample([1.5, 2], 3), r"whole numbers of the shape \(elements,\), received float64"),
    ],
    ids=["mask", "lengths", "rank", "fractions"],
)
def test_wrong_layouts_are_refused(call, message):
    with pytest.raises(HandoffError, match=message):
        call()
