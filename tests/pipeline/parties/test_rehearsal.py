"""A rehearsal is the real session beside one tape: equal where all is right, and without a trace."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Party, PartyPlanError, rehearse
from pipeline.commands.cli import main
from pipeline.parties.read_plan import plan_of
from pipeline.parties.trust_statement import trust_statement
from stages import Stage
from tests.one_tape import assert_same_bits
from tests.pipeline.parties.meeting import VANILLA, bits, bottom, data

SMALL = {**VANILLA, "training": {"batch": 4, "microbatches": 2, "order_seed": 1}}


def given():
    x, _, ids = data(16, 5)
    return Party(bottom(), x=x, ids=ids, optimizer="adam")


def test_a_rehearsal_compares_every_variable_and_leaves_no_trace():
    hospital = given()
    before = bits(hospital.model)
    report = rehearse(plan_of(SMALL), {"hospital": hospital})
    assert report.ok and report.steps == 3 and report.compared > 20 and report.stand_ins == ("lab",)
    assert "bit for bit" in str(report)
    assert_same_bits(bits(hospital.model), before, "variable")


def test_a_lost_microbatch_is_seen(monkeypatch):
    honest = Stage.backward_flat

    def losing(self, gradients, key, state=None):
        found = honest(self, gradients, key, state)
        return found if key.microbatch == 0 else tuple(None if g is None else g * 0 for g in found)

    monkeypatch.setattr(Stage, "backward_flat", losing)
    report = rehearse(plan_of(SMALL), {"hospital": given()})
    assert not report.ok and any("hospital" in line for line in report.different)
    assert "differ from one tape" in str(report)


@pytest.mark.gate
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_u_of_stand_ins_with_several_tensors(dtype):
    table = {
        **SMALL,
        "stages": {
            "bottom": {"owner": "hospital", "x": True},
            "middle": {"owner": "lab"},
            "head": {"owner": "hospital", "y": True},
        },
        "edges": [
            {"tensor": "z", "from": "bottom", "to": "middle", "shape": [2, 3], "dtype": dtype},
            {"tensor": "skip", "from": "bottom", "to": "head", "shape": [2], "dtype": "float32"},
            {"tensor": "h", "from": "middle", "to": "head", "shape": [], "dtype": "float32"},
        ],
    }
    assert rehearse(plan_of(table)).ok


def test_a_party_that_the_plan_has_not_is_refused():
    with pytest.raises(PartyPlanError, match="no party 'clinic'"):
        rehearse(plan_of(SMALL), {"clinic": given()})


PLAN = """
hub = "lab"
[parties]
hospital = {}
lab = {}
[stages]
bottom = { owner = "hospital", x = true }
top = { owner = "lab", y = true }
[[edges]]
tensor = "z"
from = "bottom"
to = "top"
shape = [4]
dtype = "float32"
[training]
batch = 4
microbatches = 2
"""
PARTY = """
import keras, numpy as np
from pipeline import Party

def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    y = np.ones((6, 1), "float32")
    return Party(model, y=y, ids=range(6), optimizer="sgd", loss="binary_crossentropy")
"""


def test_the_commands_check_and_rehearse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(PLAN)
    (tmp_path / "party_of_a_lab.py").write_text(PARTY)
    assert main(["party", "rehearse", "plan.toml", "lab=party_of_a_lab:make"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["party", "check", "plan.toml", "party_of_a_lab:make", "--as", "lab"]) == 0
    shown = capsys.readouterr().out
    assert "64 bytes to hospital and as many back" in shown and "6 rows, 5 values to train" in shown
    assert "NOT protected" in shown and "the cosine attack succeeds with exactly 1) - and yours is one" in shown
    assert main(["party", "check", "plan.toml", "party_of_a_lab:make", "--as", "hospital"]) == 2
    assert "does not fit the plan" in capsys.readouterr().err
    listen = ["--as", "lab", "--listen", "tcp://127.0.0.1:0", "--keys", str(tmp_path)]
    assert main(["party", "serve", "plan.toml", "party_of_a_lab:make", *listen]) == 2
    assert "has no key of hospital, lab" in capsys.readouterr().err
    assert main(["party", "serve", "plan.toml", "party_of_a_lab:make", *listen, "--save", "plan.toml/trained"]) == 2
    assert "cannot write into --save plan.toml/trained: Not a directory" in capsys.readouterr().err


def test_the_statement_names_who_may_learn_the_labels():
    plan = plan_of(VANILLA)
    assert "the labels of lab from hospital" in trust_statement(plan)
    assert "yours is one" in trust_statement(plan, keras.losses.BinaryCrossentropy())
    assert "yours is one" not in trust_statement(plan, "mse")
    assert "yours is one" not in trust_statement(plan, "binary_crosentropy")


def test_the_cosine_attack_on_a_linear_head_is_exactly_one():
    """The claim of the statement, computed: the sign of <g_i, g_k> tells every label from one known positive."""
    draw = np.random.default_rng(0)
    z, y = draw.normal(size=(64, 4)).astype("float32"), (draw.random((64, 1)) < 0.4).astype("float32")
    stage = Stage(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")]), loss="binary_crossentropy")
    stage.forward_loss(z, y)
    gradient = np.asarray(stage.backward())
    known = gradient[np.flatnonzero(y[:, 0])[0]]
    assert ((gradient @ known > 0) == (y[:, 0] > 0)).all()
