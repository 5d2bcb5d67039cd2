"""Everything of TensorFlow that TensorFlow does not promise: `tensorflow.python`, private names, replaced functions.

No other file of `stages` and `pipeline` touches such a name (`tests/test_house.py`). Every function says what of
TensorFlow it relies on, and `tests/stages/test_tensorflow_internals.py` tries that behaviour, so that a new TensorFlow
which behaves otherwise shows as one red file. It was read in TensorFlow 2.18 to 2.21.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.debug.lib import check_numerics_callback
from tensorflow.python.eager import backprop, backprop_util, context, record
from tensorflow.python.framework import config, constant_op, op_callbacks, ops
from tensorflow.python.ops import gen_resource_variable_ops, resource_variable_ops, script_ops

# -- kinds of objects --------------------------------------------------------------------------------------------

EagerTensor = ops.EagerTensor
"""The class of tensors that have a value."""

TensorFlowVariable = resource_variable_ops.BaseResourceVariable
"""The class of `tf.Variable`s, and of what stands for one inside functions; a Keras variable holds one."""


def has_op_run() -> bool:
    """Whether this process has run an operation, so that a process forked from it may hang in its first `tf.function`.

    Relies on `context.context_safe()`, the eager context if there is one, and its `_initialized`.
    """
    current = context.context_safe()
    return bool(current is not None and current._initialized)


def sizes_of(tensor: Any) -> tuple[int, ...]:
    """The shape of an eager tensor as a plain tuple, which `tensor.shape` wraps at ten times the price.

    Relies on `EagerTensor._shape_tuple`.
    """
    return tensor._shape_tuple()  # type: ignore[no-any-return]


# -- settings of the process -------------------------------------------------------------------------------------


def checks_numerics() -> bool:
    """Whether `tf.debugging.enable_check_numerics` was called in this thread. Relies on what it leaves in `_state`."""
    return hasattr(check_numerics_callback._state, "check_numerics_callback")


def is_deterministic() -> bool:
    """Whether `tf.config.experimental.enable_op_determinism` was called."""
    return bool(config.is_op_determinism_enabled())


def global_seed() -> int | None:
    """What `tf.random.set_seed` (and so `keras.utils.set_random_seed`) was given; None: it was not called."""
    found = context.global_seed()
    return None if found is None else int(found)


def drawn_seeds() -> Any:
    """The state of the generator that gives operations their seeds, plain data; None before `tf.random.set_seed`.

    Relies on `context.context()._rng`, as `drawing_seeds_from` does.
    """
    found = getattr(context.context(), "_rng", None)
    return None if found is None else found.getstate()


def set_drawn_seeds(seed: int, state: Any) -> None:
    """Let random operations get their seeds as where `drawn_seeds` gave this state, after `tf.random.set_seed(seed)`.

    Relies on the same.
    """
    tf.random.set_seed(seed)
    context.context()._rng.setstate(state)


# -- gradients ---------------------------------------------------------------------------------------------------


def is_trainable(what: Any) -> bool:
    """Whether a tape follows a tensor, or a dtype: floating and complex ones, not integers.

    Relies on `backprop_util.IsTrainable`, which every tape asks.
    """
    return bool(backprop_util.IsTrainable(what))


def stop_recording() -> AbstractContextManager[Any]:
    """No tape of this thread records inside; `tf.GradientTape.stop_recording` stops one. Relies on `record`'s own."""
    return record.stop_recording()  # type: ignore[no-any-return]


def recording_is_stopped() -> bool:
    """Whether all tapes of this thread are stopped by `stop_recording`.

    Relies on `TFE_Py_TapeSetIsStopped`. `tf.GradientTape.stop_recording` is not seen: it closes its tape for a while.
    """
    return bool(pywrap_tfe.TFE_Py_TapeSetIsStopped())


def may_be_recorded() -> bool:
    """Whether a tape of this thread records what is run now. Relies on `record.could_possibly_record`."""
    return bool(record.could_possibly_record())


