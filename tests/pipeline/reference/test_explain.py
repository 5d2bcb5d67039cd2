"""What blocks a gradient in one stage explains the None in the stages before it, and nothing is changed by asking."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from pipeline import Pipeline
from pipeline.commands.cli import main
from pipeline.cutting.splitter import split_model
from pipeline.errors import PipelineError
from pipeline.model.call_graph import read_graph
from pipeline.reference.explain import explain_joined
from pipeline.verify.explain import beside, status_of_array
from stages import Explanation, LearnedState
from stages.explanation.rows import ExplanationRow
from tests.levels import examples
from tests.pipeline.reference.witnessing import bits, stages_of, whole
from tests.pipeline.runtime import blocking_layers as blocking
from tests.random_graphs import LOSSES, OUTPUTS
from tests.strategies_graphs import sketches

layers = keras.layers
X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
Y = np.ones((6, 2), "float32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(3)


def three_stages(fault: Any, **options: Any) -> Pipeline:
    """Two dense stages and a third one with the fault in it."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, name="first"),
            layers.Dense(3, name="second"),
            fault,
            layers.Dropout(0.5),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="last"),
        ],
        name="net",
    )
    return split(model, ["first", "second"], **options)


def split(model: Any, at: list[str], *, loss: Any = "mean_squared_error", **options: Any) -> Pipeline:
    pipe = Pipeline.split(model, at=at, **{"microbatches": 2, "transport": "inproc"} | options)
    pipe.compile("sgd", loss, run_eagerly=True)
    return pipe


def joined(pipe: Pipeline, x: Any = X, y: Any = Y, target: str = "loss", **options: Any) -> Explanation:
    """The explanation of a pipeline without any worker; checks that it changes nothing."""
    stages = stages_of(pipe)
    before = bits(stages)
    plain = explain_joined(stages, whole(pipe, x, y), target, **options)
    assert bits(stages) == before
    return Explanation.from_plain(json.loads(json.dumps(plain)))


# -- where the blockage is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "operation"),
    [
        (blocking.Stop, "stop_gradient", "StopGradient"),
        (blocking.Hard, "comparison", "Greater"),
        (blocking.Grades, "rounding", "Round"),
        (blocking.Memory, "assignment", "AssignVariableOp"),
        (blocking.ByNumPy, "NumPy", ".numpy()"),
        (blocking.ByNumPyFunction, "numpy_function", "numpy_function"),
    ],
)
def test_a_blockage_in_stage_2_explains_the_none_in_stage_0(fault: Any, reason: str, operation: str) -> None:
    found = joined(three_stages(fault(name="fault")))
    for name in ("stage0/net/first/kernel", "stage1/net/second/bias"):
        row = found.of(name)
        assert (row.status, row.reason, row.blocker.operation) == ("not connected", reason, operation)
        assert (row.blocker.layer, row.blocker.stage) == ("fault", "stage2")
        assert row.blocker.line.startswith("blocking_layers.py:")
    assert found.of("stage2/net/last/kernel").ok and found.of("stage2/net/norm/gamma").ok
    assert not any("moving" in row.name for row in found.rows)


def test_a_tensor_beside_one_that_is_stopped_has_a_gradient_of_its_own() -> None:
    """Two tensors cross together, and nothing comes back to one: that is None, as under one tape, and not zero."""
    inputs = keras.Input((3,))
    left, right = layers.Dense(2, name="left")(inputs), layers.Dense(2, name="right")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="last")(layers.Add()([left, blocking.Stop()(right)])))
    found = joined(split(model, [("left", "right")]))
    assert found.of("left/kernel").ok
    assert (found.of("right/kernel").status, found.of("right/kernel").reason) == ("not connected", "stop_gradient")


def test_an_integer_that_crosses_a_cut_is_named() -> None:
    inputs = keras.Input((3,))
    classes = blocking.Classes(name="classes")(layers.Dense(4, name="scores")(inputs))
    outputs = layers.Dense(2, name="last")(layers.Embedding(4, 2, name="words")(classes))
    found = joined(split(keras.Model(inputs, outputs), ["classes"]))
    row = found.of("scores/kernel")
    assert (row.reason, row.blocker.operation, row.blocker.stage) == ("argmax", "ArgMax", "stage0")
    assert "'classes' crosses the cut from stage stage0 to stage stage1 as int64" in row.why
    assert found.of("words/embeddings").ok


