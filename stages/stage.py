"""A live segment: its variables, its open tapes, its accumulated gradients. The hand-off, held in the hand.

    forward   x ──► [ stage ] ──► y          opens a tape under the microbatch's number
    backward  dL/dx ◄── [ stage ] ◄── dL/dy  closes it; dL/dvariables are added up in microbatch order

Rules:

1. Each forward in training opens one tape; each backward closes it. A second backward, or one without its forward, is
   an error that names the stage and the microbatch.
2. The output gradients must have the outputs' shapes and dtypes (`tape.gradient` itself does not check).
3. A failed call changes neither gradients nor variables.
4. `trainable` may change from step to step: a microbatch gives gradients to what was trainable in its forward, an
   update changes what is trainable then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from stages.errors import HandoffError
from stages.loss.head import Head
from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, Gradients
from stages.tape.by_hand import ByHand, nested
from stages.tape.compiled import CompiledTapes
from stages.tape.contract import Blocks, Opened, PassInputs, PassKey, Tapes
from stages.tape.eager import EagerTapes
from stages.tape.misfit_message import MISFITS, named_misfit
from stages.tape.model_call import Part
from stages.tape.open_passes import OpenPasses
from stages.tape.output_gradients import check_gradients, flat_gradients
from stages.tape.window_states import Carried
from stages.variable_names import unique_names
from stages.versions import received


class Stage:
    """One segment of a model with explicit gradients.

    Args:
        model: A built Keras model or layer.
        name: The stage's name in messages; default the model's.
        loss: For a stage that gives the model's output: what `keras.Model.compile` takes. Then `forward_loss` is
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
        if not isinstance(model, keras.Layer):
            raise HandoffError(f"a Stage holds a Keras model or layer, {received(model)}")
        if not model.built:
            raise HandoffError(
                f"the model {model.name!r} is not built, so it has no variables yet; begin it with keras.Input(shape) "
                "or call it once"
            )
        self.name = name or model.name
        self.model = model
        self.heads = Heads(heads if heads is not None else [] if loss is None else [Head(loss)])
        self.run_eagerly = run_eagerly
        self.carried = Carried.of(self.name, states, model) if states else None
        if self.carried is not None and input_gradients is not None:
            input_gradients = [*input_gradients, *self.carried.differentiable()]
        self._part = Part(model, self.name, input_gradients)
        self._consumed = None if consumed is None else tuple(consumed)
        self._tapes: Tapes
        ends = self.carried is None and not any(self._consumed or ())  # only losses come back to the stage
        if run_eagerly:
            self._tapes = EagerTapes(self._part, self.heads, recompute, tied)
        else:
            self._tapes = CompiledTapes(self._part, self.heads, recompute, ends)
        self._by_hand = ByHand(self._part, self.name, recompute, 0 if self.carried is None else len(self.carried))
        self._passes = OpenPasses(self.name)

    @property
    def traces(self) -> int | None:
        """As of `Tapes`."""
        return self._tapes.traces

    @property
    def trainable_variables(self) -> list[Any]:
        """The Keras variables that gradients are taken for."""
        return self._part.trainable_variables

    def settle(self) -> None:
        """Take `trainable` of all layers as it is, for good: a worker's model is changed by nobody."""
        self._part.settle()

    @property
    def loss_scale(self) -> float:
        """Factor on every loss while it is differentiated; accumulated gradients are this much too large."""
        return self._tapes.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._tapes.loss_scale = value

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
            HandoffError: The tape of this microbatch is still open, the inputs do not fit the model, or the call is
                inside of a `tf.function`.
        """
        key = PassKey(microbatch, window)
        tensors, masked = self._by_hand.given(inputs, key, "forward")
        opened = self.forward_flat(tensors, key, training, share, masked=masked, state=state)
        self._by_hand.opened(key, training)
        return nested(opened)

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
            window: As in `forward`, like `share` and `state`; `weight` is what this loss weighs in the batch's.

        Returns:
            The weighted loss, a float scalar tensor.

        Raises:
            HandoffError: The stage has no loss, or as in `forward`.
        """
        if not self.heads:
            raise HandoffError(f"stage {self.name!r} has no loss; make it with Stage(model, loss=...)")
        key = PassKey(microbatch, window)
        tensors, masked = self._by_hand.given(inputs, key, "forward_loss")
        objective = self.heads.objective(target, sample_weight, weight)
        opened = self.forward_flat(tensors, key, True, share, objective, masked, state)
        self._by_hand.opened(key)
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
                weights are others than in the forward.
        """
        key = PassKey(microbatch, window)
        self._by_hand.outside_functions(key, "backward")
        given = self._flat_gradients(output_gradients, self._passes.of(key).values, key)
        self._by_hand.closing(key, self._passes.of(key), output_gradients is not None or self.carried is not None)
        found = self.backward_flat(given, key, state_gradient)
        return found[0] if len(found) == 1 else list(found)

    def state(self, microbatch: int = 0, training: bool = True) -> tuple[Any, ...]:
        """The states behind the last window that went forward, (n, ...) each.

        Raises:
            HandoffError: The stage has none, or no window went forward.
        """
        return self._carrying().state(microbatch, training)

    def initial_state_gradients(self, microbatch: int = 0) -> tuple[Any | None, ...]:
        """dL/d(initial states) of a microbatch whose window 0 has gone backward.

        Raises:
            HandoffError: The stage has no states, or window 0 has not gone backward.
        """
        return tuple(self._carrying().initial_gradients(microbatch))

    def _carrying(self) -> Carried:
        if self.carried is None:
            raise HandoffError(f"stage {self.name!r} carries no states; make it with Stage(model, states=('h',))")
        return self.carried

    def forward_flat(
        self,
        inputs: Sequence[Any],
        key: PassKey,
        training: bool,
        share: float = 1.0,
        objective: Objective | None = None,
        masked: Sequence[int] = (),
        state: Sequence[Any] | None = None,
    ) -> Opened:
        """`forward` on flat eager tensors: values, then the masks of those that `masked` names; for workers."""
        count = len(inputs) - len(masked)
        entered: tuple[Any, ...] = ()
        if self.carried is not None:
            entered = self.carried.enter(key.microbatch, key.window, int(inputs[0].shape[0]), training, state)
        elif state is not None:
            self._carrying()
        values = (*inputs[:count], *entered)
        self._part.check_inputs(values, key.microbatch)
        given = PassInputs((*values, *inputs[count:]), share, tuple(masked), objective)
        if training:
            self._passes.check_new(key)
        try:
            opened = self._tapes.forward(key, given) if training else self._tapes.infer(given, key.window)
        except MISFITS as error:
            raise named_misfit(error, self._at(key, "forward"), self.model, values, training)  # noqa: B904 - has one
        opened = self._left(key, opened, entered, training)
        if training:
            self._passes.open(key, opened, count)
        return opened

    def _left(self, key: PassKey, opened: Opened, entered: Sequence[Any], training: bool) -> Opened:
        """What a window gives to others; its states stay here for the next one."""
        return opened if self.carried is None else self.carried.taken_from(opened, key, tuple(entered), training)

    def backward_flat(
        self, output_gradients: Gradients, key: PassKey, state_gradient: Gradients | None = None
    ) -> Gradients:
        """`backward` on flat eager tensors, one gradient per output value; what a worker calls."""
        found = self._back(self._tapes.backward, output_gradients, key, state_gradient)
        self._passes.close(key)
        return found

    def backward_input_flat(self, output_gradients: Gradients, key: PassKey) -> Gradients:
        """The half of `backward_flat` that gives dL/dinputs; `backward_weight_flat` adds up dL/dvariables later."""
        return self._back(self._tapes.backward_input, output_gradients, key, None)

    def _back(self, backward: Any, output_gradients: Gradients, key: PassKey, state: Gradients | None) -> Gradients:
        values = self._passes.of(key).values
        check_gradients(output_gradients, values, self._at(key))
        if self.carried is not None:
            waiting = PassKey(key.microbatch, key.window + 1) in self._passes
            states = self.carried.gradients(key.microbatch, key.window, waiting, state)
            output_gradients = [*output_gradients, *states]
        inputs = self._passes.go_halfway(key)
        self._by_hand.forget(key)
        found: Gradients = backward(key, output_gradients)
        if self.carried is not None:
            self.carried.hand_back(key.microbatch, key.window, found[inputs:])
        return found[:inputs]

    def backward_weight_flat(self, key: PassKey) -> None:
        """The half that others do not wait for: add up dL/dvariables; once, and microbatches ascending."""
        self._passes.close(key)
        self._tapes.backward_weight(key)

    def go_in_halves(self, value: bool) -> None:
        """Say whether backwards will come in halves, so that compiled functions are cut so; before a forward."""
        self._tapes.halves = value

    def gradients(self) -> dict[str, np.ndarray[Any, Any] | None]:
        """Accumulated dL/dvariables.

        Returns:
            {variable path: array of the variable's shape and dtype}; None where no objective reaches the variable. Of
            variables with one path the second has ``#2`` behind it, and so on.
        """
        names = unique_names([variable.path for variable in self.trainable_variables])
        found = zip(names, self._tapes.gradients(), strict=True)
        return {name: None if g is None else np.array(g) for name, g in found}

    def accumulated(self) -> list[Any | None]:
        """The accumulated gradients as tensors, in the order of `trainable_variables`."""
        return self._tapes.gradients()

    def as_given(self) -> list[Any | None]:
        """The same as an optimizer gets them: an embedding's may be `tf.IndexedSlices`."""
        return self._tapes.as_given()

    def truncate(self, windows: int, length: int | None) -> None:
        """Cut the states' gradients behind every `length` windows of `windows`; None: nowhere."""
        self._tapes.blocks = Blocks() if length is None else Blocks(-(-windows // length), length)
        if self.carried is not None:
            self.carried.block = length

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What was accumulated for tied variables: one entry per microbatch (eager), or their sum (compiled)."""
        return self._tapes.contributions(places)

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put the sums over all stages in place of what was accumulated here for tied variables."""
        self._tapes.replace(places, totals)

    def apply(self, optimizer: Any, scale: float | None = None, divisor: float | None = None) -> None:
        """One optimizer update from the accumulated gradients, which are then cleared.

        Args:
            optimizer: A Keras optimizer; it is built on this stage's variables if it is not yet.
            scale: Factor on the gradients, for clipping by a global norm.
            divisor: What the gradients are divided by before that, for loss scaling.
        """
        if not optimizer.built:
            optimizer.build(self.trainable_variables)
        self._forget_open()
        self._tapes.apply(optimizer, scale, divisor)

    def forget_updates(self) -> None:
        """Trace the optimizer's update anew when it is next made: numbers in the optimizer were changed."""
        self._tapes.forget_updates()

    def zero_gradients(self, failed: bool = False) -> None:
        """Forget accumulated gradients and open tapes; if a call `failed`, also what it added before it did."""
        self._forget_open()
        self._tapes.clear(failed)

    def _forget_open(self) -> None:
        self._passes.forget()
        self._by_hand.forget()
        if self.carried is not None:
            self.carried.forget()

    def strips(self) -> tuple[int, ...]:
        """Which inputs, in flat order, lose their Keras mask to a layer of this stage."""
        return self._part.strips()

    def open_microbatches(self) -> tuple[int, ...]:
        """Microbatches whose backward is still to come."""
        return self._passes.microbatches()

    def _flat_gradients(self, given: Any, outputs: Sequence[Any], key: PassKey) -> list[Any | None]:
        if given is None and self._passes.of(key).losses:
            return [None] * len(outputs)
        if self._passes.of(key).losses and not any(self._consumed or ()):
            raise HandoffError(f"stage {self.name!r} has its loss on the tape; backward takes no output gradients")
        return flat_gradients(given, outputs, self._at(key))

    def _at(self, key: PassKey, what: str = "backward") -> str:
        return f"stage {self.name!r}, {what} of microbatch {key.microbatch}"
