"""The chain rule over a pipeline's stages is one tape: gradients, what crosses cuts, loss; and finds what is not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.reference.witness.chain import by_chain_rule
from pipeline.reference.witness.results import WitnessGradients
from pipeline.verify.by_witnesses import by_gradients
from pipeline.verify.tape import Observed
from tests.levels import in_turn
from tests.pipeline.reference.witnessing import NEAR, bits, case, case_of


@cache
def found(kind: str) -> WitnessGradients:
    return by_chain_rule(case(kind).stages, case(kind).batch)


def outcome(kind: str, step: Observed):
    one = case(kind)
    return by_gradients("chain", step, found(kind), one.names, one.yardstick)


@pytest.mark.parametrize("kind", in_turn(list(NEAR), 4, 5))
def test_the_chain_rule_is_one_tape_and_leaves_no_trace(kind: str) -> None:
    one = case(kind)
    before = bits(one.stages)
    result = found(kind)
    assert bits(one.stages) == before
    said = outcome(kind, one.step)
    assert said.refusal == ""
    assert [judged.row for judged in said.judged if not judged.row.ok] == []
    kinds = [judged.row.kind for judged in said.judged]
    assert kinds.count("gradient") == len(one.names.variables)
    assert kinds.count("output gradient") == len({(c.producer, c.tensor, c.consumer) for c in result.boundary}) > 0
    assert kinds[0] == "loss"


def test_every_gradient_that_crosses_a_cut_is_there_by_microbatch_and_window() -> None:
    cuts = found("windows").boundary
    assert {(cut.microbatch, cut.window) for cut in cuts} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    skips = {(cut.producer, cut.consumer) for cut in found("skips").boundary}
    assert skips == {(0, 1), (0, 2), (1, 2)}


def test_a_truncated_state_brings_no_gradient_back() -> None:
    whole, cut = (found(kind).gradients[0][0] for kind in ("windows", "truncated"))
    assert np.abs(whole - cut).max() > 1e-3 * np.abs(whole).max()


FAULTS = {
    "scaled by 1/M": lambda g: g / 2,
    "scaled by M": lambda g: g * 2,
    "of one sample less": lambda g: g * 0.8,
    "by a thousandth": lambda g: g * 1.001,
    "lost": lambda g: None,
    "transposed": lambda g: np.ascontiguousarray(g[::-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", [0, 1])
def test_a_wrong_gradient_is_found_and_named(fault: str, stage: int) -> None:
    one = case("dense")
    wrong = [FAULTS[fault](one.step.gradients[stage][0]), *one.step.gradients[stage][1:]]
    said = outcome("dense", one.faulty({stage: wrong}))
    assert [j.row.name for j in said.judged if not j.row.ok] == [one.names.variables[stage, 0]]


@pytest.mark.parametrize("fault", ["half", "lost", "swapped"])
def test_a_wrong_gradient_at_a_cut_is_found_with_its_microbatch(fault: str) -> None:
    one = case("skips")
    sights = sorted(s for s in one.step.seen if (s.what, s.producer, s.consumer, s.sent) == ("gradient", 0, 2, True))
    first, second = (one.step.seen[s] for s in sights)
    wrong = {"half": first / 2, "lost": None, "swapped": np.concatenate([second, second])[: len(first)]}[fault]
    said = outcome("skips", one.faulty(seen={sights[0]: wrong}))
    (row,) = [j.row for j in said.judged if not j.row.ok]
    assert (row.kind, row.stage, row.peer) == ("output gradient", "stage2", "stage0")
    assert row.where == "microbatch 0"


def test_a_wrong_loss_is_found() -> None:
    one = case("dense")
    said = outcome("dense", one.faulty(loss=one.step.result.loss * 1.01))
    assert [j.row.kind for j in said.judged if not j.row.ok] == ["loss"]


def test_a_limit_below_one_row_is_refused_with_the_stage() -> None:
    one = case("dense")
    refused = by_chain_rule(one.stages, one.batch, memory_limit=100)
    assert "stage1" in refused.refusal and "memory_limit" in refused.refusal
    assert by_gradients("chain", one.step, refused, one.names, one.yardstick).refusal == refused.refusal


def test_the_loss_scale_is_at_the_cuts_and_not_in_the_gradients() -> None:
    one = case("dense")
    scaled = by_chain_rule(one.stages, replace(one.batch, loss_scale=64.0))
    cut = next(iter(scaled.boundary))
    np.testing.assert_allclose(scaled.boundary[cut], 64 * found("dense").boundary[cut], rtol=1e-5)
    np.testing.assert_allclose(scaled.gradients[0][0], found("dense").gradients[0][0], rtol=1e-4, atol=1e-7)


def test_attention_of_one_head_on_one_sample_does_not_end_the_process() -> None:
    """oneDNN corrupted the heap where its rows were vectorised."""
    keras.utils.set_random_seed(1)
    x = keras.Input((3, 3))
    h = keras.layers.Dense(3, name="cut")(x)
    model = keras.Model(x, keras.layers.MultiHeadAttention(1, 2)(h, h))
    pipe = Pipeline.split(model, at=["cut"], microbatches=1, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    one = case_of(pipe, *(rng.normal(size=(1, 3, 3)).astype("float32") for _ in range(2)))
    said = by_gradients("chain", one.step, by_chain_rule(one.stages, one.batch), one.names, one.yardstick)
    assert [judged.row for judged in said.judged if not judged.row.ok] == [] and not said.refusal
