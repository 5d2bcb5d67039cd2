"""Segments are connected by the names of their tensors; every fault of the wiring is told at once."""

import keras
import pytest

from pipeline import Pipeline, WiringError
from pipeline.model.wiring import wire
from stages.errors import SegmentError
from stages.recipe.segment import Segment
from transport.message import DRIVER


def part(name=None, inputs=(), outputs=()):
    return Segment("tests.pipeline.parts:bottom", inputs=inputs, outputs=outputs, name=name)


def test_a_chain_needs_no_names():
    wires = wire([part(), part(), part()])
    assert wires.names == ("stage0", "stage1", "stage2")
    assert wires.takes == ((("x", DRIVER),), (("y0", 0),), (("y1", 1),))
    assert wires.gives == ((("y0", (1,)),), (("y1", (2,)),), (("y2", ()),))
    assert wires.inputs == ("x",) and wires.outputs == (("y2", 2),)
    assert wires.labels == ("y2",) and wires.stages == 3
    assert [wires.upstream()[i] for i in range(3)] == [(), (0,), (1,)]


def test_one_segment_is_a_pipeline():
    wires = wire([part()])
    assert wires.inputs == ("x",) and wires.outputs == (("y0", 0),)


def test_a_model_with_several_tensors_gets_several_names():
    a, b = keras.Input((2,)), keras.Input((2,))
    both = keras.Model([a, b], [a + b, a - b])
    wires = wire([Segment.of(both), Segment.of(both)])
    assert wires.inputs == ("x_0", "x_1")
    assert wires.takes[1] == (("y0_0", 0), ("y0_1", 0))
    assert wires.outputs == (("y1_0", 1), ("y1_1", 1))


def test_an_output_goes_to_every_segment_that_takes_it():
    wires = wire(
        [
            part("in", ("a",), ("h",)),
            part("left", ("h", "b"), ("l",)),
            part("right", ("h",), ("r",)),
            part("top", ("l", "r", "h"), ("y",)),
        ]
    )
    assert wires.gives[0] == (("h", (1, 2, 3)),)
    assert wires.takes[3] == (("l", 1), ("r", 2), ("h", 0))
    assert wires.inputs == ("a", "b")
    assert [wires.upstream()[i] for i in range(4)] == [(), (0,), (0,), (0, 1, 2)]


def test_inputs_may_be_put_first():
    segments = [part("in", ("a",), ("h",)), part("top", ("h", "b", "c"), ("y",))]
    assert wire(segments).inputs == ("a", "b", "c")
    assert wire(segments, ("c", "unknown", "a")).inputs == ("c", "a", "b")


@pytest.mark.parametrize(
    ("segments", "matches"),
    [
        ([part("p", ("x",), ("h",)), part("q", ("h",), ("h",))], ["'h' is given by both 'p' and 'q'"]),
        (
            [part("p", ("h",), ("g",)), part("q", ("x",), ("h",))],
            ["'p' takes 'h' from 'q', which does not come before"],
        ),
        ([part("p", ("h",), ("h",))], ["'p' takes 'h' from 'p'"]),
        (
            [part("p", ("g",), ("h",)), part("q", ("h",), ("h",)), part("r", ("h",), ("g",))],
            ["given by both", "'p' takes 'g' from 'r'"],
        ),
    ],
    ids=["given twice", "against the flow", "itself", "all faults together"],
)
def test_faults_are_told_together(segments, matches):
    with pytest.raises(WiringError) as caught:
        wire(segments)
    for match in matches:
        assert match in str(caught.value)


def test_outputs_may_be_anywhere_and_in_any_order():
    two = [part("p", ("a",), ("b",)), part("q", ("b",), ("c", "d"))]
    assert wire(two).outputs == (("c", 1), ("d", 1))
    assert wire(two, outputs_named=["d", "b", "c"]).outputs == (("d", 1), ("b", 0), ("c", 1))
    assert wire([part("p", ("a",), ("b",)), part("q", ("c",), ("d",))]).outputs == (("b", 0), ("d", 1))


@pytest.mark.parametrize(
    ("outputs", "match"), [(["d", "e"], "no segment gives the output.s. 'e'"), (["b"], "nobody takes 'd'")]
)
def test_outputs_that_are_none_are_told(outputs, match):
    with pytest.raises(WiringError, match=match):
        wire([part("p", ("a",), ("b",)), part("q", ("b",), ("d",))], outputs_named=outputs)


def test_two_stages_of_one_name():
    with pytest.raises(SegmentError, match="two stages are called 'p'"):
        wire([part("p"), part("p")])


def test_shapes_that_do_not_fit_are_told_with_both_stages():
    def dense(inputs, units):
        return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units)])

    with Pipeline([dense(3, 4), dense(5, 2)], transport="inproc") as pipe:
        pipe.compile("sgd", "mse")
        with pytest.raises(WiringError, match=r"(?s)stage0.*stage1|stage1.*stage0"):
            pipe.get_weights()
