"""Workers that die, or freeze, at every place of every stage: the run has the bits of one in which nobody dies."""

from __future__ import annotations

import functools

import pytest

from tests.pipeline.runtime.recovery.mortal import MICROBATCHES, STAGES, let_die, pipeline, train

pytestmark = pytest.mark.filterwarnings("ignore:the layer .*BatchNormalization:UserWarning")
BATCHES = 6

ACTIONS = [f"{kind} {k}" for kind in ("forward", "backward") for k in range(MICROBATCHES)]
WAITS = [f"waits {action}" for action in ACTIONS]
IN_A_STEP = ["before train", *ACTIONS, "shared gradients", "norms", "behind train"]
IN_AN_UPDATE = ["before apply", "updated", "writing", "behind apply"]
BEGINNING_AGAIN = ["launched", "before connect", "before build", "behind build", "before go_on_as", "before set"]
WAYS = ["kill", "stop", "exit", "segv"]


@functools.cache
def undisturbed(batches, eager, schedule):
    with pipeline(eager=eager, schedule=schedule) as pipe:
        return train(pipe, batches)[0]


SOME = [
    [("stage1", "backward 1", "kill")],
    [("stage2", "writing", "kill")],
    [("stage2", "behind train", "segv"), ("stage1", "before build", "exit")],
    [("stage0", "updated", "stop")],
]
"""A fault or two for each batch: a step, the middle of writing, a repair, an update that one stage made and not all."""


def all_faults():
    """Every stage at every place; the ways to die take turns."""
    places = [*IN_A_STEP, *IN_AN_UPDATE]
    found = [[(stage, place, WAYS[(i + k) % 4])] for k, place in enumerate(places) for i, stage in enumerate(STAGES)]
    found += [[(stage, place, "stop")] for place in ("forward 0", "backward 2", *IN_AN_UPDATE) for stage in STAGES]
    found += [[("stage1", place, way)] for place in WAITS for way in ("kill", "stop")]
    again = [(place, WAYS[k % 4]) for k, place in enumerate(BEGINNING_AGAIN)]
    found += [[("stage0", "backward 1", "kill"), (stage, *one)] for one in again for stage in STAGES]
    found += [[(stage, "backward 1", "kill") for stage in STAGES]]
    return found


def check(monkeypatch, tmp_path, batches, faults, eager, schedule):
    let_die(monkeypatch, tmp_path / "faults")
    with pipeline(eager=eager, schedule=schedule, recovery=True) as pipe:
        found, missed = train(pipe, batches, tmp_path / "faults", faults)
        assert not missed
        assert sum(repair.deaths for repair in pipe.repairs) >= len(faults), "every fault was met"
        names = ("bits", "history", "logs", "callbacks")
        for name, ours, theirs in zip(names, found, undisturbed(batches, eager, schedule), strict=True):
            assert ours == theirs, name


@pytest.mark.gate
def test_training_in_which_workers_die_has_the_bits_of_one_in_which_none_does(monkeypatch, tmp_path):
    check(monkeypatch, tmp_path, 2, SOME, True, "1f1b")


def in_twelves(faults):
    return [faults[k : k + 2 * BATCHES] for k in range(0, len(faults), 2 * BATCHES)]


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("part", range(len(in_twelves(all_faults()))))
def test_at_every_place_of_every_stage(monkeypatch, tmp_path, part, eager, schedule):
    check(monkeypatch, tmp_path, BATCHES, in_twelves(all_faults())[part], eager, schedule)
