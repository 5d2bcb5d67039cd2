"""Workers that die in evaluations, questions and files; what is not repaired; what must not be left out."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from pipeline import Pipeline, Recovery
from pipeline.errors import PipelineError, RecoveryError, ScheduleError, WorkerDiedError, WorkerError
from pipeline.runtime.launch.shared import shared_server
from pipeline.runtime.recovery import lasting_driver
from pipeline.runtime.recovery.freezing import process_state
from tests.dying_workers import left, plan_faults
from tests.failures import X, Y, tripping
from tests.pipeline.runtime.recovery.mortal import bits, data, let_die, pipeline, train

pytestmark = pytest.mark.filterwarnings("ignore:the layer .*BatchNormalization:UserWarning")
XS, YS = data(2)


@pytest.fixture
def faults(monkeypatch, tmp_path):
    """The list of faults that workers look at."""
    let_die(monkeypatch, tmp_path / "faults")
    return tmp_path / "faults"


def verified(pipe):
    report = pipe.verify(XS[:12], YS[:12], checks="all", steps=2)
    assert report.ok
    return len(report.rows)


def saved(pipe, folder):
    pipe.save(folder / "saved")
    with Pipeline.load(folder / "saved", transport="inproc") as again:
        return [value.tobytes() for value in again.get_weights()]


def compiled_anew(pipe, _):
    pipe.compile(pipe.optimizer, "mae", run_eagerly=True)
    return pipe.train_on_batch(XS[:12], YS[:12])


QUESTIONS = [
    ("evaluate", lambda pipe, _: pipe.evaluate(XS, YS, 12, verbose=0), ["forward 1", "behind test", "before call"]),
    ("predict", lambda pipe, _: pipe.predict(XS[:20], 12, verbose=0).tobytes(), ["forward 1", "behind predict"]),
    ("gradients", lambda pipe, _: [g.tobytes() for g in pipe.gradients(XS[:12], YS[:12]).values()], ["before get"]),
    ("verify", lambda pipe, _: verified(pipe), ["before keep", "behind apply", "before put_back", "behind put_back"]),
    ("update", lambda pipe, _: pipe.train_on_batch(XS[:12], YS[:12]), ["before apply"]),
    ("weights", lambda pipe, _: pipe.set_weights([w + 1 for w in pipe.get_weights()]), ["before get", "behind set"]),
    ("save", saved, ["before get"]),
    ("compile", compiled_anew, ["before get", "launched", "before build", "behind set"]),
]
"""(what is asked, how, places at which a worker dies meanwhile)."""


def answers(pipe, folder, path=None, some=slice(None), way="kill"):
    """What every question gives, and all bits behind it."""
    found = []
    pipe.train_on_batch(XS[:12], YS[:12])
    for k, (name, ask, places) in enumerate(QUESTIONS):
        if path is not None:
            plan_faults(path, *((f"stage{(k + i) % 3}", place, way) for i, place in enumerate(places[some])))
        (folder / name).mkdir(exist_ok=True)
        found.append((name, ask(pipe, folder / name), bits(pipe)))
        if path is not None:
            assert not left(path), name
    return found


@pytest.fixture(scope="module")
def undisturbed_answers(tmp_path_factory):
    with pipeline() as pipe:
        return answers(pipe, tmp_path_factory.mktemp("files"))


@pytest.mark.soak
@pytest.mark.parametrize("way", ["kill", "stop"])
@pytest.mark.parametrize("some", [slice(0, 1), slice(1, 3), slice(3, 4)], ids=["first", "middle", "last"])
def test_questions_in_which_workers_die_have_the_same_answers(faults, tmp_path, undisturbed_answers, some, way):
    with pipeline(recovery=True) as pipe:
        found = answers(pipe, tmp_path, faults, some, way)
        assert len(pipe.repairs) >= sum(bool(places[some]) for _, _, places in QUESTIONS)
    for ours, theirs in zip(found, undisturbed_answers, strict=True):
        assert ours == theirs, ours[0]


@pytest.fixture(scope="module")
def four_batches():
    with pipeline() as pipe:
        return train(pipe, 2)[0]


LEFT_OUT = {
    "slots": lambda values, fresh, driver: values.update(optimizer=fresh["optimizer"]),
    "seeds": lambda values, fresh, driver: begin_anew(values, fresh, driver, lambda one: not one.is_weight),
    "statistics": lambda values, fresh, driver: begin_anew(
        values, fresh, driver, lambda one: one.is_weight and not one.trained
    ),
    "metrics": lambda values, fresh, driver: values.update(
        metrics={i: [np.zeros_like(one) for one in some] for i, some in values["metrics"].items()}
    ),
}


def begin_anew(values, fresh, driver, which):
    """Let some of the model's variables be what they were at the beginning."""
    del values["states"]
    for i, arrays in values["model"].items():
        for k, one in enumerate(driver.descriptions[i].variables):
            if which(one):
                arrays[k] = fresh["model"][i][k]


