"""The trial of a model in windows of time: does it compute the same as over the whole length, on random numbers?

    whole      x[:, 0:7] ───────────────► every tensor F
    windows    x[:, 0:3] ─► x[:, 3:5] ─► x[:, 5:7]      with states handed on: W0, W1, W2

    over time (n, time, ...)    W0, W1, W2 behind one another must be F
    else      (n, ...)          W2 alone must be F

Weights, inputs and masks are random for the trial: a weight that begins as zero, or padding that the first batch
does not have, would hide what comes later. Four things must agree:

1. outputs and their masks, in inference
2. gradients of weights and inputs: a state kept in a variable would give the right values and lose them
3. what layers add to the loss themselves
4. in training every layer by itself: what it gives, and the statistics that it keeps

Where outputs differ, the first call in the model's order whose result differs is the one that is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.distance import distance
from pipeline.errors import SplitError
from pipeline.model.call_graph import Call, CallGraph, play
from pipeline.model.in_windows import ALLOWED, LOW_PRECISION, added_losses, called, largest_value, put_back_only, same
from pipeline.model.random_inputs import SIZE, random_input
from stages.grid import is_over_time
from stages.keras_internals import layers_of, own_trainable_variables
from stages.masks import mask_of, with_mask
from stages.put_back import values_put_back
from stages.tape.eagerly import eagerly
from stages.tape.tensors import is_differentiable

Array = np.ndarray[Any, Any]
SAMPLES = 4
_LONG = 24
"""Up to so many steps the trial has as many as the model."""
STEPS = 7
"""Time steps of the trial where the model leaves the length free."""
_MARGIN = 32
"""Where rounding grows: so many times what changing weights by a little changes."""
_LITTLE, _LITTLE_IF_LOW = 1e-6, 2.0**-9
"""So much, as a part of each weight; the second where tensors have less than 24 bits of mantissa."""

WITHOUT_WINDOWS = (
    "leave windows (and keep_state) out, or compute what needs other steps before the data come to the pipeline"
)


def refuse_what_windows_change(graph: CallGraph, windowed: Any, states: int) -> None:
    """Compare a model with itself cut into windows.

    Args:
        graph: The model's calls.
        windowed: A model that takes the graph's inputs, then states; gives all tensors that calls make, in order,
            then states.
        states: How many states.

    Raises:
        SplitError: They differ; names the first layer or operation that does, and says what to do.
    """
    trial = _Trial(graph, windowed, states)
    if not any(is_over_time(symbol.shape) for symbol in trial.entered):
        first = next((c for c in graph.calls if not isinstance(c.operation, keras.layers.RNN)), graph.calls[0])
        raise SplitError(
            f"{called(first)} cannot be run window by window: no input has as many time steps as the recurrent layers "
            f"read, so there is nothing that could be cut into windows; {WITHOUT_WINDOWS}"
        )
    if not trial.possible:
        return
    with trial.random_weights(), eagerly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial.run_whole()
        except Exception:
            return  # random numbers are nothing for this model; the first batch is looked at instead
        trial.run_windows()
        trial.compare()


class _Trial:
    """One run over the whole length and one in windows, with the same numbers."""

    def __init__(self, graph: CallGraph, windowed: Any, states: int) -> None:
        self.graph, self.windowed, self.states = graph, windowed, states
        self.made = [tensor for call in graph.calls for tensor in call.makes]
        self.symbols = dict(zip(self.made, windowed.outputs, strict=False))
        self.entered = windowed.inputs[: len(graph.inputs)]
        self.symbols |= dict(zip(graph.inputs, self.entered, strict=True))
        fixed = {
            graph.symbols[tensor].shape[1]
            for tensor in graph.inputs
            if is_over_time(self.symbols[tensor].shape) and graph.symbols[tensor].shape[1] is not None
        }
        self.steps, self.whole = self._over_all_steps(next(iter(fixed), STEPS))
        batch = next((graph.symbols[t].shape[0] for t in graph.inputs if graph.symbols[t].shape[0]), None)
        self.samples = batch or SAMPLES
        first = self.steps // 2 | 1  # odd, and one step alone: nothing that takes steps in pairs fits by chance
        self.lengths = tuple(n for n in (first, 1, self.steps - first - 1) if n > 0)
        self.ends = np.cumsum(self.lengths)
        self.weights: dict[int, Array] = {}
        self.random = np.random.default_rng(0)
        self.found: dict[int, Any] = {}
        self.cut: dict[int, list[Any]] = {}
        self._begin: list[tuple[Any, Any]] = []
        self._rounding: dict[int, float] | None = None
        self._gradient_rounding = 0.0

    def _over_all_steps(self, steps: int) -> tuple[int, Any]:
        """How many steps to try, and a model of them that gives all tensors: few, if the model takes any number."""
        graph = self.graph
        if steps > _LONG:
            try:
                return STEPS, self._played(graph.calls, graph.inputs, self.made)
            except Exception:  # it wants its own length
                pass
        return steps, play(graph, graph.calls, graph.inputs, self.made, "whole")

    def _played(self, calls: Sequence[Call], inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """Some calls as a model whose inputs have the shapes that they have in windows."""
        symbols = [self.symbols[tensor] for tensor in inputs]
        entered = [keras.Input(batch_shape=tuple(symbol.shape), dtype=symbol.dtype) for symbol in symbols]
        tensors = dict(zip(inputs, entered, strict=True))
        for call in calls:
            tensors |= dict(zip(call.makes, keras.tree.flatten(call.play(tensors)), strict=True))
        return keras.Model(entered, [tensors[tensor] for tensor in outputs])

    @property
    def possible(self) -> bool:
        """Whether there is a time axis of two steps or more, and only numbers."""
        over = [is_over_time(symbol.shape) for symbol in self.entered]
        return any(over) and self.steps > 1 and all(symbol.dtype != "string" for symbol in self.entered)

    def run_whole(self) -> None:
        """Outputs, gradients and own losses over the whole length."""
        self._anew()
        self.given = {tensor: self._drawn(tensor) for tensor in self.graph.inputs}
        self.found, self.gradients, self.losses = self._under_a_tape(lambda tensors: self._whole(tensors))

    def run_windows(self) -> None:
        """The same in windows."""
        self._anew()
        try:
            found = self._under_a_tape(lambda tensors: self._windows(tensors))
        except Exception as error:
            raise SplitError(
                f"{self._first_that_fails()} cannot be run on one window alone: it needs the whole length of the "
                f"sequence; {WITHOUT_WINDOWS}"
            ) from error
        self.joined, self.cut_gradients, self.cut_losses = found

    def compare(self) -> None:
        """Refuse what differs."""
        for tensor in dict.fromkeys(self.graph.outputs):
            over = is_over_time(self.symbols[tensor].shape)
            if not self._agree(tensor) or (over and self.found[tensor].shape[1] != self.steps):
                raise SplitError(self._first_that_differs())
        for call in self.graph.calls:
            if isinstance(call.operation, keras.Layer) and not isinstance(call.operation, keras.layers.RNN):
                self._alone(call)
        allowed = LOW_PRECISION if self._low else ALLOWED
        if distance(self.cut_losses, self.losses) > allowed:
            names = [layer.name for layer in layers_of(self.graph.model) if layer.activity_regularizer is not None]
            raise SplitError(
                "what layers add to the loss themselves (add_loss, activity regularisers"
                + (f": {', '.join(map(repr, names))}" if names else "")
                + f") would be another sum in windows than over the whole length; {WITHOUT_WINDOWS}"
            )
        largest = max(map(largest_value, self.gradients.values()), default=0.0) or 1.0
        for name, gradient in self.gradients.items():
            other = self.cut_gradients[name]
            by = distance(other, gradient, largest)
            if by > allowed and self._roundings() is not None and by > self._gradient_rounding:
                raise SplitError(
                    f"in windows the gradient of {name!r} would be another than over the whole length, though outputs "
                    f"are the same: a layer keeps something in a variable, which no gradient passes; {WITHOUT_WINDOWS}"
                )

    @property
    def _low(self) -> bool:
        """Whether some tensors have less than 24 bits of mantissa, and gradients with them."""
        return any(value.dtype.is_floating and value.dtype.size < 4 for value in self.found.values())

    def _whole(self, tensors: Mapping[int, Any]) -> tuple[dict[int, Any], Any]:
        results = keras.tree.flatten(self.whole([tensors[t] for t in self.graph.inputs], training=False))
        return dict(zip(self.made, results, strict=True)), added_losses(self.whole)

    def _windows(self, tensors: Mapping[int, Any]) -> tuple[dict[int, Any], Any]:
        entered = self.windowed.inputs[len(self.graph.inputs) :]
        states = [tf.zeros((self.samples, *symbol.shape[1:]), symbol.dtype) for symbol in entered]
        self.cut, losses = {tensor: [] for tensor in self.made}, []
        for window in range(len(self.lengths)):
            taken = [self._window(tensor, tensors[tensor], window) for tensor in self.graph.inputs]
            results = keras.tree.flatten(self.windowed([*taken, *states], training=False))
            for tensor, result in zip(self.made, results[: len(self.made)], strict=True):
                self.cut[tensor].append(result)
            states = results[len(self.made) :]
            losses.append(added_losses(self.windowed))
        joined = {tensor: self._join(tensor, parts) for tensor, parts in self.cut.items()}
        return joined, tf.add_n(losses)

    def _under_a_tape(self, run: Any) -> tuple[dict[int, Any], dict[str, Array], Array]:
        sources = {v.path: v.value for layer in layers_of(self.graph.model) for v in own_trainable_variables(layer)}
        for tensor, value in self.given.items():
            if is_differentiable(value.dtype):
                sources[self.graph.tensor_names()[tensor]] = value
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for source in sources.values():
                tape.watch(source)
            results, losses = run(self.given)
            total = tf.zeros(())
            for tensor in dict.fromkeys(self.graph.outputs):
                result = tf.cast(results[tensor], tf.float32)
                if is_differentiable(results[tensor].dtype):
                    drawn = np.random.default_rng(tensor).normal(size=tuple(result.shape))
                    weight = self.weights.setdefault(tensor, drawn.astype("float32"))
                    if weight.shape == drawn.shape:  # else the output itself differs
                        total += tf.reduce_sum(result * weight)
        found = tape.gradient(total, list(sources.values()))
        gradients = {
            name: np.zeros(()) if g is None else np.asarray(tf.cast(tf.convert_to_tensor(g), tf.float64))
            for name, g in zip(sources, found, strict=True)
        }
        return results, gradients, np.asarray(losses)

    def _window(self, tensor: int, value: Any, window: int) -> Any:
        """What a window sees of a tensor over the whole length: its steps, or all of what has no time axis."""
        if not is_over_time(self.symbols[tensor].shape):
            return value
        steps = slice(self.ends[window] - self.lengths[window], self.ends[window])
        mask = mask_of(value)
        return with_mask(value[:, steps], None if mask is None else mask[:, steps])

    def _join(self, tensor: int, parts: Sequence[Any]) -> Any:
        if not is_over_time(self.symbols[tensor].shape) or any(part.shape.rank < 2 for part in parts):
            return parts[-1]
        masks = [mask_of(part) for part in parts]
        whole = tf.concat(parts, 1)
        over = all(mask is not None and mask.shape.rank > 1 for mask in masks)
        return with_mask(whole, tf.concat(masks, 1) if over else masks[-1])

    def _agree(self, tensor: int) -> bool:
        """Whether a tensor is the same, and its mask where it is an output."""
        ours, theirs = self.joined[tensor], self.found[tensor]
        if not same(ours, theirs) and distance(ours, theirs) > self._roundings().get(tensor, 0.0):
            return False
        a, b = mask_of(ours), mask_of(theirs)
        return tensor not in self.graph.outputs or ((a is None) == (b is None) and (a is None or same(a, b)))

    def _first_that_fails(self) -> str:
        values = {**self.given, **self.found}
        for call in self.graph.calls:
            reads = list(dict.fromkeys(call.reads))
            try:
                self._played([call], reads, call.makes)([self._window(tensor, values[tensor], 0) for tensor in reads])
            except Exception:
                return called(call)
        return f"the model {self.graph.model.name!r}"

    def _roundings(self) -> dict[int, float]:
        """How far tensors may be apart, where rounding grows on its way: measured with weights changed by little."""
        if self._rounding is None:
            weights = [v.value for v in self.whole.trainable_variables if v.value.dtype.is_floating]
            with values_put_back(weights) as before:
                for weight, value in before:
                    by = _LITTLE_IF_LOW if self._low else _LITTLE
                    noise = self.random.uniform(1 - by, 1 + by, tuple(value.shape))
                    weight.assign(value * tf.cast(noise, value.dtype))
                self._anew()
                found, gradients, _ = self._under_a_tape(lambda tensors: self._whole(tensors))
            self._rounding = {
                tensor: _MARGIN * distance(found[tensor], value)
                for tensor, value in self.found.items()
                if value.dtype.is_floating
            }
            largest = max(map(largest_value, self.gradients.values()), default=0.0) or 1.0
            changes = [distance(gradients[name], gradient, largest) for name, gradient in self.gradients.items()]
            self._gradient_rounding = _MARGIN * max(changes, default=0.0)
        return self._rounding

    def _first_that_differs(self) -> str:
        for call in self.graph.calls:
            over = [tensor for tensor in call.makes if is_over_time(self.symbols[tensor].shape)]
            other_length = any(self.found[tensor].shape[1] != self.steps for tensor in over)
            if other_length or not all(self._agree(tensor) for tensor in call.makes):
                return f"{called(call)} cannot be run window by window: {self._why(call)}; {WITHOUT_WINDOWS}"
        model = self.graph.model.name
        return f"the model {model!r} gives another mask in windows than over the whole length; {WITHOUT_WINDOWS}"

    def _why(self, call: Call) -> str:
        if isinstance(call.operation, keras.layers.Bidirectional):
            return "it reads the sequence from its end, so no window can begin before the last one is there"
        over = [is_over_time(self.symbols[tensor].shape) for tensor in call.reads]
        if isinstance(call.operation, keras.layers.RNN):
            return (
                "what it reads is no part of the sequence that is cut, so every window would be a sequence of its own"
            )
        makes = [is_over_time(self.symbols[tensor].shape) for tensor in call.makes]
        if any(makes) and not all(over):
            return "it gives time steps from what is known only behind the last window"
        return "it reads several time steps at once, or counts them from the first, and windows would cut between them"

    def _alone(self, call: Call) -> None:
        """One layer in training, on what it reads over the whole length."""
        reads = list(dict.fromkeys(call.reads))
        values = {**self.given, **self.found}
        if not all(tensor in self.graph.inputs or self._agree(tensor) for tensor in (*reads, *call.makes)):
            return  # the time is elsewhere, or in another order, for a while
        alone = self._played([call], reads, call.makes)
        statistics = [v for v in alone.non_trainable_variables if is_differentiable(v.dtype)]

        def run(taken: Sequence[Any]) -> list[Any]:
            return list(keras.tree.flatten(alone(list(taken), training=True)))

        def kept() -> list[Array]:
            return [np.array(tf.cast(variable.value, tf.float64)) for variable in statistics]

        self._anew()
        before = [variable.value.read_value() for variable in alone.variables]

        def put_back() -> None:
            for variable, value in zip(alone.variables, before, strict=True):
                variable.value.assign(value)

        try:
            whole = run([values[tensor] for tensor in reads])
        except Exception:
            return
        after = kept()
        put_back_only(statistics, alone.variables, before)
        if not all(map(same, run([values[tensor] for tensor in reads]), whole)):
            put_back()
            return  # it draws random numbers
        put_back()
        parts = [
            run([self._window(tensor, values[tensor], window) for tensor in reads])
            for window in range(len(self.lengths))
        ]
        statistics_now = kept()
        put_back()
        joined = [
            self._join(tensor, list(some)) for tensor, some in zip(call.makes, zip(*parts, strict=True), strict=True)
        ]
        if not all(map(same, joined, whole)):
            raise SplitError(
                f"{called(call)} computes something else in training when it sees one window at a time: its "
                f"statistics are those of one window. Freeze it (trainable=False), or {WITHOUT_WINDOWS}"
            )
        if any(distance(a, b) > ALLOWED for a, b in zip(statistics_now, after, strict=True)):
            raise SplitError(
                f"{called(call)} keeps statistics, which every window would change, once each. Freeze it "
                f"(trainable=False), or {WITHOUT_WINDOWS}"
            )

    def _anew(self) -> None:
        """What runs change by themselves is as it was before the first."""
        for variable, value in self._begin:
            variable.value.assign(value)

    @contextmanager
    def random_weights(self) -> Iterator[None]:
        """Random values for all that is or could be trained; afterwards all variables are as they were."""
        variables = {id(v): v for model in (self.whole, self.windowed) for v in model.variables}
        trained = {id(v) for layer in layers_of(self.graph.model) for v in own_trainable_variables(layer)}
        with values_put_back(variables.values()) as before:
            for variable, value in before:
                if id(variable) in trained and value.dtype.is_floating:
                    scale = 0.4 / np.sqrt(value.shape[0] if value.shape.rank > 1 else 1.0)
                    noise = self.random.normal(scale=scale, size=tuple(value.shape))
                    variable.value.assign(value + tf.cast(noise, value.dtype))
            for layer in layers_of(self.graph.model):
                if isinstance(layer, keras.layers.RNN) and layer.stateful:
                    for state in keras.tree.flatten(layer.states):
                        state.assign(keras.ops.zeros_like(state))
            kept = [v for model in (self.whole, self.windowed) for v in model.non_trainable_variables]
            self._begin = [(variable, variable.value.read_value()) for variable in kept]
            yield

    def _drawn(self, tensor: int) -> Any:
        """Random numbers for an input, padded where something masks."""
        over = is_over_time(self.symbols[tensor].shape)
        symbol = self.graph.symbols[tensor]
        shape = [SIZE if size is None else size for size in symbol.shape]
        shape[0] = self.samples
        if over:
            shape[1] = self.steps
        readers = [call.operation for call in self.graph.calls if tensor in call.reads]
        return random_input(self.random, symbol.dtype, shape, readers, list(self.ends) if over else None)