def test_a_state_whose_gradient_is_cut_off_between_windows() -> None:
    """Only the last window is judged, and truncate=1 lets nothing back into the one before it."""
    inputs = keras.Input((4, 3))
    start = LearnedState(2, "normal", name="start")(inputs)
    hidden = layers.GRU(2, name="gru")(layers.Dense(3, name="first")(inputs), initial_state=start)
    model = keras.Model(inputs, layers.Dense(2, name="last")(hidden))
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype("float32")
    cut = joined(split(model, ["first"], windows=2, truncate=1), x)
    row = cut.of(next(row.name for row in cut.rows if "start" in row.name))
    assert (row.status, row.reason) == ("zero", "truncation")
    assert "every 1 window" in row.why and row.blocker.what == "on the states between windows"
    assert joined(split(model, ["first"], windows=2), x).ok


def test_targets_are_outputs_and_states_too() -> None:
    inputs = keras.Input((4, 3))
    hidden = layers.GRU(2, name="gru")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="last")(hidden))
    pipe = split(model, ["gru"], windows=2)
    (state,) = pipe.session.setup.segments[0].states
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype("float32")
    for target in (f"stage0/{state}", "gru"):
        found = joined(pipe, x, target=target)
        assert {row.target for row in found.rows} == {target}
        assert found.of("gru_cell/kernel").ok
        assert found.of("last/kernel").reason == "no dependence"


def test_shared_and_frozen_variables() -> None:
    shared = layers.Dense(3, name="shared")
    inputs = keras.Input((3,))
    middle = layers.Dense(3, name="middle")
    hidden = middle(shared(inputs))
    middle.trainable = False
    model = keras.Model(inputs, layers.Dense(2, name="last")(shared(blocking.Stop()(hidden))))
    found = joined(split(model, ["middle"]))
    assert [row.name for row in found.rows if "shared" in row.name] == ["stage0/shared/kernel", "stage0/shared/bias"]
    assert found.of("shared/kernel").ok  # by its second use
    row = found.of("middle/kernel")
    assert (row.frozen, row.ok, row.status, row.reason) == (True, True, "not connected", "stop_gradient")


# -- values, over microbatches -----------------------------------------------------------------------------------


def relu_pipe(**options: Any) -> Pipeline:
    model = keras.Sequential(
        [keras.Input((1,)), layers.Dense(1, activation="relu", name="first"), layers.Dense(1, name="last")], name="net"
    )
    model.set_weights([np.array([[1.0]]), np.array([0.0]), np.array([[1.0]]), np.array([0.0])])
    return split(model, ["first"], **options)


def test_zero_is_zero_in_all_microbatches() -> None:
    pipe, y = relu_pipe(), np.ones((4, 1), "float32")
    dead = -np.ones((4, 1), "float32")
    row = joined(pipe, dead, y).of("first/kernel")
    assert (row.status, row.reason, row.blocker.stage, row.blocker.layer) == ("zero", "dead unit", "stage0", "first")
    late = dead.copy()
    late[3] = 2.0
    assert joined(pipe, late, y).of("first/kernel").status == "connected"


def test_a_microbatch_that_is_not_finite_is_looked_for() -> None:
    pipe, y = relu_pipe(), np.zeros((4, 1), "float32")
    x = np.ones((4, 1), "float32")
    x[3] = np.inf
    statuses = {"stage0/net/first/kernel": "not finite"}
    row = joined(pipe, x, y, statuses=statuses).of("first/kernel")
    assert (row.status, row.reason) == ("not finite", "not finite value")
    assert "takes a value that is not finite" in row.blocker.what


def test_the_pipelines_own_gradients_count_and_a_difference_is_said() -> None:
    found = Explanation(
        "x",
        (
            ExplanationRow("a", "loss", "connected"),
            ExplanationRow("b", "loss", "zero"),
            ExplanationRow("c", "loss", "connected"),
        ),
    )
    ours = {"a": np.array([3.0, 4.0], "float32"), "b": None, "c": np.array([0.0])}
    told = beside(found, ours)
    assert told.of("a").norm == 5.0
    assert len(told.notes) == 1 and told.notes[0].startswith("c: the pipeline's gradient is zero")
    assert [status_of_array(g) for g in (None, np.array([np.nan]))] == ["not connected", "not finite"]


