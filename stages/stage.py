"""The hand-off, held in the hand: a live segment that a user calls.

    forward   x ──► [ stage ] ──► y          opens a tape under the microbatch's number
    backward  dL/dx ◄── [ stage ] ◄── dL/dy  closes it; dL/dvariables are added up in microbatch order

Rules, besides those of `stages.flat_stage`:

1. `trainable` may change from step to step: a microbatch gives gradients to what was trainable in its forward, an
   update changes what is trainable then.
2. What else a user changes (a layer's rate, an activation, a number in the loss or the optimizer) counts from the next
   forward or update on, compiled or not.
3. Calls of several threads take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any, NoReturn

import numpy as np

from stages.errors import HandoffError
from stages.flat_stage import FlatStage
from stages.loss.head import Head
from stages.tape.by_hand import ByHand, nested, one_head
from stages.tape.contract import PassKey
from stages.tape.output_gradients import flat_gradients
from stages.tape.tensors import is_differentiable
from stages.variable_names import unique_names


class Stage(FlatStage):
    """One segment of a model with explicit gradients.

    Args:
        model: A built Keras model or layer that is called with one argument (a tensor, or a nesting of them).
        name: The stage's name in messages; default the model's.
        loss: For a stage that gives the model's only output: what `keras.Model.compile` takes. Then `forward_loss` is
            available.
        run_eagerly: True: one `tf.GradientTape` per microbatch, bit-identical to one tape over the whole model.
            False: compiled functions, within 1e-6 of the largest gradient.
        recompute: Keep only inputs between forward and backward, and compute the forward pass again.
        input_gradients: Which inputs (in flat order) to differentiate; None: all that can be.
        heads: Ready objectives in place of `loss`, for a stage with several outputs that are judged.
        consumed: Which outputs (in flat order) other stages take; default: all, or none with a loss.
        tied: Which trainable variables (by place) other stages have too; see `contributions`.
        states: Names of the states that the stage hands to its own next window: the model takes them behind its inputs
            and gives them behind its outputs. See `stages.tape.window_states`.

    Raises:
        HandoffError: The model is none, is not built, or is called with several arguments; `loss` is for one output
            and the model has several.

    Example:
        >>> stage = Stage(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
        >>> y = stage.forward(np.ones((3, 4), "float32"), microbatch=0)
        >>> dx = stage.backward(2 * y, microbatch=0)  # dL/dx for L = sum(y * y)
        >>> sorted(stage.gradients())
        ['dense/bias', 'dense/kernel']
    """

    def __init__(
        self,
        model: Any,
        name: str | None = None,
        *,
        loss: Any = None,
        run_eagerly: bool = True,
        recompute: bool = False,
        input_gradients: Sequence[bool] | None = None,
        heads: Sequence[Head] | None = None,
        consumed: Sequence[bool] | None = None,
        tied: Sequence[int] = (),
        states: Sequence[str] = (),
    ) -> None:
        if heads is None and loss is not None:
            heads = one_head(model, loss, len(states))
        super().__init__(
            model,
            name,
            run_eagerly=run_eagerly,
            recompute=recompute,
            input_gradients=input_gradients,
            heads=heads,
            consumed=consumed,
            tied=tied,
            states=states,
        )
        self._by_hand = ByHand(self._part, self._tapes, self.heads, recompute, len(states))
        self._turn = RLock()

    def forward(
        self,
        inputs: Any,
        microbatch: int = 0,
        training: bool = True,
        *,
        window: int = 0,
        share: float = 1.0,
        state: Sequence[Any] | None = None,
    ) -> Any:
        """Run the segment; in training, keep its tape open for `backward`.

        Args:
            inputs: Array or tensor, or a nesting of them as the model takes it; (n, ...).
            microbatch: Number under which the tape is kept.
            training: False: evaluation; nothing is kept.
            window: Second part of the number, for passes through time: ascending from 0, each window takes the state
                that the one before it left.
            state: For a stage with states, in window 0: the initial ones, (n, ...) each; default zeros.
            share: The microbatch's part of its batch (n_k / N): regularisers and `add_loss` count with it.

        Returns:
            The outputs, in the model's nesting.

        Raises:
            HandoffError: The tape of this microbatch is still open, the inputs do not fit the model or are no dense
                tensors, or the call is inside of a `tf.function`.
        """
        with self._turn:
            key = self._by_hand.key(microbatch, window, "forward")
            tensors, masked = self._by_hand.given(inputs, key)
            with self._by_hand.call(key, training):
                return nested(self.forward_flat(tensors, key, training, share, masked=masked, state=state))

    def forward_loss(
        self,
        inputs: Any,
        target: Any,
        sample_weight: Any = None,
        microbatch: int = 0,
        *,
        window: int = 0,
        weight: float = 1.0,
        share: float = 1.0,
        state: Sequence[Any] | None = None,
    ) -> Any:
        """Run the segment and its loss under one tape; `backward` then needs no output gradients.

        Args:
            inputs: As in `forward`.
            target: What the loss compares with, (n, ...); with several heads a list, one per head.
            sample_weight: (n,) or None; with several heads a list, or None.
            microbatch: Number under which the tape is kept.
            window: As in `forward`, like `share` and `state`.
            weight: What the loss of this microbatch (and window) weighs in the batch's.
            share: As in `forward`.
            state: As in `forward`.

        Returns:
            The weighted loss, a float scalar tensor.

        Raises:
            HandoffError: The stage has no loss, target or weights do not fit, or as in `forward`.
        """
        if not self.heads:
            raise HandoffError(f"stage {self.name!r} has no loss; make it with Stage(model, loss=...)")
        with self._turn:
            key = self._by_hand.key(microbatch, window, "forward_loss")
            tensors, masked = self._by_hand.given(inputs, key)
            objective = self._by_hand.objective(target, sample_weight, weight, tensors, key)
            with self._by_hand.call(key, True, objective):
                opened = self.forward_flat(tensors, key, True, share, objective, masked, state)
            return self.heads.terms(opened.losses)[0]

    def backward(
        self,
        output_gradients: Any = None,
        microbatch: int = 0,
        *,
        window: int = 0,
        state_gradient: Sequence[Any | None] | None = None,
    ) -> Any:
        """Close the microbatch's tape: accumulate dL/dvariables, return dL/dinputs.

        Args:
            output_gradients: dL/dOut, like the outputs in nesting, shape and dtype. None for an output that nobody
                differentiates, and for integer outputs. Left out after `forward_loss`.
            microbatch: The number given to `forward`.
            window: The window given to `forward`; windows go backward in descending order.
            state_gradient: For a stage with states, in the last window: dL/d(final states), one each or None.

        Returns:
            dL/dinputs in the inputs' flat order: one tensor for one input, else a list. None for an input that cannot
            have a gradient (integers, booleans) or that the outputs do not depend on.

        Raises:
            HandoffError: There is no open tape for this microbatch and window, the next window is still to go backward,
                the gradients do not fit the outputs, there is nothing to go backward from, or, with `recompute`, the
                weights or a layer's settings are others than in the forward.
        """
        with self._turn:
            key = self._by_hand.key(microbatch, window, "backward")
            given = self._flat_gradients(output_gradients, key)
            opened = self._passes.of(key)
            leads = [g is not None and is_differentiable(o.dtype) for g, o in zip(given, opened.values, strict=False)]
            self._by_hand.closing(key, opened, any(leads) or self.carried is not None)
            try:
                found = self.backward_flat(given, key, state_gradient)
            finally:
                if key not in self._passes:
                    self._by_hand.forget(key)
            return found[0] if len(found) == 1 else list(found)

    def gradients(self) -> dict[str, np.ndarray[Any, Any] | None]:
        """Accumulated dL/dvariables, of what is trainable at present.

        Returns:
            {variable path: array of the variable's shape and dtype}; None where no objective reaches the variable. Of
            variables with one path the second has ``#2`` behind it, and so on.

        Raises:
            HandoffError: The call is inside of a `tf.function`.
        """
        with self._turn:
            self._by_hand.outside_functions("gradients")
            names = unique_names([variable.path for variable in self.trainable_variables])
            values = self._tapes.gradients()
            return {name: None if g is None else np.array(g) for name, g in zip(names, values, strict=True)}

    def apply(self, optimizer: Any, scale: float | None = None, divisor: float | None = None) -> None:
        """One optimizer update from the accumulated gradients, which are then cleared, as are forwards still open.

        Args:
            optimizer: A Keras optimizer; it is built on this stage's variables if it is not yet. One that several
                stages share must be built on the variables of all, and counts every call as a step (`iterations`).
            scale: Factor on the gradients, for clipping by a global norm.
            divisor: What the gradients are divided by before that, for loss scaling.

        Raises:
            HandoffError: It is no Keras optimizer or was built on other variables, or the call is inside of a
                `tf.function`.
        """
        with self._turn:
            self._by_hand.updating(optimizer, self.trainable_variables)
            super().apply(optimizer, scale, divisor)

    def zero_gradients(self, failed: bool = False) -> None:
        """Forget accumulated gradients and open tapes; if a call `failed`, also what it added before it did."""
        with self._turn:
            self._by_hand.outside_functions("zero_gradients")
            super().zero_gradients(failed)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise HandoffError(
            f"stage {self.name!r} holds open tapes and cannot be copied or pickled; make another "
            "Stage, of a copy of its model"
        )

    def _forget_open(self) -> None:
        super()._forget_open()
        self._by_hand.forget()

    def _flat_gradients(self, given: Any, key: PassKey) -> list[Any | None]:
        opened = self._passes.of(key)
        if given is None and opened.losses:
            return [None] * len(opened.values)
        if opened.losses and not any(self._consumed or ()):
            raise HandoffError(f"stage {self.name!r} has its loss on the tape; backward takes no output gradients")
        return flat_gradients(given, opened.values, self._at(key), opened.structure)


__all__ = ["Stage"]
