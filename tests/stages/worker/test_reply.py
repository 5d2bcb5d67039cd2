"""An answer arrives as it was given, over a transport's own messages."""

import math

import numpy as np

from stages.worker.reply import Reply, StepReply
from transport.codec import decode, encode
from transport.message import Message


def over_the_wire(message: Message) -> Message:
    return decode(encode(message))


def received(reply: Reply) -> Reply:
    arrived = {message.key: message for message in map(over_the_wire, reply.messages(0, number=5, source=2))}
    return Reply.receive(lambda key: arrived[key], number=5, source=2)


def test_data_longer_than_a_message_s_value_and_arrays_that_are_missing() -> None:
    value = {"names": [f"layer_{k}/kernel" for k in range(10_000)], "none": None}
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), None, np.array(2.5)]
    found = received(Reply(value, arrays))
    assert found.value == value
    assert found.arrays[1] is None
    for k in (0, 2):
        np.testing.assert_array_equal(found.arrays[k], arrays[k], strict=True)


def test_an_empty_answer_is_an_answer() -> None:
    found = received(Reply())
    assert (found.value, list(found.arrays)) == (None, [])


def test_a_step_s_answer_keeps_every_bit() -> None:
    loss = float(np.float32(0.1))
    given = StepReply(
        {2: ([loss, math.inf], None), 3: ([], 1e-300)},
        metrics={"accuracy": 1 / 3},
        masked=True,
        spans=[(0.1, 0.2)],
        squared_norms={(2, 0): math.pi, (3, 1): 1e-300},
        finite=False,
        squares={("activation", 0, 1, "h"): 2.0**-1074},
        roundings={"gradient": 1e-9},
    )
    assert StepReply.from_plain(received(Reply(given.plain())).value) == given


def test_a_loss_that_is_no_number_stays_none() -> None:
    found = StepReply.from_plain(received(Reply(StepReply({0: ([math.nan], None)}).plain())).value)
    assert math.isnan(found.losses[0][0][0])
