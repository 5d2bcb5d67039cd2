"""One party's share of a step: its stages forward for all microbatches, then backward, tensors sent and awaited.

Stages run in the plan's order, each over all microbatches before the next, and backward the other way round. Every
party does its part of the one order (stage, microbatch), so nobody waits for somebody who waits for him. All
microbatches of a batch are in flight at once, and parties work at the same time on different ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.errors import PartyStoppedError
from pipeline.parties.bound_party import BoundParty
from pipeline.parties.party_plan import PartyEdge
from pipeline.parties.wire import ACTIVATION, GRADIENT, PartyWire
from stages.loss.heads import Objective
from stages.tape.contract import Opened, PassKey
from stages.tape.optimizer_update import update
from stages.tape.tensors import to_array, to_tensor

Array = np.ndarray[Any, Any]


class PartyPass(NamedTuple):
    """The result of a pass at the party with y; elsewhere both are None.

    Attributes:
        loss: Of the batch, without the losses that layers add; None where it is not judged.
        outputs: The model's output, (n, ...).
    """

    loss: float | None = None
    outputs: Array | None = None


class PartyStep:
    """The passes of one party over its stages.

    Args:
        party: Its stages and data.
        wire: To the others.
    """

    def __init__(self, party: BoundParty, wire: PartyWire) -> None:
        self._party, self._wire, self._plan = party, wire, party.plan
        self._here: dict[tuple[str, str, int], Any] = {}

    def forward(self, rows: Array, training: bool, judging: bool = True) -> PartyPass:
        """All stages forward over a batch.

        Args:
            rows: Of the batch, (n,) numbers.
            training: Whether tapes stay open for `backward`.
            judging: Whether the loss is computed and the metrics count.

        Raises:
            PartyStoppedError: Something is not finite, or another party stopped.
            PartyLostError: Another party is gone.
            PartySilentError: It sent nothing.
        """
        self._here.clear()
        sizes = self._wire.sizes
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        objectives = self._objectives(rows, sizes) if judging else [None] * len(parts)
        outputs, losses = [], []
        for name in self._party.stages:
            judge = self._plan.stage(name).y
            for microbatch, part in enumerate(parts):
                objective = objectives[microbatch] if judge else None
                opened = self._stage_forward(name, microbatch, part, len(rows), training, objective)
                if judge:
                    outputs.append(np.array(opened.values[0]))
                    losses += [float(loss) for loss in opened.losses]
        if not outputs:
            return PartyPass()
        loss = sum(losses) if losses else None
        if loss is not None and not np.isfinite(loss):
            raise PartyStoppedError(f"the loss of step {self._wire.step} is {loss}, made by {self._party.name}")
        return PartyPass(loss, np.concatenate(outputs))

    def backward(self) -> None:
        """All stages backward over the batch that went forward.

        Raises:
            PartyStoppedError: As `forward`; and where a gradient of a variable here is not finite.
            PartyLostError: As `forward`.
            PartySilentError: As `forward`.
        """
        for name in reversed(self._party.stages):
            for microbatch in range(len(self._wire.sizes)):
                self._stage_backward(name, microbatch)
        for gradient, variable in self._pairs():
            values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
            if not bool(tf.reduce_all(tf.math.is_finite(values))):
                raise PartyStoppedError(
                    f"the gradient of {self._party.name}'s {variable.path!r} in step {self._wire.step} is not finite"
                )

    def apply(self) -> None:
        """One update of this party's optimizer."""
        pairs = self._pairs()
        if self._party.optimizer is not None and self._party.trainable:
            update(self._party.optimizer, [gradient for gradient, _ in pairs], [variable for _, variable in pairs])
        for stage in self._party.stages.values():
            stage.zero_gradients()

    def finish(self) -> None:
        """What Keras does with an optimizer when a training ends: averaged weights take their variables' place."""
        if self._party.optimizer is not None and self._party.trainable:
            self._party.optimizer.finalize_variable_values(self._party.trainable)

    def _pairs(self) -> list[tuple[Any, Any]]:
        """Gradients that exist and their variables."""
        each = [
            pair
            for stage in self._party.stages.values()
            for pair in zip(stage.as_given(), stage.trainable_variables, strict=True)
        ]
        return [(gradient, variable) for gradient, variable in each if gradient is not None]

    def _stage_forward(
        self, name: str, microbatch: int, rows: Array, samples: int, training: bool, objective: Objective | None
    ) -> Opened:
        inputs = self._party.inputs(name, rows)
        inputs += [self._taken(ACTIVATION, edge, microbatch, edge.source) for edge in self._plan.into(name)]
        stage, share = self._party.stages[name], len(rows) / samples
        opened = stage.forward_flat(inputs, PassKey(microbatch), training, share, objective)
        for edge, value in zip(self._plan.out_of(name), opened.values, strict=False):
            self._give(ACTIVATION, edge, microbatch, edge.target, value)
        return opened

    def _objectives(self, rows: Array, sizes: tuple[int, ...]) -> list[Objective | None]:
        """What each microbatch is judged by, at the party with y; elsewhere nothing."""
        y = self._party.party.y
        if y is None:
            return [None] * len(sizes)
        heads = self._party.stages[self._plan.judge.name].heads
        targets = np.split(y[rows], np.cumsum(sizes)[:-1])
        weights = self._party.weights(sizes, targets)
        return [heads.objective(target, None, weight) for target, weight in zip(targets, weights, strict=True)]

    def _stage_backward(self, name: str, microbatch: int) -> None:
        stage, plan = self._party.stages[name], self._plan
        if plan.stage(name).y:
            gradients: list[Any] = [None]
        else:
            gradients = [self._taken(GRADIENT, edge, microbatch, edge.target) for edge in plan.out_of(name)]
        found = stage.backward_flat(gradients, PassKey(microbatch))
        into = plan.into(name)
        for edge, gradient in zip(into, found[len(found) - len(into) :], strict=True):
            self._give(GRADIENT, edge, microbatch, edge.source, gradient)

    def _give(self, kind: str, edge: PartyEdge, microbatch: int, to: str, value: Any) -> None:
        if self._plan.owner(to) == self._party.name:
            self._here[(kind, edge.tensor, microbatch)] = value
        else:
            self._wire.send_tensor(kind, edge, microbatch, None if value is None else to_array(value))

    def _taken(self, kind: str, edge: PartyEdge, microbatch: int, of: str) -> Any:
        if self._plan.owner(of) == self._party.name:
            return self._here.pop((kind, edge.tensor, microbatch))
        array = self._wire.receive_tensor(kind, edge, microbatch)
        return None if array is None else to_tensor(array)


__all__ = ["PartyPass", "PartyStep"]
