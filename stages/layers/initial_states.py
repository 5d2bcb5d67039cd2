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

    Called with [carried (n, units), begun (n, 1), initial (n, units)]; gives (n, units).
    """

    def call(self, inputs: Sequence[Any]) -> Any:
        """The sum of the carried state, which is zeros in window 0, and the initial one there."""
        carried, begun, initial = inputs
        first = 1 - keras.ops.cast(keras.ops.stop_gradient(begun), initial.dtype)
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