# -- with workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["inproc", "auto"])
def test_pipe_explain(transport: str) -> None:
    with three_stages(blocking.Stop(name="fault"), transport=transport) as pipe:
        before = pipe.gradients(X, Y)
        found = pipe.explain(X, Y)
        after = pipe.gradients(X, Y)
    row = found.of("stage0/net/first/kernel")
    assert (row.reason, row.blocker.layer, row.blocker.stage) == ("stop_gradient", "fault", "stage2")
    assert found.notes == ()
    expected = before["stage2/net/last/kernel"]
    assert found.of("stage2/net/last/kernel").norm == pytest.approx(np.linalg.norm(expected.astype("float64")))
    for name, gradient in before.items():
        assert gradient is after[name] is None or gradient.tobytes() == after[name].tobytes()


@pytest.mark.gate
@settings(max_examples=examples(3, 5, 40), suppress_health_check=[HealthCheck.too_slow])
@given(sketches())
def test_random_graphs_are_explained_as_their_gradients_are(sketch: Any) -> None:
    """Branches, joins, masks, shared and frozen layers under random cuts: every None has a reason that is known."""
    model, stage_of = sketch.build()
    arrays, targets, judged = sketch.data()
    x, y = sketch.pack(arrays, sketch.input_names), sketch.pack(targets, OUTPUTS)
    weights = None if judged is None else sketch.pack(judged, OUTPUTS)
    parts = split_model(model, stage_of=stage_of(read_graph(model)))
    with Pipeline(parts, transport="inproc", microbatches=sketch.microbatches) as pipe:
        factors = sketch.pack(sketch.loss_weights, OUTPUTS) if sketch.loss_weights else None
        losses = sketch.pack([LOSSES[name]() for name in sketch.losses], OUTPUTS)
        pipe.compile("sgd", losses, loss_weights=factors, run_eagerly=True)
        gradients = pipe.gradients(x, y, weights)
        found = pipe.explain(x, y, weights)
    assert not found.notes
    assert {row.name for row in found.rows if not row.frozen} == set(gradients)
    for row in found.rows:
        assert row.certain and row.reason != "unknown", row
        if row.name in gradients:
            assert row.status == status_of_array(gradients[row.name]), row
            assert (row.reason == "") == (row.status == "connected"), row
            assert row.reason in ("", "stop_gradient", "no dependence") or row.status == "zero", row


@pytest.mark.parametrize("y", [None, np.ones((4, 1), "float32")], ids=["no y", "y"])
def test_an_output_needs_no_target_to_compare_with(y: Any) -> None:
    with relu_pipe() as pipe:
        found = pipe.explain(np.ones((4, 1), "float32"), y, target="first")
        assert pipe.predict(np.ones((4, 1), "float32")).tolist() == [[1.0]] * 4
    assert found.of("first/kernel").ok
    assert found.of("last/kernel").reason == "no dependence"


def test_what_cannot_be_asked_is_refused() -> None:
    with relu_pipe() as pipe, pytest.raises(PipelineError, match=r"among loss, first, last, received 'lost'"):
        pipe.explain(np.ones((4, 1), "float32"), np.ones((4, 1), "float32"), target="lost")


# -- the command -------------------------------------------------------------------------------------------------

MODULE = """
import keras, numpy as np, tensorflow as tf
from pipeline import Pipeline
from tests.pipeline.runtime.blocking_layers import Stop

w = tf.Variable([1.0, 2.0], name="w")
x, y = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")

def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="a"), Stop(name="s"), keras.layers.Dense(1)])

def pipe():
    found = Pipeline.split(model(), at=["a"], transport="inproc")
    found.compile("sgd", "mean_squared_error")
    return found, x, y

def compiled():
    found = model()
    found.compile("sgd", "mean_squared_error")
    return found, x, y

def good():
    return tf.reduce_sum(w * w)

def bad():
    return tf.reduce_sum(tf.round(w))

def broken():
    raise ValueError("the user's own")
"""


@pytest.mark.parametrize(
    ("function", "status", "said"),
    [
        ("pipe", 1, "StopGradient in layer s of stage stage1"),
        ("compiled", 1, "StopGradient in layer sequential"),
        ("good", 0, "1 connected"),
        ("bad", 1, "Round at explained_by_tests.py"),
    ],
)
def test_the_command_says_why_and_its_status_is_the_verdict(
    function: str, status: int, said: str, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "explained_by_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", f"explained_by_tests:{function}", "--json", "found.json"]) == status
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is (status == 0)


@pytest.mark.parametrize(("what", "said"), [("broken", "the user's own"), ("absent", "expected module:function")])
def test_the_command_fails_with_status_2(what: str, said: str, tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "explained_by_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", f"explained_by_tests:{what}"]) == 2
    assert said in capsys.readouterr().err
