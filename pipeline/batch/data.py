"""From what a user passes as x, y and weights to the arrays that travel, checked against what the stages take.

Every fault of the data is found here, in the user's process, before a worker hears of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from pipeline.batch.inputs import InputNames
from pipeline.batch.microbatch import microbatch_sizes
from pipeline.batch.outputs import by_label
from pipeline.batch.step import Batch
from pipeline.errors import CompileError, DataError
from stages.grid import is_over_time
from stages.tape.tensors import compatible

InputSpec = tuple[str, tuple[int | None, ...]]
"""dtype and shape with None for free dimensions."""


def make_batch(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    inputs: Mapping[str, InputSpec | None],
    microbatches: int,
    labels: Sequence[str] = (),
    judged: Sequence[str] = (),
    windows: int = 1,
    judged_over_time: Sequence[str] = (),
    names: InputNames | None = None,
) -> Batch:
    """One batch, converted, checked and cut.

    Args:
        x: Array or tensor (n, ...), or a list or dict of them; see `InputNames`.
        y: Targets (n, ...), for several outputs a list in their order or a dict by their names; None where the mode
            needs none.
        sample_weight: (n,) or the shape of the loss's elements, or None; one array for all outputs, or as `y`.
        inputs: The pipeline's inputs by name, with what they take, where that is known.
        microbatches: How many are wanted.
        labels: What the outputs are called.
        judged: Those that have a loss to compute; empty where the mode needs none.
        windows: Into how many windows the time axis is cut; as equal as they can be, the first ones longer.
        judged_over_time: Those of `judged` whose targets have a time axis too.
        names: How x names the inputs; default: as `inputs` does.

    Raises:
        DataError: Everything that does not fit.
    """
    arrays = _inputs(x, inputs, names or InputNames.of(tuple(inputs)))
    size = next(iter(arrays.values())).shape[0]
    targets = _targets(y, size, labels, judged) if judged else {}
    weights = _weights(sample_weight, size, labels, judged) if judged else {}
    lengths = window_lengths(arrays, inputs, windows) if windows > 1 else ()
    for label in judged_over_time if lengths else ():
        _check_steps(f"y ({label!r})", targets[label], sum(lengths))
        if label in weights and weights[label].ndim > 1:
            _check_steps(f"sample_weight ({label!r})", weights[label], sum(lengths))
    sizes = microbatch_sizes(size, microbatches)
    _check_fixed_sizes(inputs, size, sizes)
    return Batch(arrays, targets, weights, sizes, lengths)


def _check_fixed_sizes(inputs: Mapping[str, InputSpec | None], size: int, sizes: Sequence[int]) -> None:
    for name, spec in inputs.items():
        wanted = None if spec is None or not spec[1] else spec[1][0]
        if wanted is not None and any(one != wanted for one in sizes):
            parts = "" if len(sizes) == 1 else f", cut into microbatches of {', '.join(map(str, sizes))}"
            raise DataError(
                f"the input {name!r} takes batches of {wanted} samples only (its keras.Input has a batch_size, which a "
                f"layer counts on), received {size}{parts}; give batches of that size, or leave the batch_size out of "
                "the model"
            )


def window_lengths(
    arrays: Mapping[str, np.ndarray[Any, Any]], inputs: Mapping[str, InputSpec | None], windows: int
) -> tuple[int, ...]:
    """Time steps per window of a batch.

    Raises:
        DataError: No input has a time axis, they differ in length, or there are fewer steps than windows.
    """
    steps = {
        name: array.shape[1]
        for name, array in arrays.items()
        if (spec := inputs[name]) is not None and is_over_time((None, *spec[1][1:]))
    }
    if not steps:
        raise DataError(
            f"windows={windows} cuts the time axis, but no input has one: the second axis of an input over time is "
            "free (keras.Input((None, features)))"
        )
    if len(set(steps.values())) != 1:
        raise DataError(f"all inputs over time must have the same number of steps, received {steps}")
    length = next(iter(steps.values()))
    if length < windows:
        raise DataError(f"{length} time step(s) cannot be cut into {windows} windows; ask for at most {length}")
    each, more = divmod(length, windows)
    return tuple(each + (i < more) for i in range(windows))


def _check_steps(what: str, array: np.ndarray[Any, Any], steps: int) -> None:
    if array.ndim < 2 or array.shape[1] != steps:
        raise DataError(
            f"{what} must have one entry per time step, so that it can be cut into windows like x: expected the shape "
            f"(n, {steps}, ...), received {array.shape}"
        )


def refuse_text(x: Any) -> None:
    """Refuse arrays of text among those given to Keras, whose own words would not say what to do.

    Raises:
        DataError: One of the arrays of x is text.
    """
    for array in keras.tree.flatten(x):
        if isinstance(array, str | bytes) or (isinstance(array, np.ndarray) and array.dtype.kind in "SUO"):
            raise DataError(f"x must be arrays of numbers, received text; {TEXT}")


def class_weights(y: Any, class_weight: Mapping[int, float]) -> np.ndarray[Any, Any]:
    """Keras's meaning of `class_weight`: each sample weighs what its class does, 1 where the class is not named.

    Args:
        y: Class numbers (n,) or (n, 1), or one-hot rows (n, classes).
        class_weight: {class: weight}.

    Returns:
        float32 (n,).
    """
    labels = np.asarray(y)
    if labels.ndim > 1:
        labels = np.argmax(labels, axis=-1) if labels.shape[-1] != 1 else labels[..., 0]
    return np.array([class_weight.get(int(label), 1.0) for label in np.round(labels)], dtype=keras.config.floatx())


def sample_or_class_weights(y: Any, sample_weight: Any, class_weight: Mapping[int, float] | None, outputs: int) -> Any:
    """The weights of a batch's samples, given one by one or by their classes; None: neither.

    Raises:
        CompileError: They are given both, or by classes for a model with several outputs.
    """
    if class_weight is None:
        return sample_weight
    if sample_weight is not None or outputs > 1:
        raise CompileError("class_weight is for one output, without sample_weight; give sample_weight alone")
    return class_weights(y, class_weight)


def to_numpy(value: Any, what: str) -> np.ndarray[Any, Any]:
    """An array of numbers.

    Raises:
        DataError: Text, objects, or rows of different lengths.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{what} must be an array of numbers; its rows differ in shape ({error})") from error
    if array.dtype.kind not in "biufc" and array.dtype.name not in _EXTENDED:
        text = f"; {TEXT}" if array.dtype.kind in "SUO" else ""
        raise DataError(f"{what} must be an array of numbers, received dtype {array.dtype}{text}")
    return array


