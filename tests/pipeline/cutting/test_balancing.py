"""From a model and a sample to cuts and a prediction."""

import keras
import numpy as np
import pytest

from pipeline.cutting.choose import balance
from pipeline.cutting.optimise import BALANCES
from pipeline.errors import DataError, SplitError
from pipeline.model.call_graph import read_graph

layers = keras.layers


def model():
    """Wide in the middle: the two Dense layers around "wide" have nearly all parameters."""
    keras.utils.set_random_seed(1)
    inside = [layers.Dense(8, name=f"narrow{i}") for i in range(3)]
    return keras.Sequential([keras.Input((8,)), *inside, layers.Dense(512, name="wide"), layers.Dense(8, name="back")])


def test_parameters_need_no_sample():
    found = balance(read_graph(model()), 3, "parameters")
    assert found.cuts == (3, 4)
    assert found.prediction is None


@pytest.mark.parametrize("by", BALANCES)
def test_with_a_sample_there_is_a_prediction(by):
    graph = read_graph(model())
    found = balance(graph, 2, by, np.ones((4, 8)), microbatches=3, schedule="gpipe", transport="inproc")
    (cut,) = found.cuts
    counts = [call.operation.count_params() for call in graph.calls]
    assert [stage.parameters for stage in found.prediction.stages] == [sum(counts[:cut]), sum(counts[cut:])]
    assert found.prediction.plan.headline() == "gpipe: 2 stages, 3 microbatches"
    assert found.prediction.samples == 4
    assert found.prediction.names == ("stage0", "stage1")


@pytest.mark.gate
def test_a_batch_size_that_no_layer_counts_on_leaves_the_sample_free():
    parts = [keras.Input((8,), batch_size=2), layers.Dense(4), layers.Dense(1)]
    found = balance(read_graph(keras.Sequential(parts)), 2, "time", np.ones((4, 8)), transport="inproc")
    assert found.prediction.samples == 4
    parts = [keras.Input((3, 8), batch_size=2), layers.SimpleRNN(4, stateful=True), layers.Dense(1)]
    with pytest.raises(DataError, match="takes batches of 2 samples only"):
        balance(read_graph(keras.Sequential(parts)), 2, "time", np.ones((4, 3, 8)), transport="inproc")


def test_only_allowed_positions_are_cut():
    graph = read_graph(model())
    allowed = [True, True, False, False, False, True]
    assert balance(graph, 2, "parameters", allowed=allowed).cuts == (1,)
    assert balance(graph, 2, "time", np.ones((4, 8)), allowed=allowed, transport="inproc").cuts == (1,)


def test_what_is_missing_or_unknown_is_said():
    graph = read_graph(model())
    for by in ("time", "memory"):
        with pytest.raises(SplitError, match=f"balance='{by}' measures the model.*sample="):
            balance(graph, 2, by)
    with pytest.raises(SplitError, match="'time', 'parameters', 'memory', received 'speed'"):
        balance(graph, 2, "speed", np.ones((4, 8)))
