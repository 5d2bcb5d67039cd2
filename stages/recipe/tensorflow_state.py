"""TensorFlow's own objects taken apart: variables, tensors, tables, functions.

A variable travels as its shape, dtype and flags, with its value or, where values follow on another way, with zeros. A
table travels as its keys and values. A `tf.function` travels as the Python function inside it and is traced anew. A
tensor of a function's trace is of no use outside it: it travels as a remark that refuses to be used.
"""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Callable
from functools import cache
from types import GeneratorType
from typing import Any, NoReturn, Protocol

import keras
import numpy as np
import tensorflow as tf

from stages.errors import RecipeError
from stages.recipe.attributes import FLOATS, Reduced, Writing, fill
from stages.recipe.restoring import restoring


class Taking(Writing, Protocol):
    """One copy that is being written."""

    def number(self, variable: Any) -> int | None:
        """The number under which a variable's value travels; None: its value does not."""


class CopyRefusedError(Exception):
    """An object that cannot be copied; the message says what it is and what to do."""


def reduce_tensorflow(thing: Any, taking: Taking) -> Reduced | None:
    """Take an object of TensorFlow (or a lock) apart; None: it is none, or pickle's own way is right for it.

    Raises:
        CopyRefusedError: It has a value only here.
    """
    if isinstance(thing, keras.Variable):
        return _reduce_keras_variable(thing, taking)
    if isinstance(thing, tf.Variable):
        return _reduce_variable(thing, taking)
    if isinstance(thing, tf.Tensor):
        return _reduce_tensor(thing, taking)
    if isinstance(thing, np.ndarray) and taking.floats is not None and thing.dtype.name in FLOATS:
        return np.array, (_widened(thing, taking).tolist(), taking.floats)
    if isinstance(thing, tf.SparseTensor):
        return tf.SparseTensor, (thing.indices, thing.values, thing.dense_shape)
    if isinstance(thing, tf.RaggedTensor):
        return _ragged, (thing.flat_values, tuple(thing.nested_row_splits))
    if isinstance(thing, tf.random.Generator):
        return _generator, (thing.state.numpy(), int(thing.algorithm))
    if isinstance(thing, tf.lookup.StaticHashTable):
        return _reduce_static_table(thing, taking)
    if isinstance(thing, tf.lookup.experimental.MutableHashTable | tf.lookup.experimental.DenseHashTable):
        return _reduce_table(thing, taking)
    if type(thing) is _function_kind():
        return _reduce_function(thing)
    if isinstance(thing, weakref.ref):
        return _weakly, (thing(),)
    for kind, make in _LOCKS.items():
        if isinstance(thing, kind):
            return make, ()
    for kinds, what in _OF_ONE_PROCESS:
        if isinstance(thing, kinds) and not isinstance(thing, io.StringIO | io.BytesIO):
            raise CopyRefusedError(f"{what}, which belongs to one process")
    return None


# -- variables -------------------------------------------------------------------------------------------------------


def _reduce_keras_variable(variable: Any, taking: Taking) -> Reduced:
    state = dict(vars(variable))
    inner = state.pop("_value", None)
    if inner is None:  # not initialised yet
        return _plain, (type(variable),), state | {"_value": None}, None, None, fill
    number = taking.number(variable)
    value = None if number is None else _array(inner, taking)
    if taking.floats is not None and state["_dtype"] in FLOATS:
        state["_dtype"] = taking.floats
    here = (number, value, bool(inner.trainable))
    return _plain, (type(variable),), (state, here), None, None, _fill_keras_variable


def _fill_keras_variable(variable: Any, given: tuple[dict[str, Any], tuple[int | None, Any, bool]]) -> None:
    state, (number, value, trainable) = given
    fill(variable, state)
    if value is None:
        value = np.zeros(state["_shape"], tf.as_dtype(state["_dtype"]).as_numpy_dtype)
    with tf.init_scope():
        variable._initialize(tf.constant(value))
    variable._value._trainable = trainable
    if number is not None:
        restoring().variables[number] = variable


def _reduce_variable(variable: Any, taking: Taking) -> Reduced:
    options = {
        "trainable": bool(variable.trainable),
        "name": variable.name.partition(":")[0],
        "shape": variable.shape,
    }
    return _variable, (taking.number(variable), _array(variable, taking), options)


def _variable(number: int, value: Any, options: dict[str, Any]) -> Any:
    with tf.init_scope():
        made = tf.Variable(tf.constant(value), **options)
    restoring().variables[number] = made
    return made


# -- tensors ---------------------------------------------------------------------------------------------------------


def _reduce_tensor(tensor: Any, taking: Taking) -> Reduced:
    if not isinstance(tensor, tf.__internal__.EagerTensor):
        return Leftover, (f"{tensor.name} of shape {tensor.shape}",)
    if tensor.dtype in (tf.resource, tf.variant):
        raise CopyRefusedError(f"a tensor of the type {tensor.dtype.name}, which belongs to one process")
    return _tensor, (_array(tensor, taking),)


