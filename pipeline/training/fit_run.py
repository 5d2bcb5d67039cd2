"""One `fit` that saves how far it is, or goes on from where another one was.

    Keras's loop ─► first ─► the user's callbacks ─► last            around every epoch and every batch

Saving: behind a batch, when all callbacks have seen its end, all that the next batch begins with is read: the workers'
variables, and `FitRun.progress` of this process. Files are written in a thread of their own.

Going on: Keras's loop begins where the data can be drawn as before. For arrays that is the epoch that was saved, since
their order depends on the seed alone; for whatever else has a state of its own, the first epoch. Batches are drawn and
not trained, and the user's callbacks hear of nothing, until the batch that was saved last. The epoch's batches up to
there must be those that were trained (`Drawn`). Then, and not before, everything is set to what was saved, random
numbers too: an iterator that draws from them has drawn by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from pipeline.errors import CheckpointError, CompileError
from pipeline.runtime.session import Session
from pipeline.runtime.values import values_of
from pipeline.saving.checkpoint import BETWEEN_STEPS, Content, read_content, write_content
from pipeline.saving.folder import real_place
from pipeline.saving.going_on import Resumed
from pipeline.saving.own_objects import warn_of_what_is_not_in_it
from pipeline.saving.run_folder import keep_last, only_writer, state_of_step, states
from pipeline.training.callback_states import CallbackStates, same_bits
from pipeline.training.callbacks import Finalize, PipelineCheckpoint, flat
from pipeline.training.drawn import Drawn
from pipeline.training.random_states import read_random_states, write_random_states
from stages.tensorflow_internals import global_seed
from stages.worker import snapshot
from stages.worker.orders import Mode

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class FitRun:
    """One call of `fit` that saves itself, goes on from a saved one, or both.

    Args:
        trainer: What Keras trains.
        session: What does the work.
        callbacks: All of the user's, and ours.
        arguments: What Keras's `fit` is given.

    Attributes:
        skipping: Whether batches are drawn without being trained.

    Raises:
        CheckpointError, CompileError: This fit cannot save itself so that it could go on, or not go on exactly.
    """

    def __init__(self, trainer: Trainer, session: Session, callbacks: Any, arguments: Mapping[str, Any]) -> None:
        given = flat(callbacks)
        saving = [one for one in given if isinstance(one, PipelineCheckpoint) and one.every]
        if len(saving) > 1:
            raise CompileError("one PipelineCheckpoint(every=...) saves all of a training; leave the others out")
        self._trainer, self._session = trainer, session
        self._saving: PipelineCheckpoint | None = saving[0] if saving else None
        self._resumed: Resumed | None = session.workers.resumed
        self.skipping = self._resumed is not None
        self._known = CallbackStates([one for one in given if one is not self._saving and type(one) is not Finalize])
        self._gate = _Gate(given)
        self._behind_gate = self._gate.callbacks
        self._arguments = dict(arguments)
        self._epochs = int(arguments.get("epochs") or 1)
        self._epoch = self._batch = self._steps = 0
        self._drawn = Drawn()
        self._random: dict[str, Any] = {}
        self._ends: list[tuple[int, int, dict[str, Any]]] = []  # of epochs, each what the one before had not
        self._end: dict[str, Any] = {"keras": None}
        self._recipes: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._held, self._writer = ExitStack(), ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._check_going_on()
        self._check_saving()

    @property
    def _progress(self) -> Mapping[str, Any]:
        assert self._resumed is not None
        return self._resumed.progress

    @property
    def saved_logs(self) -> dict[str, Any]:
        """What Keras's progress bar shows of batches that are skipped: the logs where training was saved."""
        return dict(self._progress["logs"]["last"])

    def _check_going_on(self) -> None:
        if self._resumed is None:
            return
        if self._session.workers.compiled is not self._resumed.compiled:
            raise CheckpointError(
                "compile() was called behind Pipeline.resume, so training cannot go on exactly; give resume what "
                "compile should have: Pipeline.resume(folder, optimizer=..., loss=...)"
            )
        given = {i: len(some) for i, some in self._session.workers.besides().items()}
        if given != (saved := {i: len(some) for i, some in self._progress["own variables"].items()}):
            raise CheckpointError(
                f"losses, loss weights and layers had {sum(saved.values())} variable(s) of their own in the saved "
                f"training, and have {sum(given.values())} now; give Pipeline.resume the loss and loss_weights that "
                "compile had"
            )
        if self._has_changed():
            raise CheckpointError(
                "weights, the optimizer's state or its rate were changed between Pipeline.resume and fit, by "
                "train_on_batch, set_weights or the like, so training cannot go on exactly; change them behind this "
                f"fit, or train on from Pipeline.load({str(self._resumed.path)!r})"
            )
        self._known.check(self._progress["callbacks"])
        if self._progress["finished"] and self._progress["epochs"] != self._epochs:
            raise CheckpointError(
                f"the training saved in {self._resumed.path} has ended, after epochs={self._progress['epochs']}; to "
                f"train on, take Pipeline.load({str(self._resumed.path)!r}) and fit(..., initial_epoch="
                f"{self._progress['epochs']}, epochs={self._epochs}), with another folder for "
                "PipelineCheckpoint(every=...)"
            )

    def _has_changed(self) -> bool:
        """Whether the workers' values, or a rate in this process, are others than `Pipeline.resume` gave them."""
        assert self._resumed is not None
        if self._resumed.rates != self._session.workers.needs_compile("fit").rates():
            return True
        return any(
            not same_bits(list(saved[i]), now[i])
            for group, saved in self._resumed.begins.items()
            for now in [self._session.values.read(group)]
            for i in now
        )

    def _check_saving(self) -> None:
        if self._saving is None:
            return
        if self._resumed is None and self._shuffles and global_seed() is None:
            raise CompileError(
                "fit shuffles the samples with numbers from TensorFlow, which have no seed, so a training that is "
                "resumed would see others; call keras.utils.set_random_seed(...) before, or pass shuffle=False"
            )
        folder = Path(self._saving.filepath)
        self._held.enter_context(only_writer(folder))
        found = states(folder)
        mine = None if self._resumed is None else self._resumed.path.resolve()
        if found and found[-1].resolve() != mine:
            self._held.close()
            raise CheckpointError(
                f"{folder} has the states of another training, the last one {found[-1].name}; choose another "
                f"folder, or, if that training has not ended, go on with it by Pipeline.resume({str(folder)!r})"
            )

    @property
    def _are_arrays(self) -> bool:
        """Whether Keras is given arrays, of whose order the global seed alone decides."""
        leaves = [leaf for leaf in keras.tree.flatten(self._arguments.get("x")) if leaf is not None]
        return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)

    @property
    def _begins_where_it_was(self) -> bool:
        """Whether an epoch's batches do not depend on the epochs before it."""
        return self._are_arrays and not self._arguments.get("steps_per_epoch")

    @property
    def _shuffles(self) -> bool:
        return self._are_arrays and bool(self._arguments.get("shuffle", True))

    def fit(self, fit: Any) -> Any:
        """Call Keras's `fit`, and give its History.

        Raises:
            CheckpointError: The data are not those that were trained before.
        """
        with self._held:
            try:
                if self._resumed is not None and self._progress["finished"]:
                    return self._finished()
                history = fit(callbacks=[_First(self), self._gate, _Last(self)], **self._begun())
                if self.skipping:
                    raise self._other_data(f"this fit ends with epoch {self._epochs}")
                if self._saving is not None:
                    self._save(finished=True)
                return history
            finally:
                self._writer.shutdown()  # waits for what is being written
                if self._written is not None:
                    self._written.result()

    def _finished(self) -> Any:
        """Be where a training was that had ended, but for metrics, which no batch has built; its History."""
        history = self._trainer.history = keras.callbacks.History()
        for callback in (history, *self._behind_gate):
            keras.callbacks.Callback.set_model(callback, self._trainer)  # theirs may write files
        self._be_there([group for group in BETWEEN_STEPS if group != "metrics"])
        return history

    def _begun(self) -> dict[str, Any]:
        """What Keras's `fit` is called with, and random numbers as they were there."""
        if self._resumed is None:
            self._random["begin"] = read_random_states()
            return self._arguments
        self._random["begin"] = self._progress["random"]["begin"]
        self._known.before_train_begins(self._progress["callbacks"])
        write_random_states(self._progress["random"]["begin"])
        self._ends = list(self._progress["random"]["ends"])
        if self._begins_where_it_was:
            return {**self._arguments, "initial_epoch": self._progress["epoch"]}
        return self._arguments

    # -- what the two callbacks around the user's hear -----------------------------------------------------------

    def train_begins(self) -> None:
        """Behind all callbacks: they have begun, and hear nothing more while batches are skipped."""
        self._known.train_begins()
        if self.skipping:
            self._gate.callbacks = []

    def epoch_begins(self, epoch: int) -> None:
        """Before all callbacks."""
        if new := {name: one for name, one in self._now.items() if not same_bits(one, self._end.get(name))}:
            self._ends.append((self._epoch, self._batch, new))
            self._end |= new
        self._epoch, self._batch, self._drawn = epoch, 0, Drawn()
        if self.skipping and epoch == self._progress["epoch"]:
            write_random_states(self._progress["random"]["epoch"])
        self._random["epoch"] = read_random_states()

    def takes(self, data: Any) -> bool:
        """Note a batch that Keras has drawn; whether it is to be trained."""
        self._drawn.add(data)
        if self.skipping and (self._epoch, self._batch + 1) == (self._progress["epoch"], self._progress["batch"]):
            self._build_metrics(data)
        return not self.skipping

    def batch_ended(self) -> None:
        """Behind all callbacks."""
        self._batch += 1
        if self.skipping:
            for epoch, batch, states in self._progress["random"]["ends"]:
                if (epoch, batch) == (self._epoch, self._batch):
                    self._end |= states
                    write_random_states({**self._end, "tensorflow": None})  # data may draw behind their last batch
            if (self._epoch, self._batch) == (self._progress["epoch"], self._progress["batch"]):
                self._go_on()
            return
        self._now = {} if self._begins_where_it_was else read_random_states()
        self._steps += 1
        if self._saving is not None and self._steps % (self._saving.every or 1) == 0:
            self._save()

    def epoch_ended(self) -> None:
        """Behind all callbacks."""
        if self.skipping and self._epoch >= self._progress["epoch"]:
            raise self._other_data(f"epoch {self._epoch + 1} has only {self._batch} batches now")

    # -- saving --------------------------------------------------------------------------------------------------

    def progress(self, finished: bool) -> dict[str, Any]:
        """What this process knows of the training, plain data."""
        history = self._trainer.history
        return {
            "finished": finished,
            "epochs": self._epochs,
            "epoch": self._epoch,
            "batch": self._batch,
            "steps": self._steps,
            "drawn": self._drawn.number,
            "logs": self._trainer.logs.state(),
            "history": dict(history.history),
            "history epochs": list(history.epoch),
            "stop": bool(self._trainer.stop_training),
            "rates": self._session.workers.needs_compile("fit").rates(),
            "own variables": {i: snapshot.read(some) for i, some in self._session.workers.besides().items()},
            "callbacks": self._known.read(),
            "random": {**self._random, "now": read_random_states(), "ends": self._ends},
        }

    def _save(self, finished: bool = False) -> None:
        """Read all that is saved, and let it be written."""
        assert self._saving is not None
        content = read_content(self._trainer.pipe, self.progress(finished), self._recipes)
        if self._written is None:
            warn_of_what_is_not_in_it(content.manifest, self._saving.filepath, "resume")
        else:
            self._written.result()  # one at a time; an error there is this one's, too
        self._written = self._writer.submit(
            _written, content, Path(self._saving.filepath), self._steps, self._saving.keep
        )

    # -- going on ------------------------------------------------------------------------------------------------

    def _build_metrics(self, data: Any) -> None:
        """Let the workers make their metrics' variables, which they do with a first batch, and leave no other trace."""
        assert self._resumed is not None
        saved, driver = self._resumed.between["metrics"], self._session.workers.driver()
        found = values_of(driver, "metrics")
        if any(len(saved[i]) != len(found[i]) for i in found):
            compiled, steps = self._session.workers.needs_compile("fit"), self._session.steps
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            batch = steps.batch(x, y, sample_weight, judged=compiled.judged)
            with driver.keeping():
                driver.run(steps.plan(batch, training=False), Mode.TEST, batch)

    def _go_on(self) -> None:
        """Be where the saved training was, if it drew the same batches."""
        if self._drawn.number != self._progress["drawn"]:
            raise self._other_data(f"the first {self._batch} batches of epoch {self._epoch + 1} are others now")
        self._be_there(BETWEEN_STEPS)

    def _be_there(self, groups: Sequence[str]) -> None:
        """Set everything to what was saved, random numbers last; of the workers' variables these groups."""
        assert self._resumed is not None
        saved, driver = self._progress, self._session.workers.driver()
        for group in groups:  # kept states too, since a prediction may have been asked for before
            driver.set(group, self._resumed.between[group])
        self._trainer.pipe.changes.take_over(saved["own variables"])
        self._steps = saved["steps"]
        self._trainer.logs.go_on_from(saved["logs"])
        self._trainer.history.history, self._trainer.history.epoch = saved["history"], saved["history epochs"]
        self._trainer.stop_training = saved["stop"]
        self._session.workers.needs_compile("fit").set_rates(saved["rates"])
        self._gate.callbacks = self._behind_gate
        self._known.go_on_from(saved["callbacks"])
        self.skipping, self._session.workers.resumed = False, None
        write_random_states(saved["random"]["now"])

    def _other_data(self, how: str) -> CheckpointError:
        assert self._resumed is not None
        return CheckpointError(
            f"training cannot go on exactly behind batch {self._progress['batch']} of epoch "
            f"{self._progress['epoch'] + 1}, where it was saved: {how}. Give fit the same data in the same order: a "
            "tf.data shuffle needs a seed, or keras.utils.set_random_seed(...) before the data set is made, as does "
            "whatever else draws"
        )


