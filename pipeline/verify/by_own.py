"""Judge a step by the user's own objects: model, loss and optimizer themselves, run in the user's own process.

The reference of "tape" is made from the same recipe as the workers; where that recipe lost something, both compute the
same wrong numbers. Here nothing is a copy: the model that was split is called as Keras calls it, the loss is resolved
by Keras's own trainer, and the optimizer is the object that `compile` was given. All under one tape, over the whole
batch.

    the pipeline                                    the user's process (pipeline.own)
    outputs of the batch, in inference              own model
    losses and dL/dvariables of a training step     own model, own loss, one tape
    one update, and statistics after it             own optimizer, from the pipeline's gradients and slots

What rounding may do is the rule of `Tolerance.elsewhere`. A model that does not give the same numbers twice is not
judged. Where something differs, the model's parts are run one by one to find the first stage that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.step import Batch
from pipeline.compare.compare import Judged
from pipeline.model.merge import StageValues
from pipeline.own.chance import layers_that_draw, told
from pipeline.own.lent import Lent, lent
from pipeline.own.model import OwnModel
from pipeline.own.sent import sent_whole
from pipeline.verify.own_numbers import (
    CannotJudgeError,
    NumberKey,
    Numbers,
    OwnPair,
    Rule,
    UnrepeatableError,
    compared,
    number,
)
from pipeline.verify.own_update import OwnUpdate
from pipeline.verify.tape import FORWARD, LOSS, Names, Observed, order_of_sum
from stages.worker.orders import Mode

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

Array = np.ndarray[Any, Any]
LATE = 1 << 29
"""In place of a microbatch: what one tape finds names one, and comes first."""


@dataclass
class ByOwn:
    """The check "own".

    Attributes:
        session: The running pipeline; the caller keeps its values and puts them back.
        batch: What is verified.
        tolerance: The user's own, or None.
        names: Of stages and variables.
        loss: The own model's, once it was run.
    """

    session: Session
    batch: Batch
    tolerance: float | None
    names: Names
    loss: float | None = None
    _trained: Numbers = field(default_factory=dict)
    _loan: Lent | None = None

    @property
    def refused(self) -> str:
        """Why there is nothing to compare with; "" if there is."""
        session, names = self.session, self.names.stages
        built = [names[i] for i, segment in enumerate(session.setup.segments) if segment.model is None]
        if built:
            return f"stage {built[0]!r} is built in its worker only, so this process has no model to compare with"
        if session.workers.loaded_from:
            return f"the models in this process were read from {session.workers.loaded_from}, none of them is your own"
        if session.setup.options.keep_state:
            return "batches begin with the states that the one before left (keep_state=True), which no model here has"
        if session.setup.original is None and any(segment.states for segment in session.setup.segments):
            return "a part takes its states as inputs, which the pipeline hands on"
        if session.setup.options.truncate is not None and len(self.batch.lengths) > 1:
            return f"gradients through time are cut on purpose (truncate={session.setup.options.truncate})"
        return ""

    def judged(self, ours: Observed) -> list[Judged]:
        """Compare a step, and an update that the pipeline makes for this; its values are changed afterwards.

        Args:
            ours: The pipeline's step: what was at its cuts, losses, gradients.

        Raises:
            CannotJudgeError: The own objects cannot say what is right.
        """
        values, states = self.session.values.read("model"), self.session.values.read("layer states")
        predicted = self._predicted()
        self.session.workers.driver().set("layer states", states)  # a prediction moves them on as well
        with self._lent() as loan:
            self.model.begin_with(states)
            self._loan = loan
            try:
                found = self._step(values, ours, predicted)
                return found + self._update(values)
            except UnrepeatableError as error:
                why = self._drawing(values)
                raise CannotJudgeError(f"{error}{why and f': {why}'}") from error

    @property
    def changed(self) -> list[str]:
        """Paths of the user's variables that did not get their bits back."""
        return [] if self._loan is None else self._loan.changed

    def chance(self) -> str:
        """Which layers draw random numbers that are not Keras's, in words; "" if none does. All is put back."""
        with self._lent():
            self.model.begin_with(self.session.values.read("layer states"))
            return self._drawing(self.session.values.read("model"))

    def _drawing(self, values: StageValues) -> str:
        return told(layers_that_draw(lambda: self._run(values)), self.session.setup.options.scheme == "inproc")

    @contextmanager
    def _lent(self) -> Iterator[Lent]:
        """Everything of the user's that a run may change: variables come back, attributes are held anew."""
        session, compiled = self.session, self.session.workers.needs_compile("verify")
        besides = [variable for some in session.workers.besides().values() for variable in some]
        slots = [variable for one in compiled.optimizers if one is not None for variable in one.variables]
        own = {id(v): v for v in [*self.model.variables, *besides, *slots]}.values()
        with session.steps.calling_own(), lent(own) as loan:
            yield loan

    def _step(self, values: StageValues, ours: Observed, predicted: Numbers) -> list[Judged]:
        try:
            theirs = self._run(values)
        except CannotJudgeError:
            raise
        except Exception as error:  # a layer may need what its worker has
            what = f"{type(error).__name__}: {error}"
            raise CannotJudgeError(f"your own model cannot be run on this batch in this process: {what}") from error
        self._trained, total = theirs, theirs["loss", ""]
        self.loss = None if total is None else float(total)
        found = self._compared(values, {**predicted, **self._of_pipeline(ours)}, theirs)
        if any(one.order is not None and one.row.kind in ("prediction", "loss") for one in found):
            return self._first_difference(values, ours) + found
        return found

    def _update(self, values: StageValues) -> list[Judged]:
        if self.session.workers.needs_compile("verify").optimizer is None:
            return []
        update = OwnUpdate(self.session, self.batch, self.names, self.model, self.rule)
        return update.judged(values, self._trained, lambda seed, kinds: self._run(values, seed, kinds))

    @cached_property
    def model(self) -> OwnModel:
        """The user's own model and loss."""
        setup, compiled = self.session.setup, self.session.workers.needs_compile("verify")
        return OwnModel(setup.segments, setup.wires, setup.original, compiled)

    @property
    def rule(self) -> Rule:
        """What may differ."""
        return Rule(self.model.precision, self.tolerance)

    def _run(self, values: StageValues, seed: int | None = None, kinds: frozenset[str] = frozenset()) -> Numbers:
        """What the own model gives: outputs in inference, losses, gradients and statistics of training.

        Args:
            values: What the variables begin with.
            seed: As `OwnModel.disturb` takes it; None: as they are.
            kinds: Of `NumberKey`; what none of them needs is not computed. Default: all.
        """
        numbers: dict[NumberKey, Array | None] = {}
        if not kinds or "prediction" in kinds:
            self._given(values, seed)
            inference = self.model.run(self._inputs, training=False)
            numbers |= {("prediction", name): array for name, array in inference.outputs.items()}
            if kinds == {"prediction"}:
                return numbers
        self._given(values, seed)
        compiled = self.session.workers.needs_compile("verify")
        scale = None if compiled.loss_scaling is None else compiled.loss_scaling.scale
        gradients = not kinds or "gradient" in kinds
        found = self.model.run(self.batch, training=True, gradients=gradients, loss_scale=scale)
        numbers["loss", ""] = number(found.loss)
        for one in compiled.objectives:
            if one.label in found.losses:
                numbers |= _losses(one.label, found.losses[one.label], one.weight)
        for i, part in enumerate(self.model.trainable) if gradients else ():
            numbers |= {("gradient", i, k): found.gradients.get(id(v)) for k, v in enumerate(part)}
        after = self.model.values()
        numbers |= {("after", i, n): value for i, part in after.items() for n, value in enumerate(part)}
        if len(self.batch.lengths) > 1 and seed is None:
            self._refuse_state_in_windows(values, after)
        return numbers

    def _given(self, values: StageValues, seed: int | None) -> None:
        self.model.assign(values)
        if seed is not None:
            self.model.disturb(seed)

    def _refuse_state_in_windows(self, before: StageValues, after: StageValues) -> None:
        for i, described in self.session.workers.driver().descriptions.items():
            for variable, a, b in zip(described.variables, before[i], after[i], strict=True):
                if a.tobytes() != b.tobytes():
                    raise CannotJudgeError(
                        f"training changes {variable.name!r} (statistics or random numbers), per window in the "
                        "pipeline, once over the whole length in your own model"
                    )

    def _of_pipeline(self, ours: Observed) -> Numbers:
        """What the pipeline's own step gave."""
        found: dict[NumberKey, Array | None] = {("loss", ""): number(ours.result.loss)}
        specs = self.session.workers.driver().specs
        weights = {head.label: head.weight for spec in specs.values() for head in spec.heads}
        for label, loss in ours.result.losses.items():
            found |= _losses(label, loss, weights.get(label))
        return found | {("gradient", i, k): ours.gradients[i][k] for i, k in self.names.variables}

    def _compared(self, values: StageValues, ours: Numbers, theirs: Numbers) -> list[Judged]:
        """Outputs, losses and gradients."""
        names, wires = self.names, self.session.setup.wires
        stages, last = names.stages, len(names.stages)
        pairs = [
            OwnPair(("prediction", name), "prediction", stages[i], name, (LOSS, -1, i), ("prediction", name))
            for name, i in wires.outputs
        ]
        labels = [label for label in wires.labels if label in names.judges and ("loss", label) in theirs]
        for label in labels if len(labels) > 1 else ():
            at = names.judges[label]
            for kind, name, place in (("loss", label, at), ("weighted", f"{label}, weighted", last)):
                pairs.append(OwnPair((kind, label), "loss", stages[at], name, (LOSS, place), (kind, label)))
        stage = stages[names.judges[labels[0]]] if len(labels) == 1 else ""
        if theirs["loss", ""] is not None:
            pairs.append(OwnPair(("loss", ""), "loss", stage, "loss", (LOSS, last + 1), ("loss", "")))
            pairs += [
                OwnPair(("gradient", i, k), "gradient", stages[i], name, order_of_sum(names, i, k), ("gradient",))
                for (i, k), name in names.variables.items()
            ]
        return compared(pairs, ours, theirs, lambda seed, kinds: self._run(values, seed, kinds), self.rule)

    def _first_difference(self, values: StageValues, ours: Observed) -> list[Judged]:
        """What every part gives to others, and its own losses; nothing of a batch that is cut in time."""
        if self.batch.lengths:
            return []
        names = self.names
        sent = sent_whole(ours.seen)
        mine: dict[NumberKey, Array | None] = {("given", tensor): array for (_, tensor), array in sent.items()}
        mine |= {("own losses", i): number(value) for i, value in ours.result.own_losses.items()}

        def run(seed: int | None = None, _: frozenset[str] = frozenset()) -> Numbers:
            self._given(values, seed)
            parts = self.model.parts(self.batch, training=True)
            found: dict[NumberKey, Array | None] = {("given", tensor): parts.tensors[tensor] for _, tensor in sent}
            return found | {("own losses", i): number(parts.own_losses.get(i)) for i in range(len(names.stages))}

        pairs = [
            OwnPair(("given", tensor), "activation", names.stages[i], tensor, (FORWARD, LATE, 0, i), ("given", tensor))
            for i, tensor in sent
        ]
        for i, name in enumerate(names.stages):
            pairs.append(OwnPair(("own losses", i), "loss", name, f"{name}: own losses", (LOSS, i), ("own losses", i)))
        theirs = run()
        pairs = [pair for pair in pairs if theirs[pair.key] is not None or mine.get(pair.key) is not None]
        return compared(pairs, mine, theirs, run, self.rule)

    @property
    def _inputs(self) -> Batch:
        return replace(self.batch, targets={}, sample_weights={})

    def _predicted(self) -> Numbers:
        """The pipeline's outputs of the batch, in inference."""
        plan = self.session.steps.plan(self.batch, training=False)
        result = self.session.workers.driver().run(plan, Mode.PREDICT, self._inputs)
        return {("prediction", name): array for name, array in result.outputs.items()}


def _losses(label: str, loss: float, weight: float | None) -> dict[NumberKey, Array | None]:
    """An output's loss, by itself and by its weight."""
    return {("loss", label): number(loss), ("weighted", label): number(loss * (1.0 if weight is None else weight))}


__all__ = ["ByOwn", "CannotJudgeError"]
