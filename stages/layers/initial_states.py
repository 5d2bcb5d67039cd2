"""Initial states of recurrent layers that are not zeros: given by a tensor, or learned.

A stage runs the same model in every window, so a given initial state arrives in each of them; a state that is 0 in
front of window 0 and 1 behind it says which window begins the sequence.

    h = carried + (1 - begun) * initial          begun: 0, 1, 1, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


@keras.saving.register_keras_serializable("tapeline")
class BeginWith(keras.layers.Layer):  # type: ignore[misc]
    """The state in front of a window: the initial one in the first window, the carried one afterwards.

    Called with [carried (n, ...), begun (n, 1), initial (n, ...)]; gives (n, ...).
    """

    def call(self, inputs: Sequence[Any]) -> Any:
        """The sum of the carried state, which is zeros in window 0, and the initial one there."""
        carried, begun, initial = inputs
        first = 1 - keras.ops.cast(keras.ops.stop_gradient(begun), initial.dtype)
        for _ in range(len(initial.shape) - 2):  # a convolutional state
            first = keras.ops.expand_dims(first, -1)
        return carried + first * initial

    def compute_output_shape(self, input_shape: Sequence[Any]) -> Any:
        """That of the carried state."""
        return tuple(input_shape[0])


@keras.saving.register_keras_serializable("tapeline")
class Begun(keras.layers.Layer):  # type: ignore[misc]
    """Ones like its input (n, 1): the sequence has begun."""

    def call(self, begun: Any) -> Any:
        """Ones, without a gradient."""
        return keras.ops.ones_like(begun)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the input."""
        return tuple(input_shape)


@keras.saving.register_keras_serializable("tapeline")
class Repeated(keras.layers.Layer):  # type: ignore[misc]
    """The outputs of a window whose first steps are masked: there a recurrent layer repeats the output before them.

    Called with [outputs (n, time, ...), mask (n, time), the last output of the window before (n, ...)]; gives outputs
    like the first. Called with outputs (n, ...), it repeats where all of the window is masked.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Sequence[Any]) -> Any:
        """The outputs, or the one before them where no step was seen yet."""
        outputs, mask, before = inputs
        seen = keras.ops.cumsum(keras.ops.cast(mask, "int32"), axis=1) > 0
        if len(outputs.shape) == len(before.shape):
            seen = seen[:, -1]
        else:
            before = keras.ops.expand_dims(before, 1)
        for _ in range(len(outputs.shape) - len(seen.shape)):
            seen = keras.ops.expand_dims(seen, -1)
        return keras.ops.where(seen, outputs, before)

    def compute_mask(self, inputs: Sequence[Any], previous_mask: Any) -> Any:
        """The mask, if there is a time axis left."""
        outputs, mask, before = inputs
        return None if len(outputs.shape) == len(before.shape) else mask

    def compute_output_shape(self, input_shape: Sequence[Any]) -> Any:
        """That of the outputs."""
        return tuple(input_shape[0])


@keras.saving.register_keras_serializable("tapeline")
class LastStep(keras.layers.Layer):  # type: ignore[misc]
    """(n, time, ...) to (n, ...), the last time step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, outputs: Any, previous_mask: Any) -> None:
        """None: there is no time axis left."""

    def call(self, outputs: Any) -> Any:
        """The last step."""
        return outputs[:, -1]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Without the time axis."""
        return (input_shape[0], *input_shape[2:])


@keras.saving.register_keras_serializable("tapeline")
class LearnedState(keras.layers.Layer):  # type: ignore[misc]
    """A trainable initial state, the same for every sample.

    Args:
        units: Its size.
        initializer: Where it begins; default zeros.

    Called with anything whose first axis is the batch, for example the layer's own input; gives (n, units).

    Example:
        >>> x = keras.Input((None, 3))
        >>> y = keras.layers.GRU(4, return_sequences=True)(x, initial_state=LearnedState(4)(x))
    """

    def __init__(self, units: int, initializer: Any = "zeros", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.initializer = units, keras.initializers.get(initializer)

    def build(self, input_shape: Any) -> None:
        """Make the variable."""
        self.state = self.add_weight(shape=(self.units,), initializer=self.initializer, name="state")

    def call(self, x: Any) -> Any:
        """The state, once a sample."""
        samples = keras.ops.shape(x)[0]
        return keras.ops.broadcast_to(keras.ops.convert_to_tensor(self.state), (samples, self.units))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """(n, units)."""
        return (input_shape[0], self.units)

    def get_config(self) -> dict[str, Any]:
        """What it is made from."""
        return {
            **super().get_config(),
            "units": self.units,
            "initializer": keras.initializers.serialize(self.initializer),
        }
