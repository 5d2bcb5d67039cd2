"""Calls of a stage by a user's hand: nestings in place of flat tensors, and checks that a worker's calls do not need.

A kept tape holds what it needs of the weights, so they may change before its backward. A forward pass that is computed
again (`recompute`) runs with the weights and settings of now: others would give another gradient than that of the
outputs that were handed on. A compiled function has the settings of its trace, so others let it be traced anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.keras_internals import input_structure, layers_of
from stages.keras_training_internals import variables_known_to
from stages.loss.head import Head
from stages.loss.heads import Heads, Objective
from stages.masks import mask_of, with_mask
from stages.plain_attributes import Attributes, plain, settings_within
from stages.recipe.optimizer_state import rate_of
from stages.tape.contract import Opened, PassKey, Tapes
from stages.tape.leaves import dense_tensor, named_inputs
from stages.tape.model_call import Part, changed_by_calls
from stages.tape.tensors import describe_tensor, flatten
from stages.versions import received

_NO_NUMBERS = ("name", "built", "loss_scale_factor")


class ByHand:
    """Checks of a user's calls of one stage.

    Args:
        part: The stage's model.
        tapes: Its tapes.
        heads: Its objectives.
        recompute: Whether forward passes are computed again.
        states: How many states the model takes behind its inputs.
    """

    def __init__(self, part: Part, tapes: Tapes, heads: Heads, recompute: bool, states: int = 0) -> None:
        self._part, self._model, self._name = part, part.model, part.name
        self._tapes, self._heads, self._recompute, self._states = tapes, heads, recompute, states
        self._then: dict[PassKey, _Then] = {}
        self._settings: Attributes | None = None
        self._numbers: dict[int, tuple[Any, Any]] = {}
        self._nesting: Any = None
        if part.expected_inputs() is None:
            self._check_call()

    def _check_call(self) -> None:
        """Refuse a model that is called with several tensors side by side."""
        named = inspect.signature(self._model.call).parameters.values()
        needed = [one.name for one in named if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        if len(needed) > 1:
            raise HandoffError(
                f"stage {self._name!r}: {type(self._model).__name__} is called with several arguments "
                f"({', '.join(needed)}), and a Stage calls its model with one; build a Functional model around it: "
                "keras.Model([a, b], layer(a, b))"
            )

    def outside_functions(self, call: str) -> None:
        """Refuse a call inside of a `tf.function`.

        Raises:
            HandoffError: It is inside.
        """
        if not tf.executing_eagerly():
            raise HandoffError(
                f"stage {self._name!r}: {call}() was called inside of a tf.function, where no tape can stay open for a "
                "later call, and what is read is read once; call it from plain Python, and let "
                "Stage(..., run_eagerly=False) compile what is inside"
            )

    def key(self, microbatch: Any, window: Any, call: str) -> PassKey:
        """The key of a forward pass.

        Raises:
            HandoffError: A number is none, or the call is inside of a `tf.function`.
        """
        self.outside_functions(call)
        for name, number in (("microbatch", microbatch), ("window", window)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
                raise HandoffError(f"stage {self._name!r}: {name}= must be a whole number from 0, received {number!r}")
        return PassKey(int(microbatch), int(window))

    def given(self, inputs: Any, key: PassKey) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """The tensors of a forward pass.

        Args:
            inputs: Arrays or tensors (n, ...), in the nesting that the model takes.
            key: Of which forward pass.

        Returns:
            Flat tensors in the model's dtypes, behind them the masks that ride on them; which of them have one.

        Raises:
            HandoffError: What is given is no dense tensor, is text, or is not nested as the model's inputs.
        """
        where = f"stage {self._name!r}, forward of microbatch {key.microbatch}"
        expected = self._part.expected_inputs()
        if expected is None:
            self._nest(inputs, where)
        elif not self._states:
            structure = input_structure(self._model)
            structure = expected[0] if structure is None and len(expected) == 1 else structure
            inputs = named_inputs(inputs, structure, where)
        leaves = flatten(inputs)
        masks = {place: mask for place, leaf in enumerate(leaves) if (mask := mask_of(leaf)) is not None}
        wanted = (
            [None] * len(leaves) if expected is None else [t.dtype for t in expected[: len(expected) - self._states]]
        )
        if len(wanted) != len(leaves):
            rows = ""
            if len(wanted) == 1 and all(isinstance(leaf, int | float) for leaf in leaves):
                rows = "; a list of numbers is a nesting of tensors: give it as an array, numpy.asarray(...)"
            raise HandoffError(f"{where}: the model takes {len(wanted)} tensor(s), received {len(leaves)}{rows}")
        tensors = [dense_tensor(leaf, dtype, where) for leaf, dtype in zip(leaves, wanted, strict=True)]
        return (*tensors, *masks.values()), tuple(masks)

    def _nest(self, inputs: Any, where: str) -> None:
        """Let a model that does not say how its inputs are nested be called as the user nests them."""
        nesting = keras.tree.map_structure(lambda _: 0, inputs)
        if self._nesting is None:
            self._nesting = nesting
            if not (isinstance(nesting, list | tuple) and len(nesting) == 1):
                self._part.nest_as(nesting)
        elif self._nesting != nesting:
            raise HandoffError(f"{where}: the inputs are nested in another way than in the first forward; keep to one")

    def objective(
        self, target: Any, sample_weight: Any, weight: float, inputs: Sequence[Any], key: PassKey
    ) -> Objective:
        """What one microbatch is judged by.

        Args:
            target: As `Heads.objective` takes it.
            sample_weight: The same.
            weight: The same.
            inputs: The forward's tensors, (n, ...).
            key: Of which forward pass.

        Raises:
            HandoffError: A target or a weight is no tensor, or is not one for each sample.
        """
        where = f"stage {self._name!r}, forward_loss of microbatch {key.microbatch}"
        several = len(self._heads) != 1
        for name, given in (("target", target), ("sample_weight", sample_weight)):
            if (
                several
                and given is not None
                and not (isinstance(given, list | tuple) and len(given) == len(self._heads))
            ):
                raise HandoffError(
                    f"{where}: {name} must be a list with one entry for each of {len(self._heads)} heads"
                )
        try:
            made = self._heads.objective(target, sample_weight, weight)
        except (ValueError, TypeError) as error:
            raise HandoffError(f"{where}: a target or weight is no tensor or array: {error}") from error
        samples = int(inputs[0].shape[0])
        for name, tensors in (("target", made.targets), ("sample_weight", made.sample_weights)):
            for tensor in tensors:
                if tensor is not None and (not tensor.shape.rank or tensor.shape[0] != samples):
                    raise HandoffError(
                        f"{where}: {name} must have one entry for each of {samples} samples, received "
                        f"{describe_tensor(tensor)}"
                    )
        return made

    @contextmanager
    def call(self, key: PassKey, training: bool, objective: Objective | None = None) -> Iterator[None]:
        """Around a forward pass: settings that were changed count, and those of now are noted, if need be.

        Raises:
            HandoffError: The loss cannot take the target.
        """
        again = self._recompute and training
        before = Attributes(_objects(self._model, self._heads)) if again else None
        if self._settings is not None and self._settings.changed(None) is not None:
            self._tapes.forget_traces()
        traced = self._tapes.traces
        try:
            yield
        except HandoffError:
            raise
        except (tf.errors.InvalidArgumentError, ValueError) as error:
            if objective is None:
                raise
            targets = " and ".join(map(describe_tensor, objective.targets))
            raise HandoffError(
                f"stage {self._name!r}, forward_loss of microbatch {key.microbatch}: the loss cannot take the target "
                f"{targets} beside these outputs; the error was: {error}"
            ) from error
        if traced != self._tapes.traces:
            self._settings = Attributes(_objects(self._model, self._heads))
        if before is not None:
            self._then[key] = _Then(_weights_of(self._model), before, frozenset(before.moved()))

    def closing(self, key: PassKey, opened: Opened, given: bool) -> None:
        """Before a backward.

        Args:
            key: Of which forward pass.
            opened: What that gave.
            given: Whether gradients were given, or may have been handed over by the next window.

        Raises:
            HandoffError: There is nothing to go backward from, or what is computed again is another pass by now.
        """
        where = f"stage {self._name!r}, backward of microbatch {key.microbatch}"
        if not (given or opened.losses or opened.own_loss is not None):
            raise HandoffError(
                f"{where}: there is nothing to go backward from, so nothing would be trained; give dL/dOut, "
                "backward(output_gradients), or make Stage(model, loss=...) and call forward_loss"
            )
        changed = [] if key not in self._then else self._then[key].changed(eager=self._tapes.traces is None)
        if changed:
            raise HandoffError(
                f"{where}: {', '.join(changed)} since its forward, which recompute=True would compute again with what "
                "is now; change it after backward, or leave recompute out"
            )

    def updating(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Before an update.

        Args:
            optimizer: What the user gave.
            variables: What is trained.

        Raises:
            HandoffError: It is no Keras optimizer or was built on other variables, or the call is inside of a
                `tf.function`.
        """
        self.outside_functions("apply")
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise HandoffError(
                f"stage {self._name!r}: apply takes a Keras optimizer object, keras.optimizers.get('sgd'), "
                f"{received(optimizer)}"
            )
        if optimizer.built:
            known = {id(variable) for variable in variables_known_to(optimizer)}
            gradients = self._tapes.as_given()
            pairs = zip(variables, gradients, strict=True)
            strangers = [v.path for v, g in pairs if g is not None and id(v) not in known]
            if strangers:
                raise HandoffError(
                    f"stage {self._name!r}: the optimizer was built on other variables, not on {strangers[0]!r}; give "
                    "each stage one of its own, or build one on the variables of all: optimizer.build([...])"
                )
        constraints = {i: settings_within(v) for i, v in enumerate(variables) if v.constraint is not None}
        numbers = [_numbers(optimizer), _numbers(getattr(optimizer, "inner_optimizer", None)), constraints]
        if self._numbers.get(id(optimizer), (optimizer, numbers))[1] != numbers:
            self._tapes.forget_updates()
        self._numbers[id(optimizer)] = optimizer, numbers

    def forget(self, key: PassKey | None = None) -> None:
        """A forward pass, or all, will have no backward any more."""
        if key is None:
            self._then.clear()
        else:
            self._then.pop(key, None)


