"""Predictions: sums over the calls of a stage, the simulator's closed forms, and a table beside what was measured."""

import json
import math
from dataclasses import replace

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cutting.costs import CallCost, Costs, TensorCost, Transfer, Weight, assignment
from pipeline.cutting.measure import measure
from pipeline.cutting.optimise import balanced_cuts
from pipeline.cutting.prediction import predict
from pipeline.cutting.splitter import split_model
from pipeline.errors import SplitError, TimelineError
from pipeline.model.call_graph import read_graph
from pipeline.pipeline import Pipeline
from pipeline.plan.timeline import Timeline
from tests.strategies_costs import graphs_of_calls
from tests.strategies_plans import WINDOWED

FREE = Transfer(0.0, 0.0)


def chain(calls, forward=1.0, backward=2.0, size=10.0, samples=1, weight_half=1.0):
    made = tuple(
        CallCost(
            f"c{i}",
            (i,),
            (i + 1,),
            forward,
            backward,
            (Weight(i, 5, 20),),
            ((f"k{i}", 100),),
            weight_half,
            ((f"k{i}", 100), (f"g{i}", 30)),
        )
        for i in range(calls)
    )
    tensors = {i: TensorCost(f"t{i}", size) for i in range(calls + 1)}
    return Costs(made, tensors, (0,), (calls,), samples)


def slower(timeline, factor):
    """The same step, as a clock that runs `factor` times as fast would show it."""
    spans = [replace(span, start=span.start * factor, end=span.end * factor) for span in timeline.spans]
    return Timeline(tuple(spans), timeline.workers, "measured")


