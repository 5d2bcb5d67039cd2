"""What Keras does with the private names of `stages.keras_training_internals`: one test for every function there."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import keras_training_internals as internals

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


def test_every_function_has_a_test_here():
    tested = "\n".join(inspect.getsource(test) for name, test in globals().items() if name.startswith("test_"))
    for name, value in vars(internals).items():
        if inspect.isfunction(value) and value.__module__ == internals.__name__ and not name.startswith("_"):
            assert f"internals.{name}(" in tested, f"{name} has no canary"


# -- losses and metrics ------------------------------------------------------------------------------------------


def test_the_arguments_inside_losses_and_metrics_are_read_and_take_effect():
    loss = keras.losses.Huber(delta=3.0)
    assert internals.function_arguments(loss) == {"delta": 3.0}
    assert internals.function_arguments(keras.metrics.CosineSimilarity(axis=1))["axis"] == 1
    assert internals.function_arguments(object()) == {}
    large = float(loss([0.0], [10.0]))
    internals.set_function_arguments(loss, {"delta": 1.0})
    assert float(loss([0.0], [10.0])) == pytest.approx(9.5) and large == pytest.approx(25.5)


def test_the_function_inside_a_loss_or_metric_is_found():
    def own(y_true, y_pred):
        return y_true - y_pred

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", loss=own, metrics=[own])
    model.evaluate(np.array([[1.0]]), np.array([[0.0]]), verbose=0)
    (counted,) = [metric for metric in model.metrics if metric.name == "compile_metrics"]
    assert internals.wrapped_function(counted.metrics[0]) is own
    assert internals.wrapped_function(keras.losses.Huber()) is keras.losses.huber
    assert internals.wrapped_function(object()) is None


def test_a_loss_computes_in_the_dtype_that_was_set():
    loss = keras.losses.MeanSquaredError()
    assert internals.loss_dtype(loss) == "float32"
    assert internals.loss_dtype(keras.losses.MeanSquaredError(dtype="float64")) == "float64"
    internals.set_loss_dtype(loss, "float64")
    assert internals.loss_dtype(loss) == "float64" and loss([1.0], [0.0]).dtype == tf.float64


# -- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda: keras.optimizers.SGD(momentum=0.5, use_ema=True), ["momentums", "model_variables_moving_average"]),
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=2), ["momentums", "velocities", "accumulated"]),
        (lambda: keras.optimizers.Nadam(), ["momentums", "velocities"]),
        (lambda: keras.optimizers.Adafactor(), []),
        (lambda: keras.optimizers.Ftrl(), ["accumulators", "linears"]),
    ],
)
def test_slots_are_known_by_attribute_and_variable(make, slots):
    variables = [keras.Variable(tf.zeros((2, 2))), keras.Variable(tf.zeros((3,)))]
    optimizer = make()
    optimizer.build(variables)
    found = list(internals.slots_of(optimizer, 2))
    known = {id(variable) for _, _, variable in found}
    assert all(id(variable) in known for variable in optimizer.variables)
    for name in slots:
        of = [(place, tuple(slot.shape)) for attribute, place, slot in found if name in attribute]
        assert of == [(0, (2, 2)), (1, (3,))]
    assert [(place, one) for name, place, one in found if name == "_iterations"] == [(-1, optimizer._iterations)]
    assert not any(place >= 0 and one is variables[place] for _, place, one in found)


def test_a_step_without_gradients_is_counted_and_averaged():
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
    optimizer.build([variable])
    optimizer.apply([tf.constant([0.0])], [variable])
    variable.assign([3.0])
    internals.update_nothing(optimizer)
    assert int(optimizer.iterations) == 2 and variable.numpy() == [3.0]
    optimizer.finalize_variable_values([variable])
    assert variable.numpy() == [2.0]


def test_variables_left_out_of_weight_decay_are_known_as_objects_and_by_name():
    first, second, other = (keras.Variable([1.0], name=name) for name in ("first", "second", "other"))
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.5)
    assert internals.excluded_from_decay(optimizer, [first, second]) == []
    assert internals.names_excluded_from_decay(optimizer) is None
    optimizer.exclude_from_weight_decay([second], ["oth", "th.r"])
    assert internals.excluded_from_decay(optimizer, [first, second]) == [1]
    assert internals.excluded_from_decay_elsewhere(optimizer, [first]) == 1
    assert internals.excluded_from_decay_elsewhere(optimizer, [first, second]) == 0
    again = keras.optimizers.SGD(1.0, weight_decay=0.5)
    again.exclude_from_weight_decay([second], [internals.names_excluded_from_decay(optimizer)])
    again.build([first, second, other])
    again.apply([tf.zeros((1,))] * 3, [first, second, other])
    assert [float(v.numpy()[0]) for v in (first, second, other)] == [0.5, 1.0, 1.0]


# -- callbacks ---------------------------------------------------------------------------------------------------


def test_a_tensorboard_that_profiles_is_known(tmp_path):
    assert not internals.profiles(keras.callbacks.TensorBoard(tmp_path, profile_batch=0))
    assert internals.profiles(keras.callbacks.TensorBoard(tmp_path, profile_batch=2))


def test_the_variables_that_an_optimizer_was_built_for_are_known():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = keras.optimizers.Adam()
    assert internals.variables_known_to(optimizer) == internals.variables_known_to(None) == []
    optimizer.build([second, first])
    assert [id(variable) for variable in internals.variables_known_to(optimizer)] == [id(second), id(first)]


def test_a_callback_keeps_what_it_knows_in_attributes():
    one, other = keras.callbacks.EarlyStopping(patience=3), keras.callbacks.EarlyStopping()
    known = internals.callback_attributes(one)
    assert known["patience"] == 3 and internals.callback_attributes(keras.callbacks.Callback()) == {}
    internals.set_callback_attributes(other, known)
    assert internals.callback_attributes(other) == known


def test_a_tensorboard_counts_batches_in_known_attributes(tmp_path):
    callback = keras.callbacks.TensorBoard(str(tmp_path))
    assert [getattr(callback, name) for name in internals.counts_of_tensorboard(callback)] == [0, 0]
    assert internals.counts_of_tensorboard(keras.callbacks.History()) == ()


def test_the_state_behind_random_operations_without_a_seed_is_known_and_can_be_set():
    keras.random.normal(())
    state = internals.global_seed_state()
    before = state.numpy()
    drawn = float(keras.random.normal(()))
    internals.global_seed_state(make=True).assign(before)
    assert float(keras.random.normal(())) == drawn
