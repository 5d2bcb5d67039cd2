"""The pipeline: a Keras model in parts, each in its own process, used like one Keras model.

    pipe = Pipeline.split(model, stages=3)
    pipe.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    pipe.fit(x, y)

Workers start when they are first needed, after `compile`, and end with `close`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline import checkpoint, merging
from pipeline.compiling import Compiled
from pipeline.data import InputSpec, class_weights, make_batch
from pipeline.driver import Batch, Driver, StepResult, default_threads
from pipeline.errors import CompileError, PipelineClosedError
from pipeline.interrupts import deferred_interrupts
from pipeline.launch import prestart
from pipeline.plan import Plan
from pipeline.schedules import build_plan, forward_only, schedule_named
from pipeline.splitter import split_model
from pipeline.timeline import Span, Timeline
from pipeline.training import Trainer
from pipeline.verify import Report, Tolerance, compare
from pipeline.wiring import wire
from stages.hosted import StageSpec
from stages.segment import Segment
from transport.message import DRIVER


class Pipeline:
    """A model in segments, each in its own worker process.

    Args:
        segments: Built Keras models or `Segment`s, in the order of the data flow.
        microbatches: Into how many parts a batch is cut; a batch with fewer samples is cut into as many as it has.
        schedule: ``"gpipe"``, ``"1f1b"``, or a function (stages, microbatches) -> Plan.
        transport: ``"auto"`` (ipc), ``"ipc"``, ``"tcp"``, a loopback address ``"tcp://127.0.0.1:5555"`` for the driver,
            or ``"inproc"``: threads in this process, for tests.
        recompute: Keep only inputs between forward and backward and compute the forward pass again: less memory, more
            time. True, False, or one value per stage.
        threads: TensorFlow's threads per worker; default: the cores shared evenly.

    Raises:
        SegmentError, WiringError, ScheduleError, MicrobatchError: What was given does not fit together.

    Example:
        >>> pipe = Pipeline([bottom, middle, top], microbatches=8, schedule="1f1b")
    """

    def __init__(
        self,
        segments: Sequence[Any],
        microbatches: int = 8,
        schedule: str | Callable[..., Plan] = "1f1b",
        transport: str = "auto",
        *,
        recompute: bool | Sequence[bool] = False,
        threads: int | None = None,
    ) -> None:
        self.segments = tuple(Segment.of(part) for part in segments)
        self.wires = wire(self.segments)
        self.schedule = schedule
        self.microbatches = microbatches
        self.transport = "ipc" if transport == "auto" else transport
        schedule_named(schedule)
        self._plan(microbatches, training=True)
        self.threads = default_threads(len(self.segments)) if threads is None else threads
        each = (recompute,) * len(self.segments) if isinstance(recompute, bool) else tuple(recompute)
        if len(each) != len(self.segments):
            raise CompileError(f"recompute takes one value per stage ({len(self.segments)}), received {len(each)}")
        self.recompute = each
        self._seed = random.getrandbits(31)
        self._original: Any = None
        self._compiled: Compiled | None = None
        self._trainer: Trainer | None = None
        self._driver: Driver | None = None
        self._pending: checkpoint.State | None = None
        self._closed = False
        if not self.transport.startswith("inproc"):
            prestart()

    @classmethod
    def split(cls, model: Any, stages: int | None = None, at: Sequence[str] | None = None, **options: Any) -> Pipeline:
        """Cut a built Keras model into stages.

        Args:
            model: Sequential or Functional; models inside it are dissolved.
            stages: How many stages, parameters spread evenly.
            at: Or: names of the layers behind which to cut.
            **options: As for `Pipeline`.

        Raises:
            SplitError: The model cannot be cut, or not there.
        """
        pipe = cls(split_model(model, stages, at), **options)
        pipe._original = model
        return pipe

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names."""
        return self.wires.names

    @property
    def _cuts(self) -> list[str]:
        """Names of the layers behind which a split model was cut."""
        return [segment.model.operations[-1].name for segment in self.segments[:-1]]

    @property
    def optimizer(self) -> Any:
        """The optimizer given to `compile`; its learning rate may be read and set."""
        return None if self._compiled is None else self._compiled.optimizer

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
    ) -> None:
        """Set what training does, as `keras.Model.compile`.

        Args:
            optimizer: Name or Keras optimizer; every stage gets one like it for its own variables.
            loss: Name, function or Keras loss of the output.
            metrics: Names, functions or Keras metrics.
            weighted_metrics: The same, updated with sample weights.
            run_eagerly: True: eager tapes, bit-identical to one tape. False: compiled functions.

        Raises:
            CompileError: An unknown name, or something that means nothing in a pipeline.
            RecipeError: A loss or metric that a worker cannot import.
        """
        compiled = Compiled(optimizer, loss, metrics, weighted_metrics, run_eagerly)
        compiled.check_schedule(self.schedule, self.microbatches)
        if self._driver is not None and not self._driver.closed:
            self._pending = checkpoint.State(model=self._values("model"))
            self._stop("compile() was called")
        self._compiled = compiled
        self._trainer = None

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
    ) -> Any:
        """Train, as `keras.Model.fit`; returns Keras's History."""
        trainer = self._ready("fit")
        history = trainer.fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )
        if getattr(self.optimizer, "use_ema", False):
            self._running().call("finalize")
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """Loss and metrics, as `keras.Model.evaluate`."""
        logs = self._ready("evaluate").evaluate(
            x=x,
            y=y,
            batch_size=batch_size,
            verbose=verbose,
            sample_weight=sample_weight,
            steps=steps,
            callbacks=callbacks,
            return_dict=True,
        )
        return logs if return_dict else _as_list(logs)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Outputs for all samples, as `keras.Model.predict`."""
        trainer = self._trained_by()
        return trainer.predict(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """One update on one batch, as `keras.Model.train_on_batch`: the loss, or [loss, *metrics]."""
        trainer = self._ready("train_on_batch")
        if class_weight is not None:
            if sample_weight is not None:
                raise CompileError("give sample_weight or class_weight, not both")
            sample_weight = class_weights(y, class_weight)
        trainer.reset_metrics()
        result, size = self.train_step(x, y, sample_weight)
        logs = trainer.count(result.loss, size, result.metrics)
        return logs if return_dict else _as_list(logs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Loss and metrics of one batch, as `keras.Model.test_on_batch`."""
        trainer = self._ready("test_on_batch")
        trainer.reset_metrics()
        result, size = self.test_step(x, y, sample_weight)
        logs = trainer.count(result.loss, size, result.metrics)
        return logs if return_dict else _as_list(logs)

    def predict_on_batch(self, x: Any) -> Any:
        """Outputs (n, ...) of one batch, as `keras.Model.predict_on_batch`."""
        batch = self._batch(x, None, None, needs_target=False)
        found = self._running().run(self._plan(len(batch.sizes), training=False), "predict", batch).outputs
        outputs = [found[name] for name, _ in self.wires.outputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def train_step(self, x: Any, y: Any, sample_weight: Any = None, trace: bool = False) -> tuple[StepResult, int]:
        """Forward, backward and update of one batch; the result and the number of samples."""
        compiled = self._needs_compile("training")
        compiled.needs_optimizer()
        batch = self._batch(x, y, sample_weight, needs_target=compiled.has_loss)
        driver = self._running()
        with deferred_interrupts():
            plan = self._plan(len(batch.sizes), training=True)
            result = driver.run(plan, "train", batch, trace, norms=compiled.global_clipnorm is not None)
            driver.apply(compiled.learning_rate(), compiled.clip_scale(result.squared_norm))
        return result, sum(batch.sizes)

    def test_step(self, x: Any, y: Any, sample_weight: Any = None) -> tuple[StepResult, int]:
        """Loss and metrics of one batch; the result and the number of samples."""
        compiled = self._needs_compile("evaluation")
        batch = self._batch(x, y, sample_weight, needs_target=compiled.has_loss)
        plan = self._plan(len(batch.sizes), training=False)
        return self._running().run(plan, "test", batch), sum(batch.sizes)

    def gradients(self, x: Any, y: Any = None, sample_weight: Any = None) -> dict[str, np.ndarray[Any, Any] | None]:
        """dL/dvariables of one batch in training mode; nothing is applied, and no state is changed.

        Returns:
            {"<stage>/<variable path>": array of the variable's shape and dtype}; None where the loss does not depend
            on the variable.
        """
        batch = self._batch(x, y, sample_weight, needs_target=self._needs_compile("gradients").has_loss)
        _, gradients = self._gradients(self._running(), batch)
        return self._by_name(gradients)

    def verify(self, x: Any, y: Any = None, sample_weight: Any = None, *, tolerance: float | None = None) -> Report:
        """Compare this pipeline's gradients and loss of one batch with those of one tape over the joined model.

        The reference runs in a process of its own, with the same variables, states, microbatches and thread count, and
        shares no code with the hand-off beyond the layers. Nothing is applied, and no state is changed.

        Args:
            x: As in `train_on_batch`, like `y` and `sample_weight`.
            tolerance: Largest accepted difference as a part of the largest |gradient|; default: 0 (bit for bit) when
                eager, 1e-6 when compiled.

        Returns:
            The report: ``report.ok`` is the verdict, ``print(report)`` the table; tests call ``raise_if_failed()``.
        """
        compiled = self._needs_compile("verify")
        batch = self._batch(x, y, sample_weight, needs_target=compiled.has_loss)
        driver = self._running()
        ours, gradients = self._gradients(driver, batch)
        values = driver.get("model")
        specs = [self._spec(i, optimizer=False) for i in range(len(self.segments))]
        reference = Driver([specs], threads=self.threads, transport=driver.scheme, entry="pipeline.reference:main")
        try:
            reference.set("model", {i: [v for v in arrays if v is not None] for i, arrays in values.items()})
            theirs, expected = self._gradients(reference, batch)
        finally:
            reference.close()
        allowed = Tolerance.default(compiled.run_eagerly) if tolerance is None else Tolerance(tolerance, "as given")
        return compare(
            self._by_name(gradients), self._by_name(expected), ours.loss, theirs.loss, allowed, self._headline()
        )

    def timeline(self, x: Any, y: Any = None, sample_weight: Any = None, *, repeats: int = 5) -> Timeline:
        """When each worker did what in a step without its update, in seconds; the median of several steps.

        Nothing is applied, and no state is changed. In compiled mode the last stage's forward box holds its loss and
        backward too: they are one function.

        Args:
            x: As in `train_on_batch`, like `y` and `sample_weight`.
            repeats: How many steps to measure, after one that is not counted.
        """
        compiled = self._needs_compile("timeline")
        batch = self._batch(x, y, sample_weight, needs_target=compiled.has_loss)
        plan = self._plan(len(batch.sizes), training=True)
        driver, found = self._running(), []
        for _ in range(repeats + 1):
            found.append(_timeline(plan, driver.run(plan, "gradients", batch, trace=True).spans))
            driver.discard()
        return sorted(found[1:], key=lambda timeline: timeline.step_time)[repeats // 2]

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """All weights, stage after stage, as `keras.Model.get_weights`."""
        return [array for arrays in self._values("weights").values() for array in arrays]

    def set_weights(self, weights: Sequence[np.ndarray[Any, Any]]) -> None:
        """Set all weights, in the order of `get_weights`.

        Raises:
            CompileError: The number of arrays is not that of the weights.
        """
        driver = self._running()
        counts = {
            i: sum(1 for *_, is_weight in description["variables"] if is_weight)
            for i, description in sorted(driver.descriptions.items())
        }
        if len(weights) != sum(counts.values()):
            raise CompileError(f"set_weights expects {sum(counts.values())} array(s), received {len(weights)}")
        rest = iter(weights)
        driver.set("weights", {i: [np.asarray(next(rest)) for _ in range(count)] for i, count in counts.items()})

    def save(self, path: str | Path, overwrite: bool = True) -> None:
        """Write a checkpoint: variables, optimizer, and all that is needed to go on.

        It is written beside `path` under another name and then renamed, so that a checkpoint is whole or not there.

        Raises:
            CheckpointError: Something is at `path` and `overwrite` is False.
        """
        checkpoint.save(self, Path(path), overwrite)

    @classmethod
    def load(
        cls, path: str | Path, stages: int | None = None, at: Sequence[str] | None = None, **options: Any
    ) -> Pipeline:
        """A pipeline that continues from a checkpoint.

        Args:
            path: What `save` wrote.
            stages: Cut the model into this many stages; default: the same cuts as saved.
            at: Or: names of the layers behind which to cut.
            **options: As for `Pipeline`; default: as saved.

        Raises:
            CheckpointError: Nothing is there, or it is not whole.
        """
        return checkpoint.load(cls, Path(path), stages, at, options)

    def merge(self) -> Any:
        """One ordinary Keras model with the trained weights; the original architecture if it was split from one."""
        return merging.merge(self.segments, self.wires, self._original, self._values("model"))

    def reset_metrics(self) -> None:
        """Let the metrics count anew."""
        if self._compiled is not None and self._compiled.has_metrics:
            self._running().call("reset_metrics")

    def close(self) -> None:
        """End the workers. Idempotent."""
        self._closed = True
        self._stop("close() was called")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_driver", None) is not None:
            self.close()

    def _stop(self, why: str) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close(why)

    def _running(self) -> Driver:
        """The workers, started if they are not yet."""
        if self._closed:
            raise PipelineClosedError("this pipeline was closed; make a new one, or Pipeline.load(...) a checkpoint")
        if self._driver is None:
            specs = [[self._spec(i)] for i in range(len(self.segments))]
            self._driver = Driver(specs, threads=self.threads, transport=self.transport)
            self._fill(self._driver)
        return self._driver

    def _fill(self, driver: Driver) -> None:
        """Give fresh workers the values they should start from."""
        pending, self._pending = self._pending, None
        if pending is None:
            pending = checkpoint.State(
                model={
                    i: [variable.value.numpy() for variable in segment.model.variables]
                    for i, segment in enumerate(self.segments)
                    if segment.model is not None
                }
            )
        driver.set("model", pending.model)
        if self._compiled is not None and (values := pending.optimizer_for(driver.descriptions)):
            driver.set("optimizer", values)

    def _spec(self, index: int, optimizer: bool = True) -> StageSpec:
        compiled, segment = self._compiled, self.segments[index]
        return StageSpec(
            index=index,
            name=self.wires.names[index],
            segment=segment.recipe(),
            inputs=self.wires.takes[index],
            outputs=self.wires.gives[index],
            head=compiled.head_recipe if compiled is not None and index == self.wires.last else None,
            optimizer=compiled.optimizer_recipe if compiled is not None and optimizer else None,
            run_eagerly=compiled is not None and compiled.run_eagerly,
            recompute=self.recompute[index],
            seed=None if segment.model is not None or self.transport == "inproc" else (self._seed + index) % 2**31,
        )

    def _plan(self, microbatches: int, training: bool) -> Plan:
        wiring = self.wires.upstream()
        if not training:
            return forward_only(len(self.segments), microbatches).validate(wiring)
        return build_plan(self.schedule, len(self.segments), microbatches, wiring=wiring)

    def _batch(self, x: Any, y: Any, sample_weight: Any, needs_target: bool) -> Batch:
        return make_batch(
            x,
            y,
            sample_weight,
            inputs=self._input_specs(),
            microbatches=self.microbatches,
            needs_target=needs_target,
        )

    def _input_specs(self) -> dict[str, InputSpec | None]:
        """The pipeline's inputs, with what the stages that take them expect."""
        found: dict[str, InputSpec | None] = dict.fromkeys(self.wires.inputs)
        for index, description in self._running().descriptions.items():
            tensors = description["inputs"]
            for i, (name, source) in enumerate(self.wires.takes[index]):
                if source == DRIVER and tensors is not None:
                    dtype, shape = tensors[i]
                    found[name] = (dtype, tuple(shape))
        return found

    def _values(self, what: str) -> dict[int, list[np.ndarray[Any, Any]]]:
        return {i: [a for a in arrays if a is not None] for i, arrays in self._running().get(what).items()}

    def _gradients(self, driver: Driver, batch: Batch) -> tuple[StepResult, dict[int, list[Any]]]:
        result = driver.run(self._plan(len(batch.sizes), training=True), "gradients", batch)
        gradients = driver.get("gradients")
        driver.discard()
        return result, gradients

    def _by_name(self, gradients: Mapping[int, Sequence[Any]]) -> dict[str, Any]:
        """Gradients under "<stage>/<variable path>", in the order of stages and variables."""
        named: dict[str, Any] = {}
        for i, values in gradients.items():
            variables = self._running().descriptions[i]["variables"]
            names = {trainable: name for name, _, _, trainable, _ in variables if trainable >= 0}
            named |= {f"{self.names[i]}/{names[k]}": value for k, value in enumerate(values)}
        return named

    def _headline(self) -> str:
        compiled = self._needs_compile("verify")
        mode = "eager" if compiled.run_eagerly else "compiled"
        return f"{len(self.segments)} stages, {self.microbatches} microbatches, {self.schedule}, {mode}"

    def _needs_compile(self, what: str) -> Compiled:
        if self._compiled is None:
            raise CompileError(f"{what} needs an optimizer and a loss; call compile(optimizer=..., loss=...) first")
        return self._compiled

    def _ready(self, what: str) -> Trainer:
        self._needs_compile(what)
        return self._trained_by()

    def _trained_by(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self, self.optimizer)
        self._running()
        return self._trainer


def _timeline(plan: Plan, measured: Sequence[Sequence[tuple[float, float]]]) -> Timeline:
    """The measured spans of a plan's actions."""
    spans = tuple(
        Span(worker, action, start, end)
        for worker, (program, times) in enumerate(zip(plan.programs, measured, strict=True))
        for action, (start, end) in zip(program, times, strict=True)
    )
    return Timeline(spans, workers=plan.workers, name=f"{plan.name}, measured")


def _as_list(logs: Mapping[str, float]) -> Any:
    """What Keras returns: the loss alone, or [loss, *metrics]."""
    values = list(logs.values())
    return values[0] if len(values) == 1 else values
