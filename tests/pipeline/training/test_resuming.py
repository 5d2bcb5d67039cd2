"""A training that was stopped anywhere goes on with the bits of one that was not."""

import functools
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CheckpointError, CompileError, Pipeline, PipelineCheckpoint
from pipeline.training import fit_run
from pipeline.training.callback_states import CallbackStates
from tests.failures import GONE_SECONDS
from tests.levels import in_turn
from tests.pipeline.training import resumable
from tests.pipeline.training.resumable import STEPS, Stopping, begin, callbacks, differing, fit, left
from tests.sources import ROOT

# Keras 3.15 itself reads variables in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@functools.cache
def undisturbed(folder=None, **options):
    """What the whole training leaves, without any checkpoint."""
    return trained(begin(), folder, [], **dict(options))


def trained(pipe, folder, more, **options):
    """What a training leaves; {} where it is stopped."""
    given = callbacks(folder)
    with pipe:
        try:
            history = fit(pipe, given, more, **options)
        except KeyboardInterrupt:
            return {}
        return left(pipe, history, given)


def stopped(folder, behind, every=1, **options):
    """A training that saves itself, and is stopped behind so many batches, before that batch is saved."""
    with begin() as pipe, pytest.raises(KeyboardInterrupt):
        fit(
            pipe, callbacks(options.pop("logs", None)), [Stopping(behind), PipelineCheckpoint(folder, every)], **options
        )


def resumed(folder, every=1, **options):
    """What it leaves when it has gone on; other numbers were drawn in between."""
    keras.utils.set_random_seed(99)
    more = [Stopping(-1), PipelineCheckpoint(folder, every)]
    return trained(Pipeline.resume(folder, transport="inproc"), options.pop("logs", None), more, **options)


@pytest.mark.parametrize("behind", in_turn(range(2, STEPS + 1), check=0, gate=0))
def test_goes_on_bit_for_bit(tmp_path, behind):
    stopped(tmp_path, behind)
    assert resumed(tmp_path) == undisturbed()


