"""What a worker writes on its board is what the driver reads there."""

import numpy as np
import pytest

from stages.actions import Action, Kind
from stages.process.status_board import BOARD_SLOTS
from stages.worker.status import Phase, Status, StatusBoard
from transport.message import DRIVER

ACTION = Action(Kind.BACKWARD, stage=2, microbatch=3, window=4)


def test_a_board_has_a_slot_for_each_entry() -> None:
    assert len(Status._fields) == BOARD_SLOTS


def test_an_action_is_read_as_it_was_written() -> None:
    slots = np.zeros(BOARD_SLOTS, np.int64)
    board = StatusBoard(slots)
    board.begin(7, ACTION, done=5)
    board.waiting(DRIVER)
    found = Status.of(slots)
    assert found == Status(Phase.WAITING, 7, Kind.BACKWARD, 2, 3, 4, DRIVER, 5)
    assert found.action == ACTION


@pytest.mark.parametrize(
    ("write", "phase"),
    [
        (StatusBoard.idle, Phase.IDLE),
        (StatusBoard.busy, Phase.BUSY),
        (StatusBoard.running, Phase.RUNNING),
        (lambda board: board.waiting(1), Phase.WAITING),
        (lambda board: board.building(2), Phase.BUILDING),
    ],
)
def test_a_phase_leaves_the_last_action_to_be_read(write, phase) -> None:
    slots = np.zeros(BOARD_SLOTS, np.int64)
    board = StatusBoard(slots)
    board.begin(7, ACTION, done=5)
    write(board)
    assert Status.of(slots).phase == phase
    assert Status.of(slots).action == ACTION
