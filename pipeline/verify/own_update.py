"""One update of the pipeline beside one of the user's own optimizer: weights, slots, and statistics after the step.

Both begin with the pipeline's values, slots and gradients, which are judged by themselves: an optimizer that divides by
tiny second moments would make different updates of gradients that differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from pipeline.batch.step import Batch
from pipeline.compare.compare import Judged
from pipeline.compare.tolerance import FUSED_EPS
from pipeline.compiled.optimizer_slots import OptimizerSlots, Place
from pipeline.own.model import OwnModel
from pipeline.own.optimizer import OwnOptimizer
from pipeline.verify.own_numbers import NumberKey, Numbers, OnceMore, OwnPair, Rule, compared
from pipeline.verify.tape import UPDATE, Names
from stages.tape.embedding_rows import from_parts

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

Array = np.ndarray[Any, Any]
AFTER_STEPS = 1 << 29
"""Where it stands in the flow, as a step: behind those of the check "steps"."""
_KINDS = ("statistics", "weight", "optimizer")


@dataclass(frozen=True)
class OwnUpdate:
    """The part of the check "own" that is about an update.

    Attributes:
        session: The running pipeline.
        batch: What it is trained on.
        names: Of stages and variables.
        model: The user's own model.
        rule: What may differ.
    """

    session: Session
    batch: Batch
    names: Names
    model: OwnModel
    rule: Rule

    def judged(self, values: Mapping[int, Sequence[Array]], trained: Numbers, again: OnceMore) -> list[Judged]:
        """Let the pipeline make an update, and compare.

        Args:
            values: The stages' variables before it.
            trained: What the own model has after the same forward pass, as ``"after"``.
            again: Gives that once more.

        Returns:
            Comparisons; none where gradients are not finite, so that the update is left out.
        """
        session, compiled = self.session, self.session.workers.needs_compile("verify")
        divisor = None if compiled.loss_scaling is None else compiled.loss_scaling.scale
        slots, given = session.values.slots(), {}
        optimizer = OwnOptimizer(compiled, self.model)
        result = session.steps.step(self.batch, look=lambda driver: given.update(driver.get("given gradients")))
        if not result.finite:
            return []
        gradients = self._by_place(given)
        ours = {**_after(session.values.read("model")), **self._slots_of(session.values.slots())}

        begin = {
            i: [now if (new := trained["after", i, n]) is None else new for n, now in enumerate(part)]
            for i, part in values.items()
        }

        def run(seed: int | None = None, _: frozenset[str] = frozenset()) -> Numbers:
            self.model.assign(begin)  # a forward pass may change what is trained, too: SpectralNormalization does
            if seed is not None:
                self.model.disturb(seed)
            after = optimizer.update(slots, gradients, divisor)
            return {**_after(self.model.values()), **self._slots_of(after)}

        pairs = self._pairs({**ours, **(theirs := run())})
        statistics = [pair for pair in pairs if pair.kind == "statistics"]
        updated = [pair for pair in pairs if pair.kind != "statistics"]
        theirs = {**dict.fromkeys((pair.key for pair in updated), None), **theirs}
        found = compared(statistics, ours, trained, again, self.rule)
        return found + compared(updated, ours, theirs, run, replace(self.rule, plain=FUSED_EPS))

    def _by_place(self, given: Mapping[int, Sequence[Array | None]]) -> dict[Place, Any]:
        """{place of a trainable variable: its gradient as the stage's optimizer got it}."""
        return {
            (i, k): from_parts(_tensor(parts[2 * k]), _tensor(parts[2 * k + 1]), variable.shape)
            for i, parts in given.items()
            for k, variable in enumerate(self.model.trainable[i])
        }

    def _slots_of(self, slots: OptimizerSlots) -> dict[NumberKey, Array | None]:
        """OptimizerSlots by the first place of their variable, and each stage's own values by the stage."""
        first = self._owners()
        found: dict[NumberKey, Array | None] = {}
        for place, some in slots.of_variable.items():
            if first[place] == place:
                found |= {("optimizer", *place, name): value for name, value in some.items()}
        for i in range(len(self.names.stages)):
            found |= {("optimizer", i, -1, name): value for name, value in slots.own_of(i).items()}
        return found

    def _owners(self) -> dict[Place, Place]:
        """{place: the first place of the same variable}."""
        first: dict[int, Place] = {}
        for i, part in enumerate(self.model.trainable):
            for k, variable in enumerate(part):
                first.setdefault(id(variable), (i, k))
        return {(i, k): first[id(v)] for i, part in enumerate(self.model.trainable) for k, v in enumerate(part)}

    def _pairs(self, numbers: Numbers) -> list[OwnPair]:
        stages = self.names.stages
        found: list[OwnPair] = []

        def add(key: NumberKey, kind: str, stage: int, name: str, group: NumberKey) -> None:
            order = (UPDATE, AFTER_STEPS, _KINDS.index(kind), stage, len(found))
            found.append(OwnPair(key, kind, stages[stage], name, order, group))

        for i, described in self.session.workers.driver().descriptions.items():
            for n, variable in enumerate(described.variables):
                name = f"{stages[i]}/{variable.name}"
                if variable.trained:
                    add(("after", i, n), "weight", i, name, ("after", i, n))
                elif variable.is_weight:
                    add(("after", i, n), "statistics", i, name, ("statistics", name.rpartition("/")[0]))
        for key in numbers:
            if key[0] == "optimizer":
                _, stage, k, slot = key
                owner = self.names.variables[stage, k] if k >= 0 else stages[stage]
                add(key, "optimizer", stage, f"{owner}: {slot}", ("optimizer", slot))
        return found


def _after(values: Mapping[int, Sequence[Array]]) -> dict[NumberKey, Array | None]:
    return {("after", i, n): value for i, part in values.items() for n, value in enumerate(part)}


def _tensor(array: Array | None) -> Any | None:
    return None if array is None else tf.constant(array)


__all__ = ["AFTER_STEPS", "OwnUpdate"]
