"""Clocks are laid over each other so that nothing arrives before it was sent, and left alone where nothing does."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.clock_offsets import clock_offsets


def test_clocks_that_no_message_contradicts_are_one_clock():
    assert clock_offsets(3, {(0, 1): 0.0, (1, 0): 5.0, (1, 2): 1e-9}) == (0.0, 0.0, 0.0)


def test_a_clock_that_is_ahead_is_put_in_the_middle_of_what_messages_leave_open():
    assert clock_offsets(2, {(0, 1): 102.0, (1, 0): -99.0}) == (0.0, 100.5)


def test_a_clock_of_which_the_driver_heard_late_is_known_by_its_neighbours():
    """Clock 2 is heard of by clock 1 only."""
    found = clock_offsets(3, {(0, 1): 11.0, (1, 0): -9.0, (1, 2): 6.0, (2, 1): -4.0})
    assert found == (0.0, 10.0, 15.0)


def test_a_clock_that_nothing_is_known_of_stays():
    assert clock_offsets(3, {(0, 1): 3.0, (1, 0): -1.0})[2] == 0.0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0, 10), st.floats(0, 1e3)), max_size=12),
)
def test_no_message_arrives_before_it_was_sent(offsets, messages):
    """Whatever the clocks and the messages between them are, the true order of every message is found again."""
    true = [0.0, *offsets]
    ahead = {}
    for sender, receiver, way, sent in messages:
        a, b = sender % len(true), receiver % len(true)
        if a != b:
            most = (sent + way + true[b]) - (sent + true[a])
            ahead[a, b] = min(most, ahead.get((a, b), most))
    found = clock_offsets(len(true), ahead)
    assert all(found[b] - found[a] <= most + 1e-6 for (a, b), most in ahead.items())
