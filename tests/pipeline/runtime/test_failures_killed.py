"""A worker that is killed, and a user's process that is killed while it writes a checkpoint."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
from typing import NamedTuple

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import CheckpointError, PipelineClosedError, VerificationError, WorkerDiedError
from pipeline.runtime.crew import Crew
from pipeline.runtime.launch.shared import shared_server
from pipeline.runtime.turns import Turns
from pipeline.saving import checkpoint, folder
from stages.worker.stage_spec import StageSpec
from tests.failures import NOTICED_SECONDS, X, Y, tripping
from tests.levels import in_turn
from tests.pipeline.runtime.launch.processes import DEADLINE, children
from transport.mailbox import Mailbox
from transport.message import DRIVER, Key, Message
from transport.registry import open_transport

WAITING_AT = {"do": "wait", "call_number": 4}
"""Microbatch 1 of step 2."""


class Killer:
    """Kills a process with SIGKILL when as many workers have said on the line that they are there."""

    def __init__(self, line, choose, voices=1):
        self.time = 0.0
        self._thread = threading.Thread(target=self._run, args=(line, choose, voices))
        self._thread.start()

    def _run(self, line, choose, voices):
        heard = [line.hear() for _ in range(voices)]
        os.kill(choose(heard), signal.SIGKILL)
        self.time = time.monotonic()

    def join(self):
        self._thread.join(DEADLINE)


def speaker(heard):
    """The worker that said it is there."""
    return heard[0]["pid"]


def train(pipe):
    pipe.fit(np.tile(X, (4, 1)), np.tile(Y, (4, 1)), batch_size=8, shuffle=False, verbose=0)


def kill_while_training(pipe, line, choose, voices=1):
    """The error that `fit` raised and the seconds from the kill to it."""
    killer = Killer(line, choose, voices)
    with pytest.raises(WorkerDiedError) as caught:
        train(pipe)
    now = time.monotonic()
    killer.join()
    return caught.value, now - killer.time


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("victim", in_turn([1, 0, 2], 1, 3))
@pytest.mark.parametrize("backward", in_turn([False, True], 1, 2), ids=["forward", "backward"])
def test_killed_worker_ends_fit_with_stage_step_and_action(line, gate, victim, backward):
    trips = [{}, {}, {}]
    trips[victim] = {**WAITING_AT, "backward": backward, "line": line.path, "gate": gate.path}
    pipe = tripping(*trips)
    error, seconds = kill_while_training(pipe, line, speaker)
    stage = ("bottom", "middle1", "top")[victim]
    action = f"{'backward' if backward else 'forward'} of microbatch 1"
    assert (error.stage, error.step, error.action) == (stage, 2, action)
    assert f"the worker of stage {stage!r} is gone in step 2, {action}: killed by SIGKILL" in str(error)
    assert "Load the last checkpoint" in str(error)
    assert seconds < NOTICED_SECONDS
    with pytest.raises(PipelineClosedError, match="WorkerDiedError"):
        pipe.train_on_batch(X, Y)


@pytest.mark.usefixtures("nothing_left")
def test_worker_killed_while_it_waits_for_one_that_is_busy_for_ever(line, gate):
    """The busy one cannot hear that the run is over, so it is killed as well, and not waited for."""
    in_step_2 = {"do": "say", "call_number": 3, "line": line.path}
    pipe = tripping({}, {**WAITING_AT, "line": line.path, "gate": gate.path}, in_step_2)

    def last_worker(heard):
        return next(voice["pid"] for voice in heard if voice["did"] == "say")

    error, seconds = kill_while_training(pipe, line, last_worker, voices=2)
    assert (error.stage, error.step) == ("top", 2)
    assert "stage 'middle1' runs step 2, forward of microbatch 1" in str(error)
    assert seconds < NOTICED_SECONDS


class Worker(NamedTuple):
    """What a crew sees of a worker; one that is gone was killed."""

    name: str
    gone: bool
    board: np.ndarray

    def join(self, seconds):
        return self.gone

    def exit_reason(self):
        return "killed by SIGKILL"


def test_a_neighbour_that_tells_of_the_loss_first_is_not_blamed():
    """Its report is there before the driver sees that somebody is gone: the error is that of the dead worker."""
    crew = Crew([[StageSpec(0, "bottom", b"", (), ())], [StageSpec(1, "top", b"", (), ())]], look_seconds=DEADLINE)
    crew._handles = [Worker("bottom", True, np.zeros(8, int)), Worker("top", False, np.zeros(8, int))]
    with open_transport("inproc") as transport:
        crew._mailbox = Mailbox(transport.bind())
        lost = {"stage": "top", "type": "PeerLost", "message": "the receiver is gone", "traceback": "", "time": 0.0}
        lost |= {"step": 2, "action": "backward of microbatch 1", "building": False}
        transport.connect(crew._mailbox.inbox.address, DEADLINE).send(Message("error", 0, stage=DRIVER, value=lost))
        with pytest.raises(WorkerDiedError, match=r"the worker of stage 'bottom' is gone.*SIGKILL"):
            crew.wait(Key("reply", 2, DRIVER, 0), DEADLINE)


@pytest.mark.gate
@pytest.mark.usefixtures("nothing_left")
def test_reference_killed_while_it_verifies(line, gate):
    """The pipeline is as it was, and the next question starts another reference."""
    with tripping({}, {"do": "say", "call_number": 3, "line": line.path}) as pipe:
        pipe.train_on_batch(X, Y)
        before = pipe.get_weights()
        workers = set(children(shared_server().pid))

        def kill():
            voices = {line.hear()["pid"] for _ in range(2)}  # of the worker, and of the same layer in the reference
            (reference,) = voices - workers
            os.kill(reference, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(VerificationError, match=r"the reference process.*killed by SIGKILL(.|\n)*goes on"):
            for _ in range(100):
                pipe.verify(X, Y)
        thread.join(DEADLINE)
        for value, other in zip(pipe.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, other)
        pipe.verify(X, Y).raise_if_failed()


@pytest.mark.usefixtures("nothing_left")
def test_worker_killed_between_two_steps(line, gate):
    """`fit` sits in a callback; the next step finds out, with the last thing that the worker did."""
    pipe = tripping({}, {})

    def kill(batch, logs):
        if batch == 1:
            os.kill(max(children(shared_server().pid)), signal.SIGKILL)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=kill)
    with pytest.raises(WorkerDiedError, match=r"stage 'top' is gone after step 2, backward of microbatch 1"):
        pipe.fit(np.tile(X, (4, 1)), np.tile(Y, (4, 1)), batch_size=8, verbose=0, callbacks=[callback])


@pytest.mark.gate
@pytest.mark.usefixtures("nothing_left")
def test_fork_server_that_is_killed_takes_its_workers_along(line, gate):
    pipe = tripping({}, {**WAITING_AT, "line": line.path, "gate": gate.path})
    server = shared_server().pid
    error, seconds = kill_while_training(pipe, line, lambda _: server)
    assert error.step == 2
    assert "fork server" in str(error)
    assert seconds < NOTICED_SECONDS
    with tripping({}, {}) as pipe:
        assert np.isfinite(pipe.train_on_batch(X, Y)), "the next pipeline starts a new one"
    shared_server().wait_ready()


@pytest.mark.usefixtures("nothing_left")
def test_last_checkpoint_is_whole_after_a_kill(line, gate, tmp_path):
    pipe = tripping({}, {**WAITING_AT, "line": line.path, "gate": gate.path})
    pipe.train_on_batch(X, Y)
    pipe.save(tmp_path / "last")
    expected = pipe.get_weights()
    error, _ = kill_while_training(pipe, line, speaker)
    assert error.step == 2
    with Pipeline.load(tmp_path / "last", transport="inproc", trust=["tests"]) as again:
        for value, other in zip(again.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(value, other)


MOMENTS = (
    *((os, "fsync", moment) for moment in range(4)),  # two stages, the manifest and their folder
    (folder, "_exchange", 0),
    (folder, "_remove", 0),
    (os, "fsync", 4),  # the folder that it is in
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[1]}-{moment[2]}")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_checkpoint_that_is_being_replaced_by_a_killed_process_is_the_old_or_the_new_one(
    saved, monkeypatch, moment, after
):
    """The process that saves is a forked copy of this one, which kills itself at one of its file operations."""
    path, old, replace = saved
    gc.collect()  # nothing that TensorFlow's threads would be needed for is left to the copy
    child = os.fork()
    if child == 0:
        try:
            _kill_at(monkeypatch, *moment, after)
            replace()
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with Pipeline.load(path, transport="inproc", trust=["tests"]) as again:
        new = [value + 1 for value in old]
        is_new = moment[1:] in (("_remove", 0), ("fsync", 4)) or (moment[1] == "_exchange" and after)
        for value, other in zip(again.get_weights(), new if is_new else old, strict=True):
            np.testing.assert_array_equal(value, other)


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A checkpoint, its weights, and a function that replaces it by one with all weights one higher."""
    path = tmp_path_factory.mktemp("checkpoints") / "last"
    with tripping({}, {}, transport="inproc") as pipe:
        pipe.train_on_batch(X, Y)
        pipe.save(path)
        weights = pipe.get_weights()
        # A forked copy must run no TensorFlow operation and has no workers, so what these give is asked for before.
        kept = {what: pipe.session.values.read(what) for what in ("model", "optimizer")}
        kept["model"] = {i: [value + 1 for value in values] for i, values in kept["model"].items()}
        stages = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder, "_put", lambda place, path: shutil.rmtree(place))
            manifest = checkpoint._manifest
            empty = lambda pipe, of, by: stages.append(manifest(pipe, [], by)) or stages[0]  # noqa: E731
            patch.setattr(checkpoint, "_manifest", empty)
            pipe.save(path)

        def replace():
            checkpoint._manifest = lambda pipe, of, by: {**stages[0], "stages": of}
            pipe.session.values.read = kept.__getitem__
            pipe.session.workers.turns = Turns()  # which else refuses the copy
            pipe.save(path)

        yield path, weights, replace


@pytest.fixture
def saved(checkpointed, tmp_path):
    """The same for one test, at a place of its own."""
    path, weights, replace = checkpointed
    before = tmp_path / "before"
    shutil.copytree(path, before)
    yield path, weights, replace
    shutil.rmtree(path)
    before.rename(path)


def _kill_at(monkeypatch, owner, name, moment, after):
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) > moment and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) > moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, name, deadly)


def test_checkpoint_with_a_missing_or_changed_file_is_refused(checkpointed, tmp_path):
    path, _, _ = checkpointed
    shutil.copytree(path, tmp_path / "part")
    (tmp_path / "part" / "stage-1.npz").unlink()
    with pytest.raises(CheckpointError, match=r"not whole: stage-1\.npz is missing"):
        Pipeline.load(tmp_path / "part", trust=["tests"])
    shutil.copytree(path, tmp_path / "changed")
    data = bytearray((tmp_path / "changed" / "stage-0.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed" / "stage-0.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged: the content of stage-0\.npz changed"):
        Pipeline.load(tmp_path / "changed", trust=["tests"])
