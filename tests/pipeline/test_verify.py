"""The verification is right, does not disturb, and fails when something is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import Pipeline, VerificationError
from pipeline.compare import Part, judge, largest, ulp_distance
from pipeline.tolerance import Tolerance
from stages import program
from stages.grid import Grid

layers = keras.layers
EXACT = Tolerance(0.0, "test")
LOOSE = Tolerance(1e-6, "test")


def gradient(*values: float) -> np.ndarray:
    return np.array(values, "float32")


def one_row(ours, theirs, tolerance=LOOSE, *others):
    parts = [Part(ours, theirs, (0,), "here")]
    return judge("tape", "gradient", "s", "s/v", parts, tolerance, scale=largest([theirs, *others])).row


def test_equal_bits_pass_any_tolerance():
    row = one_row(gradient(1, -2), gradient(1, -2), EXACT)
    assert (row.ok, row.difference, row.ulps, row.verdict) == (True, 0.0, 0, "equal bits")


def test_one_last_place_fails_bit_for_bit_and_passes_the_compiled_tolerance():
    ours, theirs = gradient(1, 2), gradient(1, np.nextafter(np.float32(2), np.float32(3)))
    assert not one_row(ours, theirs, EXACT).ok
    assert one_row(ours, theirs, LOOSE).ok
    assert one_row(ours, theirs, LOOSE).ulps == 1


def test_a_difference_is_judged_by_the_largest_gradient_of_the_model():
    ours, theirs = gradient(1e-9), gradient(-1e-9)  # a bias before a normalisation: noise around zero
    assert not one_row(ours, theirs).ok
    assert one_row(ours, theirs, LOOSE, gradient(1.0)).ok


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gradient(1), gradient(1.001)),
        (None, gradient(1)),
        (gradient(1), None),
        (gradient(np.nan), gradient(1)),
        (gradient(1, 2), gradient(1)),
        (gradient(0), gradient(1)),
    ],
)
def test_what_differs_fails(ours, theirs):
    row = one_row(ours, theirs)
    assert not row.ok and row.where == "here"


def test_no_gradient_on_both_sides_is_equal():
    assert one_row(None, None, EXACT).ok


def test_ulp_distance_counts_representable_numbers():
    one = np.float32(1)
    assert ulp_distance(np.array([one]), np.array([np.nextafter(one, np.float32(2))])) == 1
    assert ulp_distance(gradient(), gradient()) == 0


def model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dense(6, activation="relu", name="middle"),
            layers.Dropout(0.4),
            layers.Dense(3, activation="softmax"),
        ]
    )


def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((11, 5), dtype="float32"), rng.integers(0, 3, 11)


def running(eager: bool) -> Pipeline:
    keras.utils.set_random_seed(0)
    pipe = Pipeline.split(model(), at=["middle"], microbatches=3, transport="inproc")
    pipe.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=eager)
    return pipe


@pytest.mark.parametrize("eager", [True, False])
def test_verification_gradients_and_timelines_change_nothing(eager):
    with running(eager) as pipe, running(eager) as untouched:
        for each in (pipe, untouched):
            each.train_on_batch(*batch())
        assert pipe.verify(*batch()).ok
        pipe.gradients(*batch())
        timeline = pipe.timeline(*batch(), repeats=1)
        assert len(timeline.spans) == 2 * 3 * 2
        for each in (pipe, untouched):
            each.train_on_batch(*batch())
        ours, theirs = ([v.numpy() for v in each.merge().variables] for each in (pipe, untouched))
        for a, b in zip(ours, theirs, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("eager", [True, False])
def test_json_says_what_the_table_says(eager):
    with running(eager) as pipe:
        report = pipe.verify(*batch())
        found = json.loads(report.to_json())
        assert found["ok"] is report.ok is True
        names = [row["name"] for row in found["rows"] if row["kind"] == "gradient"]
        assert names == list(pipe.gradients(*batch()))
        assert report.summary() in str(report).replace("\n", " ") or report.ok


def wrong_weight(monkeypatch):
    right = program.Program._objective

    def divided(self, hosted, unit):
        return replace(right(self, hosted, unit), weights=(1 / len(self.grid.sizes),))

    monkeypatch.setattr(program.Program, "_objective", divided)


def dropped_gradient(monkeypatch):
    right = program.Program._output_gradients

    def dropped(self, hosted, action):
        gradients = right(self, hosted, action)
        return [None for _ in gradients] if action.microbatch == 1 else gradients

    monkeypatch.setattr(program.Program, "_output_gradients", dropped)


class AllInOne(Grid):
    """A batch of which each microbatch believes that it is all of it."""

    def __init__(self, sizes, microbatch):
        super().__init__(sizes)
        object.__setattr__(self, "believed", sizes[microbatch])

    @property
    def samples(self):
        return self.believed


def doubled_regulariser(monkeypatch):
    right = program.Program._forward

    def every_time(self, action):
        grid, self.grid = self.grid, AllInOne(self.grid.sizes, action.microbatch)
        right(self, action)
        self.grid = grid

    monkeypatch.setattr(program.Program, "_forward", every_time)


@pytest.mark.parametrize("sabotage", [wrong_weight, dropped_gradient, doubled_regulariser])
@pytest.mark.parametrize("eager", [True, False])
def test_a_wrong_hand_off_is_found(sabotage, eager, monkeypatch):
    sabotage(monkeypatch)
    with running(eager) as pipe:
        report = pipe.verify(*batch())
        assert not report.ok
        assert "NOT equal to one tape" in report.summary()
