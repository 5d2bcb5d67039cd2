"""The verification is right, does not disturb, and fails when something is wrong."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import Pipeline, VerificationError
from pipeline.compare.compare import Pair, judge, largest, ulp_distance
from pipeline.compare.tolerance import Tolerance
from pipeline.verify import verification
from stages.grid import Grid
from stages.worker import kept_values, step_program
from tests.levels import in_turn

layers = keras.layers
EXACT = Tolerance(0.0, "test")
LOOSE = Tolerance(1e-6, "test")


def gradient(*values: float) -> np.ndarray:
    return np.array(values, "float32")


def one_row(ours, theirs, tolerance=LOOSE, *others):
    parts = [Pair(ours, theirs, (0,), "here")]
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


def test_the_worst_of_several_parts_is_told_and_the_first_that_fails_is_named():
    same, off, far = gradient(1, 1), gradient(1, 1.5), gradient(1, 3)
    parts = [
        Pair(same, same, (0,), "a"),
        Pair(off, same, (1,), "b"),
        Pair(far, same, (2,), "c"),
        Pair(same, same, (3,)),
    ]
    found = judge("tape", "gradient", "s", "s/v", parts, EXACT)
    assert (found.order, found.row.where, found.row.difference, found.row.verdict) == ((1,), "b", 2.0, "DIFFERS")
    assert found.row.shape == (8,) and found.row.norm == pytest.approx(np.linalg.norm([1, 1, 1, 1.5, 1, 3, 1, 1]))


def test_a_hand_off_is_judged_by_bits_even_where_numbers_are_equal():
    parts = [Pair(gradient(-0.0), gradient(0.0), (0,))]
    assert judge("tape", "gradient", "s", "s/v", parts, EXACT).row.verdict == "equal"
    row = judge("hand-off", "received activation", "s", "v", parts, EXACT).row
    assert not row.ok and "sign of zero" in row.verdict


def test_zeros_are_judged_by_the_size_of_the_others():
    assert one_row(gradient(0), gradient(0), EXACT).relative == 0.0
    assert one_row(gradient(1e-9), gradient(0), LOOSE, gradient(1.0)).relative == pytest.approx(1e-9)
    assert one_row(gradient(1e-9), gradient(0), LOOSE).relative == 1.0


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


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
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


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_json_says_what_the_table_says(eager):
    with running(eager) as pipe:
        report = pipe.verify(*batch())
        found = json.loads(report.to_json())
        assert found["ok"] is report.ok is True
        names = [row["name"] for row in found["rows"] if (row["check"], row["kind"]) == ("tape", "gradient")]
        assert names == list(pipe.gradients(*batch()))
        assert report.summary() in str(report).replace("\n", " ") or report.ok


def wrong_weight(monkeypatch):
    right = step_program.Program._objective

    def divided(self, hosted, unit):
        return replace(right(self, hosted, unit), weights=(1 / len(self.grid.sizes),))

    monkeypatch.setattr(step_program.Program, "_objective", divided)


def dropped_gradient(monkeypatch):
    right = step_program.Program._output_gradients

    def dropped(self, hosted, action):
        gradients = right(self, hosted, action)
        return [None for _ in gradients] if action.microbatch == 1 else gradients

    monkeypatch.setattr(step_program.Program, "_output_gradients", dropped)


class AllInOne(Grid):
    """A batch of which each microbatch believes that it is all of it."""

    def __init__(self, sizes, microbatch):
        super().__init__(sizes)
        object.__setattr__(self, "believed", sizes[microbatch])

    @property
    def samples(self):
        return self.believed


def doubled_regulariser(monkeypatch):
    right = step_program.Program._forward

    def every_time(self, action):
        grid, self.grid = self.grid, AllInOne(self.grid.sizes, action.microbatch)
        right(self, action)
        self.grid = grid

    monkeypatch.setattr(step_program.Program, "_forward", every_time)


@pytest.mark.parametrize("sabotage", [wrong_weight, dropped_gradient, doubled_regulariser])
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_a_wrong_hand_off_is_found(sabotage, eager, monkeypatch):
    sabotage(monkeypatch)
    with running(eager) as pipe:
        report = pipe.verify(*batch())
        assert not report.ok
        assert "NOT equal to one tape" in report.summary()


def everything(pipe):
    """All that a pipeline holds, in its workers and in the user's process."""
    driver = pipe.session.workers.driver()
    found = {what: driver.get(what) for what in ("model", "optimizer", "metrics")}
    arrays = [array for stages in found.values() for part in stages.values() for array in part]
    return [array.tobytes() for array in arrays] + [int(pipe.optimizer.iterations)]


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_all_checks_leave_every_bit(eager):
    with running(eager) as pipe:
        pipe.fit(*batch(), batch_size=5, verbose=0)
        before = everything(pipe)
        report = pipe.verify(*batch(), checks="all", steps=2)
        report.raise_if_failed()
        assert everything(pipe) == before
        assert all(row.verdict == "equal bits" for row in report.of("left as it was"))
        assert [check.name for check in report.checks if not check.ran] == ["batch"], "batch statistics, dropout"