@pytest.mark.parametrize("schedule", WINDOWED)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_equal_stages_take_what_the_closed_form_says(schedule, stages):
    prediction = predict(
        chain(6), assignment(range(6 // stages, 6, 6 // stages), 6), schedule=schedule, microbatches=4, transfer=FREE
    )
    each = 3.0 * 6 / stages
    assert prediction.step_time == pytest.approx((4 + stages - 1) * each)
    assert prediction.bubble == pytest.approx((stages - 1) / (4 + stages - 1))


def test_halves_take_what_they_were_measured_to_take():
    """Three equal stages F = 1, B = 2: with equal halves m(F+B) + (p-1)F, with no weight half 1F1B's (m+p-1)(F+B)."""
    for weight_half, expected in ((1.0, 4 * 3.0 + 2 * 1.0), (0.0, (4 + 3 - 1) * 3.0)):
        costs = chain(3, weight_half=weight_half)
        prediction = predict(costs, assignment([1, 2], 3), schedule="zb-h1", microbatches=4, transfer=FREE)
        assert prediction.step_time == pytest.approx(expected)


def test_between_halves_only_what_the_weight_half_reads_is_held():
    """The last stage goes forward and backward at once: a microbatch leaves 130, and 10 of dL/dinput until its I.

    The first one's backward is whole: it keeps 100 and an output of 10 each, and makes 30 that only sums read.
    """
    prediction = predict(chain(3), assignment([1, 2], 3), schedule="zb-h1", microbatches=3, transfer=FREE)
    held = [140, 130, 270, 260, 400, 390, 260, 130, 0]
    plan = prediction.plan.text().splitlines()
    assert plan[3].split("│")[1].split("·")[-1].split() == ["F0", "I0", "F1", "I1", "F2", "I2", "W0", "W1", "W2"]
    fixed = 20 * 4 + 2 * (10 + 10)  # and a message each there and back
    assert prediction.peak_memory() == (fixed + 3 * 110 + 30, prediction.peak_memory()[1], fixed + max(held))


@given(data=st.data())
def test_stages_add_up_to_the_model(data):
    costs = data.draw(graphs_of_calls())
    calls = len(costs.calls)
    cuts = sorted(data.draw(st.sets(st.integers(1, calls - 1)))) if calls > 1 else []
    stage_of = assignment(cuts, calls)
    prediction = predict(costs, stage_of, microbatches=2, transfer=Transfer(1.0, 0.5))
    assert math.fsum(stage.forward for stage in prediction.stages) == pytest.approx(costs.forward)
    assert math.fsum(stage.backward for stage in prediction.stages) == pytest.approx(costs.backward)
    assert math.fsum(stage.weight_half for stage in prediction.stages) == math.fsum(c.weight_half for c in costs.calls)
    for stage, found in enumerate(prediction.stages):
        inside = [call for call, home in zip(costs.calls, stage_of, strict=True) if home == stage]
        made = {tensor for call in inside for tensor in call.makes}
        readers = [
            (tensor, home)
            for call, home in zip(costs.calls, stage_of, strict=True)
            for tensor in call.reads
            if tensor in made and home != stage
        ]
        sizes = [costs.tensors[tensor].bytes * costs.samples for tensor, _ in set(readers)]
        assert found.sent == pytest.approx(sum(sizes))
        assert found.transfer == pytest.approx(len(sizes) + sum(sizes) / 2)


def test_a_skip_connection_goes_to_every_stage_that_reads_it():
    calls = (
        CallCost("a", (0,), (1,), 1.0, 1.0),
        CallCost("b", (1,), (2,), 1.0, 1.0),
        CallCost("c", (2, 1), (3,), 1.0, 1.0),
    )
    costs = Costs(calls, {i: TensorCost(f"t{i}", 8.0) for i in range(4)}, (0,), (3,), samples=2)
    prediction = predict(costs, (0, 1, 2), transfer=Transfer(1.0, 0.0))
    assert [stage.sent for stage in prediction.stages] == [32.0, 16.0, 0.0]
    assert [stage.transfer for stage in prediction.stages] == [2.0, 1.0, 0.0]
    assert dict(prediction.wiring) == {0: (), 1: (0,), 2: (0, 1)}


def test_a_tensor_that_one_stage_reads_twice_goes_there_once():
    calls = (CallCost("a", (0,), (1,)), CallCost("b", (1,), (2,)), CallCost("c", (1, 2), (3,)))
    costs = Costs(calls, {i: TensorCost(f"t{i}", 8.0) for i in range(4)}, (0,), (3,))
    assert [stage.sent for stage in predict(costs, (0, 1, 1)).stages] == [8.0, 0.0]


def test_stages_need_not_be_stretches_of_the_order():
    prediction = predict(two_branches(), (0, 1, 0, 2), microbatches=2, transfer=FREE)
    assert [stage.forward for stage in prediction.stages] == [2.0, 1.0, 1.0]
    assert dict(prediction.wiring) == {0: (), 1: (), 2: (0, 1)}


def two_branches():
    calls = (
        CallCost("a", (0,), (1,), 1.0, 1.0),
        CallCost("b", (0,), (2,), 1.0, 1.0),
        CallCost("c", (1,), (3,), 1.0, 1.0),
        CallCost("d", (2, 3), (4,), 1.0, 1.0),
    )
    return Costs(calls, {i: TensorCost(f"t{i}", 8.0) for i in range(5)}, (0,), (4,))


def test_memory_grows_with_the_microbatches_that_are_open():
    prediction = predict(chain(4), (0, 0, 1, 1), microbatches=8, transfer=FREE)
    fixed = 2 * 20 * 4 + 2 * (10 + 10)  # variables, gradients, two slots; a message each there and back
    kept, made, returned = 2 * 100, 2 * 30, 10
    assert prediction.peak_memory() == (fixed + 2 * (kept + 10) + made, fixed + kept + made)
    gpipe = predict(chain(4), (0, 0, 1, 1), microbatches=8, transfer=FREE, schedule="gpipe")
    assert gpipe.peak_memory() == (fixed + 8 * (kept + 10) + made, fixed + 7 * returned + kept + made)


def test_recomputing_takes_a_forward_more_and_keeps_the_inputs_only():
    costs = chain(4, samples=2)
    keeping = predict(costs, (0, 0, 1, 1), transfer=FREE)
    first, last = predict(costs, (0, 0, 1, 1), transfer=FREE, recompute=True).stages
    assert (first.forward, first.backward, first.activations) == (2.0, 4.0 + 2.0, 2 * 10 + 2 * 10)
    assert last == keeping.stages[1]  # it has the loss
    assert predict(costs, (0, 0, 1, 1), transfer=FREE, recompute=[False, True]).stages == keeping.stages
    with pytest.raises(TimelineError, match="one value of `recompute` for each of 2 stages"):
        predict(costs, (0, 0, 1, 1), recompute=[True])


def test_a_measurement_stands_beside_the_prediction():
    prediction = predict(chain(4), (0, 0, 0, 1), microbatches=4, transfer=FREE, names=("bottom", "top"))
    found = prediction.beside(slower(prediction.timeline, 3.0))
    assert [(row.name, row.predicted, row.measured) for row in found.rows] == [
        ("bottom", pytest.approx(36.0), pytest.approx(108.0)),
        ("top", pytest.approx(12.0), pytest.approx(36.0)),
    ]
    assert found.step.ratio == pytest.approx(3.0)
    assert found.bubble.measured == pytest.approx(found.bubble.predicted)
    text = str(found)
    assert text.startswith("Predicted and measured: 1f1b: 2 stages, 4 microbatches of 1 sample(s)")
    assert "bottom" in text and "108000.00" in text and "3.00" in text
    assert json.loads(found.to_json())["rows"][1]["measured"] == pytest.approx(36.0)


def test_a_running_pipeline_stands_beside_its_prediction():
    keras.utils.set_random_seed(4)
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((16,)), *(dense(16, "relu", name=f"d{i}") for i in range(4)), dense(1)])
    x = np.random.default_rng(4).normal(size=(12, 16)).astype("float32")
    costs = measure(read_graph(model), x[:4], repeats=1)
    cuts = balanced_cuts(costs, 2)
    with Pipeline(split_model(model, cuts=cuts), microbatches=3, transport="inproc") as pipe:
        pipe.compile(optimizer="sgd", loss="mean_squared_error")
        prediction = predict(costs, assignment(cuts, 5), microbatches=3, names=pipe.names)
        measured = pipe.timeline(x, x[:, :1], repeats=1)
    found = prediction.beside(measured)
    assert [row.name for row in found.rows] == list(pipe.names)
    assert [row.measured for row in found.rows] == pytest.approx(measured.busy)
    assert (found.step.predicted, found.step.measured) == (prediction.step_time, measured.step_time)
    assert all(row.predicted > 0 for row in found.rows)


