"""The vanilla RNN of case C: formulas, one tape and the hand-off over time steps agree, and so do published figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.rnn_by_hand import Weights, closed_form, inputs_for_states, published
from stages import Stage
from tests.stages.jacobian.test_jacobian_examples import example

TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
SIZES = {  # steps, samples, features, units, classes
    "published sizes": (3, 1, 4, 2, 3),
    "one step": (1, 2, 3, 4, 2),
    "one unit": (4, 3, 2, 1, 2),
    "batch": (6, 5, 3, 4, 6),
}
module = example("vanilla_rnn")


def problem(sizes: str, dtype: str) -> tuple[Any, Any, Any, Weights]:
    """Random inputs, soft targets, initial state and weights, biases included."""
    steps, samples, features, units, classes = SIZES[sizes]
    random = np.random.default_rng(4)
    targets = random.dirichlet(np.ones(classes), (steps, samples))
    shapes = [(features, units), (units, units), (units,), (units, classes), (classes,)]
    weights = Weights(*(random.normal(size=shape) * 0.7 for shape in shapes)).astype(dtype)
    x, h0 = random.normal(size=(steps, samples, features)), random.uniform(-0.9, 0.9, (samples, units))
    return x.astype(dtype), targets.astype(dtype), h0.astype(dtype), weights


def assert_all_close(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    """Every quantity, within the tolerance of the largest value (1 at least)."""
    assert found.keys() == expected.keys()
    largest = max(1.0, *(float(np.abs(value).max()) for value in expected.values()))
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == dtype, name
        assert float(np.abs(found[name] - value).max()) <= TOLERANCES[dtype] * largest, name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("way", ["by_one_tape", "by_stages"])
def test_every_formula_is_what_is_differentiated(way: str, sizes: str, dtype: str) -> None:
    """All outputs, all δ(t), dL/dh(0) and all weights: by one tape, and with a Stage for each time step."""
    given = problem(sizes, dtype)
    expected = module.by_formulas(*given)
    assert {f"δ({t})" for t in range(1, SIZES[sizes][0] + 1)} | {"dh(0)", "dU", "dW", "db", "dV", "dc"} < {*expected}
    assert_all_close(getattr(module, way)(*given), expected, dtype)


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_one_stage_whose_windows_are_the_time_steps(sizes: str, run_eagerly: bool) -> None:
    """The same stage forward window by window, and back in reverse, adds up its own weights' gradients."""
    x, y, h0, weights = given = problem(sizes, "float64")
    expected = closed_form(*given)
    network = module.Network(weights)
    now, before = network.input(network.features, "x"), network.input(network.units, "h")
    h = network.step(1, now, before)
    stage = Stage(keras.Model([now, before], [h, network.output(1, h)]), run_eagerly=run_eagerly)
    state, outputs = tf.constant(h0), []
    for t in range(len(x)):
        state, output = stage.forward([x[t], state], window=t)
        outputs.append(output)
    handed = tf.zeros_like(state)
    for t in reversed(range(len(x))):
        # Here δ(t) is made inside the stage; what crosses is its part from the later steps.
        dx, handed = stage.backward([handed, -y[t] / outputs[t]], window=t)
        np.testing.assert_allclose(dx, expected.dx[t], rtol=0, atol=1e-12)
    found = stage.gradients()
    for path, value in {
        "from_input/kernel": expected.dU,
        "from_input/bias": expected.db,
        "from_state/kernel": expected.dW,
        "readout/kernel": expected.dV,
        "readout/bias": expected.dc,
    }.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-12 * max(1, np.abs(value).max()))
    np.testing.assert_allclose(handed, expected.dh0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_loss_is_the_sum_over_samples_and_steps(sizes: str) -> None:
    x, y, h0, weights = given = problem(sizes, "float64")
    found = closed_form(*given)
    assert found.loss == pytest.approx(-(y * np.log(found.probabilities)).sum(), rel=1e-12)
    # One formula without any tape at all: a central difference in the initial state.
    direction = np.random.default_rng(0).normal(size=h0.shape)
    up, down = (closed_form(x, y, h0 + step * direction, weights).loss for step in (1e-6, -1e-6))
    assert (up - down) / 2e-6 == pytest.approx((found.dh0 * direction).sum(), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    x, y, h0, weights = problem("batch", "float32")
    found = closed_form(x, y, h0, replace(weights, c=weights.c + np.float32(512)))
    assert np.isfinite(found.loss)
    expected = closed_form(x, y, h0, weights).probabilities
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)  # 512 takes 9 bits of the logits


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("way", ["by_formulas", "by_one_tape", "by_stages"])
def test_the_published_figures_come_out(way: str, dtype: str) -> None:
    (x, y, h0, weights), known = module.outside_check()
    assert {*known} == {"ŷ(1)", "ŷ(2)", "ŷ(3)", "δ(1)", "dV", "dc", "db"}
    given = x.astype(dtype), y.astype(dtype), h0.astype(dtype), weights.astype(dtype)
    found = getattr(module, way)(*given)
    for name, value in known.items():
        assert float(np.abs(found[name] - value).max()) <= 1e-6, name


def test_inputs_lead_to_the_states_and_have_least_norm() -> None:
    weights, figures = published()
    weights, h = weights.astype("float64"), figures["h"].astype("float64")
    h0 = np.array([[0.3, -0.2]])
    x = inputs_for_states(h, h0, weights)
    targets = figures["y"].astype("float64")
    np.testing.assert_allclose(closed_form(x, targets, h0, weights).h, h, rtol=0, atol=1e-14)
    nothing = np.linalg.svd(weights.U.T)[2][2:]  # directions of x that U does not see
    np.testing.assert_allclose(x @ nothing.T, 0, atol=1e-14)


def test_states_out_of_reach_are_refused() -> None:
    weights, figures = published()
    h0 = np.zeros((1, 2), "float32")
    with pytest.raises(ValueError, match=r"inside \(-1, 1\), received one of 1.25"):
        inputs_for_states(np.full((3, 1, 2), 1.25, "float32"), h0, weights)
    with pytest.raises(ValueError, match="full column rank"):
        inputs_for_states(figures["h"], h0, replace(weights, U=weights.U * 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 4), "float32")}, r"x: expected shape \('T', 'n', 4\), received \(3, 4\)"),
        ({"x": np.zeros((0, 1, 4), "float32")}, "x: expected shape"),
        ({"targets": np.full((3, 1, 2), 0.5, "float32")}, r"targets: expected shape \(3, 1, 3\), received \(3, 1, 2\)"),
        ({"h0": np.zeros((2, 2), "float32")}, r"h0: expected shape \(1, 2\), received \(2, 2\)"),
        ({"h0": np.zeros((1, 2))}, "one float dtype for all, received .*'h0': 'float64'"),
        ({"targets": np.full((3, 1, 3), 0.5, "float32")}, "every row to sum to 1"),
    ],
    ids=["x has no batch", "no step", "targets", "initial state", "dtype", "no distribution"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    (x, y, h0, weights), _ = module.outside_check()
    with pytest.raises(ValueError, match=message):
        closed_form(**{"x": x, "targets": y, "h0": h0, "weights": weights, **change})
