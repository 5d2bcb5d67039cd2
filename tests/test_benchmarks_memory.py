"""The memory benchmark measures what it says and its bound is one; a table lands where the page has a place for it."""

import mmap
import os

import keras
import pytest

from benchmarks import memory, run
from tests.levels import in_turn

ROWS = 1000
A_LAYER = ROWS * 64 * 4
FIRST, MIDDLE = 0, 1


def stack(features: int, layers: int) -> keras.Sequential:
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(layers)]
    return keras.Sequential([keras.Input((features,)), *hidden])


def touch(mebibytes: int) -> None:
    """Take memory, use it and give it back to the system."""
    with mmap.mmap(-1, mebibytes * memory.MIB) as taken:
        for page in range(0, len(taken), mmap.PAGESIZE):
            taken[page] = 1


def test_a_stack_keeps_its_input_and_what_each_layer_gives() -> None:
    found = memory.sizes(stack(8, layers=3), ROWS)
    inputs = ROWS * 8 * 4
    assert found == memory.Sizes(inputs, A_LAYER, inputs + 3 * A_LAYER, inputs + 3 * A_LAYER)


def test_weights_are_no_activations() -> None:
    assert memory.sizes(stack(64, layers=1), rows=1).kept == 2 * 64 * 4


@pytest.mark.parametrize("eager", in_turn([False, True], 1, 2), ids=["compiled", "eager"])
def test_the_bound_follows_the_plan(eager: bool) -> None:
    gpipe, one_f_one_b, again = ([*memory.bounds(memory.QUICK, way, eager)] for way in memory.WAYS)
    assert [tapes for tapes, _ in gpipe] == [8, 8, 8, 8]
    assert [tapes for tapes, _ in one_f_one_b] == [tapes for tapes, _ in again] == [4, 3, 2, 1]
    for worker in (FIRST, MIDDLE):
        assert again[worker][1] < one_f_one_b[worker][1] < gpipe[worker][1]
    # One tape more costs what a tape of that stage holds: its input, 8 activations and a gradient that waits.
    layer = memory.QUICK.rows * memory.QUICK.width * 4
    assert gpipe[MIDDLE][1] - one_f_one_b[MIDDLE][1] == 5 * 10 * layer


@pytest.mark.gate
def test_workers_take_what_the_bound_says() -> None:
    rows = memory.measure(memory.QUICK, rounds=1, modes=(False,))
    gpipe, one_f_one_b, again = (row.workers for row in rows)
    assert again[FIRST].growth < 0.8 * one_f_one_b[FIRST].growth
    assert one_f_one_b[FIRST].growth < 0.8 * gpipe[FIRST].growth
    for worker in (*gpipe[:-1], *one_f_one_b[:-1]):
        assert 0.5 * worker.bound < worker.growth < 1.5 * worker.bound


def test_growth_is_the_peak_since_it_was_begun() -> None:
    touch(64)
    growth = memory.Growth(os.getpid())
    touch(24)
    touch(8)
    assert 20 * memory.MIB < growth.peak() < 40 * memory.MIB


def test_a_figure_that_the_kernel_does_not_have_is_an_error() -> None:
    with pytest.raises(OSError, match="no VmNothing"):
        memory.resident(os.getpid(), "VmNothing")


def test_a_table_replaces_its_own_place_only() -> None:
    page = "top\n<!-- a -->\nold\n<!-- end of a -->\nbetween\n<!-- b -->\nstays\n<!-- end of b -->\nend"
    assert run.written(page, {"a": "new"}) == page.replace("\nold\n", "\n\nnew\n\n")


@pytest.mark.parametrize(
    "page", ["nothing", "<!-- a --> but no end", "<!-- end of a -->"], ids=["none", "begun", "ended"]
)
def test_a_table_without_a_place_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="no place for the table 'a'"):
        run.written(page, {"a": "new"})


def test_the_page_has_a_place_for_every_table() -> None:
    page = (run.ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for name in run.TABLES:
        run.written(page, {name: "new"})
