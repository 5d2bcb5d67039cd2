"""The table of cuts: what crosses and what lies on either side, and that its names cut where it says."""

import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given

from pipeline.cutting.costs import CallCost, Costs, TensorCost, Weight
from pipeline.cutting.cut_table import CutTable, cut_table
from pipeline.cutting.splitter import split_model
from pipeline.errors import DataError, SplitError
from tests.strategies_costs import graphs_of_calls

layers = keras.layers


def table_of(costs):
    return CutTable.of(costs, "m")


@given(graphs_of_calls())
def test_every_row_says_what_lies_on_either_side(costs):
    rows = table_of(costs).rows
    assert [row.position for row in rows] == list(range(1, len(costs.calls)))
    for row in rows:
        sides = costs.calls[: row.position], costs.calls[row.position :]
        made = {tensor for call in sides[0] for tensor in call.makes}
        alive = sorted({tensor for call in sides[1] for tensor in call.reads} & made)
        assert row.tensors == tuple(costs.tensors[tensor].name for tensor in alive)
        assert row.bytes == sum(costs.tensors[tensor].bytes for tensor in alive)
        assert row.gradient_bytes == sum(costs.tensors[t].bytes for t in alive if costs.tensors[t].differentiable)
        assert row.forward == tuple(math.fsum(call.forward for call in side) for side in sides)
        assert row.backward == tuple(math.fsum(call.backward for call in side) for side in sides)
        variables = [{weight.key: weight.count for call in side for weight in call.weights} for side in sides]
        assert row.parameters == tuple(sum(found.values()) for found in variables)
        assert bool(row.shared) == bool(set(variables[0]) & set(variables[1]))


@given(graphs_of_calls())
def test_names_mean_exactly_the_calls_before_the_cut(costs):
    makers = costs.makers()
    for row in table_of(costs).rows:
        before = {i for i, call in enumerate(costs.calls) if call.name in row.at}
        for _ in costs.calls:
            before |= {makers[tensor] for i in before for tensor in costs.calls[i].reads if tensor in makers}
        assert before == set(range(row.position))


def twice():
    """A layer that is called twice, another one in between, and a skip connection."""
    shared = Weight(1, 10, 40)
    calls = (
        CallCost("s", (0,), (1,), 1.0, 2.0, (shared,)),
        CallCost("k", (1,), (2,), 0.5, 0.5),
        CallCost("s", (2,), (3,), 1.0, 2.0, (shared,)),
        CallCost("j", (1, 3), (4,), 0.25, 0.25),
    )
    names = {0: "x", 1: "s", 2: "k", 3: "s:2", 4: "j"}
    return Costs(calls, {i: TensorCost(name, 8.0, i != 2) for i, name in names.items()}, (0,), (4,))


def test_a_layer_called_on_both_sides_is_shared_and_its_first_call_cannot_be_named():
    first, second, third = table_of(twice()).rows
    assert (first.at, first.shared, first.parameters) == ((), ("s",), (10, 10))
    assert (second.at, second.tensors, second.shared) == (("k",), ("s", "k"), ("s",))
    assert (second.bytes, second.gradient_bytes) == (16.0, 8.0)
    assert (third.at, third.tensors, third.shared, third.parameters) == (("s",), ("s", "s:2"), (), (10, 0))


def test_only_what_is_allowed_is_listed():
    allowed = [True, False, True, False, True]
    assert [row.position for row in CutTable.of(twice(), "m", allowed).rows] == [2]


def test_the_table_as_text_and_json():
    table = table_of(twice())
    text = str(table)
    assert text.startswith("Cuts of m, before | behind; times of a microbatch of 1 sample(s)")
    assert "(by position only)" in text and "10 | 10" in text and "1500.00 | 1250.00" in text
    found = json.loads(table.to_json())
    assert found["model"] == "m" and found["rows"][1]["tensors"] == ["s", "k"] and len(found["rows"]) == 3


def residual():
    keras.utils.set_random_seed(3)
    x = keras.Input((6,), name="x")
    h = layers.Dense(8, "relu", name="first")(x)
    skip = layers.Dense(8, name="second")(h)
    return keras.Model(x, layers.Dense(2, name="last")(layers.Add(name="sum")([h, skip])), name="residual")


def test_a_model_is_cut_where_the_table_says():
    """Known bytes: float32, 8 wide; and the splitter finds the same tensors at the same name."""
    model = residual()
    rows = cut_table(model, np.ones((4, 6), "float32"), repeats=1).rows
    assert [row.at for row in rows] == [("first",), ("second",), ("sum",)]
    assert [row.tensors for row in rows] == [("first",), ("first", "second"), ("sum",)]
    assert [row.bytes for row in rows] == [32.0, 64.0, 32.0]
    assert [row.parameters for row in rows] == [(56, 90), (128, 18), (128, 18)]
    for row in rows:
        bottom, top = split_model(model, at=list(row.at)).segments
        assert bottom.outputs == top.inputs == row.tensors


def test_a_sample_that_does_not_fit_and_a_model_that_cannot_be_cut_are_refused():
    with pytest.raises(DataError, match=r"must have the shape \('n', 6\)"):
        cut_table(residual(), np.ones((4, 5), "float32"))
    with pytest.raises(SplitError, match="is not built"):
        cut_table(keras.Sequential([layers.Dense(2)]), np.ones((4, 5), "float32"))
