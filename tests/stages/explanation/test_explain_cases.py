"""Every form of "my gradient is None" that is asked about is explained as it should be, in the user's own code."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from threading import Thread
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Explanation, explaining
from stages.explanation.reasons import ADVICE
from tests.stages.explanation import none_page
from tests.stages.explanation.cases_of_none import CASES, Case

layers = keras.layers
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@cache
def explained(case: Case) -> Explanation:
    with pytest.raises(case.raises) if case.raises else nullcontext(), explaining() as explanation:
        case.run()
    return explanation


@every_case
def test_the_reason_the_operation_the_layer_and_the_line_are_right(case: Case) -> None:
    row = explained(case).of(case.source)
    assert row.certain
    assert (row.status, row.reason) == ("not connected", case.reason)
    assert row.advice == ADVICE[case.reason] and row.why
    if case.operation:
        assert row.blocker is not None and row.blocker.operation == case.operation
    if case.layer:
        assert row.blocker is not None and row.blocker.layer.split("/")[-1] == case.layer
    if case.code:
        assert row.blocker is not None and case.code in row.blocker.line
        assert row.blocker.line.startswith("cases_of_none.py:")


@every_case
def test_the_code_gets_what_it_gets_without_us(case: Case) -> None:
    """The case really is one: TensorFlow gives None (or raises) when nobody looks."""
    if case.raises is not None:
        with pytest.raises(case.raises):
            case.run()
        return
    with np.errstate(all="ignore"):
        found = case.run()
    assert None in tf.nest.flatten(found) if isinstance(found, list | tuple | dict) else found is None


def test_the_page_in_the_docs_is_what_is_said() -> None:
    assert none_page.PAGE.read_text(encoding="utf-8") == none_page.page(explained)


def test_at_least_the_twelve_most_asked_are_there() -> None:
    reasons = {case.reason for case in CASES}
    assert len(CASES) >= 12
    assert {"tensor not watched", "replaced", "NumPy", "integer source", "assignment", "outside the tape"} <= reasons
    assert {"argmax", "predict", "metric", "made beside", "no dependence", "stop_gradient"} <= reasons


def test_every_reason_is_asked_about_somewhere() -> None:
    elsewhere = {"integer result", "not differentiable"}  # test_explain
    elsewhere |= {"not followed", "hidden way", "branch", "tf.data", "queue", "table", "another tape"}
    elsewhere |= {"second derivative"}  # test_explain_reruns
    elsewhere |= {"compiled"}  # test_explain_functions
    pipelines = {"truncation"}  # tests/pipeline/reference/test_explain
    assert set(ADVICE) == {case.reason for case in CASES} | elsewhere | pipelines | {"unknown"}


def test_a_conversion_for_a_log_is_not_to_blame_and_proves_nothing() -> None:
    """The value also left TensorFlow, and nobody sees what Python did with it: it may have chosen the way."""
    w, v = tf.Variable([1.0, 2.0], name="w"), tf.Variable(3.0, name="v")
    with explaining() as explanation, tf.GradientTape() as tape:
        assert float(tf.reduce_sum(w)) == 3.0
        loss = v * 0.25 + 1.0
        tape.gradient(loss, [w, v])
    row = explanation.of("w")
    assert (row.reason, row.certain, row.blocker.operation) == ("not followed", False, "float()")
    assert explanation.of("v").ok


def test_a_way_that_is_only_guessed_says_so() -> None:
    """What was computed in NumPy is not what came out of TensorFlow, so nothing proves that it is from there."""
    w = tf.Variable([1.0, 2.0], name="w")
    with explaining() as explanation, tf.GradientTape() as tape:
        values = (w * 2.0).numpy()
        loss = tf.reduce_sum(tf.constant(values + 1.0))
        tape.gradient(loss, w)
    row = explanation.of("w")
    assert row.reason == "NumPy" and not row.certain
    assert "a guess" in str(row)


def test_a_tape_that_is_asked_twice_is_noted() -> None:
    w = tf.Variable(2.0, name="w")
    with pytest.raises(RuntimeError, match="non-persistent"), explaining() as explanation:
        with tf.GradientTape() as tape:
            loss = w * w
        tape.gradient(loss, w)
        tape.gradient(loss, w)
    assert len(explanation.notes) == 1
    assert "asked a second time" in explanation.notes[0] and "persistent=True" in explanation.notes[0]
    assert explanation.of("w").ok


@pytest.mark.parametrize("what", ["target", "source"])
def test_a_tape_that_is_given_an_array_is_noted(what: str) -> None:
    w = tf.Variable([2.0], name="w")
    with pytest.raises(AttributeError), explaining() as explanation:
        with tf.GradientTape() as tape:
            loss = w * w
        tape.gradient(*((loss.numpy(), w) if what == "target" else (loss, w.numpy())))
    assert f"was given a {what} that is no tensor but a ndarray" in explanation.notes[0]


def test_several_tapes_and_targets_have_rows_of_their_own() -> None:
    a, b = tf.Variable(1.0, name="a"), tf.Variable(2.0, name="b")
    with explaining() as explanation, tf.GradientTape(persistent=True) as tape:
        first = a * 2.0
        second = tf.stop_gradient(a) * b
        tape.gradient(first, {"a": a, "b": b})
        tape.gradient(second, {"a": a, "b": b})
    found = {(row.target, row.name): row.reason or row.status for row in explanation.rows}
    assert found == {
        ("first", "a"): "connected",
        ("first", "b"): "no dependence",
        ("second", "a"): "stop_gradient",
        ("second", "b"): "connected",
    }
    assert explanation.of("b", target="first").reason == "no dependence"


def test_every_step_of_a_loop_that_says_something_else_is_listed_once() -> None:
    w = tf.Variable(1.0, name="w")
    with explaining() as explanation:
        for rounded in (False, True, True, False):
            with tf.GradientTape() as tape:
                loss = tf.round(w) if rounded else w * 2.0
            tape.gradient(loss, w)
    assert [row.status for row in explanation.rows] == ["connected", "not connected"]


def test_a_step_of_fit_is_explained() -> None:
    """ "Gradients do not exist for variables": Keras's own training step, compiled or not."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [layers.Dense(2, name="used")(inputs), layers.Dense(2, name="left")(inputs)])
    model.compile("sgd", loss=["mean_squared_error", None])
    x, y = np.ones((4, 3), "float32"), np.zeros((4, 2), "float32")
    with explaining() as explanation, pytest.warns(UserWarning, match="Gradients do not exist"):
        model.fit(x, [y, y], verbose=0)
    assert explanation.of("used/kernel").ok
    assert explanation.of("left/kernel").reason == "no dependence"
    assert explanation.of("left/kernel").blocker.layer.endswith("left")


