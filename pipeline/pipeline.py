"""The pipeline: a Keras model in parts, each in its own process, used like one Keras model.

    pipe = Pipeline.split(model, stages=3)
    pipe.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    pipe.fit(x, y)

Workers start when they are first needed, after `compile`, and end with `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pipeline.batch.data import sample_or_class_weights
from pipeline.batch.inputs import check_cuttable
from pipeline.compiled.arguments import refuse_options
from pipeline.compiled.compiled import Compiled
from pipeline.cutting.prediction import Prediction
from pipeline.cutting.splitter import Cut, Split, cuts, split_model
from pipeline.model.wiring import wire
from pipeline.own.changes import Changes
from pipeline.own.first_batch import FirstBatch
from pipeline.plan.plan import Plan
from pipeline.runtime.launch import prestart
from pipeline.runtime.options import Options
from pipeline.runtime.recovery.options import Recovery, Repair
from pipeline.runtime.session import Session
from pipeline.runtime.turns import counting, no_copy, one_turn
from pipeline.saving import files
from pipeline.training import as_keras
from pipeline.training.not_here import WithoutModelNames
from pipeline.training.trainer import Trainer
from pipeline.verify import questions
from stages.recipe.segment import Segment

if TYPE_CHECKING:
    from pipeline.verify.every import VerifyEvery


class Pipeline(WithoutModelNames):
    """A model in segments, each in its own worker process.

    Args:
        segments: Built Keras models or `Segment`s, in the order of the data flow.
        microbatches: Into how many parts a batch is cut; a batch with fewer samples is cut into as many as it has.
        schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zb-h1"``, ``"zb-h2"``, ``"zb-v"``, or a function
            (stages, microbatches) -> Plan; for `split` also ``"auto"`` or an `AutoSchedule`. See docs/schedules.md.
        transport: ``"auto"`` or ``"local"``: Unix sockets and shared memory; ``"ipc"``, ``"tcp"`` or a loopback address
            ``"tcp://127.0.0.1:5555"`` for the driver: ZeroMQ; ``"inproc"``: threads in this process, for tests.
        recompute: Keep only inputs between forward and backward and compute the forward pass again: less memory, more
            time. True, False, or one value per stage.
        threads: TensorFlow's threads per worker; default: the cores shared evenly.
        outputs: Names of the tensors that are the model's outputs, in order; default: those that no segment takes.
        windows: Cut the time axis, the second of inputs and targets, into so many passes that run one after the other
            through every stage; recurrent layers hand states and their gradients on. See docs/windows.md.
        truncate: Let a state's gradient go back through so many windows only; None: through all.
        keep_state: Begin a batch with the states that the one before it left (values only); see `reset_state`.
        check_first_batch: Compare the first batch after `compile` that is trained, evaluated or predicted with the
            user's own model and loss in this process, and refuse to go on if they differ by more than rounding.
        recovery: Get over workers that die or freeze, with the bits that training has without it; see docs/faults.md.

    Attributes:
        segments, wires: The parts, and how they are connected.
        changes: Looks for what the user changes while training; see `pipeline.own.changes`.
        history: Keras's of the last `fit`; None before it.

    Raises:
        FirstBatchError: Later, by `fit` and others: the workers compute something else than the model in this process.
        SegmentError, WiringError, ScheduleError, CompileError, BadAddress: What was given does not fit together.
        OptionsError: Several options cannot be; it names all of them.
    """

    def __init__(
        self,
        segments: Sequence[Any] | Split,
        microbatches: int = 8,
        schedule: str | Callable[..., Plan] = "1f1b",
        transport: str = "auto",
        *,
        recompute: bool | Sequence[bool] = False,
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        windows: int = 1,
        truncate: int | None = None,
        keep_state: bool = False,
        check_first_batch: bool = True,
        recovery: bool | Recovery = False,
    ) -> None:
        split = segments if isinstance(segments, Split) else None
        if isinstance(segments, Split):
            self.segments = segments.segments
            self.wires = wire(self.segments, segments.inputs, segments.outputs, segments.labels)
        else:
            self.segments = tuple(Segment.of(part) for part in segments)
            self.wires = wire(self.segments, outputs_named=outputs)
        options = Options.of(
            len(self.segments),
            states=any(segment.states for segment in self.segments),
            microbatches=microbatches,
            schedule=schedule,
            transport=transport,
            recompute=recompute,
            threads=threads,
            windows=windows,
            truncate=truncate,
            keep_state=keep_state,
            recovery=recovery,
        )
        self.schedule, self.microbatches, self.recompute = options.schedule, options.microbatches, options.recompute
        self.transport, self.threads = options.transport, options.threads
        check_cuttable([split.model] if split else [part.model for part in self.segments], self.microbatches)
        self._trainer: Trainer | None = None
        self.history: Any = None
        self._session = Session.of(self.segments, self.wires, options, split)
        self.changes = Changes(self._session)
        self._session.workers.filled, steps = self.changes.hold, self._session.steps
        steps.begin, steps.calling_own = self.changes.look, self.changes.calling_own
        FirstBatch(self._session).watch(check_first_batch)
        if not self.transport.startswith("inproc"):
            prestart()

    @classmethod
    def split(
        cls,
        model: Any,
        stages: int | None = None,
        at: Sequence[Cut] | None = None,
        *,
        balance: str = "parameters",
        sample: Any = None,
        **options: Any,
    ) -> Pipeline:
        """Cut a built Keras model into stages.

        Args:
            model: Sequential or Functional; models inside it are dissolved.
            stages: How many stages; the slowest (or largest) is made as small as it can be.
            at: Or: where to cut, in the order of the stages. Each entry is the name of a layer or tensor, or a list of
                names: these and all they need come before the cut.
            balance: What `stages` are balanced by: ``"parameters"``, or, on a sample, ``"time"`` or ``"memory"``.
            sample: One microbatch of inputs, as `fit` takes them: `prediction` and ``schedule="auto"`` measure on it.
            **options: As for `Pipeline`.

        Raises:
            SplitError: The model cannot be cut, or not there.
        """
        split = split_model(model, stages, at, balance=balance, sample=sample, options=options)
        return cls(split, **(options if split.chosen is None else options | {"schedule": split.chosen}))

    cuts = staticmethod(cuts)

    @property
    def prediction(self) -> Prediction | None:
        """What a step should cost, by what was measured for `split`; ``prediction.beside(timeline)`` compares."""
        split = self._session.setup.split
        return None if split is None else split.prediction

    @property
    def session(self) -> Session:
        """What does the work: workers, steps, values, reference."""
        return self._session

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What was done about workers that died or were frozen, with `recovery`."""
        return tuple(self._session.workers.repairs)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names."""
        return self.wires.names

    @property
    def optimizer(self) -> Any:
        """The optimizer given to `compile` (of several the first stage's); its learning rate may be set."""
        compiled = self._session.workers.compiled
        return None if compiled is None else compiled.optimizer

    @counting()
    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Set what training does, as `keras.Model.compile`. Weights stay as they are.

        As there, a loss that is left out stays that of the `compile` before, with its weights, and so do metrics where
        neither kind is given (``metrics=[]`` ends them).

        Args:
            optimizer: Name or Keras optimizer; every stage gets one like it for its own variables. Or a list with one
                per stage, or a dict by the stages' names. One that has trained your model (``model.optimizer``) goes
                on: its slots, its count of updates, its schedule; a new object begins anew.
            loss: Name, function or Keras loss of the output; for several outputs one for all of them, or a list or a
                dict by their names, None for one without a loss.
            loss_weights: For several outputs a list of numbers or a dict by their names.
            metrics: Names, functions or Keras metrics; for several outputs a list of lists or a dict.
            weighted_metrics: The same, updated with sample weights.
            run_eagerly: True: eager tapes, bit-identical to one tape. False: compiled functions.
            steps_per_execution: So many batches between two calls of a callback; they are undone together if one fails.
            jit_compile: ``"auto"`` and False are the same here; True is refused.
            auto_scale_loss: Whether a model of the policy ``mixed_float16`` gets a `LossScaleOptimizer`, whose scale is
                decided by all stages together.

        Raises:
            CompileError: An unknown name, something that means nothing in a pipeline, or an optimizer that has
                trained other variables.
            RecipeError: A loss or metric that a worker cannot import.
        """
        refuse_options(steps_per_execution=steps_per_execution, jit_compile=jit_compile)
        setup = self._session.setup
        models = list(setup.models.values()) if setup.original is None else [setup.original]
        given = {"loss": loss, "loss_weights": loss_weights, "metrics": metrics, "weighted_metrics": weighted_metrics}
        before = self._session.workers.compiled
        compiled = Compiled(
            optimizer,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            **(given if before is None else before.left_out(given)),
            outputs=self.wires.labelled,
            stages=self.names,
            mixed_float16=auto_scale_loss and any(model.dtype_policy.name == "mixed_float16" for model in models),
        )
        compiled.check_windows(setup.options.windows)
        compiled.check_undecayed([[] if s.model is None else s.model.trainable_variables for s in self.segments])
        self._session.recompile(compiled)
        self._trainer = None

    @counting(whole=True)
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
        *,
        verify_every: int | VerifyEvery | None = None,
    ) -> Any:
        """Train, as `keras.Model.fit`; returns Keras's History, which `history` keeps.

        At its end your own model (the one that was split, or the parts) has the trained values too, as after
        `model.fit`; after `train_on_batch` and `set_weights` it gets them with `close`.

        With `verify_every` the hand-off is verified on the first batch and on every so many-th after it, before it is
        trained on; training is bit for bit the same. See `pipeline.VerifyEvery`, which may be given too, for its cost.

        Raises:
            VerificationError: Something differs by more than its tolerance; no value is that of the step it names.
        """
        trainer = self._ready("fit")
        self._session.values.ahead = True
        self.history = trainer.fit(
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
            verify_every=verify_every,
        )
        self.changes.look(closely=True)
        as_keras.give_back(self)
        return self.history

    @counting(whole=True)
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
        """Loss and metrics, as `keras.Model.evaluate`: the loss, [loss, *metrics], or with `return_dict` all by name.

        Raises:
            DataError: The data do not fit the model, or give no batch.
        """
        given = {"sample_weight": sample_weight, "steps": steps, "callbacks": callbacks, "return_dict": return_dict}
        return self._ready("evaluate").evaluate(x=x, y=y, batch_size=batch_size, verbose=verbose, **given)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Outputs for all samples, as `keras.Model.predict`."""
        trainer = self._ready("predict")
        return trainer.predict(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks)

    @counting()
    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """One update on one batch, as `train_on_batch` of Keras 3.15: its loss, or [loss, *metrics], as numbers."""
        trainer = self._ready("train_on_batch")
        sample_weight = sample_or_class_weights(y, sample_weight, class_weight, len(self.wires.labels))
        trainer.reset_metrics()
        self._session.values.ahead = True
        with self.changes.looked():
            return trainer.returned(trainer.train_step((x, y, sample_weight)), return_dict)

    @counting()
    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Loss and metrics of one batch, as `keras.Model.test_on_batch`."""
        trainer = self._ready("test_on_batch")
        trainer.reset_metrics()
        with self.changes.looked():
            return trainer.returned(trainer.test_step((x, y, sample_weight)), return_dict)

    gradients = one_turn(questions.gradients)
    verify = one_turn(questions.verify)
    explain = one_turn(questions.explain)
    timeline = one_turn(questions.timeline)
    summary = as_keras.summary
    count_params = as_keras.count_params
    __call__ = as_keras.call
    get_weights = one_turn(as_keras.get_weights)
    set_weights = one_turn(as_keras.set_weights)
    predict_on_batch = as_keras.predict_on_batch
    reset_metrics = one_turn(as_keras.reset_metrics)
    reset_state = one_turn(as_keras.reset_state)
    __reduce_ex__ = no_copy

    @property
    def metrics_names(self) -> list[str]:
        """What the numbers are called that `evaluate` and `train_on_batch` give, in their order.

        All are known after the first batch, as in Keras, which shows the metrics of `compile` as ``compile_metrics``.
        """
        if self._session.workers.compiled is None:
            return []
        return self._trainer.log_names if self._trainer is not None else ["loss"]

    save = one_turn(files.save)
    save_weights = one_turn(files.save_weights)
    load_weights = one_turn(files.load_weights)
    load, resume = classmethod(files.load), classmethod(files.resume)
    merge = one_turn(files.merge_trained)
    close = as_keras.close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_session") and self._session.ours:
            self._session.close()

    @one_turn
    def _ready(self, what: str) -> Trainer:
        if what != "predict":
            self._session.workers.needs_compile(what)
        self._trainer = self._trainer or Trainer(self, self._session)
        self._session.workers.driver()
        self.changes.look(what != "train_on_batch" or not self._session.values.ahead, what in ("fit", "train_on_batch"))
        return self._trainer