class _Then:
    """Weights and settings of one forward pass: no copy unless weights are written before its backward."""

    def __init__(self, weights: list[tuple[Any, Any]], settings: Attributes, moving: frozenset[int]) -> None:
        self._weights, self._settings, self._moving = weights, settings, moving

    def changed(self, eager: bool) -> list[str]:
        """What is another one now, in words; settings only of eager tapes: a compiled backward has those of then."""
        found = [f"{v.path!r} changed" for v, then in self._weights if not _same(v.value.read_value(), then)]
        moved = self._settings.moved() if eager else {}
        return found + [words for place, words in moved.items() if place not in self._moving]


def one_head(model: Any, loss: Any, states: int) -> list[Head]:
    """The head of a stage with one loss.

    Args:
        model: The stage's.
        loss: What the user gave.
        states: How many of its outputs are states.

    Raises:
        HandoffError: The model has several outputs, or there are several losses.
    """
    outputs = len(getattr(model, "outputs", None) or [None]) - states
    if outputs > 1 or isinstance(loss, list | tuple | dict):
        raise HandoffError(
            f"loss= of a Stage is one loss for one output, and the model {getattr(model, 'name', model)!r} has "
            f"{outputs}, {received(loss)}; give heads=[Head(loss, place=0), ...] of stages.loss.head, or backward the "
            "gradients that a tape of your own over the outputs gives"
        )
    return [Head(loss)]


