"""What is wrong in the arguments is said at once, in the user's process, with what would be right."""

from __future__ import annotations

import inspect
import pickle
import socket
from dataclasses import fields

import keras
import numpy as np
import pytest

from pipeline import Pipeline, Segment
from pipeline.errors import (
    CheckpointError,
    CompileError,
    DataError,
    OptionsError,
    PipelineClosedError,
    PipelineError,
    ScheduleError,
    SplitError,
)
from pipeline.runtime.options import Options
from tests import failing_parts
from tests.failures import X, Y, tripping
from transport.errors import AddressInUse, BadAddress


def model(layers=3):
    return keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(layers))])


def part():
    """A builder at the top of a module."""
    return failing_parts.part()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"loss": "msee"}, ["loss", "'msee'", "'mse'"]),
        ({"loss": "mean_square_error"}, ["loss", "'mean_squared_error'"]),
        ({"optimizer": "adm"}, ["optimizer", "'adm'", "'Adam'"]),
        ({"metrics": ["acuracy"]}, ["metric", "'acuracy'", "'accuracy'"]),
        ({"weighted_metrics": ["meen_squared_error"]}, ["metric", "'mean_squared_error'"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments, names):
    pipe = tripping({}, {}, compiled=False, transport="inproc")
    with pytest.raises(CompileError) as caught:
        pipe.compile(**{"optimizer": "sgd", "loss": "mse", **arguments})
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_all_options_that_cannot_be_are_told_together():
    with pytest.raises(OptionsError) as caught:
        Pipeline([model()], microbatches=0, schedule="1f1c", transport="ipcc", recompute=[True, False], threads=0)
    told = str(caught.value)
    assert [type(fault).__name__ for fault in caught.value.faults] == [
        *("ScheduleError", "ScheduleError", "ScheduleError", "BadAddress", "CompileError")
    ]
    for words in (
        "5 options",
        "`microbatches` must be",
        "`threads` must be",
        "'1f1c'",
        "'ipcc'",
        "one value per stage (1)",
    ):
        assert words in told
    assert str(pickle.loads(pickle.dumps(caught.value))) == told


def test_every_option_of_a_pipeline_is_one_of_options():
    """What `Pipeline` lists for its users and what `Options` checks are the same."""
    own = {"self", "segments", "outputs", "check_first_batch"}
    assert set(inspect.signature(Pipeline.__init__).parameters) - own == {field.name for field in fields(Options)}


def test_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(ScheduleError, match=r"'1f1c'.*'gpipe', '1f1b', .*; did you mean '1f1b'"):
        Pipeline([model()], schedule="1f1c")


@pytest.mark.parametrize(("given", "nearest"), [("ipcc", "'ipc'"), ("tcpp", "'tcp'"), ("inprok", "'inproc'")])
def test_unknown_transport_is_refused_at_once_with_the_nearest(given, nearest):
    with pytest.raises(BadAddress, match=rf"unknown transport '{given}'.*did you mean {nearest}"):
        Pipeline([model()], transport=given)


@pytest.mark.parametrize("address", ["ipc://somewhere", "tcp://127.0.0.1", "tcp://8.8.8.8:80"])
def test_bad_address_is_refused_at_once(address):
    with pytest.raises(BadAddress):
        Pipeline([model()], transport=address)


@pytest.mark.parametrize("microbatches", [0, -1, 2.5, True])
def test_microbatches_must_be_a_positive_number(microbatches):
    with pytest.raises(PipelineError, match=f"`microbatches` must be .* at least 1, received {microbatches}"):
        Pipeline([model()], microbatches=microbatches)


def test_no_segments_are_refused():
    with pytest.raises(PipelineError, match=r"at least one"):
        Pipeline([])


def test_more_stages_than_layers_are_refused_with_the_most_there_can_be():
    with pytest.raises(SplitError, match=r"3 layer\(s\).*5 stages.*at most 3"):
        Pipeline.split(model(3), stages=5)


def test_cut_behind_an_unknown_layer_names_the_nearest():
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(4)])
    with pytest.raises(SplitError, match=r"no layer 'frist'.*'first'"):
        Pipeline.split(net, at=["frist"])