@pytest.mark.gate
def test_the_last_batch_of_an_epoch_was_saved_before_its_validation(tmp_path):
    stopped(tmp_path, 4)
    assert [one.name for one in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    assert resumed(tmp_path) == undisturbed()
    with Pipeline.resume(tmp_path, transport="inproc") as pipe:
        before = pipe.session.values.read("model")
        history = fit(pipe, callbacks(), [Stopping(-1), PipelineCheckpoint(tmp_path, 1)])
        assert repr(dict(history.history)) == undisturbed()["history"], "a training that has ended gives its history"
        assert repr(pipe.session.values.read("model")) == repr(before)
        with pytest.raises(CheckpointError, match=r"has ended, after epochs=3.*initial_epoch=3, epochs=9"):
            Pipeline.resume(tmp_path).fit(
                resumable.X, resumable.Y, epochs=9,
                callbacks=[*callbacks(), Stopping(-1), PipelineCheckpoint(tmp_path, 1)],
            )  # fmt: skip


LEFT_OUT = {
    "metrics": {"history", "heard"},
    "weights": {"model"},
    "slots": {"model"},
    "logs": {"history", "heard"},
    "history": {"history"},
    "callbacks": {"heard", "best"},
    "random numbers": {"heard", "next"},
    "order": {"model"},
}
"""{state: some of the items that differ without it}."""


@pytest.mark.parametrize("what", in_turn(list(LEFT_OUT), check=0, gate=1))
def test_without_any_one_state_something_differs(tmp_path, monkeypatch, what):
    stopped(tmp_path, 6)
    pipe = Pipeline.resume(tmp_path, transport="inproc")
    state = pipe.session.workers.resumed
    start = pipe.session.workers._start
    if what == "weights":
        start.model[0][0][0] += 1e-7
    elif what == "slots":
        start.slots.of_variable = {
            place: {name: value * 0 for name, value in slots.items()}
            for place, slots in start.slots.of_variable.items()
        }
    elif what == "metrics":
        for arrays in state.between["metrics"].values():
            arrays[:] = [array * 0 for array in arrays]
    elif what == "logs":
        state.progress["logs"]["totals"] = {}
    elif what == "history":
        state.progress["history"].clear()
    elif what == "callbacks":
        monkeypatch.setattr(fit_run.CallbackStates, "go_on_from", lambda *_: None)
    elif what == "random numbers":
        state.progress["random"]["now"] = state.progress["random"]["begin"]
    elif what == "order":  # of the samples
        for when in ("begin", "epoch"):
            _, drawn = state.progress["random"][when]["tensorflow"]
            state.progress["random"][when]["tensorflow"] = (6, drawn)
        monkeypatch.setattr(fit_run.Drawn, "number", "any")
        state.progress["drawn"] = "any"
    found = trained(pipe, None, [Stopping(-1), PipelineCheckpoint(tmp_path, 1)])
    assert differing(found, undisturbed()) >= LEFT_OUT[what]


def shuffled(seed=None):
    return tf.data.Dataset.from_tensor_slices((resumable.X, resumable.Y)).shuffle(60, seed=seed).batch(20)


class Sequence(keras.utils.PyDataset):
    """Shuffles itself between epochs with NumPy's numbers, as is often done."""

    def __init__(self):
        super().__init__()
        self.order = np.arange(60)

    def __len__(self):
        return 3

    def __getitem__(self, batch):
        some = self.order[batch * 20 : batch * 20 + 20]
        return resumable.X[some], resumable.Y[some]

    def on_epoch_end(self):
        np.random.shuffle(self.order)


def endless():
    rng = np.random.default_rng(3)
    while True:
        some = rng.integers(60, size=20)
        yield resumable.X[some], resumable.Y[some]


def unknown_length():
    """A data set whose length nobody knows before it has ended."""
    signature = (tf.TensorSpec((None, 6), tf.float32), tf.TensorSpec((None,), tf.int32))
    return tf.data.Dataset.from_generator(lambda: itertools.islice(endless(), 3), output_signature=signature)


DATA = {
    "tf.data shuffle with a seed": (lambda: (shuffled(3),), {}),
    "PyDataset that shuffles itself": (lambda: (Sequence(),), {"shuffle": True}),
    "data set of unknown length": (lambda: (unknown_length(),), {}),
    "generator": (lambda: (endless(),), {"steps_per_epoch": 3}),
    "steps_per_epoch over arrays": (lambda: (resumable.X, resumable.Y), {"steps_per_epoch": 2, "batch_size": 10}),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data", "ignore:.*shuffle=True. was passed")
@pytest.mark.parametrize("kind", in_turn(list(DATA), check=0, gate=1))
def test_data_that_have_a_state_are_drawn_from_the_first_epoch_on(tmp_path, kind):
    make, options = DATA[kind]
    options = {"batch_size": None, "validation_split": 0.0, "validation_data": (resumable.X, resumable.Y), **options}
    whole = trained(begin(), None, [], data=make(), **options)
    stopped(tmp_path / "run", 5, data=make(), **options)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "a copy elsewhere")
    assert resumed(copy, data=make(), **options) == whole


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:.*shuffle=True. was passed")
def test_other_data_are_refused(tmp_path):
    options = {"batch_size": None, "validation_split": 0.0, "validation_data": (resumable.X, resumable.Y)}
    stopped(tmp_path, 3, data=(shuffled(3),), **options)
    with pytest.raises(CheckpointError, match=r"batch 2 of epoch 1.*the first 2 batches of epoch 1 are others"):
        resumed(tmp_path, data=(shuffled(4),), **options)
    with pytest.raises(CheckpointError, match="epoch 1 has only 1 batches now"):
        resumed(tmp_path, data=(shuffled(3).take(1),), **options)
    with (
        pytest.raises(CheckpointError, match="needs the same ones"),
        Pipeline.resume(tmp_path) as p,
    ):
        p.fit(shuffled(3), epochs=3)
    with (
        pytest.raises(CheckpointError, match=r"compile\(\) was called behind"),
        Pipeline.resume(tmp_path, transport="inproc") as pipe,
    ):
        pipe.compile("sgd", "mse")
        fit(pipe, callbacks(), [Stopping(-1)], data=(shuffled(3),), **options)


class Keeping(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.file = object()


def test_what_could_not_go_on_exactly_is_refused_before_training(tmp_path, monkeypatch):
    with begin() as pipe:
        keep = [PipelineCheckpoint(tmp_path / "run", 1)]
        with pytest.raises(CompileError, match=r"Keeping keeps file, of the type object.*state\(\)"):
            pipe.fit(resumable.X, resumable.Y, callbacks=[Keeping(), *keep], verbose=0)
        with pytest.raises(CompileError, match="BackupAndRestore"):
            pipe.fit(resumable.X, resumable.Y, callbacks=[keras.callbacks.BackupAndRestore("x"), *keep], verbose=0)
        with pytest.raises(CompileError, match="one PipelineCheckpoint"):
            pipe.fit(resumable.X, resumable.Y, callbacks=[*keep, *keep], verbose=0)
        monkeypatch.setattr(fit_run, "global_seed", lambda: None)
        with pytest.raises(CompileError, match="set_random_seed"):
            pipe.fit(resumable.X, resumable.Y, callbacks=keep, verbose=0)
        monkeypatch.undo()
        (tmp_path / "run" / "step-000000007").mkdir(parents=True)
        (tmp_path / "run" / "step-000000007" / "manifest.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"states of another training.*another folder, or, if .* not ended"):
            pipe.fit(resumable.X, resumable.Y, callbacks=keep, verbose=0)
    with pytest.raises(CompileError, match="every=0"):
        PipelineCheckpoint("run", every=0)
    with pytest.raises(CheckpointError, match="no training has saved itself"):
        Pipeline.resume(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="received microbatches"):
        Pipeline.resume(tmp_path, microbatches=3)
    assert Pipeline.resume(tmp_path / "nothing", begin=lambda: "made") == "made"


class Rotating(keras.callbacks.Callback):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.said, self.seen = folder, "nothing", 0

    def on_epoch_end(self, epoch, logs=None):
        self.said, self.late = "something", [epoch]


def test_a_folder_chooses_neither_where_callbacks_write_nor_what_they_do(tmp_path):
    def given():
        made = [
            keras.callbacks.ModelCheckpoint(f"{tmp_path}/mine.keras"), keras.callbacks.EarlyStopping(),
            keras.callbacks.LearningRateScheduler(float), Rotating(str(tmp_path)),
        ]  # fmt: skip
        states = CallbackStates(made)
        states.train_begins()
        return made, states

    made, states = given()
    made[-1].on_epoch_end(3)
    saved = states.read()
    others, again = given()
    again.go_on_from(saved)
    assert (others[-1].said, others[-1].late, others[-1].folder) == ("something", [3], str(tmp_path))
    evil = [
        (0, "filepath", "theirs.keras"), (0, "on_epoch_end", 1), (1, "model", None), (1, "monitor_op", None),
        (1, "_model", None), (1, "__class__", 1), (2, "schedule", "float"), (3, "folder", "/theirs"),
    ]  # fmt: skip
    for place, name, value in evil:
        told = [{**one, "constant": [k for k in one["constant"] if k != name]} for one in saved]
        told[place]["state"] = {**told[place]["state"], name: value}
        others, again = given()
        if name == "monitor_op":  # chosen in the first epoch
            others[1].monitor_op, value = keras.ops.less, "max"
        before = repr([vars(one) for one in others])
        with pytest.raises(CheckpointError, match=f"would set {name} of the callback"):
            again.go_on_from(told)
        assert repr([vars(one) for one in others]) == before
    made[-1].folder = "elsewhere"
    with pytest.raises(CompileError, match="Rotating has changed folder, text that its constructor was given"):
        states.read()


PROGRAM = """
import json, os, signal, sys
from pathlib import Path

import keras
from pipeline import Pipeline, PipelineCheckpoint
from pipeline.saving import checkpoint
from tests.pipeline.training.resumable import Stopping, begin, callbacks, fit, left

moment, folder, eager = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "eager"
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


class Dying(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        moment == "validation" and die()

    def on_epoch_end(self, epoch, logs=None):
        moment == "end of an epoch" and die()

    def on_train_batch_end(self, batch, logs=None):
        if moment == "writing":  # half of the second stage's file is there
            write = checkpoint._write_text
            checkpoint._write_text = lambda path, text: (path.write_text(text[:100]), die())


def first():
    return begin("auto", eager)


given = callbacks(folder)
more = [Dying(), Stopping(4 if moment == "a batch" else -1, die)]
keep = [] if moment == "undisturbed" else [PipelineCheckpoint(folder / "run", every=2)]
with Pipeline.resume(folder / "run", begin=first) as pipe:
    history = fit(pipe, given, [*more, *keep])
    print("LEFT", json.dumps(left(pipe, history, given)))
"""
KILLED = [
    ("eager", ("writing", "validation")),
    ("eager", ("a batch", "validation", "writing", "end of an epoch")),
    ("compiled", ("a batch", "validation", "writing", "end of an epoch")),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("way", "moments"), in_turn(KILLED, check=0, gate=1, several=True))
def test_a_program_that_is_killed_and_started_again_ends_with_the_bits_of_one_that_is_not(
    tmp_path, warm_interpreter, way, moments
):
    program = tmp_path / "my_training.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")

    def play(moment, folder):
        folder.mkdir(exist_ok=True)
        mark = {"TAPELINE_TEST": str(tmp_path)}
        ended = warm_interpreter.run(program, [moment, str(folder), way], folder=folder, seconds=100, environment=mark)
        begin = time.monotonic()
        while alive(mark):
            assert time.monotonic() - begin < GONE_SECONDS, "something outlives the user's process"
        return ended

    whole = play("undisturbed", tmp_path / "whole")
    for moment in moments:
        ended = play(moment, tmp_path / "killed")
        assert ended.returncode == -signal.SIGKILL, ended.stdout[-3000:]
    ended = play("none", tmp_path / "killed")
    assert ended.returncode == 0, ended.stdout[-3000:]
    wanted, found = (json.loads(one.stdout.rpartition("LEFT ")[2]) for one in (whole, ended))
    assert found == wanted
    states = sorted(one.name for one in (tmp_path / "killed" / "run").iterdir())
    assert states == ["step-000000008", "step-000000009"], "the last two, and nothing of the killed ones"


def alive(mark):
    """Processes that were started with this environment."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            try:
                said = (each / "environ").read_bytes().split(b"\0")
                state = (each / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if state != "Z" and all(f"{name}={value}".encode() in said for name, value in mark.items()):
                found.append(each.name)
    return found