def test_a_verification_that_leaves_something_changed_says_so(monkeypatch):
    right = kept_values.Kept.put_back

    def forgetful(self):
        right(self)
        if self._hosted.spec.index == 1 and "model" in self._values:
            variable = next(v for v in self._hosted.variables("model") if "kernel" in v.path)
            variable.assign(variable + 1)

    monkeypatch.setattr(kept_values.Kept, "put_back", forgetful)
    with running(True) as pipe:
        pipe.train_on_batch(*batch())
        report = pipe.verify(*batch())
        assert not report.ok
        assert (report.first.stage, report.first.row.kind) == ("stage1", "left as it was")
        assert "kernel" in report.first.sentence


def test_values_are_put_back_when_a_check_breaks_off(monkeypatch):
    monkeypatch.setattr(verification, "variable_gradients", lambda *_: 1 / 0)
    with running(True) as pipe:
        pipe.train_on_batch(*batch())
        before = everything(pipe)
        with pytest.raises(ZeroDivisionError):
            pipe.verify(*batch(), checks=("tape", "steps"))
        assert everything(pipe) == before


@pytest.mark.parametrize("checks", ["tapes", ("tape", "all"), ()])
def test_unknown_checks_are_refused(checks):
    with running(True) as pipe, pytest.raises(VerificationError, match="'all' or some of 'tape', 'chain'"):
        pipe.verify(*batch(), checks=checks)


def three_stages():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    low = layers.Dense(4, name="low")(inputs)
    middle = layers.Dense(4, activation="tanh", name="middle")(low)
    built = keras.Model(inputs, layers.Dense(2, name="top")(layers.Add(name="add")([middle, low])))
    pipe = Pipeline.split(built, at=["low", "middle"], microbatches=3, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    return pipe


def sent(monkeypatch, kind, stage, source, change):
    """Let what a stage sends be changed, before it is seen or after."""
    right = step_program.Program._post

    def post(self, which, to, by, tensor, number, value, mark=None):
        if (which, to, by) == (kind, stage, source) and number[0] == 1:
            value = change(value)
        right(self, which, to, by, tensor, number, value, mark)

    monkeypatch.setattr(step_program.Program, "_post", post)


@pytest.mark.parametrize(
    ("kind", "to", "by", "stage", "peer"),
    [
        ("activation", 1, 0, "stage0", "stage1"),
        ("activation", 2, 0, "stage0", "stage2"),
        ("gradient", 0, 2, "stage2", "stage0"),
        ("gradient", 0, 1, "stage1", "stage0"),
    ],
)
def test_the_first_deviation_names_stage_cut_and_microbatch(kind, to, by, stage, peer, monkeypatch):
    sent(monkeypatch, kind, to, by, lambda value: value * 1.5)
    with three_stages() as pipe:
        report = pipe.verify(batch()[0], np.zeros((11, 2)))
        assert (report.first.stage, report.first.row.peer) == (stage, peer)
        assert report.first.row.where == "microbatch 1"
        assert report.first.row.kind == ("activation" if kind == "activation" else "output gradient")


def test_what_changes_on_the_way_is_found_by_its_two_ends_alone(monkeypatch):
    right = step_program.Program._message

    def flipped(self, kind, stage, source, tensor="", microbatch=0, window=0):
        message = right(self, kind, stage, source, tensor, microbatch, window)
        if self.observer is not None and (kind, stage, microbatch) == ("activation", 1, 2):
            array = self.observer.seen[max(self.observer.seen, key=lambda s: (s.consumer == 1, not s.sent))]
            array.view(np.uint32).flat[0] ^= 1
        return message

    monkeypatch.setattr(step_program.Program, "_message", flipped)
    with three_stages() as pipe:
        report = pipe.verify(batch()[0], np.zeros((11, 2)), checks="steps")
        assert {row.check for row in report.failed} == {"hand-off"}
        assert (report.first.stage, report.first.row.peer) == ("stage1", "stage0")
        assert report.first.row.ulps == 1


def test_the_reference_stays_for_the_next_question_and_ends_with_the_pipeline():
    with three_stages() as pipe:
        x, y = batch()[0], np.zeros((11, 2))
        pipe.verify(x, y).raise_if_failed()
        first = pipe.session.reference.driver
        pipe.train_on_batch(x, y)
        pipe.verify(x, y).raise_if_failed()
        assert pipe.session.reference.driver is first
        first.close()
        pipe.verify(x, y).raise_if_failed()
        second = pipe.session.reference.driver
        assert second is not first
        pipe.compile("sgd", "mse", run_eagerly=True)
        assert second.closed


@pytest.mark.gate
def test_the_users_own_random_numbers_go_on(monkeypatch):
    with running(True) as pipe:
        pipe.train_on_batch(*batch())
        before = random.getstate()
        pipe.verify(*batch(), checks="all").raise_if_failed()
        assert random.getstate() == before


def test_a_report_without_any_check_that_was_asked_for_is_not_ok():
    """The hand-off alone agrees, but that is not what was asked: batch statistics forbid the whole batch."""
    with running(True) as pipe:
        report = pipe.verify(*batch(), checks="batch")
        assert not report.ok and not report.failed
        assert "'batch' could not be made" in report.summary() and "layer 'batch_normalization" in report.summary()
        with pytest.raises(VerificationError, match="could not be made"):
            report.raise_if_failed()
        assert pipe.verify(*batch(), checks=("tape", "batch")).ok
