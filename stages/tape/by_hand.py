"""Calls of a stage by a user's hand: nestings in place of flat tensors, and checks that a worker's calls do not need.

A kept tape holds what it needs of the weights, so they may change before its backward. A forward pass that is computed
again (`recompute`) runs with the weights of now: others would give another gradient than that of the outputs that were
handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.masks import mask_of, with_mask
from stages.tape.contract import Opened, PassKey
from stages.tape.model_call import Part, changed_by_calls
from stages.tape.tensors import flatten


class ByHand:
    """Checks of a user's calls of one stage.

    Args:
        part: The stage's model.
        name: The stage's.
        recompute: Whether forward passes are computed again.
        states: How many states the model takes behind its inputs.
    """

    def __init__(self, part: Part, name: str, recompute: bool, states: int = 0) -> None:
        self._part, self._model, self._name, self._recompute, self._states = part, part.model, name, recompute, states
        self._then: dict[PassKey, list[tuple[Any, Any]]] = {}

    def outside_functions(self, key: PassKey, call: str) -> None:
        """Refuse a call inside of a `tf.function`.

        Raises:
            HandoffError: It is inside.
        """
        if not tf.executing_eagerly():
            raise HandoffError(
                f"stage {self._name!r}, microbatch {key.microbatch}: {call}() was called inside of a tf.function, "
                "where no tape can stay open for a later call; call it from plain Python, and let "
                "Stage(..., run_eagerly=False) compile what is inside"
            )

    def given(self, inputs: Any, key: PassKey, call: str) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """The tensors of a forward pass.

        Args:
            inputs: Arrays or tensors (n, ...), in the nesting that the model takes.
            key: Of which forward pass.
            call: The method that the user called.

        Returns:
            Flat tensors in the model's dtypes, behind them the masks that ride on them; which of them have one.

        Raises:
            HandoffError: It was called inside of a `tf.function`, or there is text.
        """
        self.outside_functions(key, call)
        leaves = flatten(inputs)
        masks = {place: mask for place, leaf in enumerate(leaves) if (mask := mask_of(leaf)) is not None}
        return (*self._converted(leaves, key.microbatch), *masks.values()), tuple(masks)

    def _converted(self, leaves: Sequence[Any], microbatch: int) -> tuple[Any, ...]:
        expected = self._part.expected_inputs()
        if expected is not None:
            expected = expected[: len(expected) - self._states]
        if expected is None or len(expected) != len(leaves):
            return tuple(tf.convert_to_tensor(leaf) for leaf in leaves)
        converted = []
        for leaf, wanted in zip(leaves, expected, strict=True):
            tensor = tf.convert_to_tensor(leaf)
            if tensor.dtype == tf.string:
                raise HandoffError(f"stage {self._name!r}, microbatch {microbatch}: text cannot cross between stages")
            converted.append(tensor if tensor.dtype == wanted.dtype else tf.cast(tensor, wanted.dtype))
        return tuple(converted)

    def opened(self, key: PassKey, training: bool = True) -> None:
        """Note, if need be, the weights of a forward pass: no copy unless they are written before its backward."""
        if self._recompute and training:
            put_back = {id(variable) for variable in changed_by_calls(self._model)}
            variables = [v for v in self._model.trainable_variables if id(v) not in put_back]
            self._then[key] = [(variable, variable.value.read_value()) for variable in variables]

    def closing(self, key: PassKey, opened: Opened, given: bool) -> None:
        """Before a backward.

        Args:
            key: Of which forward pass.
            opened: What that gave.
            given: Whether gradients were given, or may have been handed over by the next window.

        Raises:
            HandoffError: There is nothing to go backward from, or the weights are others than in the forward pass.
        """
        where = f"stage {self._name!r}, backward of microbatch {key.microbatch}"
        if not (given or opened.losses or opened.own_loss is not None):
            raise HandoffError(
                f"{where}: there is nothing to go backward from, so nothing would be trained; give dL/dOut, "
                "backward(output_gradients), or make Stage(model, loss=...) and call forward_loss"
            )
        changed = [v.path for v, then in self._then.get(key, ()) if not _same(v.value.read_value(), then)]
        if changed:
            raise HandoffError(
                f"{where}: {', '.join(map(repr, changed))} changed since its forward, which recompute=True would "
                "compute again with the weights of now; update weights after backward, or leave recompute out"
            )

    def forget(self, key: PassKey | None = None) -> None:
        """A forward pass, or all, will have no backward any more."""
        if key is None:
            self._then.clear()
        else:
            self._then.pop(key, None)


def nested(opened: Opened) -> Any:
    """The outputs of a forward pass in the model's nesting, with their masks.

    They have none of Keras's other hidden attributes (cached logits).
    """
    values = [with_mask(value, opened.masks.get(place)) for place, value in enumerate(opened.values)]
    if opened.structure is not None:
        return keras.tree.pack_sequence_as(opened.structure, values)
    return values[0] if len(values) == 1 else values


def _same(now: Any, then: Any) -> bool:
    """Whether two tensors have one buffer, or at least the same bits."""
    a, b = np.asarray(now), np.asarray(then)
    return a.__array_interface__["data"] == b.__array_interface__["data"] or a.tobytes() == b.tobytes()