@pytest.mark.soak
@pytest.mark.parametrize("what", [None, *LEFT_OUT])
def test_what_is_left_out_is_missed(monkeypatch, faults, four_batches, what):
    """The negative control: without any one of them the run differs, or is refused; with all it does not."""
    give = lasting_driver._give

    def give_some(inner, values, *others):
        if what is not None and values:
            fresh = {group: inner.get(group) for group in ("model", "optimizer")}
            LEFT_OUT[what](values, fresh, inner)
        give(inner, values, *others)

    monkeypatch.setattr(lasting_driver, "_give", give_some)
    with pipeline(recovery=True) as pipe:
        found, missed = train(pipe, 2, faults, [[], [("stage1", "backward 1", "kill")]])
        assert not missed
        assert len(pipe.repairs) == 1
    assert (found == four_batches) is (what is None)


@pytest.mark.soak
def test_a_worker_that_dies_twice_at_the_same_is_not_begun_again_and_nothing_is_lost(faults):
    with pipeline(recovery=True) as pipe:
        pipe.train_on_batch(XS[:12], YS[:12])
        before = bits(pipe)
        plan_faults(faults, *[("stage1", "backward 1", "kill")] * 3)
        with pytest.raises(
            WorkerDiedError, match=r"'stage1' is gone in .*backward of microbatch 1(.|\n)*died there twice"
        ):
            pipe.train_on_batch(XS[12:], YS[12:])
        assert len(left(faults)) == 1
        plan_faults(faults)
        after = bits(pipe)
        assert after.keys() == before.keys()
        assert {key for key in before if after[key] != before[key] and key[0] != "metrics"} == set()
        assert [repair.stage for repair in pipe.repairs] == ["stage1", "stage1"]


@pytest.mark.soak
def test_updates_between_two_boundaries_are_made_again(faults, four_batches):
    with pipeline(recovery=Recovery(every=3)) as pipe:
        found, missed = train(pipe, 2, faults, [[], [("stage2", "updated", "kill")], [], [("stage0", "norms", "exit")]])
        assert not missed
        assert len(pipe.repairs) == 2
    assert found == four_batches


@pytest.mark.soak
def test_a_fork_server_that_dies_is_replaced_with_its_workers(four_batches):
    with pipeline(recovery=True) as pipe:
        found, _ = train(pipe, 2)
        assert found == four_batches
        workers = pipe.session.workers.driver().pids
        os.kill(shared_server().pid, signal.SIGKILL)
        while any(process_state(pid)[0] not in ("", "Z") for pid in workers):
            pass  # they die with it
        assert bits(pipe) == found[0]
        shared_server().wait_ready()
        os.kill(shared_server().pid, signal.SIGSTOP)
        os.kill(pipe.session.workers.driver().pids[0], signal.SIGKILL)
        assert bits(pipe) == found[0]
        assert len(pipe.repairs) == 2


@pytest.mark.gate
def test_an_exception_is_raised_and_not_tried_again():
    with tripping({}, {"do": "raise", "call_number": 3}, recovery=True) as pipe:
        pipe.train_on_batch(X, Y)
        before = pipe.get_weights()
        with pytest.raises(WorkerError, match="the layer tripped"):
            pipe.train_on_batch(X, Y)
        assert pipe.repairs == ()
        for value, other in zip(pipe.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, other)
        os.kill(pipe.session.workers.driver().pids[1], signal.SIGKILL)
        for value, other in zip(pipe.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, other)
        assert [repair.stage for repair in pipe.repairs] == ["top"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"recovery": True, "transport": "inproc"}, "threads of this one, which cannot die alone"),
        ({"recovery": "yes"}, "True, False or a pipeline.Recovery"),
    ],
)
def test_recovery_that_cannot_be_is_refused(given, says):
    with pytest.raises(PipelineError, match=says):
        tripping({}, {}, **given)


@pytest.mark.parametrize("given", [{"every": 0}, {"tries": 0.5}, {"frozen_seconds": 0}, {"frozen_seconds": True}])
def test_options_of_recovery_that_cannot_be(given):
    with pytest.raises(ScheduleError, match=f"`{next(iter(given))}`"):
        Recovery(**given)


def test_a_step_that_gives_other_numbers_when_it_is_made_again_is_refused():
    class Twice:
        def __init__(self):
            self.losses = [1.0, 2.0]

        def run(self, plan, mode, batch):
            return lasting_driver.StepResult(self.losses.pop(0), {}, {}, {}, [])

    driver = Twice()
    run = lasting_driver.UndecidedStep(None, None, None, {}, driver.run(None, None, None))
    with pytest.raises(RecoveryError, match=r"another loss: 2\.0 in place of 1\.0"):
        run.again(driver)
