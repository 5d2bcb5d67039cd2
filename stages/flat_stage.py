"""A live segment as a worker calls it: flat eager tensors in and out, its open tapes, its accumulated gradients.

Rules:

1. Each forward in training opens one tape; each backward closes it. A second backward, or one without its forward, is
   an error that names the stage and the microbatch.
2. The output gradients must have the outputs' shapes and dtypes (`tape.gradient` itself does not check).
3. A failed call changes neither gradients nor variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from stages.errors import HandoffError
from stages.loss.head import Head
from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, Gradients
from stages.tape.compiled import CompiledTapes
from stages.tape.contract import Blocks, Opened, PassInputs, PassKey, Tapes
from stages.tape.eager import EagerTapes
from stages.tape.misfit_message import MISFITS, named_misfit
from stages.tape.model_call import Part
from stages.tape.open_passes import OpenPasses
from stages.tape.output_gradients import check_gradients
from stages.tape.window_states import Carried
from stages.versions import received


class FlatStage:
    """One segment of a model with explicit gradients, called with flat tensors under a microbatch's and window's key.

    Args:
        model: As in `stages.Stage`, like all others.
        name: The stage's name in messages; default the model's.
        run_eagerly: Eager tapes, or compiled functions.
        recompute: Whether forward passes are computed again in backward.
        input_gradients: Which inputs (in flat order) to differentiate; None: all that can be.
        heads: The objectives of its outputs.
        consumed: Which outputs (in flat order) other stages take.
        tied: Which trainable variables (by place) other stages have too.
        states: Names of the states that the stage hands to its own next window.
    """

    def __init__(
        self,
        model: Any,
        name: str | None = None,
        *,
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
        self.heads = Heads(heads or ())
        self.run_eagerly = run_eagerly
        self.carried = Carried.of(self.name, states, model) if states else None
        if self.carried is not None and input_gradients is not None:
            input_gradients = [*input_gradients, *self.carried.differentiable()]
        self._part = Part(model, self.name, input_gradients)
        self._consumed = None if consumed is None else tuple(consumed)
        self._tapes: Tapes
        if run_eagerly:
            self._tapes = EagerTapes(self._part, self.heads, recompute, tied)
        else:
            only_losses = self.carried is None and not any(self._consumed or ())  # come back to the stage
            self._tapes = CompiledTapes(self._part, self.heads, recompute, ends=only_losses)
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
        if self.carried is not None:
            self.carried.forget()

    def strips(self) -> tuple[int, ...]:
        """Which inputs, in flat order, lose their Keras mask to a layer of this stage."""
        return self._part.strips()

    def open_microbatches(self) -> tuple[int, ...]:
        """Microbatches whose backward is still to come."""
        return self._passes.microbatches()

    def _at(self, key: PassKey, what: str = "backward") -> str:
        return f"stage {self.name!r}, {what} of microbatch {key.microbatch}"


__all__ = ["FlatStage"]
