"""What a session tells its parties beside tensors: no id to a hub that has none, and no path of another's host."""

from __future__ import annotations

import keras
import pytest

from pipeline import CheckpointError, Party, PartyStoppedError
from tests.pipeline.parties.meeting import VANILLA, data, meet, plan_with_keys
from transport.errors import KeyFileError


@pytest.mark.parametrize("error", [CheckpointError, KeyFileError, OSError])
def test_paths_of_a_party_are_not_told_to_the_others(error):
    from pipeline.parties.session import _told

    assert _told(error("cannot write /a/path/of/mine")) == f"an error of its own ({error.__name__})"
    assert _told(PartyStoppedError("the loss of step 1 is nan")) == "the loss of step 1 is nan"


@pytest.mark.gate
def test_a_hub_without_ids_cannot_look_the_id_of_a_row_up_in_a_list_of_guesses(tmp_path):
    """Its batches have one row, and it has the session's key."""
    from pipeline.parties import session as sessions
    from pipeline.parties.party import ids_mark

    edge, limits = VANILLA["edges"][0], VANILLA["limits"]
    plan, folders = plan_with_keys(
        {
            "hub": "lab",
            "parties": {"hospital": {}, "lab": {}},
            "stages": {
                "bottom": {"owner": "hospital", "x": True},
                "middle": {"owner": "lab"},
                "top": {"owner": "hospital", "y": True},
            },
            "edges": [{**edge, "to": "middle"}, {**edge, "tensor": "w", "from": "middle", "to": "top"}],
            "training": {"batch": 1},
            "limits": limits,
        },
        tmp_path,
    )
    x, y, ids = data(2, 3)
    dense = {
        name: keras.Sequential([keras.Input((width,)), keras.layers.Dense(out)])
        for name, width, out in (("bottom", 3, 4), ("middle", 4, 4), ("top", 4, 1))
    }
    hospital = Party(
        {name: dense[name] for name in ("bottom", "top")}, x=x, y=y, ids=ids, optimizer="sgd", loss="mean_squared_error"
    )
    keys, seen = [], []
    shake, agree = sessions.shake_hands, sessions.PartyWire.receive

    def shaken(*given):
        found = shake(*given)
        keys.append(found[0])
        return found

    def received(self, peer, kind, name):
        message = agree(self, peer, kind, name)
        seen.extend([message.value["rows"]] if name == "prepared" else [])
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "shake_hands", shaken)
        patch.setattr(sessions.PartyWire, "receive", received)
        found = meet(plan, {"hospital": hospital, "lab": Party(dense["middle"], optimizer="sgd")}, folders)
    assert found["lab"].steps == 2 and len(seen) == 2 and None not in seen and keys[0] == keys[1]
    assert not {ids_mark(keys[0], [guess]) for guess in hospital.ids} & set(seen)
