"""The meaning of a batch for losses and metrics of the user's own: made of its parts, or only of the whole of it.

Keras's own are known. Another one is tried on the first batch that is cut, before anything is updated: its targets and
weights, and the predictions that the workers give for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipeline.batch.step import Batch
from pipeline.compiled.compiled import Compiled, name_of
from pipeline.errors import CompileError
from pipeline.plan.schedules import gpipe
from pipeline.saying import users_line
from stages.grid import Grid
from stages.keras_internals import layers_of
from stages.loss.trial import Example, tried
from stages.loss.ways import Way, Ways
from stages.worker.orders import Mode

if TYPE_CHECKING:
    from pipeline.runtime.driver import Driver
    from pipeline.runtime.setup import Setup
    from pipeline.runtime.step_runner import StepRunner

Array = np.ndarray[Any, Any]


class Meaning:
    """The way from a batch's parts to the losses and metrics of one call of `compile`.

    Args:
        setup: What the pipeline is made of.
        steps: Makes plans, and knows which outputs have a time axis.
        driver: Gives the running workers.
        compiled: What `compile` was given.
    """

    def __init__(self, setup: Setup, steps: StepRunner, driver: Callable[[], Driver], compiled: Compiled) -> None:
        self._setup, self._steps, self._driver, self.compiled = setup, steps, driver, compiled
        self._tried: dict[tuple[str, bool], Ways] = {}
        self._said = self._said_of_windows = False

    def ways(self, batch: Batch) -> Mapping[str, Ways]:
        """{output label: its ways}, of those that are not made of a batch's parts as Keras's means are.

        Raises:
            CompileError: A loss or metric needs the whole batch, and the batch is cut in time.
        """
        heads = self.compiled.heads
        keys = {label: (label, label in batch.sample_weights) for label in heads}
        new = [label for label, head in heads.items() if None in head.known and keys[label] not in self._tried]
        if new and (len(batch.sizes) > 1 or batch.lengths):
            for label, ways in self._try(batch, new).items():
                self._tried[keys[label]] = ways
        found = {label: self._tried.get(keys[label], head.ways) for label, head in heads.items()}
        found = {label: ways for label, ways in found.items() if ways != Ways()}
        if batch.lengths:
            self._refuse_windows(found)
        return found

    def say(self, batch: Batch) -> None:
        """Say, each once, in what training on microbatches is not what was asked for, or not Keras's."""
        if self._said or len(batch.sizes) == 1:
            return
        self._said, schedule, models = True, self._setup.options.schedule, self._setup.models.values()
        samples, largest = sum(batch.sizes), max(batch.sizes)
        coupling = [name_of(self.compiled.heads[k].loss) for k, ways in batch.ways.items() if ways.loss is Way.WHOLE]
        if coupling and self._setup.options.schedule_name != "gpipe" and schedule is not gpipe:
            _warn(
                f"the loss {coupling[0]} is a number of the whole batch, no mean or sum over its samples, so it is "
                f"computed over the whole batch under schedule='gpipe' in place of {schedule!r}: stages keep the "
                "activations of all microbatches. Say Pipeline(..., schedule='gpipe') if this is meant"
            )
        found = [layer for model in models for layer in layers_of(model) if _normalises_batches(layer)]
        if found:
            _warn(
                f"the layer {found[0].name!r} (BatchNormalization) takes its statistics from each microbatch of "
                f"{largest} samples, where Keras takes them from the batch of {samples}: training differs. With "
                "microbatches=1 it is; GroupNormalization and LayerNormalization do not depend on the batch"
            )
        metrics = [metric.name for model in models for metric in model.metrics]
        if metrics:
            _warn(
                f"the metric {metrics[0]!r} inside of a layer counts every microbatch, where Keras counts every batch: "
                "a mean of means over equal microbatches is the same, another number is not. Give it to compile(), or "
                "use microbatches=1"
            )

    def say_of_windows(self, batch: Batch) -> None:
        """Say, once, that a metric over time is not Keras's where windows have unequal lengths."""
        if self._said_of_windows or len(set(batch.lengths)) < 2 or not batch.targets:
            return
        heads = self.compiled.heads
        counted = [label for label in self._steps.over_time(list(batch.targets)) if heads[label].has_metrics]
        if counted:
            self._said_of_windows = True
            _warn(
                f"metrics of {counted[0]!r} count every window alike, and these have {batch.lengths} time steps: a "
                "mean is not Keras's, which weighs every step alike (the loss, and its gradients, do). Sequences of a "
                f"length that is a multiple of windows={len(batch.lengths)} are counted as in Keras"
            )

    def _try(self, batch: Batch, labels: list[str]) -> dict[str, Ways]:
        """What a trial says of some outputs; nothing of those whose loss fails on the batch, which a worker tells."""
        driver, wires, outputs = self._driver(), self._setup.wires, {}
        names = {label: name for (name, _), label in zip(wires.outputs, wires.labels, strict=True)}
        with driver.keeping():
            outputs = driver.run(self._steps.plan(batch, training=False), Mode.PREDICT, batch).outputs
        over_time = self._steps.over_time(labels) if batch.lengths else ()
        masked = any(description.masks for description in driver.descriptions.values())
        found = {}
        for label in labels:
            example = Example(
                batch.targets[label],
                outputs[names[label]],
                batch.sample_weights.get(label),
                Grid(tuple(batch.sizes), tuple(batch.lengths)),
                label in over_time,
                masked,
            )
            try:
                ways = tried(self.compiled.heads[label], example)
            except Exception:  # the worker that has the loss meets it too, and tells where
                continue
            if ways is not None:
                found[label] = ways
        return found

    def _refuse_windows(self, found: Mapping[str, Ways]) -> None:
        for label, ways in found.items():
            head = self.compiled.heads[label]
            if ways.loss is Way.WHOLE:
                raise CompileError(
                    f"the loss {name_of(head.loss)} is no mean or sum over samples and time steps alike (it couples "
                    "some, or adds up a sample's steps), so it cannot be computed window by window; use one that is, "
                    "or leave windows out"
                )
            if ways.metrics is Way.WHOLE:
                raise CompileError(
                    f"a metric of the output {label!r} gives a number of a whole batch, or of a sample's whole length, "
                    "so it cannot count window by window; use one that counts samples and time steps, or leave windows "
                    "out"
                )


def _normalises_batches(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and layer.trainable


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=users_line())


__all__ = ["Meaning"]
