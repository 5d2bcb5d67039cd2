"""Parties go on after the last epoch that all have, and end with the bits of a training that nothing disturbed."""

from __future__ import annotations

import json
import shutil

import keras
import numpy as np
import pytest

from pipeline import (
    CheckpointError,
    Party,
    PartyLostError,
    PartyMismatchError,
    PartyPlanError,
    PartyStoppedError,
    serve_party,
)
from pipeline.parties.bound_party import BoundParty
from pipeline.parties.party_checkpoints import EndOfEpoch, PartyCheckpoints
from pipeline.parties.wire import PartyWire
from tests.one_tape import assert_same_bits
from tests.pipeline.parties.meeting import VANILLA, bits, bottom, data, meet, met, plan_with_keys, top

TRAINING = {"batch": 8, "microbatches": 2, "epochs": 4, "order_seed": 5}


class Run:
    """A hospital and a lab whose checkpoints are in folders of their own."""

    def __init__(self, folder):
        self.plan, self.keys = plan_with_keys(
            {**VANILLA, "training": TRAINING, "grants": {"loss": ["hospital"]}}, folder
        )
        self.x, self.y, self.ids = data(12, 5)
        self.folder = folder

    def parties(self, models):
        lab = Party(
            models[1], y=self.y, ids=self.ids, optimizer=keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
            loss="binary_crossentropy", metrics=["accuracy"],
        )  # fmt: skip
        return {"hospital": Party(models[0], x=self.x, ids=self.ids, optimizer="adam"), "lab": lab}

    def options(self, resume, checkpoints=True):
        each = {name: {"checkpoints": self.folder / f"{name}-runs", "resume": resume} for name in ("hospital", "lab")}
        return each if checkpoints else None


class Vanishing(list):
    """Ids of a party that is gone when its row is asked for the nth time."""

    def __init__(self, ids, at):
        super().__init__(ids)
        self.left = at

    def __getitem__(self, place):
        self.left -= 1
        if self.left < 0:
            raise SystemExit
        return super().__getitem__(place)


@pytest.mark.gate
@pytest.mark.parametrize("who", ["hospital", "lab"])
def test_a_party_that_vanished_comes_back_and_the_bits_are_those_of_an_undisturbed_run(tmp_path, who):
    run = Run(tmp_path)
    undisturbed, disturbed, others = (bottom(), top()), (bottom(), top()), (bottom(seed=50), top(seed=60))
    whole = met(run.plan, run.parties(undisturbed), run.keys)
    parties = run.parties(disturbed)
    parties[who].ids = Vanishing(parties[who].ids, 12 * 2 + 9)  # in the second step of the third epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartyWire, "tell_the_end", lambda self, sentence: None)
        found = meet(run.plan, parties, run.keys, each=run.options(resume=False))
    other = "lab" if who == "hospital" else "hospital"
    assert isinstance(found[other], PartyLostError) and "step 5" in found[other].__notes__[0], found
    again = met(run.plan, run.parties(others), run.keys, each=run.options(resume=True))
    assert_same_bits(bits(*others), bits(*undisturbed), "variable")
    assert again["lab"].history == whole["lab"].history and again["hospital"].history == whole["hospital"].history
    assert again["lab"].steps == whole["lab"].steps == 8


@pytest.mark.gate
def test_the_one_that_is_an_epoch_ahead_goes_back_and_without_a_common_epoch_nobody_goes_on(tmp_path):
    run = Run(tmp_path)
    undisturbed, others = (bottom(), top()), (bottom(seed=50), top(seed=60))
    met(run.plan, run.parties(undisturbed), run.keys, each=run.options(resume=False))
    kept = sorted(path.name for path in (tmp_path / "lab-runs").iterdir())
    assert kept == ["epoch-2.npz", "epoch-3.npz", "epoch-4.npz"]
    run_of_both = {run_of(file) for name in ("lab", "hospital") for file in (tmp_path / f"{name}-runs").iterdir()}
    assert len(run_of_both) == 1
    (tmp_path / "lab-runs" / "epoch-4.npz").unlink()
    (tmp_path / "hospital-runs" / "epoch-3.npz").write_bytes(b"damaged")
    said = []
    met(run.plan, run.parties(others), run.keys, each=run.options(resume=True), said=said)
    assert sum("goes on after epoch 2, step 4" in line for line in said) == 2
    assert_same_bits(bits(*others), bits(*undisturbed), "variable")
    assert {run_of(file) for file in (tmp_path / "hospital-runs").iterdir()} == run_of_both
    one = meet(run.plan, run.parties((bottom(), top())), run.keys, each={"lab": run.options(True)["lab"]})
    assert one["lab"].differences == {"hospital": ("resume",)} and isinstance(one["hospital"], PartyMismatchError)
    shutil.rmtree(tmp_path / "hospital-runs")
    none = meet(run.plan, run.parties((bottom(), top())), run.keys, each=run.options(resume=True))
    assert all(isinstance(error, PartyStoppedError) for error in none.values())
    assert "no epoch after which all parties can go on" in str(none["lab"])