def record_as_one(
    kind: str, outputs: Sequence[Any], inputs: Sequence[Any], variables: Sequence[Any], backward: Callable[..., Any]
) -> None:
    """Let the tapes of this thread take something for one operation of theirs.

    Args:
        kind: What it is called.
        outputs: Its results, tensors.
        inputs: What it was made from: tensors, and the handles of variables.
        variables: The `tf.Variable`s that it read, which tapes begin to watch.
        backward: From dL/d(each output) to dL/d(each input).

    Relies on `record.record_operation` and `resource_variable_ops.variable_accessed`, as custom gradients and reads do.
    """
    for variable in variables:
        resource_variable_ops.variable_accessed(variable)
    record.record_operation(kind, list(outputs), list(inputs), backward)


def watches_accessed_variables(tape: Any) -> bool:
    """Whether a `tf.GradientTape` watches variables that are read. Relies on `_watch_accessed_variables`."""
    return bool(tape._watch_accessed_variables)


def has_gradient(operation: str) -> bool | None:
    """Whether a gradient function is registered for a kind of operation.

    Returns:
        True; False: the operation is registered as not differentiable; None: it is not registered.

    Relies on `ops._gradient_registry`, which tapes look functions up in: LookupError or None for these two.
    """
    try:
        function: Any = ops._gradient_registry.lookup(operation)
    except LookupError:
        return None
    return function is not None


def gradients_of_operation(
    operation: str, attributes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], given: Sequence[Any]
) -> Any:
    """What the registered gradient function of an operation gives for gradients of its outputs.

    Args:
        operation: Its kind, ``"MatMul"``.
        attributes: Its attributes as the recorder of operations is given them: name, value, name, value ...
        inputs: Its eager inputs.
        outputs: Its eager outputs.
        given: dL/d(each output), or None.

    Returns:
        One tensor or None for every input, or one alone.

    Relies on `backprop._gradient_function`, which every tape calls with these arguments.
    """
    return backprop._gradient_function(operation, attributes, len(inputs), inputs, outputs, given, (), None)


GradientFunction = Callable[..., Any]
"""(operation, attributes, number of inputs, inputs, outputs, output gradients, ...) -> gradients of the inputs."""


@contextmanager
def replaced_gradient_function(make: Callable[[GradientFunction], GradientFunction]) -> Iterator[None]:
    """Let all tapes of this process call another function for the gradients of operations, for a while.

    Args:
        make: Makes it from TensorFlow's own.

    Relies on `TFE_Py_RegisterGradientFunction`, and on TensorFlow having registered `backprop._gradient_function`.
    """
    pywrap_tfe.TFE_Py_RegisterGradientFunction(make(backprop._gradient_function))
    try:
        yield
    finally:
        pywrap_tfe.TFE_Py_RegisterGradientFunction(backprop._gradient_function)


# -- variables behind their handles ------------------------------------------------------------------------------


def dtype_behind(handle: Any) -> tf.DType | None:
    """The dtype of the variable that an eager handle (a tensor of dtype resource) stands for; None: of none.

    Relies on `EagerTensor._handle_data.shape_and_type`, which variables fill in when they are made.
    """
    data = getattr(handle, "_handle_data", None)
    return None if data is None else tf.as_dtype(data.shape_and_type[0].dtype)


def read_behind(handle: Any, dtype: Any) -> Any:
    """The value, an eager tensor, of the variable that a handle stands for. Relies on `read_variable_op`."""
    return gen_resource_variable_ops.read_variable_op(handle, tf.as_dtype(dtype))


def write_behind(handle: Any, value: Any) -> None:
    """Assign a tensor to the variable that a handle stands for. Relies on `assign_variable_op`."""
    gen_resource_variable_ops.assign_variable_op(handle, value)


# -- graphs and random numbers -----------------------------------------------------------------------------------


def called_graph(graph: Any, name: str) -> Any | None:
    """The graph of a function that an operation of a graph calls by this name, or None if it is not known there.

    Relies on `Graph._get_function`, whose answer has the function's `graph`.
    """
    return getattr(graph._get_function(name), "graph", None)


def run_behind(operation: Any, earlier: Any) -> None:
    """Let an operation of the graph that is being traced wait for another one, which must not depend on it.

    Relies on `Operation._add_control_input`: `tf.control_dependencies` only reaches what is made inside it.
    """
    operation._add_control_input(earlier)


