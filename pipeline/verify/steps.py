"""Judge updates: after each of k live training steps, everything that training changes beside Keras in one process.

Step by step the reference starts from what the pipeline has, computes the same step, and lets Keras's own optimizer,
one over all stages where the user gave one, update the joined model. So k right steps are k proofs, and rounding of
one step is not blown up by the next: an optimizer that divides by tiny second moments turns the last bit of a
gradient into a different update. For the same reason compiled stages' own gradients, which are judged by "tape", are
what the reference's optimizer is given; eager ones it computes itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.step import Batch, StepResult
from pipeline.compare.compare import FlowOrder, Judged, Pair, judge, largest
from pipeline.compare.tolerance import Tolerance
from pipeline.compiled.compiled import Compiled
from pipeline.compiled.optimizer_slots import OptimizerSlots
from pipeline.reference.orders import MakeOptimizers
from pipeline.runtime.values import values_of
from pipeline.verify.tape import UPDATE, Allowance, Names
from stages.loss.precision import float_of_losses
from stages.worker.orders import Mode, Service

if TYPE_CHECKING:
    from pipeline.runtime.session import Session
    from pipeline.verify.question import Question

Array = np.ndarray[Any, Any]
_KINDS = ("metric", "seed", "statistics", "weight", "optimizer", "prediction")
"""In the order in which the first deviation is looked for."""


@dataclass
class Steps:
    """The check "steps".

    Attributes:
        session: The running pipeline, whose values are kept by the caller.
        batch: What every step is made of.
        question: How many steps, and what may differ.
        names: What stages are called.
    """

    session: Session
    batch: Batch
    question: Question
    names: Names
    _parts: dict[tuple[str, int, str], list[Pair]] = field(default_factory=dict)
    _tolerances: dict[str, Tolerance] = field(default_factory=dict)

    @property
    def refused(self) -> str:
        """Why it cannot be made; "" if it can."""
        return "compile() was given no optimizer" if self._compiled.optimizer is None else ""

    def run(self) -> list[Judged]:
        """Make the steps and judge them."""
        driver, eager, compiled = self.session.workers.driver(), self._eager, self._compiled
        reference = self.session.reference.synchronised()
        plan = self.session.steps.plan(self.batch, training=True)
        described = {int(i): slots for reply in reference.ask(MakeOptimizers()) for i, slots in reply.value.items()}
        driver.call(Service.RESET_METRICS)
        reference.call(Service.RESET_METRICS)
        for step in range(1, self.question.steps + 1):
            slots = self.session.values.slots()
            self.session.reference.synchronised()  # takes over the values
            reference.set("optimizer", {i: slots.ordered(_wanted(entries)) for i, entries in described.items()})
            rates, scaling = compiled.learning_rates(len(self.session.setup.segments)), compiled.loss_scaling
            loss_scale = None if scaling is None else scaling.scale
            ours, gradients = self._live_step()
            theirs = reference.run(plan, Mode.TRAIN, self.batch, loss_scale=loss_scale)
            if not eager:
                reference.set("given gradients", gradients)
            if ours.finite:
                reference.apply(rates, None, loss_scale)
            else:
                reference.discard()
            allowed = Allowance(eager, theirs.roundings, self.question.tolerance)
            self._tolerances |= {kind: allowed.of("gradient" if kind == "statistics" else kind) for kind in _KINDS}
            self._tolerances["seed"] = Tolerance.bits()
            self._metrics(step, ours, theirs)
            self._variables(step, reference.get("model"))
            self._slots(step, _slots_of(described, values_of(reference, "optimizer")))
        self._predictions(self.question.steps)
        return self._judged()

    @property
    def _eager(self) -> bool:
        return self._compiled.run_eagerly

    @property
    def _compiled(self) -> Compiled:
        return self.session.workers.needs_compile("verify")

    def _live_step(self) -> tuple[StepResult, dict[int, list[Array | None]]]:
        """One training step as `fit` makes it: its result, and its gradients as the optimizers got them."""
        found: dict[int, list[Array | None]] = {}
        result = self.session.steps.step(self.batch, look=lambda driver: found.update(driver.get("given gradients")))
        return result, found

    def _add(self, kind: str, stage: int, name: str, step: int, ours: Array | None, theirs: Array | None) -> None:
        order: FlowOrder = (UPDATE, step, _KINDS.index(kind), stage, len(self._parts))
        self._parts.setdefault((kind, stage, name), []).append(Pair(ours, theirs, order, f"step {step}"))

    def _metrics(self, step: int, ours: StepResult, theirs: StepResult) -> None:
        for name in dict.fromkeys([*theirs.metrics, *ours.metrics]):
            values = [result.metrics.get(name) for result in (ours, theirs)]
            self._add(
                "metric", -1, name, step, *(None if v is None else np.asarray(v, float_of_losses()) for v in values)
            )

    def _variables(self, step: int, theirs: Mapping[int, Sequence[Array | None]]) -> None:
        live = self.session.workers.driver()
        for i, arrays in live.get("model").items():
            for variable, ours, expected in zip(live.descriptions[i].variables, arrays, theirs[i], strict=True):
                kind = "weight" if variable.trained else "statistics" if variable.is_weight else "seed"
                self._add(kind, i, f"{self.names.stages[i]}/{variable.name}", step, ours, expected)

    def _slots(self, step: int, theirs: OptimizerSlots) -> None:
        ours, live = self.session.values.slots(), self.session.workers.driver()
        for place, slots in ours.of_variable.items():
            owner = _owner(place, live)
            for name, value in slots.items():
                title = f"{self.names.variables[place]}: {name}"
                self._add("optimizer", place[0], title, step, value, theirs.of_variable.get(owner, {}).get(name))
        for i, own in ours.own.items():
            for name, value in own.items():
                title = f"{self.names.stages[i]}: {name}"
                self._add("optimizer", i, title, step, value, theirs.own_of(i).get(name))

    def _predictions(self, step: int) -> None:
        session = self.session
        batch = Batch(self.batch.inputs, {}, {}, self.batch.sizes, self.batch.lengths)
        plan = session.steps.plan(batch, training=False)
        drivers = (session.workers.driver(), session.reference.synchronised())
        ours, theirs = (driver.run(plan, Mode.PREDICT, batch) for driver in drivers)
        allowed = Allowance(self._eager, theirs.roundings, self.question.tolerance)
        self._tolerances["prediction"] = allowed.of("prediction")
        for name, stage in session.setup.wires.outputs:
            self._add("prediction", stage, name, step, ours.outputs.get(name), theirs.outputs.get(name))

    def _judged(self) -> list[Judged]:
        norm = self._norm_tolerance()
        scales: dict[tuple[str, str], float] = {}
        for (kind, _, name), parts in self._parts.items():
            group = _group(kind, name)
            scales[group] = max(scales.get(group, 0.0), largest(part.theirs for part in parts))
        found = []
        for (kind, stage, name), parts in self._parts.items():
            tolerance = self._tolerances[kind]
            if norm is not None and kind in ("weight", "optimizer", "prediction"):
                tolerance = max(tolerance, norm, key=lambda one: one.relative)
            some = parts[0].theirs
            if some is not None and some.dtype.kind in "biu":
                tolerance = Tolerance.bits()
            title = self.names.stages[stage] if stage >= 0 else ""
            found.append(
                judge("steps", kind, title, name, parts, tolerance, scale=scales[_group(kind, name)], repeated=True)
            )
        return sorted(found, key=lambda judged: _KINDS.index(judged.row.kind))

    def _norm_tolerance(self) -> Tolerance | None:
        """Where gradients are clipped by their global norm: the reference sums it in the order of the stages."""
        compiled = self._compiled
        if compiled.global_clipnorm is None or self.question.tolerance is not None:
            return None
        stages = self.session.workers.driver().descriptions.values()
        sizes = [math.prod(variable.shape) for stage in stages for variable in stage.variables]
        terms = len(sizes) + math.ceil(math.log2(max(sizes, default=1) + 1))
        found = Tolerance.reordered("float32", terms)
        return Tolerance(found.relative, f"the global norm of all gradients: {found.why}")


def _group(kind: str, name: str) -> tuple[str, str]:
    """What is judged by one size: a slot over all variables, a layer's statistics, else a variable by itself.

    (A moving mean may be nothing but rounding; the moving variance beside it says how large the layer's values are.)
    """
    if kind == "optimizer":
        return kind, name.rpartition(": ")[2]
    return kind, name.rpartition("/")[0] if kind == "statistics" else name


def _slots_of(
    described: Mapping[int, Sequence[Sequence[Any]]], values: Mapping[int, Sequence[Array]]
) -> OptimizerSlots:
    """The reference's optimizer variables by what they belong to."""
    return OptimizerSlots.of(
        ((stage, k), name, value)
        for i, entries in described.items()
        for (stage, k, name), value in zip(entries, values[i], strict=True)
    )


def _wanted(entries: Sequence[Sequence[Any]]) -> list[tuple[tuple[int, int], str]]:
    return [((stage, k), name) for stage, k, name in entries]


def _owner(place: tuple[int, int], live: Any) -> tuple[int, int]:
    """Where a variable's slots are in the reference: those of a tied one belong to its first stage."""
    for tie in live.specs[place[0]].ties:
        first = tie.stages[0]
        if tie.place == place[1] and first != place[0]:
            return first, next(one.place for one in live.specs[first].ties if one.name == tie.name)
    return place