def nested(opened: Opened) -> Any:
    """The outputs of a forward pass in the model's nesting, with their masks.

    They have none of Keras's other hidden attributes (cached logits).
    """
    values = [with_mask(value, opened.masks.get(place)) for place, value in enumerate(opened.values)]
    if opened.structure is not None:
        return keras.tree.pack_sequence_as(opened.structure, values)
    return values[0] if len(values) == 1 else values


def _objects(model: Any, heads: Heads) -> Iterator[tuple[str, Any]]:
    """What has settings that a user may change, each with what it is called."""
    for layer in layers_of(model):
        yield f"the layer {layer.name!r}", layer
    for variable in model.trainable_variables:
        yield f"the variable {variable.path!r}", variable
    for head in heads:
        if head.loss is not None:
            yield f"the loss {getattr(head.loss, 'name', head.loss)}", head.loss


def _weights_of(model: Any) -> list[tuple[Any, Any]]:
    put_back = {id(variable) for variable in changed_by_calls(model)}
    variables = [variable for variable in model.trainable_variables if id(variable) not in put_back]
    return [(variable, variable.value.read_value()) for variable in variables]


def _numbers(optimizer: Any) -> dict[str, Any]:
    """What of an optimizer decides about its updates; of a schedule of its rate, what it is made with."""
    found = {name: value for name, value in plain(optimizer).items() if name not in _NO_NUMBERS}
    if optimizer is None or isinstance(rate := rate_of(optimizer), keras.Variable):
        return found
    within = {f"learning rate.{name}": value for name, value in settings_within(rate).items()}
    return found | {"learning rate": rate} | within


def _same(now: Any, then: Any) -> bool:
    """Whether two tensors have one buffer, or at least the same bits."""
    a, b = np.asarray(now), np.asarray(then)
    return a.__array_interface__["data"] == b.__array_interface__["data"] or a.tobytes() == b.tobytes()
