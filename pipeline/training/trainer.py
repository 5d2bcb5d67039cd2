"""Keras's own training loop around the hand-off.

`fit`, `evaluate` and `predict` are Keras's: epochs, data adapters, shuffling, validation, callbacks, history and the
progress bar come from a Keras model without layers whose steps are steps of the pipeline. What Keras asks of "the
model" in a callback (weights, saving, the learning rate, a metric's direction) is answered by the pipeline.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.batch.data import refuse_text
from pipeline.batch.outputs import by_label
from pipeline.batch.step import StepResult
from pipeline.errors import CompileError, DataError, NotInPipelineError
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from pipeline.saying import users_line
from pipeline.training import own_metrics
from pipeline.training.callbacks import prepared, saves_or_goes_on, watchers_among
from pipeline.training.executions import next_batches
from pipeline.training.model_without_layers import ModelWithoutLayers, in_words
from pipeline.training.running_logs import RunningLogs

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline
    from pipeline.training.fit_run import FitRun
    from pipeline.verify.every import VerifyEvery


_NO_BATCH = "the data gave no batch: no samples, or a generator or data set that has run out"


def _verifying(verify_every: int | VerifyEvery | None) -> tuple[VerifyEvery, ...]:
    """The callback that `fit` was asked for, if it was; what it takes is imported only then."""
    if verify_every is None:
        return ()
    from pipeline.verify.every import VerifyEvery

    return (VerifyEvery.of(verify_every),)


class Trainer(ModelWithoutLayers):
    """The Keras side of a pipeline: what callbacks know as ``self.model``.

    Args:
        pipe: The pipeline, for what callbacks ask of the whole model.
        session: What does the work.

    Attributes:
        logs: Of the epoch so far.
    """

    def __init__(self, pipe: Pipeline, session: Session) -> None:
        original = session.setup.original
        super().__init__(name="pipeline" if original is None else original.name)
        self.built = True
        self.pipe, self.session = pipe, session
        self.logs = RunningLogs()
        self._run: FitRun | None = None
        self._watchers: tuple[StepWatcher, ...] = ()
        self._metrics_are_read = False
        self._trained = self._tested = self._predicted = 0
        self._told_of_steps = False
        if session.workers.compiled is not None:
            session.workers.compiled.build_optimizers()  # Keras asks them for the rate and the iterations
        several = 1 if session.workers.compiled is None else session.workers.compiled.steps_per_execution
        options: dict[str, Any] = {"run_eagerly": True, "jit_compile": False, "auto_scale_loss": False}
        keras.Model.compile(self, pipe.optimizer, steps_per_execution=several, **options)
        self.loss = None if session.workers.compiled is None else session.workers.compiled.loss

    def call(self, x: Any, training: bool | None = None, mask: Any = None) -> Any:
        """One forward pass through the workers, in inference mode."""
        return self.pipe(x, training, mask)

    @property
    def input_shape(self) -> Any:
        """Of the model that was split."""
        return self._one_model("input_shape").input_shape

    @property
    def output_shape(self) -> Any:
        """Of the model that was split."""
        return self._one_model("output_shape").output_shape

    def _one_model(self, asked: str) -> Any:
        if (original := self.session.setup.original) is None:
            raise NotInPipelineError(in_words(asked))
        return original

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's."""
        return self.pipe.train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's."""
        return self.pipe.test_on_batch(*args, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        """The pipeline's."""
        return self.pipe.predict_on_batch(x)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """The one model that the stages are, exported by Keras."""
        self.pipe.merge().export(*args, **kwargs)

    def fit(
        self, *args: Any, callbacks: Any = None, verify_every: int | VerifyEvery | None = None, **kwargs: Any
    ) -> Any:
        """Keras's `fit`, with callbacks that were looked through first; step watchers see every batch."""
        finalize = self.session.workers.needs_compile("fit").averages
        callbacks = prepared(callbacks, self.session, finalize, _verifying(verify_every))
        refuse_text(args[0] if args else kwargs.get("x"))
        self._watchers, self._metrics_are_read = watchers_among(callbacks), own_metrics.reads_every_batch(callbacks)
        before = self._trained
        try:
            if saves_or_goes_on(self.session, callbacks):
                if self.steps_per_execution > 1:
                    raise CompileError(
                        f"PipelineCheckpoint(every=...) and Pipeline.resume go batch by batch, and compile() was given "
                        f"steps_per_execution={self.steps_per_execution}; leave it at 1"
                    )
                from pipeline.training.fit_run import FitRun  # what only files take is imported with the first

                self._run = FitRun(
                    self, self.session, callbacks, {**dict(zip(("x", "y"), args, strict=False)), **kwargs}
                )
                return self._run.fit(super().fit)
            history = super().fit(*args, callbacks=callbacks, **kwargs)
        finally:
            self._watchers, self._metrics_are_read, self._run = (), False, None
        if history.epoch and self._trained == before:
            raise DataError(f"{_NO_BATCH}; nothing was trained")
        return history

    def evaluate(self, *args: Any, callbacks: Any = None, return_dict: bool = False, **kwargs: Any) -> Any:
        """Keras's `evaluate`, its list in Keras's order."""
        callbacks = prepared(callbacks, self.session, finalize=False)
        refuse_text(args[0] if args else kwargs.get("x"))
        before = self._tested
        logs = super().evaluate(*args, callbacks=callbacks, return_dict=True, **kwargs)
        if self._tested == before:
            raise DataError(f"{_NO_BATCH}; there is nothing to evaluate")
        return self.returned(logs, return_dict)

    def predict(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """Keras's `predict`, with callbacks that were looked through first."""
        refuse_text(args[0] if args else kwargs.get("x"))
        callbacks, before, outputs = prepared(callbacks, self.session, finalize=False), self._predicted, None
        try:
            outputs = super().predict(*args, callbacks=callbacks, **kwargs)
        except UnboundLocalError:  # Keras's, where there is no batch
            if self._predicted != before:
                raise
        if self._predicted == before:
            raise DataError(f"{_NO_BATCH}; there is nothing to predict")
        return outputs

    def make_train_function(self, force: bool = False) -> None:
        """Keras's; several batches an execution go to the workers together."""
        super().make_train_function(force)
        if self.steps_per_execution > 1:
            self.train_function = self._executed(self._train_several)

    def make_test_function(self, force: bool = False) -> None:
        """The same."""
        super().make_test_function(force)
        if self.steps_per_execution > 1:
            self.test_function = self._executed(lambda batches: [self.test_step(data) for data in batches])

    def _executed(self, run: Callable[[Iterator[Any]], list[dict[str, Any]]]) -> Callable[[Any], Any]:
        """A function from Keras's iterator to the logs behind its next batches, as many as there still are."""

        def function(iterator: Any) -> Any:
            if not (logs := run(next_batches(iterator, self.steps_per_execution))):
                raise StopIteration
            return tf.experimental.Optional.from_value(logs[-1]).get_value()  # numbers as Keras gives them

        return function

    def _train_several(self, batches: Iterator[Any]) -> list[dict[str, Any]]:
        compiled, steps = self.session.workers.needs_compile("training"), self.session.steps
        if self._watchers or steps.one_by_one():
            logs = [self.train_step(data) for data in batches]
            self._say_nothing_is_gained("a callback looks at each of them" if self._watchers else steps.one_by_one())
            return logs
        several: list[Any] = []
        lost: Exception | None = None
        try:
            for data in batches:
                several.append(keras.utils.unpack_x_y_sample_weight(data))
                self._see(several[-1][1])
        except Exception as error:  # of the user's data: what came before is trained, as one by one
            lost = error
        results = steps.train_several(several)
        self._trained += len(results)
        logs = [self.logs.add(result, compiled.loss_labels, size) for result, size in results]
        if self._metrics_are_read and logs:
            self._fetch_metrics()
        if lost is not None:
            raise lost
        return logs

    def _say_nothing_is_gained(self, why: str) -> None:
        if why and not self._told_of_steps:
            self._told_of_steps = True
            warnings.warn(
                f"steps_per_execution={self.steps_per_execution} makes no step faster here, since {why}: they go one "
                "by one, and callbacks are called as often as you asked",
                stacklevel=users_line(),
            )

    def train_step(self, data: Any) -> dict[str, Any]:
        """One batch: forward, backward, update."""
        self._trained += 1
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._see(y)
        if self._run is not None and not self._run.takes(data):
            return self._run.saved_logs
        arrived = time.monotonic()
        for watcher in self._watchers:
            watcher.arrived = arrived
        asked = [watcher.before_step(self.session, (x, y, sample_weight)) for watcher in self._watchers]
        observe, trace = next(filter(None, asked), ""), any(watcher.traces for watcher in self._watchers)
        result, size = self.session.steps.train(x, y, sample_weight, observe=observe, trace=trace)
        for watcher in self._watchers:
            watcher.after_step(self.session, result)
        return self._count(result, size)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One batch: loss and metrics."""
        self._tested += 1
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._see(y)
        if self._run is not None and self._run.skipping:
            return self._run.saved_logs
        return self._count(*self.session.steps.test(x, y, sample_weight))

    def predict_step(self, data: Any) -> Any:
        """One batch: outputs."""
        self._predicted += 1
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return keras.tree.map_structure(tf.convert_to_tensor, self.pipe.predict_on_batch(x))

    def _count(self, result: StepResult, size: int) -> dict[str, Any]:
        """The logs after one more batch."""
        compiled = self.session.workers.compiled
        logs = self.logs.add(result, () if compiled is None else compiled.loss_labels, size)
        if self._metrics_are_read:
            self._fetch_metrics()
        return logs

    def _fetch_metrics(self) -> None:
        """Give the metrics of this process the workers' values, and the loss's what was counted here."""
        if self.session.workers.compiled is None:
            return
        self.logs.shown = True
        own_metrics.fetch(self.session, self.session.workers.compiled)
        for metric in self.metrics:
            if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
                metric.total.assign(self.logs.totals.get("loss", 0.0))
                metric.count.assign(self.logs.samples)

    def returned(self, logs: Mapping[str, Any], return_dict: bool) -> Any:
        """Logs as Keras's methods return them: a dict, the loss alone, or [loss, *metrics]."""
        compiled = self.session.workers.compiled
        if compiled is not None and compiled.has_metrics:
            self._fetch_metrics()
        return self.logs.returned(logs, return_dict)

    @property
    def log_names(self) -> list[str]:
        """What the logs hold, in the order in which `returned` lists them; the loss alone before a first batch."""
        return list(self.logs.order) or ["loss"]

    @property
    def metrics(self) -> list[Any]:
        """What callbacks look a metric's direction up in; the values come from the workers."""
        compiled = self.session.workers.compiled if hasattr(self, "session") else None
        return [] if compiled is None else [m for head in compiled.heads.values() for m in head.judge.metrics]

    def _see(self, targets: Any) -> None:
        """Resolve the metrics' names here too, which needs a target and the shape of the predictions."""
        compiled, wires = self.session.workers.compiled, self.session.setup.wires
        if compiled is None or not compiled.has_metrics or targets is None:
            return
        if all(head.built for head in compiled.heads.values()):
            return
        given = by_label(targets, wires.labels, compiled.judged)
        for (name, stage), label in zip(wires.outputs, wires.labels, strict=True):
            told = self.session.workers.driver().output_spec(stage, name)
            if label not in compiled.heads or told is None or given is None:
                continue
            dtype, shape = told
            one = tf.convert_to_tensor(given[label])
            if not one.shape.rank or not one.shape[0]:
                return  # the step itself says what is wrong with it
            one = one[:1]
            free = [*one.shape, *(1 for _ in shape)]
            sizes = [free[i] if size is None else size for i, size in enumerate(shape)]
            with self.session.steps.calling_own():
                own_metrics.build(compiled, label, one, tf.zeros([1, *sizes[1:]], dtype))

    def reset_metrics(self) -> None:
        """Start counting anew, here and in the workers; Keras does so where an epoch begins."""
        self.pipe.changes.closely = True
        compiled, shown = self.session.workers.compiled, self.logs.shown
        self.logs.reset()
        self.pipe.reset_metrics()
        if compiled is not None and (compiled.has_metrics or shown):  # else Keras's mean of the loss is zero already
            foreign = own_metrics.any_of_users_classes(compiled)  # they may count in attributes
            with self.session.steps.calling_own() if foreign else nullcontext():
                own_metrics.reset(compiled)

    def get_metrics_result(self) -> dict[str, Any]:
        """The logs as the last step left them, also one of an evaluation by a callback; Keras asks after an epoch."""
        self._fetch_metrics()
        return dict(self.logs.last)

    def count_params(self) -> int:
        """The number of parameters of all stages' weights."""
        return self.pipe.count_params()

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """The pipeline's table."""
        self.pipe.summary(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The configuration of the one model that the stages are."""
        config: dict[str, Any] = self.pipe.merge().get_config()
        return config

    def to_json(self, **kwargs: Any) -> str:
        """The one model that the stages are, as JSON."""
        return str(self.pipe.merge().to_json(**kwargs))

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """The pipeline's weights."""
        return self.pipe.get_weights()

    def set_weights(self, weights: Any) -> None:
        """Set the pipeline's weights."""
        self.pipe.set_weights(weights)

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """A Keras file (``.keras``, the merged model) or a checkpoint of the pipeline (any other name)."""
        self.pipe.save(filepath, overwrite, **kwargs)

    def save_weights(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """The merged model's weights and its optimizer's state (``.weights.h5``)."""
        self.pipe.save_weights(filepath, overwrite, **kwargs)

    def load_weights(self, filepath: Any, **kwargs: Any) -> None:
        """A ``.weights.h5`` file into the stages."""
        self.pipe.load_weights(filepath, **kwargs)
