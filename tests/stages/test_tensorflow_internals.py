"""What TensorFlow does with the private names that `stages.tensorflow_internals` touches: one test for every one."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from stages import tensorflow_internals as internals
from tests.sources import ROOT
from tests.stages import test_tensorflow_graphs, test_watched_classes


def test_every_name_has_a_test_here():
    tests = {**globals(), **vars(test_tensorflow_graphs), **vars(test_watched_classes)}
    tested = "\n".join(inspect.getsource(test) for name, test in tests.items() if name.startswith("test_"))
    for name, value in vars(internals).items():
        mine = getattr(value, "__module__", "") == internals.__name__ and not isinstance(value, type)
        if (inspect.isfunction(value) and mine) or name.isupper():
            assert f"internals.{name}" in tested, f"{name} has no canary"


def test_eager_tensors_and_variables_are_of_these_classes():
    assert isinstance(tf.constant(1.0), internals.EagerTensor)
    assert isinstance(tf.Variable(1.0), internals.TensorFlowVariable)
    found = []

    @tf.function
    def traced(x, v):
        found.append(isinstance(x, internals.EagerTensor) or not isinstance(v, internals.TensorFlowVariable))
        return x

    traced(tf.constant(1.0), tf.Variable(1.0))
    assert found == [False]


def test_sizes_of_eager_tensors_are_plain_tuples():
    found = [internals.sizes_of(tf.zeros(shape)) for shape in ((), (3,), (2, 0, 4))]
    assert repr(found) == "[(), (3,), (2, 0, 4)]"


@pytest.mark.gate
def test_the_first_operation_is_noticed_and_the_import_is_none():
    code = (
        "import tensorflow as tf, keras\n"
        "from stages import tensorflow_internals as internals\n"
        "before = internals.has_op_run(); tf.constant(1.0); print(before, internals.has_op_run())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout.split() == ["False", "True"], result.stderr


# -- gradients ---------------------------------------------------------------------------------------------------


def test_tapes_follow_floating_and_complex_tensors_only():
    for dtype in (tf.float32, tf.bfloat16, tf.complex64):
        assert internals.is_trainable(dtype)
        with tf.GradientTape() as tape:
            tape.watch(x := tf.ones((), dtype))
            y = x * x
        assert tape.gradient(y, x) is not None
    for dtype in (tf.int32, tf.bool, tf.string):
        assert not internals.is_trainable(dtype)
    assert internals.is_trainable(tf.constant(1.0)) and not internals.is_trainable(tf.constant(1))


@pytest.mark.gate
def test_settings_of_the_process_are_what_it_was_told():
    code = (
        "import keras, tensorflow as tf\n"
        "from stages import tensorflow_internals as internals\n"
        "def told(): return internals.checks_numerics(), internals.is_deterministic(), internals.global_seed()\n"
        "before = told()\n"
        "tf.debugging.enable_check_numerics()\n"
        "tf.config.experimental.enable_op_determinism()\n"
        "keras.utils.set_random_seed(7)\n"
        "print(before, told())\n"
        "tf.debugging.disable_check_numerics()\n"
        "print(internals.checks_numerics())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert found.stdout.splitlines() == ["(False, False, None) (True, True, 7)", "False"], found.stderr


def test_no_tape_records_while_recording_is_stopped():
    x = tf.constant(3.0)
    with tf.GradientTape(persistent=True) as outer, tf.GradientTape() as inner:
        outer.watch(x)
        inner.watch(x)
        with internals.stop_recording():
            assert internals.recording_is_stopped()
            unseen = x * x
        assert not internals.recording_is_stopped()
        seen = x * x
    assert (
        outer.gradient(unseen, x) is None and outer.gradient(seen, x).numpy() == inner.gradient(seen, x).numpy() == 6.0
    )


def test_a_tape_that_stops_itself_stops_no_other():
    with tf.GradientTape() as tape, tape.stop_recording():
        assert not internals.recording_is_stopped()


@pytest.mark.parametrize("accesses", [True, False])
def test_a_tape_says_whether_it_watches_variables_that_are_read(accesses):
    with tf.GradientTape(watch_accessed_variables=accesses) as tape:
        y = (variable := tf.Variable(2.0)) * 2.0
    assert internals.watches_accessed_variables(tape) == accesses == (tape.gradient(y, variable) is not None)


def test_registered_gradients_are_told_from_missing_and_from_none():
    assert internals.has_gradient("MatMul") is True
    assert internals.has_gradient("Const") is False
    assert internals.has_gradient("NoSuchOperation") is None


def test_the_gradient_function_of_an_operation_can_be_called():
    a, b = tf.constant([[2.0, 3.0]]), tf.constant([[5.0], [7.0]])
    attributes = ("transpose_a", False, "transpose_b", False, "T", tf.float32.as_datatype_enum)
    for_a, for_b = internals.gradients_of_operation("MatMul", attributes, [a, b], [a @ b], [tf.ones((1, 1))])
    np.testing.assert_array_equal(for_a, [[5.0, 7.0]])
    np.testing.assert_array_equal(for_b, [[2.0], [3.0]])
    assert internals.gradients_of_operation("Floor", ("T", 1), [a], [tf.floor(a)], [a]) in (None, [None])


def test_attributes_that_a_recorder_sees_serve_the_gradient_function():
    seen = []
    a = tf.constant([[2.0, 3.0]])
    with internals.seen_operations(lambda *given: seen.append(given)):
        out = tf.linalg.matmul(a, a, transpose_b=True)
    _, inputs, attributes, _, *_ = next(given for given in seen if given[0] in ("MatMul", b"MatMul"))
    for_a, for_b = internals.gradients_of_operation("MatMul", attributes, list(inputs), [out], [tf.ones((1, 1))])
    np.testing.assert_array_equal(for_a, a)
    np.testing.assert_array_equal(for_b, a)


def test_a_replaced_gradient_function_serves_every_tape_until_it_is_put_back():
    def sevens(original):
        def gradient(name, attributes, count, *rest):
            assert original(name, attributes, count, *rest) is not None
            return [tf.constant(7.0)] * count

        return gradient

    x = tf.constant(3.0)

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(x)
            return float(tape.gradient(tf.square(x), x))

    with internals.replaced_gradient_function(sevens):
        assert gradient() == 7.0
    assert gradient() == 6.0


# -- variables behind their handles ------------------------------------------------------------------------------


def test_a_variable_is_read_and_written_by_its_handle():
    variable = tf.Variable([1.0, 2.0], dtype=tf.float64)
    assert internals.dtype_behind(variable.handle) == tf.float64
    assert internals.dtype_behind(tf.constant(1.0)) is None
    np.testing.assert_array_equal(internals.read_behind(variable.handle, "float64"), [1.0, 2.0])
    internals.write_behind(variable.handle, tf.constant([3.0, 4.0], tf.float64))
    np.testing.assert_array_equal(variable, [3.0, 4.0])


# -- seeing what eager code does ---------------------------------------------------------------------------------


def test_replaced_attributes_are_put_back_and_inherited_ones_deleted():
    class Base:
        def own(self):
            return 1

    class Derived(Base):
        pass

    with (
        pytest.raises(ZeroDivisionError),
        internals.replaced(Base, "own", lambda original: lambda self: -original(self)),
    ):
        assert Base().own() == -1
        _ = 1 / 0
    with internals.replaced(Derived, "own", lambda original: lambda self: 10 * original(self)):
        assert (Derived().own(), Base().own()) == (10, 1)
    assert (Derived().own(), Base().own()) == (1, 1) and "own" not in vars(Derived)


def test_operations_are_seen_with_inputs_attributes_and_outputs():
    seen = []
    a = tf.constant([1.0, 2.0])
    with internals.seen_operations(lambda *given: seen.append(given)):
        out = tf.nn.relu(a)
    ((name, inputs, attributes, outputs, *more),) = seen
    assert name in ("Relu", b"Relu") and inputs[0] is a and outputs[0] is out
    assert attributes[0] == "T" and more[1:] in ([], [None])
    tf.nn.relu(a)
    assert len(seen) == 1


def test_the_fast_path_is_given_variables_that_it_would_read_unseen():
    variable, operations, paths = tf.Variable([1.0]), [], []

    def watching(original):
        def execute(context, operation, name, *arguments):
            paths.append((operation, [isinstance(one, internals.TensorFlowVariable) for one in arguments]))
            return original(context, operation, name, *arguments)

        return execute

    with (
        internals.replaced(*internals.FAST_PATH, watching),
        internals.seen_operations(lambda *g: operations.append(g[0])),
    ):
        tf.nn.relu(variable)
    assert ("Relu", [True]) in [(operation, given[:1]) for operation, given in paths]
    assert "ReadVariableOp" not in [str(name) for name in operations]


def test_custom_gradients_are_recorded_by_one_function():
    @tf.custom_gradient
    def doubled(x):
        return x * 2.0, lambda upstream: upstream * 5.0

    seen = []

    def watching(original):
        def recorded(kind, outputs, inputs, backward, *rest):
            seen.append((kind, list(outputs), list(inputs), backward))
            return original(kind, outputs, inputs, backward, *rest)

        return recorded

    x = tf.constant(1.0)
    with internals.replaced(*internals.RECORD_OPERATION, watching), tf.GradientTape() as tape:
        tape.watch(x)
        y = doubled(x)
    assert tape.gradient(y, x).numpy() == 5.0
    ((_, outputs, _, backward),) = seen
    assert outputs[0].numpy() == 2.0 and tf.nest.flatten(backward(tf.constant(1.0)))[0].numpy() == 5.0


def test_functions_in_python_and_numpy_go_through_one_function():
    seen = []

    def watching(original):
        def call(function, inp, Tout, *args, **kwargs):
            seen.append([float(one) for one in inp])
            return original(function, inp, Tout, *args, **kwargs)

        return call

    with internals.replaced(*internals.PY_FUNCTION, watching):
        assert tf.numpy_function(lambda x: x + 1.0, [1.0], tf.float64).numpy() == 2.0
        tf.numpy_function(lambda x: x, [tf.constant(3.0)], tf.float32)
    assert seen == [[1.0], [3.0]]


CONVERT = {
    "numpy": lambda t: t.numpy(),
    "__array__": lambda t: t.__array__(),
    "__float__": float,
    "__int__": int,
    "__bool__": bool,
    "__index__": lambda t: [10, 11, 12][tf.cast(t, tf.int32)],
    "__complex__": complex,
    "__format__": lambda t: f"{t:.1f}",
}


def seen_in(place, convert, tensor):
    """What an attribute is given while a tensor is converted, which gives what it always gives."""
    seen, usual = [], convert(tensor)

    def watching(original):
        return lambda first, *more, **named: (seen.append(first), original(first, *more, **named))[1]

    with internals.replaced(*place, watching):
        assert convert(tensor) == usual
    return seen


@pytest.mark.parametrize("place", internals.CONVERSIONS, ids=lambda place: place[1])
def test_values_leave_tensors_by_methods_of_one_class(place):
    assert seen_in(place, CONVERT[place[1]], tf.constant(1.0))
    assert {name for _, name in internals.CONVERSIONS} == set(CONVERT)


@pytest.mark.parametrize("place", internals.NUMPY_FUNCTIONS, ids=lambda place: place[1])
def test_numpy_functions_take_a_tensor_as_it_is(place):
    tensor = tf.constant(1.0)
    assert seen_in(place, lambda given: getattr(np, place[1])(given), tensor)[0] is tensor


def test_numpy_functions_ask_the_tensor_first_and_can_be_called_past_that():
    asked = []

    def dispatch(_):
        def called(tensor, function, types, args, kwargs):
            asked.append(function.__name__)
            return internals.numpy_itself(function)(*args, **kwargs)

        return called

    with internals.replaced(*internals.NUMPY_DISPATCH, dispatch):
        assert np.mean(tf.constant([1.0, 3.0])) == 2.0
    assert asked == ["mean"] and np.mean(tf.constant([1.0, 3.0])) == 2.0


def test_tapes_open_and_close_through_two_methods():
    events = []

    def noting(event):
        return lambda original: lambda tape, *given: (events.append((event, id(tape))), original(tape, *given))[1]

    with (
        internals.replaced(*internals.TAPE_OPENED, noting("opened")),
        internals.replaced(*internals.TAPE_CLOSED, noting("closed")),
    ):
        with tf.GradientTape() as tape:
            events.append(("inside", 0))
        x = tf.constant(1.0)
        with tf.GradientTape() as asked_inside:
            asked_inside.watch(x)
            asked_inside.gradient(x * x, x)
    first = [event for event, one in events if one in (0, id(tape))]
    assert first[:3] == ["opened", "inside", "closed"]
    assert [event for event, one in events if one == id(asked_inside)][-1] == "closed"


def test_what_a_tape_is_asked_goes_through_its_class():
    calls, x = [], tf.constant(3.0)

    def noting(original):
        return lambda tape, *given: (calls.append(given), original(tape, *given))[1]

    assert tf.GradientTape in {
        owner for owner, _ in (internals.TAPE_WATCHES, internals.TAPE_ASKED, internals.TAPE_STOPPED)
    }
    with (
        internals.replaced(*internals.TAPE_WATCHES, noting),
        internals.replaced(*internals.TAPE_ASKED, noting),
        internals.replaced(*internals.TAPE_STOPPED, noting),
        tf.GradientTape() as tape,
    ):
        tape.watch(x)
        y = x * x
        with tape.stop_recording():
            pass
        assert tape.gradient(y, x).numpy() == 6.0
    assert calls[0][0] is x and calls[1] == () and calls[2][0] is y


def test_what_runs_without_a_tape_is_taken_for_one_operation_of_a_tape():
    x, v = tf.constant(3.0), tf.Variable(2.0)
    assert not internals.may_be_recorded()
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert internals.may_be_recorded()
        with internals.stop_recording():
            y = x * v
        internals.record_as_one("Ours", [y], [x, v.handle], [v], lambda seed: [seed * 10.0, seed * 20.0])
    assert [float(g) for g in tape.gradient(y, [x, v])] == [10.0, 20.0]


def test_arrays_that_become_tensors_and_jacobians_are_seen():
    seen, x, tape = [], tf.constant([[1.0, 2.0]]), tf.GradientTape(persistent=True)
    with tape:
        y = (tape.watch(x), x * x)[1]
    for place in (internals.FROM_NUMPY, *internals.TAPE_JACOBIANS):
        with internals.replaced(*place, lambda original: lambda *args: seen.append(args) or original(*args)):
            tf.constant(np.ones(2, "float32")) if place is internals.FROM_NUMPY else getattr(tape, place[1])(y, x)
    assert type(seen[0][0]) is np.ndarray and all(args[1] is y and args[2] is x for args in seen[-2:])
