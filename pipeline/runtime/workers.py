"""The life of a pipeline's workers: started when first needed, stopped by `compile`, started again, ended for good."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.compiled.compiled import Compiled
from pipeline.compiled.optimizer_slots import Described, StartValues, described_slots
from pipeline.compiled.trained_optimizers import (
    check_known,
    check_none_lost,
    give_back_slots,
    knows_variables,
    slots_here,
)
from pipeline.errors import CompileError, PipelineClosedError
from pipeline.model.wiring import check_shapes
from pipeline.runtime.driver import Driver
from pipeline.runtime.recovery.options import Repair
from pipeline.runtime.setup import Setup
from pipeline.runtime.stage_specs import SpecOptions, stage_specs
from pipeline.runtime.turns import Turns
from pipeline.runtime.values import optimizer_slots_of, values_of
from stages.worker import snapshot
from stages.worker.stage_spec import StageSpec

Array = np.ndarray[Any, Any]


class Workers:
    """The workers of one pipeline, or none as yet.

    Args:
        setup: What the pipeline is made of.

    Attributes:
        compiled: What `compile` was given; None before.
        placement: For each stage the worker that hosts it; before the workers are started it may be set.
        loaded_from: The file or folder that the models were read from; "" of models that are the user's own.
        resumed: What the next `fit` goes on from (`pipeline.saving.going_on.Resumed`); None: it begins anew.
        filled: Is called when workers have just got copies of the user's objects and their values.
        turns: Who may use the workers when.
        repairs: What was done about workers that died.
        given: {stage: the user's own variables that its losses and layers use beside those of its model}.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.turns = Turns()
        self.compiled: Compiled | None = None
        self.placement: tuple[int, ...] = tuple(range(len(setup.segments)))
        self.loaded_from = ""
        self.resumed: Any = None
        self._start: StartValues | None = None
        self.given: dict[int, list[Any]] = {}
        self.repairs: list[Repair] = []
        self.filled: Callable[[], None] = lambda: None
        self._driver: Driver | None = None
        self._closed = False
        # Drawn for builders only: with built models, the user's own random numbers stay what they are without us.
        built_here = len(setup.models) == len(setup.segments)
        self._seed = None if built_here or setup.options.scheme == "inproc" else random.getrandbits(31)

    def driver(self) -> Driver:
        """The workers, started if they are not yet.

        Raises:
            PipelineClosedError: `close` was called.
            UsageError: This is a forked copy of the process that made the pipeline.
        """
        with self.turns:
            if self._closed:
                raise PipelineClosedError(
                    "this pipeline was closed; make a new one, or Pipeline.load(...) a checkpoint"
                )
            if self._driver is None:
                self._driver, self._start = self._started(), None
                self.filled()
            return self._driver

    def _started(self) -> Driver:
        specs, options, placement = self.specs(), self._setup.options, self.placement
        hosted = [[spec for spec in specs if placement[spec.index] == worker] for worker in range(1 + max(placement))]
        given: dict[str, Any] = {"threads": options.threads, "transport": options.transport, "turns": self.turns}
        if options.recovery is None:
            driver = Driver(hosted, **given)
        else:
            from pipeline.runtime.recovery.lasting_driver import LastingDriver

            driver = LastingDriver(hosted, recovery=options.recovery, repairs=self.repairs, **given)
        try:
            check_shapes(self._setup.wires, driver.descriptions)
            self._fill(driver)
        except BaseException:  # Ctrl-C too: workers with some of their values are no workers
            driver.close("they could not be given their values")
            raise
        return driver

    @property
    def are_running(self) -> bool:
        """Whether the workers are there."""
        return self._driver is not None and not self._driver.closed

    def needs_compile(self, what: str) -> Compiled:
        """What `compile` was given.

        Raises:
            CompileError: It was not called.
        """
        if self.compiled is None:
            raise CompileError(f"{what} needs an optimizer and a loss; call compile(optimizer=..., loss=...) first")
        return self.compiled

    def recompile(self, compiled: Compiled) -> None:
        """Go on under other rules: the values stay, an optimizer's too where it is the same object, as in Keras.

        Raises:
            CompileError: An optimizer has trained other variables, or knows its own no more.
        """
        check_known(compiled.optimizers, self._trainable())
        anew = compiled.stages_with_other_optimizers(self.compiled)
        check_none_lost([one for i, one in enumerate(compiled.optimizers) if i in anew])
        if self._driver is not None and not self._driver.closed:
            kept = {i: numbers for i, numbers in self._trained_now().items() if i not in anew}
            slots = optimizer_slots_of(self._driver).among(self._trained_before(), kept) if kept else None
            values, states = values_of(self._driver, "model"), values_of(self._driver, "layer states")
            kept_states = values_of(self._driver, "kept states") if self._setup.options.keep_state else {}
            self._start = StartValues(values, slots, anew, states, kept_states)
            self.stop("compile() was called")
        elif self._start is not None:
            self._start = replace(self._start, anew=self._start.anew | anew)
        self.compiled = compiled

    def start_from(self, state: StartValues) -> None:
        """Let workers that are still to be started begin with these values."""
        self._start = state

    def stop(self, why: str) -> None:
        """End the workers; they start again when needed."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close(why)

    def close(self, why: str) -> None:
        """End the workers for good. Idempotent."""
        self._closed = True
        self.stop(why)

    @property
    def trainable_has_changed(self) -> bool:
        """Whether layers of the user's own models were frozen or thawed since the workers were built."""
        return self._trained_now() != self._trained_before()

    def needs_the_trainable_set(self, what: str) -> None:
        """Raise if layer.trainable changed since `compile`: the workers still train the variables of before.

        Args:
            what: The caller, for the message.

        Raises:
            CompileError: It changed.
        """
        if self.trainable_has_changed:
            raise CompileError(
                f"layer.trainable was changed after compile(), which takes effect with the next compile(); {what} "
                "needs both to agree: call compile(...) again, or change it back"
            )

    def _trained_before(self) -> dict[int, list[int]]:
        """{stage: places of the model's variables that its worker trains, in the order of its trainable ones}."""
        return {i: list(stage.trained) for i, stage in self.driver().descriptions.items()}

    def _trained_now(self) -> dict[int, list[int]]:
        """The same for stages that will be built from the models as they are now: layers may have been frozen."""
        found = self._trained_before()
        for i, model in self._setup.models.items():
            number = {id(variable): k for k, variable in enumerate(model.variables)}
            found[i] = [number[id(variable)] for variable in model.trainable_variables]
        return found

    def specs(self, reference: bool = False) -> list[StageSpec]:
        """What each worker is told of its stage.

        Args:
            reference: For the process that hosts all stages.
        """
        options = SpecOptions(self._setup.options.recompute, self._setup.options.keep_state, self._seed)
        found = stage_specs(self._setup.segments, self._setup.wires, self.compiled, options, reference)
        if not reference:
            self.given = {one.spec.index: one.besides for one in found}
        return [one.spec for one in found]

    def besides(self) -> dict[int, list[Any]]:
        """{stage: the user's own variables that its losses and layers use beside those of its model}.

        The workers have copies: ``driver.set("besides", {stage: values})`` gives them new values, in this order.
        """
        self.driver()
        return {i: list(variables) for i, variables in sorted(self.given.items())}

    def _fill(self, driver: Driver) -> None:
        """Give fresh workers the values they should start from."""
        start = self._start
        if start is None:
            start = StartValues({i: snapshot.read(model.variables) for i, model in self._setup.models.items()})
        driver.set("model", start.model)
        if start.layer_states:
            driver.set("layer states", start.layer_states)
        if start.kept_states:
            driver.set("kept states", start.kept_states)
        described = described_slots(driver.descriptions)
        slots = {}
        if start.slots is not None:
            slots = start.slots.for_stages({i: some for i, some in described.items() if i not in start.anew})
        slots |= self._slots_here({i: some for i, some in described.items() if i not in slots})
        if slots:
            driver.set("optimizer", slots)

    def _slots_here(self, described: Described) -> dict[int, list[Array]]:
        """What optimizers that have trained in this process know of the stages' variables."""
        if self.compiled is None:
            return {}
        known = slots_here(self.compiled.optimizers, self._trainable())
        return known.for_stages({i: described[i] for i in known.own if i in described})

    def take_slots(self) -> None:
        """Give the stages' optimizers all that those in this process know, where these were built for the own model."""
        driver = self.driver()
        driver.set("optimizer", self._slots_here(described_slots(driver.descriptions)))

    def _trainable(self) -> list[list[Any]]:
        """For each stage the user's own variables that it trains, as far as they are known here."""
        models = self._setup.models
        return [list(models[i].trainable_variables) if i in models else [] for i in range(len(self._setup.segments))]

    def give_back_slots(self) -> None:
        """Let optimizers that were built for the user's own variables know what those of the stages have learned."""
        if self.compiled is None or not knows_variables(self.compiled.optimizers):
            return
        trained, models = self._trained_before(), self._setup.models
        parts = [[models[i].variables[number] for number in trained[i]] if i in models else [] for i in sorted(trained)]
        give_back_slots(self.compiled.optimizers, parts, optimizer_slots_of(self.driver()))


__all__ = ["Workers"]
