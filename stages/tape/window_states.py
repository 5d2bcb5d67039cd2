"""States that a stage hands to its own next window, and their gradients on the way back.

    window   0             1             2
    states   s0 ─► [ f ] ─► s1 ─► [ f ] ─► s2 ─► [ f ] ─► s3        forward, windows ascending
             ◄─ dL/ds1 ─────◄─ dL/ds2 ─────◄─ (dL/ds3)              backward, windows descending

A variable cannot carry a state through time: assigning to it blocks the gradient. Here a state is an input and an
output of the model, like an activation, and its gradient is handed back like an output gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import tensorflow as tf

from stages.errors import HandoffError
from stages.tape.contract import Opened, PassKey
from stages.tape.tensors import describe_tensor, is_differentiable

StateTensors = tuple[Any, ...]


@dataclass
class _Way:
    """What one microbatch has on its way through the windows.

    Attributes:
        window: The last window that went forward.
        states: The states behind it.
        gradients: {window: dL/d(states behind it)}, handed back by the window after it.
    """

    window: int = -1
    states: StateTensors = ()
    gradients: dict[int, Sequence[Any | None]] = field(default_factory=dict)


class Carried:
    """The states of one stage.

    Args:
        stage: The stage's name, for messages.
        names: The states' names.
        inputs: The symbolic inputs of the model that take them, in the same order.
    """

    def __init__(self, stage: str, names: Sequence[str], inputs: Sequence[Any]) -> None:
        self.stage, self.names, self._inputs = stage, tuple(names), tuple(inputs)
        self._ways: dict[tuple[int, bool], _Way] = {}
        self._kept: dict[int, StateTensors] = {}
        self.persists = False
        self.block: int | None = None
        """How many windows a gradient goes back through; None: all."""

    @classmethod
    def of(cls, stage: str, names: Sequence[str], model: Any) -> Self:
        """The states of a stage whose model takes them behind its inputs and gives them behind its outputs.

        Raises:
            HandoffError: The model has no such inputs and outputs.
        """
        inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
        extra = len(names)
        if inputs is None or outputs is None or len(inputs) <= extra or len(outputs) < extra:
            raise HandoffError(
                f"stage {stage!r} with the states {', '.join(names)} needs a Functional model that takes them "
                "behind its inputs and gives them behind its outputs"
            )
        return cls(stage, names, inputs[len(inputs) - extra :])

    def __len__(self) -> int:
        return len(self.names)

    def enter(
        self, microbatch: int, window: int, samples: int, training: bool, given: Sequence[Any] | None = None
    ) -> StateTensors:
        """The states in front of a window.

        Args:
            microbatch: Which.
            window: Which, from 0.
            samples: How many samples the microbatch has.
            training: Whether gradients will come back; evaluation has a way of its own.
            given: In window 0: the initial states; None: zeros, or what the batch before left (`persists`).

        Raises:
            HandoffError: A window out of order, or states that do not fit.
        """
        if window == 0:
            states = self._initial(microbatch, samples, given)
            self._ways[microbatch, training] = _Way()
        else:
            way = self._ways.get((microbatch, training), _Way())
            if given is not None:
                raise HandoffError(f"{self._at(microbatch, window)}: initial states are given to window 0 only")
            if way.window != window - 1:
                last = way.window if way.window >= 0 else "none"
                raise HandoffError(
                    f"{self._at(microbatch, window)}: its state is handed over by window {window - 1}, the last window "
                    f"that went forward is {last}; forward windows in ascending order"
                )
            states = way.states
        return states

    def _initial(self, microbatch: int, samples: int, given: Sequence[Any] | None) -> StateTensors:
        if given is None and self.persists and microbatch in self._kept:
            given = self._kept[microbatch]
            if given[0].shape[0] != samples:
                raise HandoffError(
                    f"stage {self.stage!r}: the states of microbatch {microbatch} are kept from a batch with "
                    f"{given[0].shape[0]} sample(s), this one has {samples}; give batches of one size, or reset_state()"
                )
        if given is None:
            return tuple(tf.zeros((samples, *self._sizes(i)), self._inputs[i].dtype) for i in range(len(self)))
        if len(given) != len(self):
            raise HandoffError(
                f"stage {self.stage!r} carries {len(self)} state(s) ({', '.join(self.names)}), received {len(given)}"
            )
        states = tuple(tf.cast(tf.convert_to_tensor(s), i.dtype) for s, i in zip(given, self._inputs, strict=True))
        for i, state in enumerate(states):
            if tuple(state.shape) != (samples, *self._sizes(i)):
                raise HandoffError(
                    f"stage {self.stage!r}: the initial state {self.names[i]!r} must have the shape "
                    f"{(samples, *self._sizes(i))}, received {describe_tensor(state)}"
                )
        return states

    def _sizes(self, i: int) -> tuple[int, ...]:
        sizes = tuple(self._inputs[i].shape[1:])
        if None in sizes:
            raise HandoffError(
                f"stage {self.stage!r}: the state {self.names[i]!r} has a free size, {(None, *sizes)}, so zeros cannot "
                "be made for it; give the initial state"
            )
        return sizes

    def taken_from(self, opened: Opened, key: PassKey, entered: StateTensors, training: bool) -> Opened:
        """Keep the states that a window gives for the next one; what it gives to others.

        Args:
            opened: What the window gives: outputs, and the states behind them.
            key: The microbatch and window.
            entered: The states in front of it.
            training: Whether gradients will come back.
        """
        values = opened.values
        count = len(values) - len(self)
        self.leave(key.microbatch, key.window, entered, values[count:], training)
        masks = {place: mask for place, mask in opened.masks.items() if place < count}
        return opened._replace(structure=None, outputs=(*values[:count], *masks.values()), masked=tuple(masks))

    def leave(self, microbatch: int, window: int, before: StateTensors, states: StateTensors, training: bool) -> None:
        """Keep the states behind a window for the next one.

        Raises:
            HandoffError: A state has another shape or dtype than before the window.
        """
        for name, old, new in zip(self.names, before, states, strict=True):
            if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
                raise HandoffError(
                    f"{self._at(microbatch, window)}: the state {name!r} came in as {describe_tensor(old)} and went "
                    f"out as {describe_tensor(new)}; a state keeps its shape"
                )
        way = self._ways[microbatch, training]
        way.window, way.states = window, states
        if self.persists:
            self._kept[microbatch] = states

    def state(self, microbatch: int, training: bool = True) -> StateTensors:
        """The states behind the last window that went forward.

        Raises:
            HandoffError: None did.
        """
        way = self._ways.get((microbatch, training))
        if way is None or way.window < 0:
            raise HandoffError(f"stage {self.stage!r}: no window of microbatch {microbatch} went forward yet")
        return way.states

    def gradients(
        self, microbatch: int, window: int, waiting: bool, given: Sequence[Any] | None = None
    ) -> Sequence[Any | None]:
        """dL/d(states behind a window) for its backward.

        Args:
            microbatch: Which.
            window: Which.
            waiting: Whether the next window is still to go backward.
            given: In the last window: what a loss on the final states sends back.

        Raises:
            HandoffError: The next window has not gone backward yet, or the gradients do not fit.
        """
        way = self._ways[microbatch, True]
        cut = self.block is not None and (window + 1) % self.block == 0
        if waiting and not cut:
            raise HandoffError(
                f"{self._at(microbatch, window, 'backward')}: window {window + 1} has not gone backward yet, and hands "
                "the state's gradient over; go backward through windows in descending order"
            )
        found = way.gradients.pop(window, None)
        if given is None:
            return (None,) * len(self) if found is None or cut else found
        if window != way.window:
            raise HandoffError(
                f"{self._at(microbatch, window, 'backward')}: a gradient of the final state belongs to the last "
                f"window, {way.window}"
            )
        if len(given) != len(self):
            raise HandoffError(
                f"{self._at(microbatch, window, 'backward')}: expected {len(self)} state gradient(s) "
                f"({', '.join(self.names)}), received {len(given)}"
            )
        return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in given]

    def hand_back(self, microbatch: int, window: int, found: Sequence[Any | None]) -> None:
        """Keep dL/d(states in front of a window) for the window before it; in front of window 0 stays readable."""
        if window and self.block is not None and window % self.block == 0:
            return  # truncated here: nobody takes it
        self._ways[microbatch, True].gradients[window - 1] = list(found)

    def initial_gradients(self, microbatch: int) -> Sequence[Any | None]:
        """dL/d(initial states).

        Raises:
            HandoffError: Window 0 has not gone backward yet.
        """
        way = self._ways.get((microbatch, True))
        if way is None or -1 not in way.gradients:
            raise HandoffError(f"stage {self.stage!r}: window 0 of microbatch {microbatch} has not gone backward yet")
        return way.gradients[-1]

    def differentiable(self) -> tuple[bool, ...]:
        """Which states can carry a gradient."""
        return tuple(is_differentiable(i.dtype) for i in self._inputs)

    def forget(self) -> None:
        """Drop what is on its way; kept states stay."""
        self._ways.clear()

    def reset(self) -> None:
        """Let the next batch begin anew."""
        self._kept.clear()

    @property
    def kept(self) -> dict[int, StateTensors]:
        """{microbatch: the states that its next batch begins with}."""
        return dict(self._kept)

    @kept.setter
    def kept(self, value: Mapping[int, StateTensors]) -> None:
        self._kept = dict(value)

    def _at(self, microbatch: int, window: int, way: str = "forward") -> str:
        return f"stage {self.stage!r}, {way} of microbatch {microbatch}, window {window}"