def test_the_measured_number_and_size_of_microbatches_count():
    measured = predict(chain(2), (0, 1), microbatches=3, transfer=FREE).timeline
    prediction = predict(chain(2, samples=4), (0, 1), microbatches=8, transfer=FREE)
    assert prediction.beside(measured).step.ratio == pytest.approx(1.0)
    assert prediction.beside(measured, samples=8).step.ratio == pytest.approx(0.5)


def test_fused_stages_count_their_whole_time():
    """A compiled last stage does its backward within the forward's box: busy seconds are the same."""
    prediction = predict(chain(2), (0, 1), microbatches=1, transfer=FREE)
    forward, fused, back, backward = prediction.timeline.spans
    fused, back = replace(fused, end=back.end), replace(back, start=back.end)
    found = prediction.beside(Timeline((forward, fused, back, backward)))
    assert [row.ratio for row in found.rows] == [pytest.approx(1.0)] * 2


def test_a_timeline_of_another_pipeline_is_refused():
    prediction = predict(chain(3), (0, 1, 2), transfer=FREE)
    with pytest.raises(TimelineError, match=r"is for 3 stage\(s\), the measured timeline has the stages \[0, 1\]"):
        prediction.beside(predict(chain(3), (0, 1, 1), transfer=FREE).timeline)
    with pytest.raises(TimelineError, match=r"has the stages \[\]"):
        prediction.beside(Timeline(()))


def test_the_prediction_as_text_and_json():
    prediction = predict(chain(4), (0, 0, 0, 1), microbatches=4, transfer=FREE)
    headline, _, _ = str(prediction).partition("\n")
    assert headline == "Predicted, 1f1b: 2 stages, 4 microbatches of 1 sample(s): step 36000.00 ms, bubble 33.3%"
    found = json.loads(prediction.to_json())
    assert found["step_time"] == pytest.approx(36.0) and found["stages"][0]["parameters"] == 15


@pytest.mark.parametrize("stage_of", [(0, 1), (0, 0, 2), (1, 1, 1), ()], ids=["short", "gap", "no first", "empty"])
def test_an_impossible_assignment_is_refused(stage_of):
    with pytest.raises(TimelineError, match="expected one stage for each of 3 calls and no empty stage"):
        predict(chain(3), stage_of)
    with pytest.raises(TimelineError, match="expected one name for each of 3 stages"):
        predict(chain(3), (0, 1, 2), names=("a",))


def test_cuts_become_an_assignment():
    assert assignment((1, 3), 4) == (0, 1, 1, 2)
    assert assignment((), 2) == (0, 0)
    for cuts in [(0,), (2, 2), (3, 1), (4,)]:
        with pytest.raises(SplitError, match="between 1 and 3, each once"):
            assignment(cuts, 4)
