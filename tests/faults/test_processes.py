"""Frames damaged between real processes: well-formed, with a right header, and not what was sent."""

from functools import partial

import pytest

from pipeline import VerificationError
from pipeline.runtime import workers
from tests.faults.cases import CASES
from tests.levels import in_turn


@pytest.mark.parametrize(
    ("transport", "entry", "eager"),
    in_turn(
        [
            ("auto", "flipping", True),
            ("ipc", "narrowing", True),
            ("auto", "narrowing", False),
            ("ipc", "flipping", False),
        ],
        0,
        2,
        several=True,
    ),
)
def test_a_damaged_frame_is_found_on_its_edge(transport, entry, eager, monkeypatch):
    driver = partial(workers.Driver, entry=f"tests.faults.workers:{entry}")
    monkeypatch.setattr(workers, "Driver", driver)
    case = CASES["convolutional"]
    with case.pipeline("1f1b", eager, transport=transport) as pipe:
        report = pipe.verify(*case.data(0))
        row = report.first.row
        assert (row.check, row.kind, row.name) == ("hand-off", "received output gradient", "low_norm")
        assert (row.stage, row.peer) == ("stage0", "stage1")
        assert row.where == ("microbatch 1" if entry == "flipping" else "microbatch 0")
        with pytest.raises(VerificationError, match="not what 'stage1' sent"):
            report.raise_if_failed()


@pytest.mark.gate
def test_the_same_pipeline_without_damage_verifies():
    case = CASES["convolutional"]
    with case.pipeline("1f1b", transport="auto") as pipe:
        pipe.verify(*case.data(0)).raise_if_failed()
