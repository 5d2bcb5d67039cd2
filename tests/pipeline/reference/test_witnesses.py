"""`Pipeline.verify` with the three witnesses: healthy pipelines pass, refusals are told, faults are found."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from stages.loss.head import Head
from stages.worker import step_program
from tests.levels import in_turn
from tests.pipeline.reference.witness_kinds import KINDS, made

ALL = ("chain", "differences", "batch")
REFUSED = {
    "convolution": {"batch": "layer 'normal'"},
    "dropout": {"batch": "layer 'drop'"},
    "truncated": {"batch": "truncated", "differences": "truncated"},
}


def verified(kind: str, checks=ALL):
    pipe, x, y, weights = made(kind)
    names = pipe.session.setup.wires.labels
    target = dict(zip(names, y, strict=True)) if isinstance(y, list) else y
    with pipe:
        return pipe.verify(x, target, weights, checks=checks)


@pytest.mark.parametrize("kind", in_turn(list(KINDS), 2, 9))
def test_every_witness_agrees_or_says_why_it_cannot(kind: str) -> None:
    report = verified(kind)
    assert report.ok, report
    checks = {check.name: check for check in report.checks}
    for name in ALL:
        why = REFUSED.get(kind, {}).get(name)
        assert checks[name].ran is (why is None)
        assert (why or "") in checks[name].reason
        assert bool(report.of("gradient", "directional derivative", check=name)) is (why is None)


def scaled(monkeypatch):
    right = step_program.Program._output_gradients

    def wrong(self, hosted, action):
        return [None if g is None else g / 2 for g in right(self, hosted, action)]

    monkeypatch.setattr(step_program.Program, "_output_gradients", wrong)


def dropped(monkeypatch):
    right = step_program.Program._output_gradients

    def wrong(self, hosted, action):
        found = right(self, hosted, action)
        return [None for _ in found] if action.microbatch == 1 else found

    monkeypatch.setattr(step_program.Program, "_output_gradients", wrong)


def unweighted(monkeypatch):
    monkeypatch.setattr(step_program.Program, "_weight_of", lambda self, one, unit: None)


def alike(monkeypatch):
    right = step_program.Program._objective

    def wrong(self, hosted, unit):
        found = right(self, hosted, unit)
        return found and replace(found, weights=tuple(1 / len(self.grid.sizes) for _ in found.weights))

    monkeypatch.setattr(step_program.Program, "_objective", wrong)


def repeated_regulariser(monkeypatch):
    right = step_program.Program._forward

    class Alone:
        def __init__(self, grid):
            self._grid = grid

        def __getattr__(self, name):
            return getattr(self._grid, name)

        samples = 1

    def wrong(self, action):
        grid, self.grid = self.grid, Alone(self.grid)
        right(self, action)
        self.grid = grid

    monkeypatch.setattr(step_program.Program, "_forward", wrong)


@pytest.mark.parametrize(
    ("fault", "kind"),
    in_turn(
        [
            (unweighted, "dense"),
            (dropped, "dense"),
            (repeated_regulariser, "dense"),
            (alike, "masked"),
            (scaled, "dense"),
            (alike, "dense"),
        ],
        3,
        6,
        several=True,
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_witness_finds_a_wrong_step(fault, kind: str, monkeypatch) -> None:
    fault(monkeypatch)
    report = verified(kind)
    for check in ALL:
        rows = report.of("gradient", "directional derivative", check=check)
        assert rows and any(not row.ok for row in rows), check
    assert report.first is not None


def test_a_wrong_rule_of_weights_that_the_reference_shares_is_found_by_others(monkeypatch) -> None:
    """`Head.weights` serves the pipeline and one tape alike; differences and the whole batch know no weights.

    Nor does the user's own loss, which judges unasked.
    """
    monkeypatch.setattr(Head, "weights", lambda self, sizes, *_: (1 / len(sizes),) * len(sizes))
    report = verified("masked", ("tape", "differences", "batch"))
    failed = {row.check for row in report.failed}
    assert failed == {"differences", "batch", "own"}
    assert np.isfinite(report.loss)


def test_sample_weights_lost_in_the_loss_itself_are_found_though_all_stages_and_one_tape_lose_them(monkeypatch) -> None:
    right = Head.value
    monkeypatch.setattr(Head, "value", lambda self, target, prediction, _: right(self, target, prediction, None))
    x = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, name="low"), keras.layers.Dense(1, name="top")]
    with Pipeline.split(keras.Sequential([keras.Input((3,)), *layers]), at=["low"], transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        weights = np.arange(8, dtype="float32")
        assert {row.check for row in pipe.verify(x, x[:, :1], weights, checks="tape").failed} == {"own"}
        for check in ("batch", "differences"):
            report = pipe.verify(x, x[:, :1], weights, checks=check)
            assert not report.ok and report.first.stage == "stage1", check
