"""Values of a form that is none of the protocol's end a session in one sentence at both ends."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import PartyStoppedError
from tests.pipeline.parties.meeting import VANILLA
from tests.pipeline.parties.test_refusals import Pair


@pytest.mark.gate
@pytest.mark.parametrize("change", [{"rows": None}, {"nonces": 7}], ids=["rows", "nonces"])
def test_a_hello_with_what_is_none_of_ours_is_refused_in_a_sentence(tmp_path, change):
    """Both ends end with an error of the product, whichever of them has sent it."""
    from pipeline.parties import handshake

    pair = Pair(tmp_path)
    honest = handshake.PartyWire.send

    def changed(self, peer, kind, tensor, value=None, **given):
        if tensor == "hello":
            value = {key: one for key, one in {**value, **change}.items() if one is not None}
        return honest(self, peer, kind, tensor, value, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handshake.PartyWire, "send", changed)
        found = pair.meet()
    assert all(isinstance(one, PartyStoppedError) for one in found.values()), found
    pair.assert_untouched()


@pytest.mark.gate
@pytest.mark.parametrize(
    ("second", "said"), [(np.zeros((8, 2), "float32"), "not one shape and dtype"), (np.float32(1), "not one row each")]
)
def test_predictions_that_change_from_batch_to_batch_are_refused_in_a_sentence(tmp_path, second, said):
    from pipeline.parties import session as sessions

    pair = Pair(tmp_path, {**VANILLA, "grants": {"outputs": ["hospital"]}})
    honest = sessions.PartyWire.send

    def changed(self, peer, kind, name, value=None, array=None):
        array = np.array(second) if name == "predictions" and self.step == 2 else array
        return honest(self, peer, kind, name, value, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions.PartyWire, "send", changed)
        found = pair.meet(task="predict")
    assert isinstance(found["hospital"], PartyStoppedError) and said in str(found["hospital"]), found
    assert f"hospital ended the session in step 2: {found['hospital']}" in str(found["lab"])