def test_second_derivatives_are_followed_through_the_inner_gradient() -> None:
    x = tf.Variable([1.0, 2.0], name="x")
    with explaining() as explanation, tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y = tf.reduce_sum(x**3)
        slope = inner.gradient(y, x)
        hessian = outer.gradient(tf.reduce_sum(tf.round(slope)), x)
    assert hessian is None
    assert [row.reason for row in explanation.rows] == ["", "rounding"]


@pytest.mark.parametrize("nested", [True, False])
def test_zeros_that_were_asked_for_in_place_of_none_are_given_and_explained(nested: bool) -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    with explaining() as explanation, tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.round(w))
        found = tape.gradient(loss, {"w": w} if nested else w, unconnected_gradients="zero")
    found = found["w"] if nested else found
    np.testing.assert_array_equal(found.numpy(), [0.0, 0.0])
    assert (explanation.of("w").status, explanation.of("w").reason) == ("not connected", "rounding")


def test_a_jacobian_is_what_it_is_without_us() -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    with explaining(), tf.GradientTape(persistent=True) as tape:
        y = w**3
    with explaining(), tf.GradientTape() as again:
        z = w**3
        found = again.jacobian(z, w)
    np.testing.assert_array_equal(found.numpy(), tape.jacobian(y, w).numpy())


def test_other_threads_are_not_looked_at() -> None:
    w, v = tf.Variable(1.0, name="w"), tf.Variable(2.0, name="v")

    def elsewhere() -> None:
        with tf.GradientTape() as tape:
            loss = tf.round(v)
        tape.gradient(loss, v)

    with explaining() as explanation, tf.GradientTape() as tape:
        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        loss = w * 2.0
        tape.gradient(loss, w)
    assert [row.name for row in explanation.rows] == ["w"]


def test_updates_of_the_block_stay() -> None:
    w = tf.Variable(1.0, name="w")
    with explaining() as explanation:
        with tf.GradientTape() as tape:
            loss = w * w
        w.assign_sub(0.1 * tape.gradient(loss, w))
    assert float(w) == np.float32(1.0 - 0.2)
    assert explanation.ok


def test_what_was_seen_before_an_error_is_explained() -> None:
    w = tf.Variable([1.0, 2.0], name="w")

    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.floor(w))
        gradient = tape.gradient(loss, w)
        return w.assign_sub(gradient)

    with pytest.raises(ValueError, match="None"), explaining() as explanation:
        step()
    assert explanation.of("w").reason == "rounding"
