"""A Keras model seen as a function of flat tensors that also gives its masks and its own losses.

*Own losses* are what the part itself adds to the objective: weight and activity regularisers, `add_loss`. Keras keeps
them on the model, so they are read right after the call, under the same tape.

*Masks* ride on tensors as a hidden attribute, which a cut would lose. So they are made visible: flat tensors are the
values followed by the masks of those values that have one, and `masked` says which these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.keras_internals import input_structure, layers_of, let_inner_layers_mask
from stages.masks import mask_of, with_mask
from stages.put_back import values_put_back
from stages.tape.tensors import compatible, describe_tensor, flatten, is_differentiable
from stages.tensorflow_internals import sizes_of

_KNOWN_SIZES = 256
"""So many shapes of inputs that fit are remembered."""


class Called(NamedTuple):
    """The results of a call of a part.

    Attributes:
        structure: The outputs in the model's nesting.
        outputs: The outputs, flat, followed by the masks of those that have one.
        masked: Which outputs these masks belong to.
        own: The part's own losses, float scalars.
    """

    structure: Any
    outputs: tuple[Any, ...]
    masked: tuple[int, ...]
    own: tuple[Any, ...]


class Part:
    """A model with its variables, called with flat tensors.

    Args:
        model: A Keras model, or a built layer, with any nesting of inputs and outputs.
        name: The stage's name, for messages.
        input_gradients: Which inputs (in flat order) to differentiate; None: all that can be. Integers and booleans
            never are.
    """

    def __init__(self, model: Any, name: str, input_gradients: Sequence[bool] | None = None) -> None:
        self.model = model
        self.name = name
        self._input_gradients = input_gradients
        self._pack = packer(model)
        _let_inner_layers_mask(model)
        self._settled: tuple[list[Any], tuple[bool, ...]] | None = None
        self._fitting: set[tuple[tuple[int, ...], ...]] = set()
        self._normalising = [x for x in layers_of(model) if isinstance(x, keras.layers.BatchNormalization)]

    @property
    def trainable_variables(self) -> list[Any]:
        """The Keras variables that gradients are taken for, in the model's order."""
        return list(self.model.trainable_variables if self._settled is None else self._settled[0])

    def settle(self) -> None:
        """Look up for the last time what is trained, and how: nobody changes `trainable` from now on.

        Keras walks through all layers to tell, which every microbatch of a small model would notice.
        """
        self._settled = None
        self._settled = self.trainable_variables, self.modes()

    @property
    def settled(self) -> bool:
        """Whether `settle` was called."""
        return self._settled is not None

    def modes(self) -> tuple[bool, ...]:
        """What decides how some layers run besides `training`: a frozen BatchNormalization is one that infers."""
        return tuple(layer.trainable for layer in self._normalising) if self._settled is None else self._settled[1]

    @property
    def regularised(self) -> int:
        """How many of the model's own losses are regularisers of weights; Keras lists them last."""
        return sum(v.regularizer is not None for v in self.model.trainable_weights)

    def call(self, inputs: Sequence[Any], training: bool, masked: Sequence[int] = (), window: int = 0) -> Called:
        """Run the model.

        Args:
            inputs: Flat tensors in the model's input order, then masks.
            training: Keras's flag.
            masked: Which inputs the masks belong to.
            window: Regularisers of weights are among the own losses of window 0 only: they count once a batch.
        """
        values = list(inputs[: len(inputs) - len(masked)])
        for place, mask in zip(masked, inputs[len(values) :], strict=True):
            values[place] = with_mask(values[place], mask)
        structure = self.model(self._pack(values), training=training)
        losses = list(self.model.losses)
        losses = losses[: len(losses) - self.regularised] if window else losses
        own = tuple(tf.reduce_sum(tf.cast(loss, keras.config.floatx())) for loss in losses)
        outputs = flatten(structure)
        masks = {place: mask for place, output in enumerate(outputs) if (mask := mask_of(output)) is not None}
        return Called(structure, (*outputs, *masks.values()), tuple(masks), own)

    def nest_as(self, structure: Any) -> None:
        """Call a model that does not say how its inputs are nested with inputs nested so."""
        self._pack = lambda tensors: keras.tree.pack_sequence_as(structure, list(tensors))

    def strips(self) -> tuple[int, ...]:
        """Which inputs lose their mask while the model runs: Keras's attention layers take it off the tensor itself.

        Whoever reads such a tensor afterwards, in one process, finds no mask. Found out by running the model once on
        zeros in inference mode; an input of which that cannot be said keeps its mask.
        """
        inputs = self.expected_inputs() or ()
        values = [tf.zeros([1 if size is None else size for size in t.shape], t.dtype) for t in inputs]
        masked = [place for place, value in enumerate(values) if value.shape.rank >= 2]
        values = [
            with_mask(value, tf.ones(value.shape[:2], tf.bool)) if place in masked else value
            for place, value in enumerate(values)
        ]
        try:
            with values_put_back(states_of_layers(self.model)):
                self.model(self._pack(values), training=False)
        except Exception:
            return ()
        return tuple(place for place in masked if mask_of(values[place]) is None)

    def wanted(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Which of these inputs get a gradient."""
        asked = [True] * len(inputs) if self._input_gradients is None else list(self._input_gradients)
        asked += [False] * (len(inputs) - len(asked))  # masks
        return tuple(yes and is_differentiable(tensor.dtype) for tensor, yes in zip(inputs, asked, strict=True))

    def expected_inputs(self) -> list[Any] | None:
        """Symbolic inputs of the model in flat order (dtype, shape), or None if it does not know them."""
        inputs = getattr(self.model, "inputs", None)
        return list(inputs) if inputs else None

    def check_inputs(self, inputs: Sequence[Any], microbatch: int) -> None:
        """Compare tensors with what the model takes.

        Raises:
            HandoffError: A wrong number of tensors, a shape that cannot fit, or text where numbers belong.
        """
        sizes = tuple([sizes_of(given) for given in inputs])
        if sizes in self._fitting:
            return
        expected = self.expected_inputs()
        if expected is None:
            return
        where = f"stage {self.name!r}, forward of microbatch {microbatch}"
        if len(inputs) != len(expected):
            raise HandoffError(f"{where}: the model takes {len(expected)} tensor(s), received {len(inputs)}")
        for given, wanted in zip(inputs, expected, strict=True):
            fits = len(given.shape) == len(wanted.shape) and compatible(given.shape[1:], wanted.shape[1:])
            if not fits:  # of any number of samples, as Keras takes them
                raise HandoffError(
                    f"{where}: input {wanted.name!r} must have the shape {(None, *wanted.shape[1:])} (None is any "
                    f"size), received {describe_tensor(given)}; the model before it, or the data, gives another shape"
                )
        if self.settled and len(self._fitting) < _KNOWN_SIZES:
            self._fitting.add(sizes)


def _let_inner_layers_mask(model: Any) -> None:
    """The layers inside a model hand masks on by themselves; tell Keras, which would warn that the model does not."""
    if isinstance(model, keras.Model):
        let_inner_layers_mask(model)


def packer(model: Any) -> Callable[[Sequence[Any]], Any]:
    """A function from flat tensors to the nesting that the model is called with."""
    structure = input_structure(model)
    if structure is None:
        return lambda tensors: tensors[0] if len(tensors) == 1 else list(tensors)
    return lambda tensors: keras.tree.pack_sequence_as(structure, list(tensors))


def watch(tape: Any, inputs: Sequence[Any], wanted: Sequence[bool], variables: Sequence[Any]) -> list[Any]:
    """Watch what gradients are wanted for and return it: the wanted inputs first, then the variables."""
    sources = [tensor for tensor, yes in zip(inputs, wanted, strict=True) if yes]
    sources += [variable.value for variable in variables]
    for source in sources:
        tape.watch(source)
    return sources


def spread(wanted: Sequence[bool], found: Sequence[Any | None]) -> tuple[Any | None, ...]:
    """Gradients of the wanted inputs back at their places, None for the others."""
    gradients = iter(found)
    return tuple(next(gradients) if yes else None for yes in wanted)


def metrics_of_layers(model: Any) -> list[Any]:
    """The metrics that layers inside a model keep and count in their calls, each once."""
    layers = [layer for layer in layers_of(model) if not isinstance(layer, keras.Model)]
    return list({id(metric): metric for layer in layers for metric in layer.metrics}.values())


def states_of_layers(model: Any) -> list[Any]:
    """The variables in which recurrent layers with ``stateful=True`` keep their states; no model counts them as its."""
    layers = [layer for layer in layers_of(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    found = [state for layer in layers for state in keras.tree.flatten(layer.states)]
    return list({id(state): state for state in found if isinstance(state, keras.Variable)}.values())


def changed_by_calls(model: Any) -> list[Any]:
    """The Keras variables that a forward pass may change by itself: statistics, seed generators, metrics of layers.

    The states of stateful layers too.

    Among them trainable ones: SpectralNormalization divides its kernel by its norm on the spot, in every call.
    """
    found = {id(variable): variable for variable in model.non_trainable_variables}
    found |= {id(variable): variable for metric in metrics_of_layers(model) for variable in metric.variables}
    found |= {id(variable): variable for variable in states_of_layers(model)}
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.SpectralNormalization):
            found.setdefault(id(layer.kernel), layer.kernel)
    return list(found.values())


class CallState:
    """The values of variables that a forward pass changes by itself.

    Computing a forward pass again must start from the states it started from, and leave them as they are now.
    """

    def __init__(self, model: Any) -> None:
        self._variables = [variable.value for variable in changed_by_calls(model)]

    def read(self) -> tuple[Any, ...]:
        """Their values now."""
        return tuple(variable.read_value() for variable in self._variables)

    def write(self, values: Sequence[Any]) -> None:
        """Set them."""
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)

    def __len__(self) -> int:
        return len(self._variables)