def _passed_on(name: str) -> Any:
    def hear(gate: Any, *args: Any, **kwargs: Any) -> None:
        for one in gate.callbacks:
            getattr(one, name)(*args, **kwargs)

    return hear


_Gate: Any = type(
    "_Gate",
    (keras.callbacks.CallbackList,),
    {
        "__doc__": "The user's callbacks as one, which get the very same logs: some add to them.",
        **{name: _passed_on(name) for name in dir(keras.callbacks.CallbackList) if name.startswith("on_")},
    },
)


class _First(keras.callbacks.Callback):  # type: ignore[misc]
    """Hears before the user's callbacks."""

    def __init__(self, run: FitRun) -> None:
        super().__init__()
        self._run = run

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._run.epoch_begins(epoch)


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Hears behind the user's callbacks."""

    def __init__(self, run: FitRun) -> None:
        super().__init__()
        self._run = run

    def on_train_begin(self, logs: Any = None) -> None:
        self._run.train_begins()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._run.batch_ended()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._run.epoch_ended()


def _written(content: Content, folder: Path, steps: int, keep: int) -> None:
    """Write one state, then remove those that are too old."""
    try:
        write_content(content, real_place(state_of_step(folder, steps), overwrite=True))
        keep_last(folder, keep)
    except OSError as error:
        raise CheckpointError(
            f"the training's state behind step {steps} could not be written into {folder}: {error.strerror or error}"
        ) from error


__all__ = ["FitRun"]
