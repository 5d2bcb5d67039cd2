"""The reference's own updates: Keras's optimizers over the joined model, as a user of one process would apply them.

One optimizer for all stages is one object here, which clips by the global norm itself; a stage's worker has one for its
own variables, and the driver decides about norms. Both must end at the same weights and slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.reference.one_tape.batch import owned, owner
from stages.recipe.optimizer_state import as_unbuilt, leave_undecayed
from stages.tape.optimizer_update import rescaled, update
from stages.worker import snapshot
from stages.worker.hosted_stage import HostedStage

Array = np.ndarray[Any, Any]


class ReferenceOptimizer:
    """One Keras optimizer over the variables of some stages.

    Args:
        optimizer: Like the user's, clipping included; not built.
        hosted: The stages that it updates, in order; variables that an earlier stage of all has too are left out.
        undecayed: {stage: which of its trainable variables, by place, are left out of weight decay}.
    """

    def __init__(self, optimizer: Any, hosted: Sequence[HostedStage], undecayed: Mapping[int, Sequence[int]]) -> None:
        self._hosted, self._eager = hosted, hosted[0].spec.run_eagerly
        self._functions: dict[Any, Any] = {}
        self.variables = [v for stage in hosted for v in owned(stage)]
        self._optimizer = optimizer
        left_out = [stage.stage.trainable_variables[k] for stage in hosted for k in undecayed[stage.spec.index]]
        if left_out:
            leave_undecayed(self._optimizer, left_out)
        self._optimizer.build(self.variables)

    def described(self) -> list[list[Any]]:
        """[stage, index among its trainable variables or -1, slot name] of each of the optimizer's variables."""
        places = self.places
        first = self._hosted[0].spec.index
        return [
            [*(places[slot.variable] if slot.variable >= 0 else (first, -1)), slot.name]
            for slot in snapshot.optimizer_slots(self._optimizer, self.variables)
        ]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(stage, index among its trainable variables) of each variable."""
        at = {id(v): (h.spec.index, k) for h in self._hosted for k, v in enumerate(h.stage.trainable_variables)}
        return [at[id(variable)] for variable in self.variables]

    def read(self) -> list[Array]:
        """The values of the optimizer's variables."""
        return snapshot.read(self._optimizer.variables)

    def write(self, values: Sequence[Array]) -> None:
        """Set them."""
        snapshot.write(self._optimizer.variables, values, "the reference's optimizer")

    def apply(self, gradients: Mapping[int, Sequence[Any]], rate: float | None, divisor: float | None) -> None:
        """One update.

        Args:
            gradients: {stage: dL/dvariable of each trainable variable, or None}.
            rate: The learning rate; None leaves it.
            divisor: What the gradients are divided by first (the loss scale).
        """
        if rate is not None:
            self._optimizer.learning_rate = rate
        given = [gradients[i][k] for i, k in self.places]
        there = tuple(n for n, gradient in enumerate(given) if gradient is not None)
        function = self._update if self._eager else self._functions.get((there, divisor))
        if function is None:  # compiled as the stages' updates are: an optimizer like Ftrl magnifies a last bit
            function = self._functions[there, divisor] = tf.function(self._update, autograph=False)
        function([given[n] for n in there], there, divisor)

    def _update(self, gradients: Sequence[Any], there: Sequence[int], divisor: float | None) -> None:
        update(self._optimizer, rescaled(gradients, None, divisor), [self.variables[n] for n in there])


def reference_optimizers(
    hosted: Sequence[HostedStage], undecayed: Mapping[int, Sequence[int]]
) -> dict[int, ReferenceOptimizer]:
    """{first stage it is for: an optimizer}: one for all stages where only the first has one, else one each."""
    by_index = {stage.spec.index: stage for stage in hosted}
    given = {i: stage.objects.optimizer for i, stage in by_index.items() if stage.objects.optimizer is not None}
    if len(given) == 1 and len(hosted) > 1:
        return {i: ReferenceOptimizer(as_unbuilt(one), hosted, undecayed) for i, one in given.items()}
    return {i: ReferenceOptimizer(as_unbuilt(one), [by_index[i]], undecayed) for i, one in given.items()}


def share_values(hosted: Sequence[HostedStage]) -> None:
    """Give every stage's copy of a tied variable the owner's value."""
    by_index = {stage.spec.index: stage for stage in hosted}
    for stage in hosted:
        for tie in stage.ties:
            if tie.stages[0] != stage.spec.index:
                stage.stage.trainable_variables[tie.place].assign(owner(tie, by_index).value)
