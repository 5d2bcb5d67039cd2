"""Settings of Keras and TensorFlow that hold for a whole process, so that workers compute under the user's.

A loss reads Keras's epsilon when it is called, a builder its float type and dtype policy, every product of matrices
TensorFlow's choice of TensorFloat-32. `settings` says what they are, as plain data; `settle` makes it so elsewhere.
Seeds go along as one number, from which every worker draws its own: two workers with equal random numbers would be
worse than none.

Threads of the user's process share its settings but for those that Keras keeps for each thread by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from stages.tensorflow_internals import checks_numerics, global_seed, is_deterministic

Settings = dict[str, Any]
"""{name: plain value}."""

_SEEDS = 2**31


class _Setting(NamedTuple):
    """One setting.

    Attributes:
        get: Its value as plain data.
        set: Makes it so.
        each_thread: Whether every thread has its own.
    """

    get: Callable[[], Any]
    set: Callable[[Any], object]
    each_thread: bool = False


def settings() -> Settings:
    """What this process (and thread) is set to."""
    return {name: setting.get() for name, setting in _SETTINGS.items()}


def settle(given: Mapping[str, Any], *, number: int, own_process: bool) -> None:
    """Set this worker as the process that started it.

    Args:
        given: What `settings` said there.
        number: The worker's, from which its seed is drawn.
        own_process: False: it is a thread of that process.
    """
    for name, value in given.items():
        setting = _SETTINGS[name]
        if name == "seed":
            if own_process and value is not None:
                keras.utils.set_random_seed((value * 1_000_003 + number + 1) % _SEEDS)
        elif (own_process or setting.each_thread) and setting.get() != value:
            setting.set(value)


def _policy() -> Any:
    return keras.dtype_policies.serialize(keras.config.dtype_policy())


def _set_policy(value: Any) -> None:
    keras.config.set_dtype_policy(keras.dtype_policies.deserialize(value))


def _check_numerics(_: bool) -> None:
    tf.debugging.enable_check_numerics()


def _make_deterministic(_: bool) -> None:
    tf.config.experimental.enable_op_determinism()


def _like_numpy() -> bool:
    return hasattr(tf.Tensor, "astype")


def _be_like_numpy(_: bool) -> None:
    tf.experimental.numpy.experimental_enable_numpy_behavior()


def _tracebacks(filtered: bool) -> None:
    (keras.config.enable_traceback_filtering if filtered else keras.config.disable_traceback_filtering)()


def _flash(enabled: bool) -> None:
    (keras.config.enable_flash_attention if enabled else keras.config.disable_flash_attention)()


_SETTINGS: Mapping[str, _Setting] = {
    "floatx": _Setting(keras.config.floatx, keras.config.set_floatx),
    "epsilon": _Setting(keras.config.epsilon, keras.config.set_epsilon),
    "image_data_format": _Setting(keras.config.image_data_format, keras.config.set_image_data_format),
    "dtype_policy": _Setting(_policy, _set_policy, each_thread=True),
    "flash_attention": _Setting(keras.config.is_flash_attention_enabled, _flash, each_thread=True),
    "traceback_filtering": _Setting(keras.config.is_traceback_filtering_enabled, _tracebacks, each_thread=True),
    "tensor_float_32": _Setting(
        tf.config.experimental.tensor_float_32_execution_enabled,
        tf.config.experimental.enable_tensor_float_32_execution,
    ),
    "run_functions_eagerly": _Setting(tf.config.functions_run_eagerly, tf.config.run_functions_eagerly),
    "jit": _Setting(tf.config.optimizer.get_jit, lambda value: tf.config.optimizer.set_jit(value or False)),
    "optimizer": _Setting(tf.config.optimizer.get_experimental_options, tf.config.optimizer.set_experimental_options),
    "soft_device_placement": _Setting(tf.config.get_soft_device_placement, tf.config.set_soft_device_placement),
    "check_numerics": _Setting(checks_numerics, _check_numerics, each_thread=True),
    "deterministic": _Setting(is_deterministic, _make_deterministic),
    "like_numpy": _Setting(_like_numpy, _be_like_numpy),
    "seed": _Setting(global_seed, lambda _: None),
}

__all__ = ["Settings", "settings", "settle"]
