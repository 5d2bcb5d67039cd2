"""Parties that do not mean the same train nothing; what must not be sent ends the session with the last commit kept."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Party, PartyLostError, PartyMismatchError, PartyPlanError, PartyStoppedError
from pipeline.parties.read_plan import plan_of
from tests.one_tape import assert_same_bits
from tests.pipeline.parties.meeting import VANILLA, bits, bottom, data, meet, plan_with_keys, top


class Pair:
    """A hospital and a lab, small and without chance, and what they had before."""

    def __init__(self, folder, table=None, **changes):
        self.plan, self.folders = plan_with_keys(table or VANILLA, folder)
        x, y, ids = data(16, 3)
        a = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
        b = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        self.models = (a, b)
        self.parties = {
            "hospital": Party(a, x=changes.get("x", x), ids=changes.get("hospital_ids", ids), optimizer="sgd"),
            "lab": Party(b, y=changes.get("y", y), ids=ids, optimizer="adam", loss="mean_squared_error"),
        }
        self.before = bits(*self.models)

    def meet(self, **options):
        return meet(self.plan, self.parties, self.folders, **options)

    def assert_untouched(self):
        assert_same_bits(bits(*self.models), self.before, "variable")


def test_rows_in_another_order_are_refused_before_anything_is_trained(tmp_path):
    ids = [f"patient {k}" for k in range(16)]
    pair = Pair(tmp_path, hospital_ids=[*ids[:5], ids[6], ids[5], *ids[7:]])
    found = pair.meet()
    for name, other in (("hospital", "lab"), ("lab", "hospital")):
        assert isinstance(found[name], PartyMismatchError), found[name]
        assert found[name].differences == {other: ("ids",)}
    pair.assert_untouched()


def test_different_plans_tasks_and_rows_are_one_error_with_field_names_at_both_ends(tmp_path):
    x, _, ids = data(15, 3)
    pair = Pair(tmp_path, x=x, hospital_ids=ids)
    other, _ = plan_with_keys(
        {**VANILLA, "training": {**VANILLA["training"], "batch": 7}, "grants": {"metrics": ["hospital"]}},
        tmp_path / "b",
    )
    from dataclasses import replace

    found = pair.meet(plans={"hospital": replace(other, parties=pair.plan.parties)})
    names = ("rows", "ids", "grants.metrics", "training.batch")
    for name, peer in (("hospital", "lab"), ("lab", "hospital")):
        assert found[name].differences == {peer: names}, found[name]
        assert all(one in str(found[name]) for one in names)
        assert "15" not in str(found[name]) and "nothing was trained" in str(found[name])
    pair.assert_untouched()


def test_rows_that_are_swapped_in_the_middle_are_refused_at_that_step(tmp_path):
    pair = Pair(tmp_path)
    hospital, x = pair.parties["hospital"], pair.parties["hospital"].x[0]

    class Shuffling(list):
        """Ids that are as they were agreed on, until the third step asks for them."""

        asked = 0

        def __getitem__(self, place):
            Shuffling.asked += 1
            return super().__getitem__((place + 1) % 16 if Shuffling.asked > 16 else place)

    hospital.ids = Shuffling(hospital.ids)
    found = pair.meet()
    assert "rows of step 3 are not the same" in str(found["hospital"]), found
    assert "hospital ended the session in step 3" in str(found["lab"]), found
    assert all("step 2" in error.__notes__[0] for error in found.values())
    assert len(x) == 16


@pytest.mark.parametrize("who", ["x", "y"])
def test_what_is_not_finite_is_applied_by_nobody_and_told_by_name(tmp_path, who):
    x, y, _ = data(16, 3)
    poisoned = {"x": x, "y": y}[who]
    poisoned[:] = np.nan
    pair = Pair(tmp_path, **{who: poisoned})
    found = pair.meet()
    maker, other = ("hospital", "lab") if who == "x" else ("lab", "hospital")
    assert isinstance(found[maker], PartyStoppedError) and f"made by {maker}" in str(found[maker])
    assert f"{maker} ended the session in step 1" in str(found[other])
    pair.assert_untouched()


def test_an_error_of_a_party_reaches_the_others_without_its_words(tmp_path):
    pair = Pair(tmp_path)
    hospital = pair.parties["hospital"]

    class Broken(list):
        def __getitem__(self, place):
            raise RuntimeError("the patient is called so and so")

    hospital.ids = Broken(hospital.ids)
    found = pair.meet()
    assert isinstance(found["hospital"], RuntimeError)
    assert str(found["lab"]) == "hospital ended the session in step 1: an error of its own (RuntimeError)"
    pair.assert_untouched()


@pytest.mark.gate
def test_an_evaluation_counts_its_own_rows_alone_and_names_of_others_have_no_power_over_the_terminal(tmp_path):
    """With the metric object that a training has counted in."""
    name = "right\x1b[2J"
    pair = Pair(tmp_path, {**VANILLA, "grants": {"metrics": ["hospital"]}})
    x, y, _ = data(16, 3)
    lab = pair.parties["lab"]
    lab.optimizer, lab.metrics = keras.optimizers.SGD(0.0), [keras.metrics.BinaryAccuracy(name=name)]
    pair.parties["hospital"].optimizer = keras.optimizers.SGD(0.0)
    said = []
    assert all(result.history for result in pair.meet(said=said).values())
    lab.y = np.where(np.arange(16)[:, None] < 8, y, 1 - y)
    judged = pair.meet(task="evaluate", said=said)
    right = keras.metrics.BinaryAccuracy()
    right.update_state(lab.y, pair.models[1](pair.models[0](x)))
    assert [result.history[name] for result in judged.values()] == [[float(right.result())]] * 2
    figures = [line for line in said if "right" in line]
    assert figures and all(line.isprintable() for line in figures)


def test_a_training_without_a_whole_batch_is_refused_at_both_ends(tmp_path):
    pair = Pair(tmp_path, {**VANILLA, "training": {"batch": 17, "drop_last": True}})
    found = pair.meet()
    assert all("there is no whole batch" in str(error) for error in found.values()), found
    pair.assert_untouched()


def test_a_key_that_is_revoked_ends_the_live_session_with_the_last_commit_kept(tmp_path):
    pair = Pair(tmp_path)
    lab, hospital = pair.folders["lab"], pair.parties["hospital"]

    class Revoking(list):
        asked = 0

        def __getitem__(self, place):
            Revoking.asked += 1
            if Revoking.asked == 9:  # the second step's first row
                lab.revoke("hospital")
            return super().__getitem__(place)

    hospital.ids = Revoking(hospital.ids)
    found = pair.meet()
    assert "the key of hospital is trusted no longer" in str(found["lab"]), found
    assert "lab ended the session" in str(found["hospital"])
    assert "its last commit" in found["lab"].__notes__[0]


def test_a_party_that_vanishes_is_told_and_the_other_keeps_its_last_commit(tmp_path):
    """Its connection ends without a word; see `test_killed.py` for processes."""
    pair = Pair(tmp_path)
    hospital = pair.parties["hospital"]
    from pipeline.parties import session as sessions

    class Vanishing(list):
        asked = 0

        def __getitem__(self, place):
            Vanishing.asked += 1
            if Vanishing.asked == 17:
                raise SystemExit
            return super().__getitem__(place)

    hospital.ids = Vanishing(hospital.ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions.PartyWire, "tell_the_end", lambda self, sentence: None)
        found = pair.meet()
    assert isinstance(found["lab"], PartyLostError) and "hospital is gone" in str(found["lab"])
    assert "step 2" in found["lab"].__notes__[0]


def tensor(shape, dtype="float32", **given):
    """The fields of an activation."""
    fields = {"kind": "activation", "step": 1, "tensor": "z", "microbatch": 0, **given}
    return {**fields, "array": np.zeros(shape, dtype)}


@pytest.mark.gate
@pytest.mark.parametrize(
    ("message", "said"),
    [
        (tensor((4, 4)), "expected float32"),
        (tensor((3, 4), microbatch=9), "3 microbatches"),
        (tensor((3, 4), step=2), "step 1 is under way"),
        (tensor((3, 4), kind="gradient"), "no such tensor"),
        (tensor((3, 4), tensor="w"), "no such tensor"),
        (tensor((3, 4), "float64"), "expected float32"),
        ({"kind": "variable", "tensor": "kernel"}, "no such message"),
        ({"kind": "hello", "tensor": "n1"}, "no such message"),
        ({"kind": "command", "tensor": "commit"}, "no such message"),
        ({"kind": "output", "tensor": "predictions", "array": np.zeros(3)}, "no such message"),
        ({"kind": "hello", "tensor": "hello", "array": np.zeros(3)}, "comes with an array"),
    ],
)  # fmt: skip
def test_what_is_not_expected_ends_the_session(tmp_path, message, said):
    from pipeline.parties import party_step
    from transport.message import Message

    pair = Pair(tmp_path)

    def giving(self, kind, edge, microbatch, array):
        self._link.send("lab", Message(**message), 5.0)

    honest = party_step.PartyWire.send_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            party_step.PartyWire,
            "send_tensor",
            lambda self, *given: (giving if self.name == "hospital" else honest)(self, *given),
        )
        found = pair.meet()
    assert said in str(found["lab"]) and "hospital sent what must not be" in str(found["lab"]), found["lab"]
    pair.assert_untouched()


def test_tensors_that_changed_on_the_way_are_applied_by_nobody(tmp_path):
    from pipeline.parties import party_step

    pair = Pair(tmp_path)
    honest = party_step.PartyWire.send_tensor

    def tampered(self, kind, edge, microbatch, array):
        if self.name == "hospital":
            self._note("lab", kind, edge.tensor, microbatch, array + 1)
            array = np.array(array)
        return honest(self, kind, edge, microbatch, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(party_step.PartyWire, "_note", noted_once(party_step.PartyWire._note))
        patch.setattr(party_step.PartyWire, "send_tensor", tampered)
        found = pair.meet()
    assert "is not the same; nobody applies it" in str(found["lab"]), found
    pair.assert_untouched()


def noted_once(honest):
    """The first note of a tensor stays."""

    def note(self, peer, kind, tensor, microbatch, array):
        if (peer, kind, tensor, microbatch) not in self._crossed:
            honest(self, peer, kind, tensor, microbatch, array)

    return note


def test_all_faults_of_a_plan_are_one_error_by_field():
    table = {
        "hub": "labs",
        "parties": {"hospital": {"key": "short"}, "lab": {}, "1x": {}},
        "stages": {"bottom": {"owner": "hospitl", "x": 1}, "top": {"owner": "lab", "y": True}},
        "edges": [{"tensor": "z", "from": "bottom", "to": "tops", "shape": [0], "dtype": "int32", "size": 1}],
        "training": {"batch": 0, "micro": 2},
        "grants": {"weights": []},
        "limits": {"patience": -1},
    }
    with pytest.raises(PartyPlanError) as caught:
        plan_of(table)
    for field in (
        "hub: expected a party", "parties.hospital.key", "parties: a name", "stages.bottom.owner", "stages.bottom.x",
        "edges.z.to", "edges.z.shape", "edges.z.dtype", "edges.z.size", "training.batch", "training.micro",
        "grants.weights", "limits.patience",
    ):  # fmt: skip
        assert field in str(caught.value), field


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": {**VANILLA["stages"], "top": {"owner": "lab"}}}, "one stage with y = true"),
        ({"stages": {**VANILLA["stages"], "bottom": {"owner": "hospital"}}}, "it takes nothing"),
        ({"training": {"batch": 2, "microbatches": 3}}, "more than a batch has rows"),
        ({"parties": {"hospital": {}, "lab": {}, "clinic": {}}}, "parties.clinic: it owns no stage"),
        ({"edges": [*VANILLA["edges"], {**VANILLA["edges"][0], "tensor": "w", "from": "top"}]}, "no edge leads on"),
        ({"edges": [*VANILLA["edges"], VANILLA["edges"][0]]}, "two edges have this name"),
        ({"format": 2}, "this tapeline reads 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, said):
    with pytest.raises(PartyPlanError, match=said):
        plan_of({**VANILLA, **change})


def test_a_plan_says_the_same_whatever_the_order_of_its_words():
    one = plan_of(VANILLA)
    other = plan_of(dict(reversed(VANILLA.items())))
    assert one.digest() == other.digest() and one == other
    assert one.digest() != plan_of({**VANILLA, "limits": {"patience": 61, "silence": 5}}).digest()


def add_loss_sum():
    class Adding(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x**2))
            return x

    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), Adding()])


def own_step():
    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    return Own([keras.Input((3,)), keras.layers.Dense(4)])


def half():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype="mixed_float16")])


def stateful_layer():
    return keras.Sequential(
        [keras.Input((3,), batch_size=3), keras.layers.Reshape((3, 1)), keras.layers.LSTM(4, stateful=True)]
    )


def masking():
    return keras.Sequential([keras.Input((3,)), keras.layers.Embedding(9, 4, mask_zero=True)])


def square(a, b):
    return (a - b) ** 2


X, Y, IDS = data(16, 3)
GIVEN = {
    "no ids": (lambda: Party(bottom(3), x=X, optimizer="sgd"), "hospital", "ids are missing"),
    "rows": (lambda: Party(bottom(3), x=X, ids=IDS[:-1], optimizer="sgd"), "hospital", "same number of rows"),
    "no x": (lambda: Party(bottom(3), ids=IDS, optimizer="sgd"), "hospital", "there is no x"),
    "y": (lambda: Party(bottom(3), X, Y, IDS, "sgd"), "hospital", "none of its stages has y"),
    "cut": (lambda: Party(bottom(3, 5), x=X, ids=IDS, optimizer="sgd"), "hospital", r"edges.z: the plan says"),
    "optimizer": (lambda: Party(bottom(3), x=X, ids=IDS), "hospital", "no optimizer"),
    "no loss": (lambda: Party(top(), y=Y, ids=IDS, optimizer="sgd"), "lab", "there is none"),
    "own loss": (lambda: Party(top(), y=Y, ids=IDS, optimizer="sgd", loss=square), "lab", "not known to be"),
    "add_loss": (lambda: Party(add_loss_sum(), x=X, ids=IDS, optimizer="sgd"), "hospital", "a sum over samples"),
    "scaling": (
        lambda: Party(top(), None, Y, IDS, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse"),
        "lab",
        "loss scaling",
    ),
    "train_step": (lambda: Party(own_step(), x=X, ids=IDS, optimizer="sgd"), "hospital", "train_step"),
    "float16": (lambda: Party(half(), x=X, ids=IDS, optimizer="sgd"), "hospital", "needs loss scaling"),
    "stateful": (lambda: Party(stateful_layer(), x=X, ids=IDS, optimizer="sgd"), "hospital", "stateful=True"),
    "mask": (lambda: Party(masking(), x=X, ids=IDS, optimizer="sgd"), "hospital", "has a Keras mask"),
    "words": (
        lambda: Party(top(), None, Y, IDS[:-1], "adamm", "msee", ["acuracy", "acc"]),
        "lab",
        r"(?s)1\. .*same number.*2\. optimizer: .* 'adamm'\n.*3\. loss: .* 'msee'\n.*4\. metrics: .* 'acuracy'$",
    ),
    "stages": (lambda: Party({"middle": top()}, y=Y, ids=IDS), "lab", "the plan gives this party the stages top"),
    "name": (lambda: Party(top(), y=Y, ids=IDS), "labs", "the plan has no party"),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_a_party_that_does_not_fit_is_refused_before_anybody_is_asked(case):
    from pipeline.parties.bound_party import BoundParty

    make, name, said = GIVEN[case]
    with pytest.raises(PartyPlanError, match=said):
        BoundParty(plan_of(VANILLA), name, make())


def test_ids_are_there_once_each_and_a_number_is_no_word():
    with pytest.raises(PartyPlanError, match="once each; 1 are repeated"):
        Party(bottom(3), x=X[:2], ids=["a", "a"])
    with pytest.raises(PartyPlanError, match="strings or whole numbers"):
        Party(bottom(3), x=X[:2], ids=[1.0, 2.0])
    assert Party(bottom(3), ids=[1, 2]).ids != Party(bottom(3), ids=["1", "2"]).ids
    assert Party(bottom(3), ids=np.array([1, 2])).ids == Party(bottom(3), ids=[1, 2]).ids


def test_a_look_at_a_party_leaves_every_bit():
    from pipeline.parties.bound_party import BoundParty

    model = bottom(3)
    before = bits(model)
    BoundParty(plan_of(VANILLA), "hospital", Party(model, x=X, ids=IDS, optimizer="adam"))
    assert_same_bits(bits(model), before, "variable")
