"""A layer that runs an inner cell a different number of times on every element of a series (ragged inner steps).

    elements  x[0]            x[1]                  x[2]
               │               │                     │
    states  s ─►[B]─[B]─[B]──►[B]─[B]─[B]─[B]──────►[B]─[B]          steps 3, 4, 2; or s again at every element
                 │   │   │     │   │   │   │         │   │
    output     (batch, elements, longest, units), zero where an element had fewer steps, with a mask that says so

How many steps is known beforehand (a list), comes with the batch (a tensor), or is found out while running (a stop
rule). The batch stands first, so that microbatches can be cut; `stages.layers.ragged.layout` gives other layouts.

Rules:

1. Padding is made of zeros that no variable and no input touches: what is done with it reaches no gradient.
2. The output carries the Keras mask (batch, elements, longest), which Keras's losses and metrics leave out.
3. A sample whose steps are used up keeps its state as it is while others of the batch go on.
4. Eager, every step is an operation of its own: the gradients are those of a loop in Python, bit for bit. A compiled
   function has one loop of TensorFlow's (`stages.layers.ragged.loop`). Both end an element when its last sample has
   ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.keras_internals import set_mask
from stages.layers.ragged.cells import (
    cell_takes_training,
    draw_dropout,
    output_units,
    reset_dropout,
    state_units,
    watched_state,
)
from stages.layers.ragged.checks import check_cell, check_layers, check_series, check_step_shape, longest, whole_numbers
from stages.layers.ragged.loop import choose, run_loop

_PACKAGE = "tapeline"


@keras.saving.register_keras_serializable(_PACKAGE)
class NormAbove(keras.layers.Layer):  # type: ignore[misc]
    """Stop rule: the L2 norm of what is watched has passed a threshold.

    Args:
        threshold: A step whose norm is greater is the sample's last.
    """

    def __init__(self, threshold: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = float(threshold)

    def call(self, watched: Any) -> Any:
        """(batch, n) floats → (batch,) bool."""
        return tf.norm(watched, axis=-1) > tf.cast(self.threshold, watched.dtype)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "threshold": self.threshold}


@keras.saving.register_keras_serializable(_PACKAGE)
class RaggedSteps(keras.layers.Layer):  # type: ignore[misc]
    """Run `cell` ``steps[i]`` times on element i of a series.

    Called with the series (batch, elements, features), or with ``[series, steps]`` where `steps` is an integer tensor
    (elements,) for all samples or (batch, elements) for each. What a pipeline cuts into microbatches must have the
    batch in front: see `stages.layers.ragged.layout.steps_per_sample`. A mask (batch, elements) on the
    series gives the elements that are masked out no steps.

    Args:
        cell: A Keras RNN cell, or any layer with ``call(inputs, states)`` and `state_size`.
        steps: Steps of every element, whole numbers of at least 0 (an element without steps leaves an empty row and
            the state alone), not all 0. None: they are given as a tensor, or decided by `stop`.
        max_steps: The padded length. Default with `steps`: the longest; needed otherwise.
        stop: A Keras layer from what is watched (batch, n) to (batch,) bool, asked after every step: True makes it the
            sample's last. Every element gets at least one step and at most `max_steps`. `NormAbove` is one.
        read_out: A Keras layer applied to the state of every step (the first tensor of it; of stacked cells the last
            one's). It is what `stop` watches, in place of the state itself. A decision has no gradient: alone it does
            not train the read-out, ``emit="read_out"`` does.
        carry_state: Whether the state runs on from one element to the next, or begins anew at every element.
        emit: What a step's output is: the cell's ``"output"`` or the ``"read_out"``.
        return_lengths: Whether the row lengths, (batch, elements) int32, are a second output.

    Returns:
        (batch, elements, longest, units), zero where there was no step, with a Keras mask (batch, elements, longest).

    Raises:
        SegmentError: What was given does not fit together.
        HandoffError: A series or steps of a wrong shape or dtype, steps below 0 or above `max_steps`. In a compiled
            function, where the values of steps are not known beforehand, these are TensorFlow's InvalidArgumentError.

    Example:
        >>> upper = RaggedSteps(keras.layers.SimpleRNNCell(4), [3, 4, 2])
        >>> upper(tf.zeros((2, 3, 4))).shape
        TensorShape([2, 3, 4, 4])
    """

    mask_zero = True
    """Keras's word for a layer that begins a mask; what a microbatch weighs in a mean depends on the masks of all."""

    def __init__(
        self,
        cell: Any,
        steps: Sequence[int] | None = None,
        *,
        max_steps: int | None = None,
        stop: Any = None,
        read_out: Any = None,
        carry_state: bool = True,
        emit: str = "output",
        return_lengths: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_cell(cell)
        check_layers(stop, read_out, emit)
        self.steps = None if steps is None else whole_numbers(steps)
        self.max_steps = longest(self.steps, max_steps, stop)
        self.cell, self.stop, self.read_out = cell, stop, read_out
        self.carry_state, self.emit, self.return_lengths = bool(carry_state), emit, bool(return_lengths)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Build the inner layers.

        Args:
            input_shape: (batch, elements, features), or a list of it and the shape of the steps.

        Raises:
            SegmentError: The series has another rank or number of elements than the steps.
        """
        series, *rest = input_shape if _is_several(input_shape) else [input_shape]
        series = tuple(series)
        check_series(series, self.steps, self.name)
        self._check_inputs(len(rest))
        if rest:
            check_step_shape(tuple(rest[0]), series, self.name)
        if not self.cell.built:
            self.cell.build((series[0], series[2]))
            self.cell.built = True
        if self.read_out is not None and not self.read_out.built:
            self.read_out.build((series[0], state_units(self.cell)))
            self.read_out.built = True

    def call(self, inputs: Any, mask: Any = None, training: bool = False) -> Any:
        """Run the cell; see the class."""
        series, lengths, alive = self._given(inputs, mask)
        reset_dropout(self.cell)  # a call that failed may have left masks
        try:
            run = self._written_out if tf.executing_eagerly() else self._looped
            steps, made = run(series, lengths, alive, training)
        finally:
            reset_dropout(self.cell)
        padded = tf.reshape(steps, (tf.shape(series)[0], series.shape[1], self.max_steps, self._units()))
        set_mask(padded, tf.sequence_mask(made, self.max_steps))
        return [padded, made] if self.return_lengths else padded

    def rows(self, inputs: Any, mask: Any = None, training: bool = False) -> list[list[Any]]:
        """The steps as they are on an eager tape, so that one can be differentiated with respect to another.

        Args:
            inputs: As for a call of the layer, which must be built.
            mask: (batch, elements), or None.
            training: Keras's flag.

        Returns:
            Out[i][j], (batch, units): as many steps as the sample with the most made. A sample that made fewer has
            values there that count for nothing.
        """
        series, lengths, alive = self._given(tf.nest.map_structure(tf.convert_to_tensor, inputs), mask)
        reset_dropout(self.cell)
        try:
            return self._rows(series, lengths, alive, training)[0]
        finally:
            reset_dropout(self.cell)

    def _given(self, inputs: Any, mask: Any) -> tuple[Any, Any | None, Any | None]:
        """The series, the steps (batch, elements) unless a rule decides, and which elements are not masked out."""
        series, given = inputs if isinstance(inputs, list | tuple) else (inputs, None)
        self._check_inputs(given is not None)
        check_series(series.shape, self.steps, self.name)
        lengths = None if given is None else self._lengths(given, series)
        if self.steps is not None:
            lengths = tf.broadcast_to(tf.constant(self.steps), tf.shape(series)[:2])
        return series, lengths, mask[0] if isinstance(mask, list | tuple) else mask

    def _written_out(self, series: Any, lengths: Any | None, alive: Any | None, training: bool) -> tuple[Any, Any]:
        """The steps one by one: (batch, elements * longest, units), and their number (batch, elements) int32."""
        rows, counts = self._rows(series, lengths, alive, training)
        zero = tf.zeros((tf.shape(series)[0], self._units()), self.compute_dtype)
        steps: list[Any] = []
        for row, count in zip(rows, counts, strict=True):
            if self.steps is None or alive is not None:
                row = [choose(count > j, output, zero) for j, output in enumerate(row)]
            steps += row + [zero] * (self.max_steps - len(row))
        return tf.stack(steps, axis=1), tf.stack(counts, axis=1)

    def _rows(
        self, series: Any, lengths: Any | None, alive: Any | None, training: bool
    ) -> tuple[list[list[Any]], list[Any]]:
        """For every element its outputs (batch, units), and how many of them each sample made, (batch,) int32."""
        initial = self._initial_state(tf.shape(series)[0])
        state, rows, counts = initial, [], []
        for i in range(series.shape[1]):
            element = series[:, i]
            state = state if self.carry_state else initial
            if self.steps is not None and alive is None:
                row, state = self._same_steps(element, state, self.steps[i], training)
                count = lengths[:, i]  # type: ignore[index]
            else:
                starts = self._starts(series, lengths, alive)[:, i]
                row, state, count = self._own_steps(i, element, state, starts, lengths, training)
            rows.append(row)
            counts.append(count)
        return rows, counts

    def _same_steps(self, element: Any, state: Any, steps: int, training: bool) -> tuple[list[Any], Any]:
        """All samples make the same number of steps."""
        row = []
        for _ in range(steps):
            output, state, _ = self._step(element, state, training)
            row.append(output)
        return row, state

    def _own_steps(
        self, i: int, element: Any, state: Any, active: Any, lengths: Any | None, training: bool
    ) -> tuple[list[Any], Any, Any]:
        """Every sample makes steps until its own number, or the stop rule, is reached (rule 3)."""
        row: list[Any] = []
        count = tf.zeros_like(active, tf.int32)
        while len(row) < self.max_steps and bool(tf.reduce_any(active)):
            output, after, watched = self._step(element, state, training)
            row.append(output)
            state = keras.tree.map_structure(lambda new, old, now=active: choose(now, new, old), after, state)
            count += tf.cast(active, tf.int32)
            active = active & self._goes_on(lengths, i, len(row), watched)
        return row, state, count

    def _looped(self, series: Any, lengths: Any | None, alive: Any | None, training: bool) -> tuple[Any, Any]:
        """As `_written_out`, by a loop of TensorFlow's."""
        initial = self._initial_state(tf.shape(series)[0])
        draw_dropout(self.cell, series[:, 0], initial)
        steps, made = run_loop(
            lambda element, state: self._step(element, state, training),
            lambda i, made, watched: self._goes_on(lengths, i, made, watched),
            series,
            initial,
            self._starts(series, lengths, alive),
            self.max_steps,
            self.carry_state,
            self.compute_dtype,
        )
        return tf.transpose(steps, [1, 0, 2]), made

    def _starts(self, series: Any, lengths: Any | None, alive: Any | None) -> Any:
        """Who makes a first step of which element, (batch, elements) bool."""
        starts = tf.fill(tf.shape(series)[:2], True) if alive is None else tf.cast(alive, tf.bool)
        return starts if lengths is None else starts & (lengths > 0)

    def _goes_on(self, lengths: Any | None, i: Any, made: Any, watched: Any) -> Any:
        """Who makes another step after `made` ones of element i, (batch,) bool."""
        return ~self._stops(watched) if lengths is None else lengths[:, i] > made

    def _step(self, element: Any, state: Any, training: bool) -> tuple[Any, Any, Any]:
        """One step of the cell: the output, the state after it, and what a stop rule watches."""
        keywords = {"training": training} if cell_takes_training(self.cell) else {}
        output, after = self.cell(element, state, **keywords)
        after = keras.tree.pack_sequence_as(state, keras.tree.flatten(after))  # some cells leave out a list
        watched = watched_state(self.cell, after)
        if self.read_out is not None:
            watched = self.read_out(watched)
        emitted = output if self.emit == "output" else watched
        return tf.cast(emitted, self.compute_dtype), after, watched

    def _stops(self, watched: Any) -> Any:
        stops = self.stop(watched)
        if stops.shape.rank != 1 or stops.dtype != tf.bool:
            raise HandoffError(
                f"layer {self.name!r}: the stop rule {self.stop.name!r} must give one bool per sample, shape (batch,), "
                f"received {stops.dtype.name} {tuple(stops.shape)}; reduce it over the features"
            )
        return stops

    def _initial_state(self, batch: Any) -> list[Any]:
        """Zeros, or what the cell says."""
        make = getattr(self.cell, "get_initial_state", None)
        dtype = self.cell.compute_dtype
        if make is not None:
            state = make(batch_size=batch)
        else:
            sizes = self.cell.state_size
            sizes = list(sizes) if isinstance(sizes, list | tuple) else [sizes]
            state = keras.tree.map_structure(lambda size: tf.zeros((batch, size), dtype), sizes)
        state = list(state) if isinstance(state, list | tuple) else [state]
        return keras.tree.map_structure(lambda tensor: tf.cast(tensor, dtype), state)  # type: ignore[no-any-return]

    def _lengths(self, given: Any, series: Any) -> Any:
        """The steps (batch, elements) int32 of a steps tensor, checked."""
        check_step_shape(given.shape, series.shape, self.name)
        if not given.dtype.is_integer:
            raise HandoffError(
                f"layer {self.name!r}: steps must be whole numbers, received {given.dtype.name} {tuple(given.shape)}; "
                "give an integer array, for example steps.astype('int32')"
            )
        lengths = tf.cast(given, tf.int32)
        wrong = tf.reduce_any((lengths < 0) | (lengths > self.max_steps))
        expected = f"layer {self.name!r}: steps must lie between 0 and max_steps={self.max_steps}"
        advice = "raise max_steps, or cut the steps"
        if not tf.executing_eagerly():
            low, high = tf.reduce_min(lengths), tf.reduce_max(lengths)
            tf.debugging.Assert(~wrong, [f"{expected}; received from, to:", low, high, advice])
        elif bool(wrong):
            low, high = int(tf.reduce_min(lengths)), int(tf.reduce_max(lengths))
            raise HandoffError(f"{expected}, received values from {low} to {high}; {advice}")
        if given.shape.rank == 1:
            lengths = tf.broadcast_to(lengths, tf.shape(series)[:2])
        return lengths

    def _check_inputs(self, extra: int) -> None:
        """Whether a steps tensor is expected and there."""
        expected = self.steps is None and self.stop is None
        if expected and not extra:
            raise HandoffError(
                f"layer {self.name!r}: has neither steps=[...] nor a stop rule, so it expects [series, steps], "
                "received the series alone; call it with a list of two tensors"
            )
        if extra and not expected:
            source = "steps=[...]" if self.steps is not None else "a stop rule"
            raise HandoffError(
                f"layer {self.name!r}: received [series, steps], but it was made with {source}; call it with the "
                "series alone, or make it without"
            )

    def _units(self) -> int:
        """The size of a step's output."""
        if self.emit == "output":
            return output_units(self.cell)
        shape = self.read_out.compute_output_shape((None, state_units(self.cell)))
        return int(shape[-1])

    def compute_output_spec(self, inputs: Any, mask: Any = None, training: bool = False) -> Any:
        """The symbolic output."""
        series = inputs[0] if isinstance(inputs, list | tuple) else inputs
        batch, elements = series.shape[:2]
        padded = keras.KerasTensor((batch, elements, self.max_steps, self._units()), dtype=self.compute_dtype)
        return [padded, keras.KerasTensor((batch, elements), dtype="int32")] if self.return_lengths else padded

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: `call` knows the lengths and sets the mask; that of the series must not be handed on."""
        return

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        inner = {name: getattr(self, name) for name in ("cell", "stop", "read_out")}
        config = {
            name: None if layer is None else keras.saving.serialize_keras_object(layer) for name, layer in inner.items()
        }
        names = ("max_steps", "carry_state", "emit", "return_lengths")
        steps = None if self.steps is None else list(self.steps)
        return {**super().get_config(), **config, "steps": steps, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> RaggedSteps:
        """The layer that a configuration describes."""
        config = dict(config)
        for name in ("cell", "stop", "read_out"):
            if config[name] is not None:
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)


def _is_several(shape: Any) -> bool:
    """Whether a shape is a list of shapes."""
    return bool(shape) and isinstance(shape[0], list | tuple)
