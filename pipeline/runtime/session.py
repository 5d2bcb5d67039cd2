"""The running side of a pipeline: workers started when first needed, the steps they make, the values they hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from pipeline.batch.data import InputSpec, make_batch
from pipeline.batch.inputs import InputNames
from pipeline.batch.step import Batch, StepResult
from pipeline.compiled.compiled import Compiled
from pipeline.compiled.optimizer_slots import Slots, State, described_slots
from pipeline.errors import CompileError, DataError, PipelineClosedError, WiringError
from pipeline.model.shared_variables import state_in_two_stages
from pipeline.model.stateful import warn_of_stateful_layers
from pipeline.model.wiring import Wires, check_shapes
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import build_plan, forward_only
from pipeline.plan.timeline import Timeline, measured_timeline
from pipeline.runtime.driver import Driver
from pipeline.runtime.interrupts import deferred_interrupts
from pipeline.runtime.options import Options
from pipeline.runtime.reference_process import ReferenceProcess
from pipeline.runtime.runnable import check_runnable
from pipeline.runtime.stage_specs import SpecOptions, stage_specs
from stages.grid import is_over_time
from stages.recipe.segment import Segment
from stages.worker import snapshot
from stages.worker.hosted_stage import StageSpec
from stages.worker.orders import Mode
from transport.message import DRIVER

Array = np.ndarray[Any, Any]
Gradients = dict[int, list[Array | None]]
"""{stage: dL/dvariable of each of its trainable variables, in order; None: there is none}."""


class Session:
    """The workers of one pipeline.

    Args:
        segments: What the stages are built from.
        wires: How they are connected.
        options: How it runs.
        original: The model that was split, if one was.

    Attributes:
        compiled: What `compile` was given; None before.
        look: Is shown every batch that is trained ("train"), evaluated ("test") or predicted, before it is.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        wires: Wires,
        options: Options,
        original: Any | None = None,
    ) -> None:
        self.segments, self.wires, self.options = tuple(segments), wires, options
        self.original = original
        self.compiled: Compiled | None = None
        self.look: Callable[[str, Batch], None] = lambda mode, batch: None
        self._plans: dict[tuple[int, int, bool], Plan] = {}
        self._start: State | None = None
        self._besides: dict[int, list[Any]] = {}
        self._driver: Driver | None = None
        self._reference = ReferenceProcess()
        self._closed = False
        # Drawn for builders only: with built models, the user's own random numbers stay what they are without us.
        built_here = all(segment.model is not None for segment in self.segments)
        self._seed = None if built_here or options.scheme == "inproc" else random.getrandbits(31)
        self._plan(options.microbatches, options.windows, training=True)
        models = {i: segment.model for i, segment in enumerate(self.segments) if segment.model is not None}
        warn_of_stateful_layers(models.values())
        if found := state_in_two_stages(models):
            layer, one, other = found
            raise WiringError(
                f"the layer {layer!r} is in the stages {wires.names[one]!r} and {wires.names[other]!r}, and every use "
                "changes its state (statistics or random numbers), which cannot be in two processes at once; give each "
                "stage a layer of its own"
            )

    def driver(self) -> Driver:
        """The workers, started if they are not yet."""
        if self._closed:
            raise PipelineClosedError("this pipeline was closed; make a new one, or Pipeline.load(...) a checkpoint")
        if self._driver is None:
            specs = [[spec] for spec in self._specs()]
            driver = Driver(specs, threads=self.options.threads, transport=self.options.transport)
            try:
                check_shapes(self.wires, driver.descriptions)
                self._fill(driver)
            except BaseException:  # Ctrl-C too: workers with some of their values are no workers
                driver.close("they could not be given their values")
                raise
            self._driver, self._start = driver, None
        return self._driver

    @property
    def is_running(self) -> bool:
        """Whether the workers are there."""
        return self._driver is not None and not self._driver.closed

    def recompile(self, compiled: Compiled) -> None:
        """Go on under other rules: the values stay, the optimizer's too where it is the same object, as in Keras."""
        same = self.compiled is not None and self.compiled.has_optimizers_of(compiled)
        if self._driver is not None and not self._driver.closed:
            slots = self.slots().among(self._trained_before(), self._trained_now()) if same else None
            self._start = State(self.values("model"), slots)
            self.stop("compile() was called")
        elif self._start is not None and not same:
            self._start = State(self._start.model)
        self.compiled = compiled

    def _trained_before(self) -> dict[int, list[int]]:
        """Which of its model's variables every stage trains at present, in the order of its trainable ones."""
        return {i: list(stage.trained) for i, stage in self.driver().descriptions.items()}

    def _trained_now(self) -> dict[int, list[int]]:
        """The same for stages that will be built from the models as they are now: layers may have been frozen."""
        found = self._trained_before()
        for i, segment in enumerate(self.segments):
            if segment.model is not None:
                number = {id(variable): k for k, variable in enumerate(segment.model.variables)}
                found[i] = [number[id(variable)] for variable in segment.model.trainable_variables]
        return found

    def needs_the_trainable_set(self, what: str) -> None:
        """Refuse what would mix up variables, where `trainable` was changed and the workers train others as yet.

        Raises:
            CompileError: `trainable` was changed after `compile`.
        """
        if self._trained_now() != self._trained_before():
            raise CompileError(
                f"layer.trainable was changed after compile(), which takes effect with the next compile(); {what} "
                "needs both to agree: call compile(...) again, or change it back"
            )

    def start_from(self, state: State) -> None:
        """Let workers that are still to be started begin with these values."""
        self._start = state

    def stop(self, why: str) -> None:
        """End the workers; they start again when needed."""
        driver, self._driver = self._driver, None
        self._reference.close(why)
        if driver is not None:
            driver.close(why)

    def close(self) -> None:
        """End the workers for good. Idempotent."""
        self._closed = True
        self.stop("close() was called")

    def train(self, x: Any, y: Any, sample_weight: Any, *, observe: str = "") -> tuple[StepResult, int]:
        """Forward, backward and update of one batch, `observe` as for `step`; the result and the number of samples."""
        compiled = self.needs_compile("training")
        compiled.needs_optimizer()
        batch = self.batch(x, y, sample_weight, judged=compiled.judged)
        self.look("train", batch)
        return self.step(batch, observe=observe), sum(batch.sizes)

    def step(self, batch: Batch, *, observe: str = "", look: Callable[[Driver], None] | None = None) -> StepResult:
        """Forward, backward and update.

        Args:
            batch: The batch.
            observe: As `Driver.run` takes it.
            look: Called with the workers between backward and update.
        """
        compiled = self.needs_compile("training")
        driver, scaling = self.driver(), compiled.loss_scaling
        loss_scale = None if scaling is None else scaling.scale
        with deferred_interrupts():
            plan = self.plan(batch, training=True)
            norms = compiled.global_clipnorm is not None
            result = driver.run(plan, Mode.TRAIN, batch, norms=norms, loss_scale=loss_scale, observe=observe)
            if look is not None:
                look(driver)
            if result.finite:
                rates = compiled.learning_rates(len(self.segments))
                driver.apply(rates, compiled.clip_scale(self._in_model_order(result.squared_norms)), loss_scale)
                compiled.count_update()
            else:
                driver.discard()
            if scaling is not None:
                scaling.decide(result.finite)
        return result

    def _in_model_order(self, values: Mapping[tuple[int, int], float]) -> list[float]:
        """Values by (stage, place of a trainable variable), in the order of the variables of the model that was split.

        Without one, stage after stage.
        """
        if not values:
            return []
        number = {} if self.original is None else {id(v): n for n, v in enumerate(self.original.variables)}
        found = {}
        for i, description in self.driver().descriptions.items():
            model = self.segments[i].model
            variables = [None] * len(description.variables) if model is None else model.variables
            for variable, info in zip(variables, description.variables, strict=True):
                found[i, info.place] = (number.get(id(variable), len(number)), i, info.place)
        return [values[place] for place in sorted(values, key=found.__getitem__)]

    def test(self, x: Any, y: Any, sample_weight: Any) -> tuple[StepResult, int]:
        """Loss and metrics of one batch; the result and the number of samples."""
        compiled = self.needs_compile("evaluation")
        batch = self.batch(x, y, sample_weight, judged=compiled.judged)
        self.look("test", batch)
        plan = self.plan(batch, training=False)
        return self.driver().run(plan, Mode.TEST, batch), sum(batch.sizes)

    def predict(self, x: Any) -> list[Array]:
        """The outputs (n, ...) of one batch, in the pipeline's order."""
        batch = self.batch(x, None, None, judged=())
        self.look("predict", batch)
        found = self.driver().run(self.plan(batch, training=False), Mode.PREDICT, batch).outputs
        return [found[name] for name, _ in self.wires.outputs]

    def gradients(self, batch: Batch) -> tuple[StepResult, dict[str, Array | None]]:
        """The result of one batch and its gradients under "<stage>/<variable path>"; nothing is applied.

        A variable that several stages have is there once, under the first of them.
        """
        result, gradients = self.differentiate(batch, self.driver())
        owned = {place: name for place, (name, owner) in self.variable_names().items() if owner}
        return result, {name: gradients[i][k] for (i, k), name in owned.items()}

    def differentiate(
        self, batch: Batch, driver: Driver, *, observe: str = "", trace: bool = False
    ) -> tuple[StepResult, Gradients]:
        """The result of one batch, and {stage: dL/dvariable of each trainable variable}; nothing is applied.

        Args:
            batch: The batch.
            driver: The workers, or the reference.
            observe: As `Driver.run` takes it, like `trace`.
        """
        scaling = None if self.compiled is None else self.compiled.loss_scaling
        loss_scale = None if scaling is None else scaling.scale
        with deferred_interrupts():  # or the next update would count these gradients too
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

    def variable_names(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """{(stage, index among its trainable variables): ("<stage>/<path>", whether no earlier stage has it too)}."""
        driver, found = self.driver(), {}
        for i, stage in driver.descriptions.items():
            others = {tie.place for tie in driver.specs[i].ties if tie.stages[0] != i}
            for variable in stage.variables:
                if variable.trained:
                    name = f"{self.wires.names[i]}/{variable.name}"
                    found[i, variable.place] = (name, variable.place not in others)
        return dict(sorted(found.items()))

    def timeline(self, x: Any, y: Any, sample_weight: Any, repeats: int) -> Timeline:
        """The median of some measured steps, of which nothing is applied; a first one is not counted."""
        batch = self.batch(x, y, sample_weight, judged=self.needs_compile("timeline").judged)
        plan, driver, found = self.plan(batch, training=True), self.driver(), []
        for _ in range(repeats + 1):
            measured = driver.run(plan, Mode.GRADIENTS, batch, trace=True).spans
            driver.discard()
            found.append(measured_timeline(plan, measured))
        return sorted(found[1:], key=lambda timeline: timeline.step_time)[repeats // 2]

    def reference(self) -> Driver:
        """One process with all stages joined, set to the pipeline's present values; it stays for the next question."""
        self.needs_the_trainable_set("verify")
        driver = self._reference.running(
            lambda: [self._specs(reference=True)], self.options.threads, self.options.scheme
        )
        driver.set("model", self.values("model"))
        if self.options.keep_state:
            driver.set("kept states", self.values("kept states"))
        return driver

    def telling_of_the_reference(self) -> AbstractContextManager[None]:
        """Say so when it was the reference that failed, and not the pipeline, which goes on."""
        return self._reference.telling(lambda: self._driver is not None and not self._driver.closed)

    def values(self, what: str) -> dict[int, list[Array]]:
        """Every stage's ``model``, ``weights`` or ``optimizer`` variables, in order."""
        return {i: [a for a in arrays if a is not None] for i, arrays in self.driver().get(what).items()}

    def slots(self) -> Slots:
        """The optimizer's values by what they belong to."""
        return Slots.of_stages(described_slots(self.driver().descriptions), self.values("optimizer"))

    def get_weights(self, original: Any | None) -> list[Array]:
        """All weights, in the order of `get_weights` of the original model, else stage after stage."""
        values = self.values("weights")
        return [values[i][k] for (i, k), *_ in self._weight_places(original)]

    def set_weights(self, original: Any | None, weights: Sequence[Any]) -> None:
        """Set all weights, in the order of `get_weights`.

        Raises:
            DataError: The number of arrays, or a shape, does not fit; nothing was set.
        """
        places = self._weight_places(original)
        if len(weights) != len(places):
            raise DataError(f"set_weights expects {len(places)} array(s), received {len(weights)}")
        by_place = {place: value for uses, value in zip(places, weights, strict=True) for place in uses}
        stages = range(len(self.segments))
        self._set_weights({i: [by_place[p] for p in sorted(by_place) if p[0] == i] for i in stages})

    def _weight_places(self, original: Any | None) -> list[list[tuple[int, int]]]:
        """(stage, index among its weights) of every weight; several where several stages have it.

        Args:
            original: The model whose order of weights counts; None: stage after stage.
        """
        described = sorted(self.driver().descriptions.items())
        counts = {i: len(stage.weights) for i, stage in described}
        uses: dict[Any, list[tuple[int, int]]] = {}
        for i, count in counts.items():
            model = self.segments[i].model
            weights = [None] * count if model is None else model.weights
            for k, weight in enumerate(weights):
                uses.setdefault((i, k) if weight is None else id(weight), []).append((i, k))
        return list(uses.values()) if original is None else [uses[id(weight)] for weight in original.weights]

    def _set_weights(self, weights: Mapping[int, Sequence[Any]]) -> None:
        """Set every stage's weights, in order.

        Raises:
            DataError: A shape does not fit; nothing was set.
        """
        arrays = {i: [np.asarray(value) for value in part] for i, part in weights.items()}
        for i, part in arrays.items():
            for weight, array in zip(self.driver().descriptions[i].weights, part, strict=True):
                if weight.shape != array.shape:
                    raise DataError(
                        f"stage {self.wires.names[i]!r}: the weight {weight.name!r} has the shape {weight.shape}, "
                        f"received {array.shape}"
                    )
        self.driver().set("weights", arrays)

    def plan(self, batch: Batch, training: bool) -> Plan:
        """The checked plan of a step; made once for each number of microbatches and windows."""
        return self._plan(len(batch.sizes), max(1, len(batch.lengths)), training)

    def _plan(self, microbatches: int, windows: int, training: bool) -> Plan:
        key = (microbatches, windows, training)
        if key not in self._plans:
            wiring, stages = self.wires.upstream(), len(self.segments)
            if training:
                plan = build_plan(
                    self.options.schedule,
                    stages,
                    microbatches,
                    windows=windows,
                    truncate=self.options.truncate,
                    wiring=wiring,
                )
                self._plans[key] = check_runnable(plan)
            else:
                self._plans[key] = forward_only(stages, microbatches, windows=windows).validate(wiring)
        return self._plans[key]

    def batch(self, x: Any, y: Any, sample_weight: Any, judged: Sequence[str]) -> Batch:
        """One batch, converted, checked and cut; `judged` are the outputs that need targets."""
        return make_batch(
            x,
            y,
            sample_weight,
            inputs=self._input_specs(),
            names=InputNames.of(self.wires.inputs, getattr(self.original, "input", None)),
            microbatches=self.options.microbatches,
            labels=self.wires.labels,
            judged=judged,
            windows=self.options.windows,
            judged_over_time=self._over_time(judged) if self.options.windows > 1 else (),
        )

    def _over_time(self, labels: Sequence[str]) -> list[str]:
        """Those outputs that have a time axis."""
        driver = self.driver()
        places = dict(zip(self.wires.labels, self.wires.outputs, strict=True))
        told = {label: driver.output_spec(stage, name) for label, (name, stage) in places.items()}
        return [label for label in labels if (spec := told[label]) is not None and is_over_time(spec.shape)]

    def needs_compile(self, what: str) -> Compiled:
        """What `compile` was given.

        Raises:
            CompileError: It was not called.
        """
        if self.compiled is None:
            raise CompileError(f"{what} needs an optimizer and a loss; call compile(optimizer=..., loss=...) first")
        return self.compiled

    def _input_specs(self) -> dict[str, InputSpec | None]:
        """The pipeline's inputs, with what the stages that take them expect."""
        found: dict[str, InputSpec | None] = dict.fromkeys(self.wires.inputs)
        for index, description in self.driver().descriptions.items():
            for i, (name, source) in enumerate(self.wires.takes[index]):
                if source == DRIVER and description.inputs is not None:
                    found[name] = description.inputs[i]
        return found

    def _fill(self, driver: Driver) -> None:
        """Give fresh workers the values they should start from."""
        start = self._start
        if start is None:
            models = {i: segment.model for i, segment in enumerate(self.segments) if segment.model is not None}
            start = State({i: snapshot.read(m.variables) for i, m in models.items()})
        driver.set("model", start.model)
        if start.slots is not None:
            driver.set("optimizer", start.slots.for_stages(described_slots(driver.descriptions)))

    def _specs(self, reference: bool = False) -> list[StageSpec]:
        options = SpecOptions(self.options.recompute, self.options.keep_state, self._seed)
        found = stage_specs(self.segments, self.wires, self.compiled, options, reference)
        if not reference:
            self._besides = {one.spec.index: one.besides for one in found}
        return [one.spec for one in found]

    def besides(self) -> dict[int, list[Any]]:
        """For each stage the user's own variables that went along with its losses and layers, beside the model's.

        The workers have copies: ``driver.set("besides", {stage: values})`` gives them new values, in this order.
        """
        self.driver()
        return {i: list(variables) for i, variables in sorted(self._besides.items())}
