"""What witnesses found survives the wire, and directions are the same everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.reference.witness.results import CutPlace, Differences, Direction, Size, WitnessGradients, direction


def test_gradients_survive_the_wire() -> None:
    one = np.arange(6, dtype="float32").reshape(2, 3)
    sent = WitnessGradients(
        {0: [one, None], 2: []},
        {CutPlace(0, "y", 2, 1, 0): None, CutPlace(0, "y", 1, 0, 3): one * 2},
        Size(7, "float32"),
    )
    sent.rounding, sent.rounding_at_cuts, sent.loss, sent.note = 1e-7, 2e-7, 0.1, "cheap"
    description, arrays = sent.to_wire()
    got = WitnessGradients.from_wire(json.loads(json.dumps(description)), arrays)
    assert got.to_wire()[0] == description
    assert got.gradients[0][0].tobytes() == one.tobytes() and got.gradients[0][1] is None and got.gradients[2] == []
    assert got.boundary[0, "y", 2, 1, 0] is None
    assert (got.size, got.rounding, got.rounding_at_cuts, got.loss, got.note) == (
        Size(7, "float32"),
        1e-7,
        2e-7,
        0.1,
        "cheap",
    )


@pytest.mark.parametrize("directions", [[], [Direction(0, 1, 2, 0.3, float("inf"), -1.0)]], ids=["none", "one"])
def test_differences_survive_the_wire(directions) -> None:
    sent = Differences(directions, 3, 2.5, Size(9, "bfloat16"), 1e-6, 0.5, "no", "note")
    description, arrays = sent.to_wire()
    assert Differences.from_wire(json.loads(json.dumps(description)), arrays) == sent


def test_a_refusal_survives_the_wire() -> None:
    description, arrays = WitnessGradients(refusal="stage 'a'").to_wire()
    assert WitnessGradients.from_wire(json.loads(json.dumps(description)), arrays).refusal == "stage 'a'"


def test_directions_are_unit_and_differ_by_every_number() -> None:
    base = (0, 1, 2, 3)
    first = direction(*base, (4, 5))
    assert first.dtype == np.float64 and np.linalg.norm(first) == pytest.approx(1)
    assert direction(*base, (4, 5)).tobytes() == first.tobytes()
    for k in range(4):
        other = [*base]
        other[k] += 1
        assert np.abs(direction(*other, (4, 5)) - first).max() > 1e-3
    assert direction(*base, ()).shape == () and direction(*base, (0, 3)).shape == (0, 3)
