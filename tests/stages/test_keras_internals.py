"""What Keras does with the private names that `stages.keras_internals` touches: one test for every function there."""

import inspect
import random
import threading
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import keras_internals as internals
from stages.tensorflow_internals import replaced

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def two_branches(name="net"):
    """An input, two dense layers on it, their sum."""
    x = keras.Input((4,), name="x")
    left, right = keras.layers.Dense(2, name="left"), keras.layers.Dense(2, name="right")
    return keras.Model(x, keras.layers.Add(name="sum")([left(x), right(x)]), name=name)


def names(nodes):
    return [node.operation.name for node in nodes]


def test_every_function_has_a_test_here():
    tested = "\n".join(inspect.getsource(test) for name, test in globals().items() if name.startswith("test_"))
    for name, value in vars(internals).items():
        if inspect.isfunction(value) and value.__module__ == internals.__name__ and not name.startswith("_"):
            assert f"internals.{name}(" in tested, f"{name} has no canary"


# -- models as graphs --------------------------------------------------------------------------------------------


def test_a_built_sequential_holds_its_graph_and_a_functional_model_is_one():
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    functional = two_branches()
    assert internals.is_functional(internals.graph_model(built)) and not internals.is_functional(built)
    assert internals.graph_model(built)(X).shape == (3, 2)
    assert internals.graph_model(functional) is functional and internals.is_functional(functional)
    assert internals.graph_model(keras.Sequential([keras.layers.Dense(2)])) is None
    assert internals.graph_model(keras.layers.Dense(2)) is None and internals.graph_model(7) is None


def test_nodes_come_in_the_order_of_running_and_say_what_they_read():
    model = two_branches()
    nodes = list(internals.nodes_in_order(model))
    assert names(nodes) == ["x", "left", "right", "sum"]
    assert [node.is_input for node in nodes] == [True, False, False, False]
    assert nodes[1].input_tensors[0] is model.inputs[0]
    assert [id(t) for t in nodes[3].input_tensors] == [id(nodes[1].outputs[0]), id(nodes[2].outputs[0])]
    assert isinstance(nodes[3].arguments.args, tuple) and isinstance(nodes[3].arguments.kwargs, dict)


def test_a_model_runs_its_nodes_in_the_order_that_was_set():
    model = two_branches()
    ran = []
    for layer in model.layers:
        internals.wrap_call(layer, lambda call, layer=layer: lambda *a, **k: (ran.append(layer.name), call(*a, **k))[1])
    expected = model(X).numpy()
    assert ran == ["left", "right", "sum"]
    left_last = [node for _, node in sorted(zip([0, 2, 1, 3], internals.nodes_in_order(model), strict=True))]
    internals.run_nodes_in_order(model, left_last)
    ran.clear()
    np.testing.assert_array_equal(model(X), expected)
    assert ran == ["right", "left", "sum"]
    assert names(internals.nodes_in_order(model)) == ["x", "right", "left", "sum"]


def test_a_node_is_called_again_on_other_tensors():
    model = two_branches()
    node = list(internals.nodes_in_order(model))[3]
    tensors = {id(symbol): tf.constant([float(i + 1)]) for i, symbol in enumerate(node.input_tensors)}
    args, kwargs = internals.node_arguments(node, tensors)
    assert node.operation(*args, **kwargs).numpy() == [3.0]


def test_an_operation_knows_its_calls_in_the_order_they_were_made():
    x, layer = keras.Input((2,)), keras.layers.Dense(2)
    first = layer(x)
    model = keras.Model(x, layer(first))
    made = internals.calls_of(layer)
    assert made[0].outputs[0] is first
    assert [id(node) for node in internals.nodes_in_order(model) if not node.is_input] == [id(node) for node in made]


def test_layers_with_a_training_argument_are_known():
    assert internals.takes_training(keras.layers.Dropout(0.5))
    assert not internals.takes_training(keras.layers.Flatten())
    operation = keras.ops.exp(keras.Input((2,)))
    assert not internals.takes_training(internals.maker_of(operation))


def test_a_symbolic_tensor_knows_its_maker():
    model = two_branches()
    assert internals.maker_of(model.inputs[0]).name == "x"
    assert internals.maker_of(model.outputs[0]) is model.get_layer("sum")


def test_the_nesting_of_inputs_and_outputs_is_known():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    total = keras.layers.Add()([a, b])
    model = keras.Model({"a": a, "b": b}, {"total": total, "both": [a * 2.0, b * 2.0]})
    packed = keras.tree.pack_sequence_as(internals.input_structure(model), [1, 2])
    assert packed == {"a": 1, "b": 2}
    found = keras.tree.pack_sequence_as(internals.output_structure(model), [1, 2, 3])
    assert found == {"both": [1, 2], "total": 3}
    assert internals.input_structure(keras.Sequential([keras.layers.Dense(2)])) is None