def run_of(path):
    """The run in a checkpoint's manifest."""
    with np.load(path) as file:
        return json.loads(bytes(file["manifest"]))["run"]


def test_another_runs_checkpoints_are_not_replaced_not_removed_and_not_gone_on_from(tmp_path):
    run = Run(tmp_path)
    lab, folder = run.parties((bottom(), top()))["lab"], tmp_path / "runs"
    checkpoints = PartyCheckpoints(folder, BoundParty(run.plan, "lab", lab))
    for epoch in (1, 2, 3, 4):
        checkpoints.write(EndOfEpoch(epoch, 2 * epoch, {"hospital": "00" * 32}, {}, "old"))
    with pytest.raises(CheckpointError, match="go on from them"):
        serve_party(run.plan, lab, "lab", "", keys=run.keys["lab"], checkpoints=folder)
    checkpoints.refuse_other_runs(resume=True)
    checkpoints.write(EndOfEpoch(1, 2, {"hospital": "11" * 32}, {}, "new"))
    kept = {path.name: run_of(path) for path in folder.iterdir()}
    assert kept == {"epoch-1.npz": "new", **{f"epoch-{epoch}.npz": "old" for epoch in (2, 3, 4)}}
    with pytest.raises(CheckpointError, match="another run, plan or party"):
        checkpoints.write(EndOfEpoch(2, 4, {"hospital": "11" * 32}, {}, "new"))
    with pytest.raises(CheckpointError, match="checkpoints of 2 runs"):
        serve_party(run.plan, lab, "lab", "", keys=run.keys["lab"], checkpoints=folder, resume=True)


def test_another_runs_checkpoint_is_no_common_epoch():
    """Equal epochs of two runs have other transcripts."""
    from pipeline.parties.handshake import _last_common

    places = {
        epoch: EndOfEpoch(epoch, 2 * epoch, {"a": f"a{epoch}", "b": f"b{epoch}"}, {}, "run") for epoch in (1, 2, 3)
    }
    a = {"epochs": {"1": "run a1", "2": "run a2", "3": "run a3"}}
    assert _last_common({"a": a, "b": {"epochs": {"1": "run b1", "2": "run b2", "3": "run other"}}}, places) == 2
    assert _last_common({"a": a, "b": {"epochs": {"1": "run b1", "2": "run b2", "3": "past b3"}}}, places) == 2
    assert _last_common({"a": a, "b": {"epochs": {"3": "other"}}}, places) == 0
    assert _last_common({"a": a, "b": {"epochs": "nonsense"}}, places) == 0
    assert _last_common({"a": a, "b": {}}, None) == 0


def test_a_checkpoint_of_other_models_is_refused_and_changes_nothing(tmp_path):
    run = Run(tmp_path)
    mine = bottom()
    checkpoints = PartyCheckpoints(
        tmp_path / "runs", BoundParty(run.plan, "hospital", run.parties((mine, top()))["hospital"])
    )
    checkpoints.write(EndOfEpoch(1, 2, {"lab": "00" * 32}, {"loss": [0.1]}, "run"))
    wide = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)])
    before = bits(wide)
    there = PartyCheckpoints(
        tmp_path / "runs", BoundParty(run.plan, "hospital", run.parties((wide, top()))["hospital"])
    )
    assert there.places()[1].history == {"loss": [0.1]}
    with pytest.raises(CheckpointError, match="cannot go on from the checkpoint"):
        there.load(1)
    assert_same_bits(bits(wide), before, "variable")


def test_only_a_training_with_checkpoints_can_be_resumed(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(PartyPlanError, match="say in which folder"):
        serve_party(run.plan, run.parties((bottom(), top()))["lab"], "lab", "", keys=run.keys["lab"], resume=True)
