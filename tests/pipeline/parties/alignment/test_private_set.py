"""Two parties find the ids that both have, in one order, whatever their sets; what is no honest message is refused."""

from __future__ import annotations

import random
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import DataError
from pipeline.parties.alignment.private_set import POINT, PrivateSet, id_hash


def exchanged(here, there):
    """What both find; every message as it would travel."""
    a, b = PrivateSet(here), PrivateSet(there)
    from_a, from_b = a.blinded(), b.blinded()
    to_a, to_b = b.answered(from_a), a.answered(from_b)
    return [here[row] for row in a.intersection(to_a)], [there[row] for row in b.intersection(to_b)]


def test_all_pairs_of_subsets_meet_in_exactly_what_both_have():
    universe = ["a", "b", "c", 7]
    subsets = list(chain.from_iterable(combinations(universe, n) for n in range(1, 5)))
    for here in subsets:
        for there in subsets:
            mine, theirs = exchanged(list(here), list(there))
            assert mine == theirs and set(mine) == set(here) & set(there)


@settings(max_examples=8)
@given(st.sets(st.text(max_size=6), min_size=1, max_size=12), st.sets(st.text(max_size=6), min_size=1, max_size=12))
def test_any_texts(here, there):
    mine, theirs = exchanged(sorted(here), sorted(there, reverse=True))
    assert mine == theirs and set(mine) == here & there


def test_the_order_is_one_however_the_tables_are_sorted_and_numbers_are_no_texts():
    ids = [f"patient-{k}" for k in range(40)]
    shuffled = random.Random(0).sample(ids, 40)
    mine, theirs = exchanged(ids, shuffled)
    assert mine == theirs and sorted(mine) == sorted(ids) and mine != ids
    assert mine == sorted(ids, key=id_hash)
    assert exchanged([1, 2], ["1", "2", 2])[0] == [2]
    assert exchanged(list(np.arange(4)), [2, 3, 9])[1] == exchanged([2, 3, 9], list(np.arange(4)))[0]


def test_a_mark_is_equal_at_both_and_cannot_be_made_from_ids():
    """Who lies may make up which rows are common; a hash of ids would let him guess them afterwards."""
    a, b = PrivateSet(["x", "y"]), PrivateSet(["y"])
    with pytest.raises(DataError, match="call `intersection` first"):
        a.mark()
    to_a, to_b = b.answered(a.blinded()), a.answered(b.blinded())
    assert a.intersection(to_a) == [1] and b.intersection(to_b) == [0]
    again, other = PrivateSet(["x", "y"]), PrivateSet(["y"])
    to_again = other.answered(again.blinded())
    again.answered(other.blinded())
    again.intersection(to_again)
    assert a.mark() == b.mark() != again.mark()


def test_what_travels_is_fresh_in_every_exchange_and_tells_no_order():
    ids = [f"p{k}" for k in range(30)]
    first, second = PrivateSet(ids).blinded(), PrivateSet(ids).blinded()
    assert len(first) == len(second) == 30 * POINT and first != second
    cut = lambda sent: {sent[at : at + POINT] for at in range(0, len(sent), POINT)}  # noqa: E731
    assert not cut(first) & cut(second)
    assert [first[at : at + POINT] for at in range(0, len(first), POINT)] == sorted(cut(first))


@pytest.mark.parametrize("ids", [["a", "a"], [1, np.int64(1)], [], [1.5], [True], [b"x"], [None]])
def test_ids_that_repeat_or_are_none_are_refused(ids):
    with pytest.raises(DataError, match=r"repeated ones|1 to \d+ ids|text or a whole number"):
        PrivateSet(ids)


def test_messages_that_are_none_are_refused_before_anything_is_told():
    a, b = PrivateSet(["x", "y"]), PrivateSet(["y", "z", "w"])
    honest = b.blinded()
    points = [honest[at : at + POINT] for at in range(0, len(honest), POINT)]
    twice, turned = points[0] * 2, points[1] + points[0]
    for wrong in (b"", honest[:-1], b"\x00" * POINT, b"\xff" * POINT, twice, turned):
        with pytest.raises(DataError, match="must be"):
            PrivateSet(["x"]).answered(wrong)
    with pytest.raises(DataError, match="needs the other party's ids first"):
        a.intersection(b.answered(a.blinded()))
    a.answered(honest)
    with pytest.raises(DataError, match="answers once"):
        a.answered(honest)
    with pytest.raises(DataError, match="expected an answer of 2 different points, received 3"):
        a.intersection(honest)
    with pytest.raises(DataError, match="expected an answer of 2 different points, received 1"):
        a.intersection(points[0] * 2)