# -- layers and their variables ----------------------------------------------------------------------------------


def test_layers_are_listed_at_any_depth_and_copies_alike():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="deep")], name="inner")
    cells = keras.layers.RNN([keras.layers.GRUCell(2), keras.layers.GRUCell(2)], name="rnn")
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.TimeDistributed(inner, name="time"), cells], name="all")
    found = internals.layers_of(model)
    assert found[0] is model and len({id(layer) for layer in found}) == len(found)
    assert {"all", "time", "inner", "deep", "rnn"} <= {layer.name for layer in found}
    assert any(layer is cells.cell.cells[1] for layer in found)
    assert internals.layers_of(model, include_self=False) == found[1:]
    copy = type(cells).from_config(cells.get_config())
    copy.build((None, 5, 2))
    assert [type(layer) for layer in internals.layers_of(copy)] == [type(layer) for layer in internals.layers_of(cells)]
    assert internals.has_layers(model) and internals.has_layers(inner.layers[0])
    assert not internals.has_layers(keras.losses.MeanSquaredError())
    assert not internals.has_layers(keras.optimizers.Adam())


def test_a_layers_own_variables_are_listed_by_what_they_were_made_for():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    assert [v.path for v in internals.own_trainable_variables(layer)] == [layer.gamma.path, layer.beta.path]
    others = internals.own_other_variables(layer)
    assert any(v is layer.moving_mean for v in others) and any(v is layer.moving_variance for v in others)
    layer.trainable = False
    assert len(internals.own_trainable_variables(layer)) == 2
    outside = keras.Sequential([keras.Input((4,)), layer])
    assert internals.own_trainable_variables(outside) == []


def test_generators_are_listed_and_their_state_changes_with_every_draw():
    layer = keras.layers.Dropout(0.5)
    (generator,) = internals.own_seed_generators(layer)
    before = generator.state.numpy().copy()
    layer(tf.ones((2, 2)), training=True)
    assert (generator.state.numpy() != before).any()
    assert internals.own_seed_generators(keras.layers.Dense(2)) == []


def test_a_variable_that_a_layer_forgets_is_listed_no_more():
    layer = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]).layers[0]
    internals.forget_variables(layer, [layer.moving_mean])
    assert [v.name for v in layer.non_trainable_variables] == ["moving_variance"]


def test_added_losses_are_those_of_the_layer_itself():
    layer = keras.layers.ActivityRegularization(l2=1.0)
    model = keras.Sequential([keras.Input((4,)), layer])
    model(X)
    assert len(internals.own_added_losses(layer)) == 1 and internals.own_added_losses(model) == []


def test_a_variable_is_replaced_wherever_a_layer_has_it():
    first, second = (keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).layers[0] for _ in range(2))
    internals.replace_in(second, second.kernel, first.kernel)
    assert second.kernel is first.kernel and second.trainable_variables[0] is first.kernel
    first.kernel.assign(tf.ones((4, 2)))
    np.testing.assert_array_equal(second(X), first(X))


def test_a_variable_is_read_as_the_tensor_that_stands_in_and_differentiated_there():
    layer = keras.layers.Dense(2, use_bias=False)
    layer.build((None, 4))
    before = layer.kernel.numpy()
    other = tf.ones((4, 2))
    with tf.GradientTape() as tape:
        tape.watch(other)
        with internals.standing_in([(layer.kernel, other)]):
            out = layer(X)
            assert layer.kernel.value is other
    np.testing.assert_allclose(out, X @ np.ones((4, 2)), rtol=1e-6)
    assert tape.gradient(out, other) is not None
    np.testing.assert_array_equal(layer.kernel.numpy(), before)
    layer.kernel.assign(tf.zeros((4, 2)))
    np.testing.assert_array_equal(layer(X), np.zeros((3, 2)))


# -- methods that are replaced -----------------------------------------------------------------------------------


def test_a_wrapped_call_is_the_one_that_keras_makes_until_it_is_put_back():
    layer = keras.layers.Dense(2)
    expected = layer(X).numpy()
    model = keras.Sequential([keras.Input((4,)), layer])
    put_back = internals.wrap_call(layer, lambda call: lambda *args, **kwargs: call(*args, **kwargs) * 2.0)
    again = internals.wrap_call(layer, lambda call: lambda *args, **kwargs: call(*args, **kwargs) + 1.0)
    np.testing.assert_array_equal(model(X), expected * 2.0 + 1.0)
    again()
    np.testing.assert_array_equal(model(X), expected * 2.0)
    put_back()
    np.testing.assert_array_equal(model(X), expected)
    assert "call" not in vars(layer)


