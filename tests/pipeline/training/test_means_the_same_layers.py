"""Every layer means the same in a pipeline: one tape over the uncut model, written without it, is the judge.

For each model: Keras's own `fit` with one microbatch, bit for bit, weights, statistics and random states; gradients of
unequal microbatches under two schedules, eager (equal bits) and compiled (1e-6), with and without recomputation (of
compiled stages in the soak only); and where nothing depends on how a batch is cut, the whole batch.
"""

from __future__ import annotations

from typing import Any

import keras
import pytest

from pipeline import Pipeline
from tests.levels import SOAK, in_turn
from tests.natural_tape import natural_tape
from tests.one_tape import assert_same_bits, difference
from tests.pipeline.reference.twins import SEED, assert_same_arrays, twins
from tests.pipeline.training.same_models import CASES

MICROBATCHES = 3


def states(model: Any) -> list[Any]:
    """All variables: what calls change (statistics, random states, a power iteration's vectors), and weights."""
    return [variable.numpy() for variable in model.variables]


def put(model: Any, values: list[Any]) -> None:
    """Set all variables."""
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)


def in_the_models_order(pipe: Pipeline, model: Any, x: Any, y: Any) -> list[Any]:
    """The pipeline's gradients in the order of the variables of the model that was split."""
    ours = {id(v): None for segment in pipe.segments for v in segment.model.trainable_variables}
    found = dict(zip(ours, pipe.gradients(x, y).values(), strict=True))
    return [found[id(variable)] for variable in model.trainable_variables]


@pytest.mark.filterwarnings("ignore:the layer .* changes its variable")  # SpectralNormalization, by power iterations
@pytest.mark.parametrize("name", in_turn(list(CASES), 1, 10))
def test_microbatches_are_one_tape(name: str) -> None:
    """Gradients of microbatches of 3, 3 and 2 samples, and what the calls of one update leave behind."""
    case = CASES[name]
    x, y = case.data()
    keras.utils.set_random_seed(SEED)
    model = case.build()
    before = states(model)
    _, wanted = natural_tape(model, x, [y], [case.loss()], MICROBATCHES)
    assert any(gradient is None for gradient in wanted) == name.startswith("stop_gradient")
    whole = natural_tape(model, x, [y], [case.loss()], 1)[1] if case.whole else None
    found = []
    for schedule, recompute in (("gpipe", False), ("1f1b", True)):
        options = {"microbatches": MICROBATCHES, "schedule": schedule, "recompute": recompute, "transport": "inproc"}
        put(model, before)  # the model is the trained one after a pipeline was closed
        with Pipeline.split(model, at=list(case.at), **options) as pipe:
            for run_eagerly in (False, True) if SOAK or not recompute else (True,):
                pipe.compile(keras.optimizers.SGD(0.0), case.loss(), run_eagerly=run_eagerly)
                ours = in_the_models_order(pipe, model, x, y)
                if run_eagerly and case.bits:
                    assert_same_bits(ours, wanted, "gradient")
                rounding = 1e-6 if run_eagerly else case.rounding
                assert difference(ours, wanted) <= rounding
                assert whole is None or difference(ours, whole) <= rounding
                if run_eagerly and not recompute:
                    pipe.verify(x, y).raise_if_failed()
            pipe.evaluate(x, y, verbose=0)
            pipe.predict(x, verbose=0)
            assert_same_arrays(states(pipe.merge()), before)
            pipe.train_on_batch(x, y)
            found.append(states(pipe.merge()))
    put(model, before)
    natural_tape(model, x, [y], [case.loss()], MICROBATCHES, restore=False)
    after = states(model)
    for ours in found:
        assert_same_arrays(ours, after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True)) == case.changes


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")  # Keras, behind stop_gradient
@pytest.mark.parametrize("name", in_turn(list(CASES), 1, len(CASES)))
def test_training_is_keras(name: str) -> None:
    """One microbatch a batch, eagerly: histories, weights and predictions to the last bit."""
    case = CASES[name]
    x, y = case.data(10)

    def compiled() -> dict[str, Any]:
        return {"optimizer": keras.optimizers.Adam(0.02), "loss": case.loss()}

    with twins(case.build, compiled, at=list(case.at)) as pair:
        pair.assert_fit_alike(x, y, batch_size=3, validation_split=0.2)
        theirs, ours = pair.both(lambda twin: twin.predict(x, verbose=0))
        assert_same_arrays([ours], [theirs])