def _array(tensor: Any, taking: Taking) -> Any:
    """The value of an eager tensor or variable."""
    return _widened(np.asarray(tensor.numpy()), taking)


def _widened(value: Any, taking: Taking) -> Any:
    return value.astype(taking.floats) if taking.floats is not None and value.dtype.name in FLOATS else value


def _tensor(value: Any) -> Any:
    with tf.init_scope():
        return tf.constant(value)


def _ragged(values: Any, splits: tuple[Any, ...]) -> Any:
    with tf.init_scope():
        return tf.RaggedTensor.from_nested_row_splits(values, splits)


def _generator(state: Any, algorithm: int) -> Any:
    with tf.init_scope():
        return tf.random.Generator.from_state(state, alg=algorithm)


class Leftover:
    """In place of a tensor that a traced `call` left in an attribute: outside that trace it has no value.

    Keras leaves such tensors behind whenever a layer keeps something it has computed (``self.scores = scores``). Most
    are never read again; one that is says so.
    """

    def __init__(self, what: str) -> None:
        self.__dict__["what"] = what

    def __repr__(self) -> str:
        return f"<left over from a trace: {self.__dict__['what']}>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):  # asked by Python and by libraries, not used
            raise AttributeError(name)
        raise RecipeError(
            f"an attribute holds {self.__dict__['what']}, a tensor that an earlier call left there and that has no "
            "value any more; set the attribute before it is read, in the same call"
        )


# -- tables ----------------------------------------------------------------------------------------------------------


def _reduce_static_table(table: Any, taking: Taking) -> Reduced:
    try:
        keys, values = table.export()
    except tf.errors.FailedPreconditionError:  # nothing was put in yet
        keys = values = None
    types = (table.key_dtype.name, table.value_dtype.name)
    content = None if keys is None else (_array(keys, taking), _array(values, taking))
    return _static_table, (content, types, _array(table.default_value, taking))


def _static_table(content: tuple[Any, Any] | None, types: tuple[str, str], default: Any) -> Any:
    with tf.init_scope():
        if content is None:
            source: Any = _Nothing(*types)
        else:
            source = tf.lookup.KeyValueTensorInitializer(*content, *types)
        return tf.lookup.StaticHashTable(source, tf.constant(default, types[1]))


class _Nothing(tf.lookup.KeyValueTensorInitializer):  # type: ignore[misc]
    """Leaves a table without content, as Keras's look-up layers are before `adapt`."""

    def __init__(self, keys: str, values: str) -> None:
        self._keys, self._values_type = tf.as_dtype(keys), tf.as_dtype(values)

    @property
    def key_dtype(self) -> Any:
        return self._keys

    @property
    def value_dtype(self) -> Any:
        return self._values_type

    def initialize(self, table: Any) -> None:
        pass


def _reduce_table(table: Any, taking: Taking) -> Reduced:
    keys, values = table.export()
    options = {"key_dtype": table.key_dtype.name, "value_dtype": table.value_dtype.name}
    default = _array(table._default_value, taking)
    if isinstance(table, tf.lookup.experimental.DenseHashTable):
        raise CopyRefusedError(
            "a DenseHashTable, whose empty and deleted keys it does not tell; use a MutableHashTable"
        )
    return _table, (options, default, _array(keys, taking), _array(values, taking))


def _table(options: dict[str, str], default: Any, keys: Any, values: Any) -> Any:
    with tf.init_scope():
        made = tf.lookup.experimental.MutableHashTable(default_value=default, **options)
        if len(keys):
            made.insert(tf.constant(keys, options["key_dtype"]), tf.constant(values, options["value_dtype"]))
        return made


# -- functions, references, locks ------------------------------------------------------------------------------------


@cache
def _function_kind() -> type:
    return type(tf.function(lambda: None))


def _reduce_function(function: Any) -> Reduced:
    signature = function.input_signature
    options = {
        "autograph": function._autograph,
        "jit_compile": function._jit_compile,
        "reduce_retracing": function._reduce_retracing,
        "experimental_autograph_options": function._experimental_autograph_options,
    }
    return _function, (function.python_function, None if signature is None else tuple(signature), options)


def _function(inner: Callable[..., Any], signature: Any, options: dict[str, Any]) -> Any:
    return tf.function(inner, input_signature=signature, **options)


def _weakly(target: Any) -> Any:
    if target is None:
        return _no_one
    return weakref.ref(target)


def _no_one() -> None:
    return None


_LOCKS: dict[Any, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}

_OF_ONE_PROCESS: tuple[tuple[Any, str], ...] = (
    (io.IOBase, "an open file"),
    (GeneratorType, "a generator"),
    (threading.Thread, "a thread"),
    (tf.data.Dataset | tf.data.Iterator, "a tf.data pipeline"),
)


def _plain(kind: type) -> Any:
    return object.__new__(kind)


__all__ = ["CopyRefusedError", "Leftover", "Taking", "reduce_tensorflow"]