def test_a_subclassed_model_keeps_its_masks_without_a_warning():
    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Embedding(5, 2, mask_zero=True)

        def call(self, words):
            return self.inner(words)

    model = Outer()
    internals.let_inner_layers_mask(model)
    words = tf.constant([[1, 0]])
    np.testing.assert_array_equal(internals.mask_of(model(words)), [[True, False]])
    internals.set_mask(words, tf.constant([[True, True]]))
    np.testing.assert_array_equal(internals.mask_of(model(words)), [[True, False]])


def test_every_call_of_a_layer_and_model_goes_through_one_method():
    called = []

    def watching(original):
        return lambda layer, *given, **more: (called.append(layer.name), original(layer, *given, **more))[1]

    model = keras.Sequential(
        [keras.Input((2, 4)), keras.layers.LSTM(2, name="lstm"), keras.layers.Dense(2, name="out")]
    )
    with replaced(*internals.layer_call(), watching):
        model(np.zeros((1, 2, 4)))
    assert called[0] == model.name and {"lstm", "out"} <= set(called)


def test_predictions_go_through_methods_of_one_class():
    called = []
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    for owner, name in internals.predictions():
        watching = partial(lambda original, *given, **more: (called.append(1), original(*given, **more))[1])
        with replaced(owner, name, lambda original, watching=watching: lambda *a, **k: watching(original, *a, **k)):
            assert isinstance(getattr(model, name)(X), np.ndarray)
    assert len(called) == 2


def test_the_random_functions_of_layers_are_replaced_and_put_back():
    layer = keras.layers.GaussianNoise(1.0)
    doubled = {"normal": lambda draw: lambda *args, **kwargs: draw(*args, **kwargs) * 0.0 + 5.0}
    with internals.replaced_draws(doubled):
        np.testing.assert_array_equal(layer(tf.zeros((2, 2)), training=True), np.full((2, 2), 5.0))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(keras.random.normal((1,)).numpy()))
        thread.start()
        thread.join()
        assert seen == [5.0]
    assert (layer(tf.zeros((2, 2)), training=True).numpy() != 5.0).all()
    with internals.replaced_draws({"dropout": lambda draw: lambda inputs, rate, *args, **kwargs: inputs * 3.0}):
        np.testing.assert_array_equal(keras.layers.Dropout(0.5)(tf.ones((2,)), training=True), [3.0, 3.0])
    for name in ("normal", "uniform", "truncated_normal", "gamma", "beta", "binomial"):
        with internals.replaced_draws({name: lambda draw: lambda *args, **kwargs: "replaced"}):
            arguments = {"gamma": [1.0], "beta": [1.0, 1.0], "binomial": [1.0, 0.5]}.get(name, [])
            assert getattr(keras.random, name)((2,), *arguments) == "replaced"


def test_draws_without_a_seed_can_be_made_as_if_they_had_not_been():
    keras.utils.set_random_seed(1)
    first = keras.random.normal((3,)).numpy()
    with internals.keeping_the_global_seed():
        second = keras.random.normal((3,)).numpy()
    assert (keras.random.normal((3,)).numpy() == second).all() and (first != second).any()
    keras.backend.clear_session()  # older releases of Keras keep their generator under a new seed
    keras.utils.set_random_seed(1)
    drawn = random.getstate()
    with internals.keeping_the_global_seed():
        keras.random.normal((3,))  # makes Keras's generator, from Python's
    random.setstate(drawn)
    assert (keras.random.normal((3,)).numpy() == first).all()


# -- what rides on tensors ---------------------------------------------------------------------------------------


def test_masks_ride_on_tensors_and_layers_and_losses_read_them():
    x = tf.constant([[[1.0], [3.0]]])
    assert internals.mask_of(x) is None
    masked = keras.layers.Masking(3.0)(x)
    np.testing.assert_array_equal(internals.mask_of(masked), [[True, False]])
    internals.set_mask(x, tf.constant([[True, False]]))
    assert keras.layers.GlobalAveragePooling1D()(x).numpy() == [[1.0]]
    assert float(keras.losses.MeanSquaredError()(tf.zeros((1, 2, 1)), x)) == pytest.approx(1.0)
    internals.set_mask(x, None)
    assert keras.losses.MeanSquaredError()(tf.zeros((1, 2, 1)), x).numpy() == 5.0


def test_logits_ride_behind_a_softmax_and_cross_entropies_use_them():
    given = tf.constant([[1.0, 2.0]])
    out = keras.activations.softmax(given)
    np.testing.assert_array_equal(internals.logits_of(out), given)
    assert internals.logits_of(given) is None
    loss = keras.losses.CategoricalCrossentropy()
    usual = float(loss(tf.constant([[1.0, 0.0]]), out))
    internals.set_logits(out, tf.constant([[2.0, 1.0]]))
    assert float(loss(tf.constant([[1.0, 0.0]]), out)) == pytest.approx(usual - 1.0)