def test_builders_that_another_process_cannot_import_run_and_are_brought_to_a_checkpoint(tmp_path):
    with Pipeline([Segment(lambda: part())], transport="inproc") as pipe:
        found = pipe.predict(X, verbose=0)
        assert found.shape == (len(X), 4)
        with pytest.warns(UserWarning, match=r"a lambda.*top of a module"):
            pipe.save(tmp_path / "it")
    with pytest.raises(CheckpointError, match=r"your own objects: Pipeline.load\(path, model=\.\.\.\).*a lambda"):
        Pipeline.load(tmp_path / "it", transport="inproc")
    with Pipeline.load(tmp_path / "it", model=[Segment(lambda: part())], transport="inproc") as pipe:
        np.testing.assert_array_equal(pipe.predict(X, verbose=0), found)


def test_training_before_compile_says_what_to_call():
    pipe = tripping({}, {}, compiled=False, transport="inproc")
    with pytest.raises(CompileError, match=r"fit needs .* call compile\(optimizer=\.\.\., loss=\.\.\.\) first"):
        pipe.fit(X, Y)
    with pytest.raises(CompileError, match=r"call compile"):
        pipe.train_on_batch(X, Y)


def test_closed_pipeline_says_so():
    with tripping({}, {}, transport="inproc") as pipe:
        pipe.train_on_batch(X, Y)
    for use in (
        lambda: pipe.fit(X, Y),
        lambda: pipe.train_on_batch(X, Y),
        lambda: pipe.predict(X),
        pipe.get_weights,
        lambda: pipe.verify(X, Y),
    ):
        with pytest.raises(PipelineClosedError, match=r"this pipeline was closed; make a new one"):
            use()
    pipe.close()


def test_labels_of_the_wrong_length_leave_the_pipeline_usable():
    with tripping({}, {}, transport="inproc") as pipe:
        first = pipe.test_on_batch(X, Y)
        with pytest.raises(DataError, match=r"one target per sample: expected 8, received 5"):
            pipe.train_on_batch(X, Y[:5])
        with pytest.raises(DataError, match=r"y is missing"):
            pipe.train_on_batch(X)
        with pytest.raises(DataError, match=r"one weight per sample: expected 8, received 3"):
            pipe.train_on_batch(X, Y, sample_weight=np.ones(3))
        with pytest.raises(ValueError, match=r"same number of samples.*\n*.*8\n.*5"):  # Keras's own words
            pipe.fit(X, Y[:5], verbose=0)
        assert pipe.test_on_batch(X, Y) == first


def test_inputs_that_do_not_fit_leave_the_pipeline_usable():
    with Pipeline([model()], transport="inproc") as pipe:
        pipe.compile("sgd", "mse")
        with pytest.raises(DataError, match=r"shape \('n', 4\).*received \(8, 5\)"):
            pipe.train_on_batch(np.ones((8, 5)), Y)
        with pytest.raises(DataError, match=r"no samples"):
            pipe.train_on_batch(X[:0], Y[:0])
        with pytest.raises(DataError, match=r"numbers"):
            pipe.train_on_batch([["a"] * 4] * 8, Y)
        pipe.train_on_batch(X, Y)


@pytest.mark.gate
@pytest.mark.usefixtures("nothing_left")
def test_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        pipe = tripping({}, {}, transport=f"tcp://127.0.0.1:{port}")
        with pytest.raises(AddressInUse, match=f"port {port} on 127.0.0.1 is in use; choose another"):
            pipe.train_on_batch(X, Y)
    assert np.isfinite(pipe.train_on_batch(X, Y)), "the port is free now, so the same pipeline can start"
    pipe.close()
