"""Steps of a pipeline: batches made ready, plans made once, and forward, backward and update ordered of the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.batch.data import InputSpec, make_batch
from pipeline.batch.inputs import InputNames
from pipeline.batch.step import Batch, StepResult
from pipeline.plan.placing import placed
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import build_plan, forward_only
from pipeline.plan.step_events import StepEvents, events_of
from pipeline.plan.timeline import Timeline, measured_timeline
from pipeline.runtime.driver import Driver
from pipeline.runtime.interrupts import deferred_interrupts
from pipeline.runtime.meaning import Meaning
from pipeline.runtime.run_ahead import run_ahead
from pipeline.runtime.runnable import check_runnable
from pipeline.runtime.setup import Setup
from pipeline.runtime.workers import Workers
from stages.grid import is_over_time
from stages.worker.orders import Mode
from transport.message import DRIVER

Array = np.ndarray[Any, Any]
StageGradients = dict[int, list[Array | None]]
"""{stage: dL/dvariable of each of its trainable variables, in order; None: there is none}."""


class StepRunner:
    """Runs steps on the workers.

    Args:
        setup: What the pipeline is made of.
        workers: Who computes.

    Attributes:
        look: Is shown every batch before it is trained (`Mode.TRAIN`), evaluated (`Mode.TEST`) or predicted
            (`Mode.PREDICT`).
        look_at_parts: Is shown every batch before it is verified.
        begin: Is called before a batch is made ready.
        calling_own: Makes what surrounds every run of the user's own layers, losses and metrics in this process.

    Raises:
        ScheduleError, PlanError: The schedule makes no plan for these stages and options that workers can run.
    """

    def __init__(self, setup: Setup, workers: Workers) -> None:
        self._setup, self._workers = setup, workers
        self.look: Callable[[Mode, Batch], None] = lambda mode, batch: None
        self.look_at_parts: Callable[[Batch], None] = lambda batch: None
        self.begin: Callable[[], None] = lambda: None
        self.calling_own: Callable[[], AbstractContextManager[None]] = nullcontext
        self._plans: dict[tuple[int, int, bool, bool], Plan] = {}
        self._meaning: Meaning | None = None
        self._names = InputNames.of(setup.wires.inputs, getattr(setup.original, "input", None))
        self._specs: Mapping[str, InputSpec | None] = {}
        self._specs_of: object = None
        workers.placement = self._plan(setup.options.microbatches, setup.options.windows, training=True).placement

    def train(
        self, x: Any, y: Any, sample_weight: Any, *, observe: str = "", trace: bool = False
    ) -> tuple[StepResult, int]:
        """Forward, backward and update of one batch; the result and the number of samples.

        Args:
            x: Arrays (n, ...) as `fit` takes them, like `y` and `sample_weight`.
            observe: As for `step`, like `trace`.
        """
        compiled = self._workers.needs_compile("training")
        compiled.needs_optimizer()
        with self._workers.turns:
            batch = self.batch(x, y, sample_weight, judged=compiled.judged)
            self.look(Mode.TRAIN, batch)
            return self.step(batch, observe=observe, trace=trace), sum(batch.sizes)

    def one_by_one(self) -> str:
        """Why no step may begin before the one in front of it was answered, in words; empty: it may."""
        if self._setup.options.recovery is not None:
            return "recovery writes all values down behind each of them"
        if self._workers.driver().looks_at_masks:
            return "the masks of a batch are looked at before it is trained"
        return self._workers.needs_compile("training").decides_after_steps

    def train_several(self, data: Iterable[tuple[Any, Any, Any]]) -> list[tuple[StepResult, int]]:
        """As `train` for one batch after another, without a round trip between them where nothing is decided there.

        A batch that does not fit is refused when those before it were trained. Where a step fails, all are undone.

        Args:
            data: (x, y, sample weights) of each batch.
        """
        compiled = self._workers.needs_compile("training")
        compiled.needs_optimizer()
        batches: list[Batch] = []
        refused: Exception | None = None
        with self._workers.turns:
            try:
                for x, y, sample_weight in data:
                    batch = self.batch(x, y, sample_weight, judged=compiled.judged)
                    self.look(Mode.TRAIN, batch)
                    batches.append(batch)
            except Exception as error:
                refused = error
            rates = compiled.learning_rates(len(self._setup.segments))
            with deferred_interrupts():
                work = [(self.plan(batch, training=True), batch) for batch in batches]
                results = run_ahead(self._workers.driver(), work, rates, compiled.to_adjust)
                compiled.adjusted()
                for _ in results:
                    compiled.count_update()
        if refused is not None:
            raise refused
        return [(result, sum(batch.sizes)) for result, batch in zip(results, batches, strict=True)]

    def step(
        self,
        batch: Batch,
        *,
        observe: str = "",
        trace: bool = False,
        look: Callable[[Driver], None] | None = None,
    ) -> StepResult:
        """Forward, backward and update.

        Args:
            batch: The batch.
            observe: As `Driver.run` takes it.
            trace: Whether the result has a timeline.
            look: Called with the workers between backward and update.
        """
        compiled = self._workers.needs_compile("training")
        driver, scaling = self._workers.driver(), compiled.loss_scaling
        loss_scale = None if scaling is None else scaling.scale
        with self._workers.turns, deferred_interrupts():
            plan = self.plan(batch, training=True)
            norms = compiled.global_clipnorm is not None
            result = driver.run(
                plan, Mode.TRAIN, batch, norms=norms, loss_scale=loss_scale, observe=observe, trace=trace
            )
            try:
                if look is not None:
                    look(driver)
                rates = compiled.learning_rates(len(self._setup.segments))
                scale = compiled.clip_scale(self._in_model_order(result.squared_norms)) if result.finite else None
            except BaseException:
                if not driver.closed:
                    driver.abandon_step()
                raise
            if result.finite:
                driver.apply(rates, scale, loss_scale, compiled.adjusted())
                compiled.count_update()
            else:
                driver.discard()
            if scaling is not None:
                scaling.decide(result.finite)
        return replace(result, timeline=self.measured(batch, result)) if trace else result

    def _in_model_order(self, values: Mapping[tuple[int, int], float]) -> list[float]:
        """Values by (stage, place of a trainable variable), in the order of the variables of the model that was split.

        Without one, stage after stage.
        """
        if not values:
            return []
        original = self._setup.original
        number = {} if original is None else {id(v): n for n, v in enumerate(original.variables)}
        found = {}
        for i, description in self._workers.driver().descriptions.items():
            model = self._setup.models.get(i)
            variables = [None] * len(description.variables) if model is None else model.variables
            for variable, info in zip(variables, description.variables, strict=True):
                found[i, info.place] = (number.get(id(variable), len(number)), i, info.place)
        return [values[place] for place in sorted(values, key=found.__getitem__)]

    def test(self, x: Any, y: Any, sample_weight: Any) -> tuple[StepResult, int]:
        """Loss and metrics of one batch; the result and the number of samples."""
        compiled = self._workers.needs_compile("evaluation")
        with self._workers.turns:
            batch = self.batch(x, y, sample_weight, judged=compiled.judged)
            self.look(Mode.TEST, batch)
            plan = self.plan(batch, training=False)
            return self._workers.driver().run(plan, Mode.TEST, batch), sum(batch.sizes)

    def predict(self, x: Any) -> list[Array]:
        """The outputs (n, ...) of one batch, in the pipeline's order."""
        with self._workers.turns:
            batch = self.batch(x, None, None, judged=())
            self.look(Mode.PREDICT, batch)
            found = self._workers.driver().run(self.plan(batch, training=False), Mode.PREDICT, batch).outputs
        return [found[name] for name, _ in self._setup.wires.outputs]

    def differentiate(
        self, batch: Batch, driver: Driver, *, observe: str = "", trace: bool = False
    ) -> tuple[StepResult, StageGradients]:
        """The result of one batch, and {stage: dL/dvariable of each trainable variable}; nothing is applied.

        Args:
            batch: The batch.
            driver: The workers, or the reference.
            observe: As `Driver.run` takes it, like `trace`.
        """
        compiled = self._workers.compiled
        scaling = None if compiled is None else compiled.loss_scaling
        loss_scale = None if scaling is None else scaling.scale
        with self._workers.turns, deferred_interrupts():  # or the next update would count these gradients too
            plan = self.plan(batch, training=True)
            result = driver.run(plan, Mode.GRADIENTS, batch, loss_scale=loss_scale, observe=observe, trace=trace)
            gradients = driver.get("gradients")
            driver.discard()
        if loss_scale is None:
            return result, gradients
        return result, {
            i: [value if value is None else value / value.dtype.type(loss_scale) for value in values]
            for i, values in gradients.items()
        }

    def timeline(self, x: Any, y: Any, sample_weight: Any, repeats: int) -> Timeline:
        """The median of some measured steps, in seconds, of which nothing is applied; a first one is not counted."""
        batch = self.batch(x, y, sample_weight, judged=self._workers.needs_compile("timeline").judged)
        plan, driver, found = self.plan(batch, training=True), self._workers.driver(), []
        for _ in range(repeats + 1):
            result = driver.run(plan, Mode.GRADIENTS, batch, trace=True)
            driver.discard()
            found.append(self.measured(batch, result))
        return sorted(found[1:], key=lambda timeline: timeline.step_time)[repeats // 2]

    def measured(self, batch: Batch, result: StepResult) -> Timeline:
        """The timeline of a training step of a batch that ran with a trace."""
        assert result.record is not None
        plan, wires = self.plan(batch, training=True), self._setup.wires
        step = StepEvents(plan, dict(wires.upstream()), wires.names, sum(batch.sizes), batch.at_once)
        return measured_timeline(result.spans, events_of(result.record, step))

    def plan(self, batch: Batch, training: bool) -> Plan:
        """The checked plan of a step; made once for each number of microbatches and windows."""
        at_once = training and batch.at_once
        if self._meaning is not None:
            if training:
                self._meaning.say(batch)
            self._meaning.say_of_windows(batch)
        return self._plan(len(batch.sizes), max(1, len(batch.lengths)), training, at_once)

    def _plan(self, microbatches: int, windows: int, training: bool, at_once: bool = False) -> Plan:
        key, options = (microbatches, windows, training, at_once), self._setup.options
        if key not in self._plans:
            wiring, stages = self._setup.wires.upstream(), len(self._setup.segments)
            if training:
                schedule = "gpipe" if at_once else options.schedule
                plan = build_plan(
                    schedule, stages, microbatches, windows=windows, truncate=options.truncate, wiring=wiring
                )
                plan = check_runnable(plan)
            else:
                plan = forward_only(stages, microbatches, windows=windows).validate(wiring)
            # The first plan says where stages are; in processes, they stay there.
            self._plans[key] = placed(plan, self._workers.placement, wiring) if self._plans else plan
        return self._plans[key]

    def batch(self, x: Any, y: Any, sample_weight: Any, judged: Sequence[str]) -> Batch:
        """One batch, converted, checked and cut.

        Args:
            x: Arrays (n, ...) as `fit` takes them, like `y` and `sample_weight`.
            judged: The labels of the outputs that need targets.

        Raises:
            DataError: Something does not fit.
            CompileError: A loss or metric needs the whole batch, which is cut in time.
        """
        self.begin()
        wires, options, compiled = self._setup.wires, self._setup.options, self._workers.compiled
        batch = make_batch(
            x,
            y,
            sample_weight,
            inputs=self._input_specs(self._workers.driver()),
            names=self._names,
            microbatches=options.microbatches,
            labels=wires.labels,
            judged=judged,
            windows=options.windows,
            judged_over_time=self.over_time(judged) if options.windows > 1 else (),
        )
        if not judged or compiled is None:
            return batch
        if self._meaning is None or self._meaning.compiled is not compiled:
            self._meaning = Meaning(self._setup, self, self._workers.driver, compiled)
        return replace(batch, ways=self._meaning.ways(batch), loss_weights=compiled.loss_weights())

    def over_time(self, labels: Sequence[str]) -> list[str]:
        """Those outputs that have a time axis."""
        driver, wires = self._workers.driver(), self._setup.wires
        places = dict(zip(wires.labels, wires.outputs, strict=True))
        told = {label: driver.output_spec(stage, name) for label, (name, stage) in places.items()}
        return [label for label in labels if (spec := told[label]) is not None and is_over_time(spec.shape)]

    def _input_specs(self, driver: Driver) -> Mapping[str, InputSpec | None]:
        """The pipeline's inputs, with what the stages that take them expect; found once for the same workers."""
        if self._specs_of is not driver.descriptions:
            found: dict[str, InputSpec | None] = dict.fromkeys(self._setup.wires.inputs)
            for index, description in driver.descriptions.items():
                for i, (name, source) in enumerate(self._setup.wires.takes[index]):
                    if source == DRIVER and description.inputs is not None:
                        dtype, shape = description.inputs[i]
                        free = shape and index in self._setup.models and not self._setup.one_size
                        found[name] = dtype, (None, *shape[1:]) if free else tuple(shape)
            self._specs_of, self._specs = driver.descriptions, found
        return self._specs


__all__ = ["StageGradients", "StepRunner"]
