"""Random graphs under random cuts are one tape: branches, joins, skips, shared layers, several inputs and outputs.

Each sketch is built, cut and run as a pipeline. `Pipeline.verify` must find what it promises, and an independent tape
over the uncut model the same gradients: in equal bits where tapes are eager and no sum can have another order, else
within 1e-6 of the largest |gradient|.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings

from pipeline import Pipeline
from pipeline.graph import read_graph
from pipeline.splitter import split_model
from tests.conftest import NIGHTLY
from tests.natural_tape import natural_tape
from tests.one_tape import assert_same_bits
from tests.random_graphs import LOSSES, Sketch
from tests.strategies_graphs import sketches

PARTS = 10 if NIGHTLY else 4
EXAMPLES = 100 if NIGHTLY else 20
SEVERAL_OUTPUTS = True
TIED = True


def check(sketch: Sketch) -> None:
    """One sketch."""
    built = sketch.build()
    x, y, weights = sketch.data()
    expected_loss, expected = natural_tape(
        built.model,
        x if len(x) > 1 else x[0],
        y,
        [LOSSES[name]() for name in sketch.losses],
        sketch.microbatches,
        factors=sketch.loss_weights or None,
        sample_weights=weights,
    )
    split = split_model(built.model, stage_of=built.stage_of(read_graph(built.model)))
    event(f"{len(split.segments)} stages")
    options = {"microbatches": sketch.microbatches, "schedule": sketch.schedule, "recompute": sketch.recompute}
    with Pipeline(split, transport="inproc", **options) as pipe:
        pipe.compile(
            "sgd",
            [LOSSES[name]() for name in sketch.losses] if len(y) > 1 else LOSSES[sketch.losses[0]](),
            loss_weights=list(sketch.loss_weights) or None,
            run_eagerly=sketch.eager,
        )
        batch = [values if len(values) > 1 else values[0] for values in (x, y)]
        judged = {"sample_weight": None if weights is None else weights if len(y) > 1 else weights[0]}
        report = pipe.verify(*batch, **judged)
        by_path = {name.partition("/")[2]: value for name, value in pipe.gradients(*batch, **judged).items()}
    report.raise_if_failed()
    assert report.loss == pytest.approx(expected_loss, rel=2e-6, abs=1e-6)
    gradients = [by_path.pop(variable.path) for variable in built.model.trainable_variables]
    assert not by_path
    assert [g is None for g in gradients] == [g is None for g in expected]
    if sketch.eager and sketch.sums_alike:
        event("equal bits")
        assert_same_bits(gradients, expected, "gradient")
    pairs = [(a, b) for a, b in zip(gradients, expected, strict=True) if a is not None]
    largest = max((float(np.abs(b).max()) for _, b in pairs), default=0.0)
    for (a, b), variable in zip(pairs, built.model.trainable_variables, strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest, err_msg=variable.path)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs_are_one_tape(part: int) -> None:
    """Several parts, so that none runs into its time limit; the gate names a failing sketch, the soak shrinks it."""
    phases = list(Phase) if NIGHTLY else [Phase.explicit, Phase.generate]
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=EXAMPLES, phases=phases, suppress_health_check=suppressed)
    @given(sketches(several_outputs=SEVERAL_OUTPUTS, tied=TIED))
    def every(sketch: Sketch) -> None:
        check(sketch)

    (every if NIGHTLY else seed(part)(every))()
