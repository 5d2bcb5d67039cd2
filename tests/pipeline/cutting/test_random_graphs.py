"""Random graphs under random cuts are one tape: branches, joins, skips, shared layers, several inputs and outputs.

Each sketch is built, cut and run as a pipeline. `Pipeline.verify` must find what it promises, and an independent tape
over the uncut model the same gradients: in equal bits where tapes are eager and no sum can have another order, else
within 1e-6 of the largest |gradient|. So must all weights and statistics after one update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from pipeline import Pipeline
from pipeline.cutting.splitter import Split, split_model
from pipeline.model.call_graph import read_graph
from tests.levels import SOAK, examples, in_turn
from tests.natural_tape import natural_tape
from tests.one_tape import Gradients, assert_same_bits
from tests.random_graphs import LOSSES, OUTPUTS, REGULARISED, Node, Sketch
from tests.strategies_graphs import sketches

RATE = 0.01
EXAMPLES = examples(5, 7, 100)


@dataclass(frozen=True)
class Expected:
    """What one tape says of a sketch: the loss, its gradients, and all variables after one update by them."""

    loss: float
    gradients: Gradients
    after: list[np.ndarray]


def one_tape(sketch: Sketch, model: Any) -> Expected:
    """The model is left as it was."""
    before = [variable.numpy() for variable in model.variables]
    x, y, weights = sketch.data()
    loss, gradients = natural_tape(
        model,
        sketch.pack(x, sketch.input_names),
        y,
        [LOSSES[name]() for name in sketch.losses],
        sketch.microbatches,
        factors=sketch.loss_weights or None,
        sample_weights=weights,
        restore=False,
    )
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        if gradient is not None:
            variable.assign_sub(np.float32(RATE) * gradient)
    after = model.get_weights()
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return Expected(loss, gradients, after)


def check(sketch: Sketch) -> None:
    """One sketch: gradients, loss, prediction, and all weights and statistics after an update."""
    model, stage_of = sketch.build()
    expected = one_tape(sketch, model)
    split = split_model(model, stage_of=stage_of(read_graph(model)))
    arrays, targets, judged = sketch.data()
    x, y = sketch.pack(arrays, sketch.input_names), sketch.pack(targets, OUTPUTS)
    weights = None if judged is None else sketch.pack(judged, OUTPUTS)
    kept = [variable.numpy() for variable in model.variables]
    options = {"microbatches": sketch.microbatches, "schedule": sketch.schedule, "recompute": sketch.recompute}
    with Pipeline(split, transport="inproc", **options) as pipe:
        pipe.compile(
            keras.optimizers.SGD(RATE),
            sketch.pack([LOSSES[name]() for name in sketch.losses], OUTPUTS),
            loss_weights=sketch.pack(sketch.loss_weights, OUTPUTS) if sketch.loss_weights else None,
            run_eagerly=sketch.eager,
        )
        predicted = keras.tree.flatten(pipe.predict_on_batch(x))
        report = pipe.verify(x, y, weights)
        found = pipe.gradients(x, y, weights)
        pipe.train_on_batch(x, y, weights)
        after = pipe.get_weights()
    for variable, value in zip(model.variables, kept, strict=True):  # closing the pipeline gave it the trained ones
        variable.assign(value)
    report.raise_if_failed()
    assert report.loss == pytest.approx(expected.loss, rel=2e-6, abs=1e-6)
    gradients = in_order_of(model, split, found)
    assert [g is None for g in gradients] == [g is None for g in expected.gradients]
    if sketch.eager and sketch.sums_alike:
        assert_same_bits(gradients, expected.gradients, "gradient")
    assert_close(gradients, expected.gradients, 1e-6)
    assert_close(after, expected.after, 1e-6)
    assert_close(predicted, [np.asarray(value) for value in keras.tree.flatten(model(x, training=False))], 1e-5)


def in_order_of(model: Any, split: Split, found: Mapping[str, Any]) -> Gradients:
    """A pipeline's gradients in the order of the model's variables; one that several stages have is in the first."""
    by_variable: dict[int, Any] = {}
    values = iter(found.values())
    for segment in split.segments:
        for variable in segment.model.trainable_variables:
            if id(variable) not in by_variable:
                by_variable[id(variable)] = next(values)
    assert list(values) == []
    return [by_variable[id(variable)] for variable in model.trainable_variables]


def assert_close(ours: Sequence[Any], theirs: Sequence[Any], part: float) -> None:
    """Differences of at most that part of the largest |value| of all."""
    largest = max((float(np.abs(b).max()) for b in theirs if b is not None), default=0.0)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b is not None:
            np.testing.assert_allclose(a, b, rtol=0, atol=part * largest, err_msg=str(i))


KNOWN = {
    # Three terms for one value from three stages: their order shows in the last bit.
    "read by three stages": Sketch(
        inputs=("floats",),
        nodes=(
            Node("dense", (0,), 5, 0),
            Node("dense", (1,), 5, 1),
            Node("multiply", (2, 1), 0, 2),
            Node("dense", (3,), 5, 2),
            Node("concatenate", (4, 1), 0, 3),
            Node("dense", (5,), 5, 3),
        ),
        outputs=(6,),
        losses=("squares",),
    ),
    # Three terms for one value in its own stage, one of them from its loss.
    "judged and read twice in its stage": Sketch(
        inputs=("floats",),
        nodes=(
            Node("dense", (0,), 5, 0),
            Node("tanh", (1,), 0, 0),
            Node("dense", (1,), 5, 0),
            Node("concatenate", (2, 3), 0, 1),
            Node("dense", (4,), 3, 1),
        ),
        outputs=(5, 1),
        losses=("classes", "squares"),
    ),
    # The regulariser of a layer in three stages counts once.
    "regularised in three stages": Sketch(
        inputs=("floats",),
        nodes=tuple(Node("shared", (i,), REGULARISED, i) for i in range(3)),
        outputs=(3,),
        losses=("squares",),
    ),
    # Losses in three stages, one on a value that others read.
    "outputs in three stages": Sketch(
        inputs=("floats", "tokens"),
        nodes=(
            Node("dense", (0,), 4, 0),
            Node("embed", (1,), 3, 0),
            Node("recurrent", (3,), 4, 1),
            Node("add", (2, 4), 0, 1),
            Node("dense", (5,), 3, 2),
        ),
        outputs=(6, 2, 5),
        losses=("classes", "squares", "huber"),
        loss_weights=(1.0, 0.5, 2.0),
        weighted=True,
        named=True,
    ),
}


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_graphs_are_one_tape(name: str, eager: bool) -> None:
    """What random ones seldom are, or what failed once."""
    check(replace(KNOWN[name], eager=eager))


@pytest.mark.parametrize("part", in_turn(range(10), 0, 2))
def test_random_graphs_are_one_tape(part: int) -> None:
    """Several parts, so that none runs into its time limit; the gate names a failing sketch, the soak shrinks it."""
    phases = list(Phase) if SOAK else [Phase.explicit, Phase.generate]
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=EXAMPLES, phases=phases, suppress_health_check=suppressed, database=None)
    @given(sketches())
    def every(sketch: Sketch) -> None:
        check(sketch)

    (every if SOAK else seed(part)(every))()