@contextmanager
def drawing_seeds_from(seed: str) -> Iterator[None]:
    """Draw the seeds that TensorFlow gives to random operations from a generator of our own for a while.

    TensorFlow draws one seed for every random operation. Inside, those that the user's code would draw next are kept.

    Args:
        seed: Of that generator.

    Relies on `context.context()._rng`, a `random.Random`, which is there once `tf.random.set_seed` was called.
    """
    eager = context.context()
    before = getattr(eager, "_rng", None)
    if before is not None:
        eager._rng = random.Random(seed)
    try:
        yield
    finally:
        if before is not None:
            eager._rng = before


# -- seeing what eager code does ---------------------------------------------------------------------------------


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class or module by what `make` makes of it, for a while.

    An attribute that `owner` only inherits, or does not have, is deleted afterwards; `make` gets it, or None.
    """
    there = name in vars(owner)
    original = vars(owner)[name] if there else getattr(owner, name, None)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if there:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def seen_operations(callback: Callable[..., Any]) -> Iterator[None]:
    """Call a function after every operation that this thread runs, for a while.

    Args:
        callback: Is given (kind of operation, inputs, attributes, outputs, name), the kind as str or bytes, and of an
            operation in a graph the graph besides; it must return None.

    Relies on `op_callbacks`, and on operations that are run in Python's fast path being given to them as well.
    """
    op_callbacks.add_op_callback(callback)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(callback)


FAST_PATH = (pywrap_tfe, "TFE_Py_FastPathExecute")
"""For `replaced`: (context, kind of operation, name, *arguments) of every eager operation before it runs.

Variables among the arguments are read inside, without a word to `seen_operations`.
"""

RECORD_OPERATION = (record, "record_operation")
"""For `replaced`: (kind, outputs, inputs, backward function, forward function) of what `tf.custom_gradient` made."""

FROM_NUMPY = (constant_op, "convert_to_eager_tensor")
"""For `replaced`: (value, context, dtype) -> the eager tensor that an array or a number becomes."""

PY_FUNCTION = (script_ops, "py_func_common")
"""For `replaced`: (function, inputs, Tout, ...) of `tf.numpy_function` and `tf.py_function`."""

CONVERSIONS = tuple(
    (ops._EagerTensorBase, name)
    for name in ("numpy", "__array__", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__format__")
)
"""Each for `replaced`: (tensor, ...) of the methods that give an eager tensor's value away."""

COMPILED_CALL = (type(tf.function(lambda: None)), "__call__")
"""For `replaced`: (function, ...) of every call of a `tf.function`."""

ITERATION = (tf.Tensor, "__iter__")
"""For `replaced`: (tensor) of ``for row in tensor``, whose number of turns is the tensor's first size."""

NUMPY_FUNCTIONS = tuple((np, name) for name in ("array", "asarray", "asanyarray", "ascontiguousarray"))
"""Each for `replaced`: (object, ...) of NumPy functions that read a tensor's memory and call none of `CONVERSIONS`."""

NUMPY_DISPATCH = (ops._EagerTensorBase, "__array_function__")
"""For `replaced`, which gets None: (tensor, function, types, args, kwargs) of NumPy given tensors (NEP 18)."""

TAPE_OPENED, TAPE_CLOSED = (backprop.GradientTape, "_push_tape"), (backprop.GradientTape, "_pop_tape")
"""For `replaced`: (tape) of every tape that begins to record, and ends."""

TAPE_WATCHES, TAPE_ASKED = (backprop.GradientTape, "watch"), (backprop.GradientTape, "gradient")
"""For `replaced`: a tape's own methods, with their arguments by place; `tf.GradientTape` is this class."""

TAPE_JACOBIANS = tuple((backprop.GradientTape, name) for name in ("jacobian", "batch_jacobian"))
"""Each for `replaced`: (tape, target, source, ...) of the methods that ask a tape for every row."""

TAPE_STOPPED = (backprop.GradientTape, "stop_recording")
"""For `replaced`: (tape) -> a context manager."""


def numpy_itself(function: Any) -> Callable[..., Any]:
    """A NumPy function without its dispatch to foreign arrays (NEP 18). Relies on NumPy's `_implementation`."""
    return function._implementation  # type: ignore[no-any-return]
