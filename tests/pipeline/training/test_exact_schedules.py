"""Whatever the schedule, a step is that of one tape: eager bit for bit, compiled within rounding; `verify` agrees.

The models have what a backward in halves can get wrong: tied weights, statistics, dropout, masks, several outputs,
regularisers, rows of embeddings, recomputed stages, variables without a gradient.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline, Plan
from pipeline.plan.placing import placed
from pipeline.plan.schedules import one_f_one_b
from tests.faults.cases import CASES
from tests.levels import in_turn
from tests.models import cross_entropy, grouped, stack
from tests.one_tape import OneTape, assert_same_bits, difference

GRID = [("recurrent", "zb-h1"), ("branched", "zb-v"), ("branched", "zb-h1"), ("convolutional", "zb-h2")]
GRID += [pair for pair in product(CASES, ("zb-h1", "zb-h2")) if pair not in GRID]


@pytest.mark.parametrize(("name", "schedule"), in_turn(GRID, 1, 4, several=True))
def test_eager_gradients_are_those_of_1f1b_bit_for_bit(name: str, schedule: str) -> None:
    """A plan decides when a gradient is computed, and not what it is; 1F1B is one tape by other tests."""
    case = CASES[name]
    x, y, weights = case.data(1)
    found = []
    for each in ("1f1b", schedule):
        with case.pipeline(each) as pipe:
            before = list(pipe.gradients(x, y, weights).values())
            losses = [pipe.train_on_batch(x, y, weights) for _ in range(2)]
            found.append((before, losses, pipe.get_weights()))
    assert_same_bits(found[1][0], found[0][0], "gradient")
    assert found[1][1] == found[0][1]
    assert_same_bits(found[1][2], found[0][2], "weight")


@pytest.mark.parametrize(
    ("name", "schedule"), in_turn([*((name, "zb-h1") for name in CASES), ("branched", "zb-v")], 0, 4, several=True)
)
def test_compiled_halves_are_verified(name: str, schedule: str) -> None:
    """By one tape and by the user's own objects, gradients and updates."""
    case = CASES[name]
    x, y, weights = case.data(1)
    with case.pipeline(schedule, eager=False) as pipe:
        pipe.train_on_batch(x, y, weights)
        pipe.verify(x, y, weights, steps=2).raise_if_failed()


@pytest.mark.parametrize(
    ("name", "recompute"),
    in_turn([("lstm", False), ("batch-normalization", True), ("attention", False)], 1, 3, several=True),
)
def test_compiled_halves_are_one_tape_within_rounding(name: str, recompute: bool) -> None:
    chosen = stack(name)
    x, y = chosen.data(20)
    parts = grouped(chosen.build(), 3)
    make = lambda: keras.optimizers.SGD(0.05, momentum=0.9)  # noqa: E731
    tape = OneTape(parts, cross_entropy(), make())
    with Pipeline(parts, 4, "zb-h1", "inproc", recompute=recompute) as pipe:
        pipe.compile(make(), cross_entropy())
        _, expected = tape.gradients(x, y, 4)
        assert difference(list(pipe.gradients(x, y).values()), expected) <= 1e-6
        for _ in range(5):
            loss = pipe.train_on_batch(x, y)
            assert loss == pytest.approx(float(tape.train(x, y, 4)), rel=1e-5)
        assert difference(pipe.get_weights(), tape.weights()) <= 1e-5


def test_an_output_that_no_loss_reaches_and_a_stage_that_is_frozen() -> None:
    """Variables without a gradient stay without one, and a frozen stage only hands gradients on."""
    keras.utils.set_random_seed(1)
    x = keras.Input((4,))
    h = keras.layers.Dense(4, "tanh", name="low")(x)
    h = keras.layers.Dense(4, "tanh", name="middle", trainable=False)(h)
    unused = keras.layers.Dense(4, name="unused")(keras.ops.stop_gradient(h))
    h = keras.layers.Add(name="join")([h, keras.ops.stop_gradient(unused)])
    model = keras.Model(x, keras.layers.Dense(1, name="top")(h))
    rng = np.random.default_rng(1)
    data, target = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    found: dict[bool, Any] = {}
    for eager in (True, False):
        each = []
        for schedule in ("1f1b", "zb-h1"):
            with Pipeline.split(
                model, at=["low", "middle"], microbatches=3, schedule=schedule, transport="inproc"
            ) as pipe:
                pipe.compile("sgd", "mse", run_eagerly=eager)
                each.append(pipe.gradients(data, target))
        found[eager] = each
    for whole, halves in found.values():
        assert [name for name, g in halves.items() if g is None] == [name for name, g in whole.items() if g is None]
        assert any("unused" in name for name, g in halves.items() if g is None)
        assert_same_bits(list(halves.values()), list(whole.values()), "gradient")


def test_processes_in_halves() -> None:
    """Across processes too, compiled, with another batch size after some updates."""
    chosen = stack("convolution")
    x, y = chosen.data(13)
    with Pipeline(grouped(chosen.build(), 3), 4, "zb-h1", "ipc") as pipe:
        pipe.compile("adam", cross_entropy())
        for samples in (8, 13):
            pipe.train_on_batch(x[:samples], y[:samples])
        pipe.verify(x, y).raise_if_failed()


WHAT = ("gradient", "loss", "weight", "loss", "prediction")


def folded(stages: int, microbatches: int, **_: Any) -> Plan:
    """1F1B of three stages on two workers: the outer two share one."""
    return placed(one_f_one_b(stages, microbatches), (0, 1, 0))


SHARING = [("recurrent", folded), ("branched", "interleaved"), ("branched", "zb-v")]


@pytest.mark.parametrize(("name", "schedule"), in_turn(SHARING, 0, 2, several=True))
def test_two_stages_a_worker_hand_tensors_to_each_other(name: str, schedule: Any) -> None:
    """In two processes: tied weights of one worker, masks, skip edges, dropout; then a smaller batch, and all else.

    What a worker sends to itself comes as what others send does; evaluation, prediction and the count of masked
    elements run on the same workers.
    """
    case = CASES[name]
    x, y, weights = case.data(1)
    found = []
    for each in ("1f1b", schedule):
        with case.pipeline(each, transport="auto") as pipe:
            before = list(pipe.gradients(x, y, weights).values())
            losses = [
                pipe.train_on_batch(x, y, weights),
                pipe.train_on_batch(*cut((x, y, weights), 5)),
            ]
            tested, predicted = pipe.test_on_batch(x, y), pipe.predict(x, verbose=0)
            found.append((before, losses, pipe.get_weights(), tested, keras.tree.flatten(predicted)))
            if each is schedule:
                pipe.verify(x, y, weights).raise_if_failed()
                assert pipe.timeline(x, y, weights).workers == 2
    for ours, theirs, what in zip(found[1], found[0], WHAT, strict=True):
        assert_same_bits(keras.tree.flatten(ours), keras.tree.flatten(theirs), what)


def cut(data: Any, samples: int) -> Any:
    """The first samples of some arrays."""
    return keras.tree.map_structure(lambda array: array[:samples], data)
