"""What an action needs first, and how it is written, wired and sent."""

import numpy as np
import pytest
from hypothesis import given

from stages.actions import Action, Kind, Wiring, actions_from_array, actions_to_array, chain, dependencies, open_tapes
from tests.strategies_plans import actions, wirings

F, B, I, W = Kind  # noqa: E741  (the letters of the drawings)

SKIP = {0: (), 1: (0,), 2: (1, 0)}
JOIN = {0: (), 1: (), 2: (0, 1)}


@pytest.mark.parametrize(
    ("action", "short", "words"),
    [
        (Action(F, 0, 3), "F0.3", "forward of microbatch 3"),
        (Action(B, 2, 0), "B2.0", "backward of microbatch 0"),
        (Action(I, 1, 4), "I1.4", "input gradient of microbatch 4"),
        (Action(W, 1, 4, 2), "W1.4/2", "weight gradient of microbatch 4, window 2"),
    ],
)
def test_an_action_is_written_short_and_in_words(action, short, words):
    assert str(action) == short
    assert action.describe() == words


def test_the_numbers_of_the_kinds_are_part_of_the_wire_format():
    assert {kind.name: int(kind) for kind in Kind} == {
        "FORWARD": 0,
        "BACKWARD": 1,
        "BACKWARD_INPUT": 2,
        "BACKWARD_WEIGHT": 3,
    }


@pytest.mark.parametrize(
    ("rule", "action", "wiring", "windows", "halved", "expected"),
    [
        (1, Action(F, 0, 5), chain(3), 1, (), []),
        (1, Action(F, 2, 5), chain(3), 1, (), [Action(F, 1, 5)]),
        (1, Action(F, 2, 5), SKIP, 1, (), [Action(F, 1, 5), Action(F, 0, 5)]),
        (1, Action(F, 2, 5), JOIN, 1, (), [Action(F, 0, 5), Action(F, 1, 5)]),
        (2, Action(F, 1, 5, 2), chain(3), 4, (), [Action(F, 1, 5, 1), Action(F, 0, 5, 2)]),
        (2, Action(F, 1, 5, 0), chain(3), 4, (), [Action(F, 0, 5, 0)]),
        (3, Action(B, 2, 5), chain(3), 1, (), [Action(F, 2, 5)]),
        (4, Action(B, 1, 5), chain(3), 1, (), [Action(F, 1, 5), Action(B, 2, 5)]),
        (4, Action(B, 0, 5), SKIP, 1, (), [Action(F, 0, 5), Action(B, 1, 5), Action(B, 2, 5)]),
        (4, Action(B, 0, 5), SKIP, 1, {(2, 5, 0)}, [Action(F, 0, 5), Action(B, 1, 5), Action(I, 2, 5)]),
        (4, Action(B, 0, 5), chain(2), 1, {(1, 4, 0)}, [Action(F, 0, 5), Action(B, 1, 5)]),
        (5, Action(B, 1, 5, 1), chain(2), 3, (), [Action(F, 1, 5, 1), Action(B, 1, 5, 2)]),
        (5, Action(B, 1, 5, 1), chain(2), 3, {(1, 5, 2)}, [Action(F, 1, 5, 1), Action(I, 1, 5, 2)]),
        (5, Action(B, 1, 5, 2), chain(2), 3, (), [Action(F, 1, 5, 2)]),
        (6, Action(I, 0, 5), chain(2), 1, {(0, 5, 0)}, [Action(F, 0, 5), Action(B, 1, 5)]),
        (6, Action(W, 0, 5, 1), chain(2), 2, {(0, 5, 1)}, [Action(I, 0, 5, 1)]),
    ],
)
def test_dependencies_follow_the_numbered_rule(rule, action, wiring, windows, halved, expected):
    assert dependencies(action, wiring, windows=windows, halved=halved) == tuple(expected)


def test_a_backward_does_not_wait_for_the_window_behind_a_cut_in_time():
    """Rule 5 with truncation: of five windows cut behind every second, windows 1 and 3 wait for none after them."""
    waits = {
        window: Action(B, 0, 0, window + 1) in dependencies(Action(B, 0, 0, window), chain(1), windows=5, truncate=2)
        for window in range(5)
    }
    assert waits == {0: True, 1: False, 2: True, 3: False, 4: False}


def test_a_wiring_is_a_mapping_that_knows_its_inverse():
    wiring = Wiring({3: (0, 1), 1: [0], 2: iter((1,))})
    assert wiring == {0: (), 1: (0,), 2: (1,), 3: (0, 1)}
    assert list(wiring) == [0, 1, 2, 3]
    assert [wiring.downstream(stage) for stage in range(5)] == [(1, 3), (2, 3), (), (), ()]
    assert [wiring.upstream(stage) for stage in range(5)] == [(), (0,), (1,), (0, 1), ()]
    assert Wiring.of(wiring) is wiring
    assert Wiring({1: (0, 0)}).downstream(0) == (1,)
    assert chain(3) == {0: (), 1: (0,), 2: (1,)}
    assert chain(1) == {0: ()}


@given(wirings())
def test_downstream_is_the_inverse_of_upstream(wiring):
    edges = {(source, stage) for stage in wiring for source in wiring.upstream(stage)}
    assert edges == {(stage, sink) for stage in wiring for sink in wiring.downstream(stage)}


@given(actions())
def test_a_program_survives_the_journey_as_an_array(program):
    array = actions_to_array(program)
    assert array.dtype == np.int32
    assert array.shape == (len(program), 4)
    assert actions_from_array(array) == tuple(program)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((2, 3), np.int32), r"shape \(2, 3\)"),
        (np.zeros(4, np.int32), r"shape \(4,\)"),
        (np.zeros((1, 4), np.float32), "float32"),
        (np.array([[0, 0, 0, 0], [7, 0, 0, 0]], np.int32), "row 1 .*kind"),
        (np.array([[0, 0, -1, 0]], np.int32), "row 0 .*at least 0"),
    ],
)
def test_an_array_that_is_no_program_is_refused(array, complaint):
    with pytest.raises(ValueError, match=complaint):
        actions_from_array(array)


def test_a_tape_is_open_from_its_forward_to_the_weight_half():
    program = [Action(F, 0, 0), Action(F, 0, 1), Action(I, 0, 0), Action(B, 0, 1), Action(W, 0, 0)]
    assert open_tapes(program) == [1, 2, 2, 1, 0]
