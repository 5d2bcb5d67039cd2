"""Call a traced function with as little Python around it as TensorFlow allows.

`tf.function.__call__` binds arguments, converts, flattens, checks and packs again on every call: 250-450 µs here for a
function whose arithmetic takes 30 µs. A stage calls the same few functions with flat tuples of tensors thousands of
times, so it calls them through the public `StatefulPartitionedCall` operation: 50-70 µs.

Rules:

1. TensorFlow marks 32-bit integers as shape data and refuses them as outputs of that operation, so a function that
   goes through here must not return int32 (see `portable`).
2. That operation has no gradient. A tape of the user's own that records a call gets one that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from stages.errors import HandoffError
from stages.tensorflow_internals import may_be_recorded, record_as_one, stop_recording


def portable(tensor: Any) -> Any:
    """A tensor as it may leave a directly called function: int32 becomes int64, all else stays."""
    return tf.cast(tensor, tf.int64) if tensor.dtype == tf.int32 else tensor


def portable_dtype(dtype: Any) -> Any:
    """The dtype that `portable` gives."""
    return tf.int64 if dtype == tf.int32 else dtype


def unportable(tensor: Any, dtype: Any) -> Any:
    """Undo `portable`: cast back where the dtype had been changed."""
    return tensor if tensor.dtype == dtype else tf.cast(tensor, dtype)


def direct(function: Callable[..., Sequence[Any]], signature: Sequence[Any]) -> Callable[..., list[Any]]:
    """Trace a function of flat tensors once and return its fast caller.

    Args:
        function: Takes tensors, returns a flat list of tensors (no None, no int32).
        signature: One `tf.TensorSpec` per argument.

    Returns:
        A callable from eager tensors (dtype and shape as in the signature; not checked again) to a list of tensors.
    """
    concrete = tf.function(function, input_signature=tuple(signature), autograph=False).get_concrete_function()
    captured = list(concrete.captured_inputs)
    dtypes = [output.dtype for output in concrete.outputs]
    call = tf.raw_ops.StatefulPartitionedCall
    if not dtypes:

        def run_for_effect(*tensors: Any) -> list[Any]:
            call(args=[*tensors, *captured], Tout=[], f=concrete)
            return []

        return run_for_effect

    def run(*tensors: Any) -> list[Any]:
        arguments = [*tensors, *captured]
        if not may_be_recorded():
            result: list[Any] = call(args=arguments, Tout=dtypes, f=concrete)
            return result
        with stop_recording():
            result = call(args=arguments, Tout=dtypes, f=concrete)
        record_as_one("CompiledStage", result, arguments, concrete.variables, _no_gradient)
        return result

    return run


def _no_gradient(*_: Any) -> Any:
    raise HandoffError(
        "a tape of your own was asked for a gradient through a compiled stage, which hands its gradients over by "
        "itself: give dL/dOut to stage.backward(), or make the stage with run_eagerly=True"
    )