TEXT = (
    "text is turned into numbers where the data come from, with tf.data: "
    "data.map(lambda x, y: (lookup(x), y)), lookup being a StringLookup or TextVectorization layer"
)
_EXTENDED = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def _inputs(x: Any, inputs: Mapping[str, InputSpec | None], names: InputNames) -> dict[str, np.ndarray[Any, Any]]:
    leaves = names.arrays(x)
    arrays = {name: _input(leaf, name, spec) for (name, spec), leaf in zip(inputs.items(), leaves, strict=True)}
    sizes = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"all inputs must have the same number of samples, received {sizes}")
    if not all(sizes.values()):
        raise DataError("x has no samples; a step needs at least one")
    return arrays


def _input(leaf: Any, name: str, spec: InputSpec | None) -> np.ndarray[Any, Any]:
    array = to_numpy(leaf, f"x ({name!r})")
    if array.ndim == 0:
        raise DataError(f"x ({name!r}) must have the samples as its first axis, received a scalar")
    if spec is None:
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array
    dtype, shape = spec
    wanted = shape[1:]
    if not compatible(array.shape[1:], wanted):
        if wanted[-1:] == (1,) and compatible(array.shape[1:], wanted[:-1]):
            array = array[..., None]  # as Keras does, like the opposite
        elif array.shape[-1] == 1 and compatible(array.shape[1:-1], wanted):
            array = array[..., 0]
        else:
            raise DataError(
                f"x ({name!r}) must have the shape {('n', *wanted)} (None is any size), received {array.shape}"
            )
    return array if array.dtype.name == dtype else array.astype(dtype)


def _targets(y: Any, size: int, labels: Sequence[str], judged: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    if y is None:
        raise DataError("y is missing: the loss compares predictions with targets")
    if len(labels) == 1 and isinstance(y, Mapping) and len(y) == 1:
        y = next(iter(y.values()))
    given = by_label(y, labels, judged)
    if given is None:
        raise DataError(_does_not_fit("y", y, labels, judged))
    return {label: _target(given[label], size, "y" if len(labels) == 1 else f"y ({label!r})") for label in judged}


def _weights(weight: Any, size: int, labels: Sequence[str], judged: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    if weight is None:
        return {}
    if not isinstance(weight, list | tuple | Mapping):
        return dict.fromkeys(judged, _weight(weight, size, "sample_weight"))
    if isinstance(weight, Mapping):
        unknown = set(weight) - set(labels)
        given = None if unknown else dict(weight)
    else:
        given = by_label(weight, labels, judged)
        if given is None and len(labels) == 1:
            given = {judged[0]: weight}
    if given is None:
        raise DataError(_does_not_fit("sample_weight", weight, labels, judged))
    some = {label: given[label] for label in judged if given.get(label) is not None}
    return {label: _weight(one, size, f"sample_weight ({label!r})") for label, one in some.items()}


def _does_not_fit(what: str, given: Any, labels: Sequence[str], judged: Sequence[str]) -> str:
    if len(labels) == 1:
        return f"{what} must be one array of targets, received {len(given)}"
    received = f"the keys {sorted(given)}" if isinstance(given, Mapping) else type(given).__name__
    if isinstance(given, list | tuple):
        received = f"{len(given)} entries"
    quoted = ", ".join(map(repr, labels))
    losses = "" if len(judged) == len(labels) else f" ({', '.join(map(repr, judged))} have a loss)"
    return (
        f"the pipeline has {len(labels)} outputs, {quoted}{losses}; {what} must be a list in this "
        f"order or a dict by these names, received {received}"
    )


def _target(y: Any, size: int, what: str) -> np.ndarray[Any, Any]:
    array = to_numpy(y, what)
    if array.ndim == 0 or array.shape[0] != size:
        raise DataError(
            f"{what} must have one target per sample: expected {size}, received "
            f"{array.shape[0] if array.ndim else 'a scalar'}"
        )
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array


def _weight(sample_weight: Any, size: int, what: str) -> np.ndarray[Any, Any]:
    array = to_numpy(sample_weight, what)
    if array.ndim == 0 or array.shape[0] != size:
        raise DataError(
            f"{what} must have one weight per sample: expected {size}, received "
            f"{array.shape[0] if array.ndim else 'a scalar'}"
        )
    return array.astype(keras.config.floatx())
