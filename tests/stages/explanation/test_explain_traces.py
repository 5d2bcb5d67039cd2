"""Explanations leave no trace, refuse what cannot be explained, and can be shown, written and read again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import backprop, context, record
from tensorflow.python.framework import constant_op, ops
from tensorflow.python.ops import script_ops

from stages import Explanation, HandoffError, explain, explaining
from stages.explanation.rows import Blocker, ExplanationRow
from tests.pipeline.runtime import blocking_layers as blocking
from tests.stages.explanation.test_explain import X, Y, around, faulty, seeded  # noqa: F401

layers = keras.layers


# -- nothing is disturbed ----------------------------------------------------------------------------------------


def patched() -> list[Any]:
    """All that a recording replaces, and switches on."""
    tape = backprop.GradientTape
    return [
        pywrap_tfe.TFE_Py_FastPathExecute,
        record.record_operation,
        keras.Layer.__call__,
        keras.Model.predict,
        keras.Model.predict_on_batch,
        script_ops.py_func_common,
        constant_op.convert_to_eager_tensor,
        tape.jacobian,
        tape.batch_jacobian,
        *(vars(tf.autodiff.ForwardAccumulator)[name] for name in ("__init__", "__enter__", "__exit__", "jvp")),
        *(getattr(np, name) for name in ("array", "asarray", "asanyarray", "ascontiguousarray")),
        *(vars(tape)[name] for name in ("_push_tape", "_pop_tape", "watch", "gradient", "stop_recording")),
        dict(vars(ops._EagerTensorBase)),
        list(context.context().op_callbacks),
        tf.config.functions_run_eagerly(),
    ]


def test_variables_seeds_and_random_numbers_are_as_before() -> None:
    model = around(layers.Dropout(0.5))
    model.add(layers.BatchNormalization())
    model.add(blocking.Memory())
    random.seed(1)
    np.random.seed(1)
    tf.random.set_seed(1)

    def state() -> list[bytes]:
        numbers = [np.float64(random.random()), np.random.random(3), tf.random.normal((2,)).numpy()]
        return [np.asarray(v).tobytes() for v in (*model.variables, *numbers)]

    start = (random.getstate(), np.random.get_state())

    def expect() -> list[bytes]:
        random.setstate(start[0])
        np.random.set_state(start[1])
        tf.random.set_seed(1)
        return state()

    def drawn() -> Any:
        noise = random.random() + np.random.random() + tf.random.normal(())
        return tf.reduce_sum(model(X, training=True)) * noise

    before = expect()
    random.setstate(start[0])
    np.random.set_state(start[1])
    tf.random.set_seed(1)
    assert not explain(drawn).ok
    assert state() == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["explain", "explaining"])
def test_everything_replaced_is_put_back(how: str, fails: bool) -> None:
    before = patched()
    w = tf.Variable(1.0)
    kept = tf.Variable(5.0)

    def loss() -> Any:
        kept.assign(7.0)
        if fails:
            raise KeyError("the user's own")
        return w * kept

    def run() -> None:
        if how == "explain":
            explain(loss)
        else:
            with explaining(), tf.GradientTape() as tape:
                tape.gradient(loss(), w)

    if fails:
        with pytest.raises(KeyError, match="the user's own"):
            run()
    else:
        run()
    assert patched() == before
    assert float(kept) == (5.0 if how == "explain" else 7.0)


def test_a_step_after_an_explanation_is_the_step_without_one() -> None:
    def trained(look: bool) -> list[Any]:
        keras.utils.set_random_seed(9)
        model = around(layers.Dropout(0.5))
        model.compile("adam", "mean_squared_error", run_eagerly=True)
        for _ in range(2):
            if look:
                explain(model, X, Y)
            model.train_on_batch(X, Y)
        return list(model.get_weights())

    for a, b in zip(trained(False), trained(True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_explanation_at_a_time() -> None:
    w = tf.Variable(1.0, name="w")
    with explaining(), pytest.raises(HandoffError, match="another explanation"):
        explain(lambda: w * 1.0)
    assert explain(lambda: w * 1.0).ok


# -- asking and showing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: explain(3), "received int"),
        (lambda: explain(around(layers.Dense(1))), "needs inputs"),
        (lambda: explain(around(layers.Dense(2)), X, Y), "no loss"),
        (lambda: explain(around(layers.Dense(2)), X, loss="mse"), "no y"),
        (lambda: explain(lambda: None), "returned None"),
        (lambda: explain(lambda: 2.0), "returned a float, not a tensor"),
        (lambda: explain(lambda: np.ones(2)), "returned a ndarray, not a tensor"),
    ],
)
def test_what_cannot_be_explained_is_refused(ask: Callable[[], Any], message: str) -> None:
    before = patched()
    with pytest.raises(HandoffError, match=message):
        ask()
    assert patched() == before


def test_a_compiled_models_own_loss_counts_with_its_regularisers() -> None:
    model = around(layers.Dense(3, kernel_regularizer="l2", name="middle"))
    model.layers[-1].activation = tf.stop_gradient
    model.compile("sgd", "mean_squared_error")
    found = explain(model, X, Y)
    assert {row.target for row in found.rows} == {"loss"}
    assert found.of("middle/kernel").ok  # through its regulariser
    assert found.of("before/kernel").reason == "stop_gradient"


def test_rows_can_be_found_written_and_read_again() -> None:
    found = explain(faulty("rounding"), X, Y, loss="mse")
    assert Explanation.from_plain(json.loads(found.to_json())) == found
    assert json.loads(found.to_json())["rows"][0]["blockers"][0]["operation"] == "Round"
    with pytest.raises(KeyError, match="no row is called 'nothing'"):
        found.of("nothing")
    with pytest.raises(KeyError, match="several rows are"):
        found.of("kernel")


def test_the_table_says_it_once_for_all_that_it_is_true_of() -> None:
    text = str(explain(faulty("rounding"), X, Y, loss="mse"))
    assert text.count("- Round in layer net/fault") == 1
    assert "2 connected, 2 not connected" in text.splitlines()[0]
    assert "before/kernel" in text and "before/bias" in text and "norm " in text


def test_names_of_others_have_no_power_over_the_terminal() -> None:
    row = ExplanationRow(
        "a\x1b[31m", "loss", "not connected", "rounding", blockers=(Blocker("Round", layer="[red]x[/]"),)
    )
    text = str(Explanation("x", (row,)))
    assert "\x1b" not in text and "[red]x[/]" in text


def test_an_explanation_of_nothing_is_not_ok() -> None:
    assert not Explanation().ok
    assert "no gradient was asked for" in str(Explanation("explained"))
