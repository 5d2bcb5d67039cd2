"""A pipeline's optimizers, one a stage, update as one Keras optimizer over all variables would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import CompileError
from tests.levels import in_turn
from tests.models import Unused, cross_entropy, part, stack
from tests.one_tape import OneTape, assert_same_bits, difference

layers = keras.layers
optimizers = keras.optimizers
schedules = optimizers.schedules

STEPS, SAMPLES, MICROBATCHES = 6, 10, 4


def parts() -> list[Any]:
    """Four stages: one has nothing to train, one a weight that the loss does not reach."""
    keras.utils.set_random_seed(5)
    return [
        part((6,), layers.Dense(8, "tanh")),
        part((8,), layers.Dropout(0.2)),
        part((8,), Unused()),
        part((4,), layers.Dense(3)),
    ]


def excluding(optimizer: Any) -> Any:
    optimizer.exclude_from_weight_decay(var_names=["bias", "idle"])
    return optimizer


EXACT: dict[str, Callable[[], Any]] = {
    "clipnorm": lambda: optimizers.Adam(0.02, clipnorm=0.05),
    "clipvalue": lambda: optimizers.SGD(0.5, momentum=0.9, nesterov=True, clipvalue=0.02),
    "exponential": lambda: optimizers.SGD(schedules.ExponentialDecay(0.5, 2, 0.5)),
    "piecewise": lambda: optimizers.Adam(schedules.PiecewiseConstantDecay([2, 4], [0.1, 0.01, 0.001])),
    "cosine": lambda: optimizers.AdamW(schedules.CosineDecay(0.01, 5, warmup_target=0.1, warmup_steps=2)),
    "average": lambda: optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "accumulation": lambda: optimizers.SGD(0.5, gradient_accumulation_steps=2, clipnorm=0.05),
    "no-decay-of-biases": lambda: excluding(optimizers.AdamW(0.1, weight_decay=0.5)),
    "rmsprop": lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "lamb": lambda: optimizers.Lamb(0.01),
}


def run(optimizer: Callable[[], Any], run_eagerly: bool) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Weights before, and after some steps of the pipeline and of one optimizer."""
    x, y = stack("dense").data(SAMPLES)
    models = parts()
    tape = OneTape(models, cross_entropy(), optimizer())
    before = tape.weights()
    with Pipeline(models, MICROBATCHES, "1f1b", "inproc") as pipe:
        pipe.compile(optimizer(), cross_entropy(), run_eagerly=run_eagerly)
        for _ in range(STEPS):
            pipe.train_on_batch(x, y)
        ours = pipe.get_weights()
        for _ in range(STEPS):
            tape.train(x, y, MICROBATCHES)
        return before, ours, tape.weights()


@pytest.mark.parametrize("name", in_turn(list(EXACT), 3, 10))
def test_equals_one_optimizer_bit_for_bit(name: str) -> None:
    """Clipping per variable, schedules, averages, accumulation, decay: the same bits in every weight."""
    before, ours, theirs = run(EXACT[name], True)
    assert_same_bits(ours, theirs, "weight")
    assert difference(ours, before) > 1e-3


@pytest.mark.parametrize("name", in_turn(["average", "clipnorm", "cosine", "no-decay-of-biases"], 1, 4))
def test_compiled_equals_one_optimizer(name: str) -> None:
    """The same with the optimizer inside a compiled function."""
    _, ours, theirs = run(EXACT[name], False)
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
@pytest.mark.parametrize("clip", in_turn([0.1, 1e6], 1, 2))
def test_global_norm_is_taken_over_all_stages(clip: float, run_eagerly: bool) -> None:
    """`global_clipnorm` scales all gradients by one factor, and by none when the norm is small."""
    _, ours, theirs = run(lambda: optimizers.SGD(0.5, global_clipnorm=clip), run_eagerly)
    _, unclipped, _ = run(lambda: optimizers.SGD(0.5), run_eagerly)
    if run_eagerly:  # the norm is that of all variables in their order, as Keras takes it
        assert_same_bits(ours, theirs, "weight")
    assert difference(ours, theirs) <= 1e-6
    assert (difference(ours, unclipped) > 1e-2) == (clip < 1)


@pytest.mark.gate
def test_fixed_loss_scale_changes_nothing() -> None:
    """`loss_scale_factor` is undone: Keras scales the loss and divides the gradients again, a pipeline does neither."""
    _, scaled, _ = run(lambda: optimizers.SGD(0.5, loss_scale_factor=64.0), True)
    _, plain, _ = run(lambda: optimizers.SGD(0.5), True)
    assert_same_bits(scaled, plain, "weight")


@pytest.mark.gate
def test_averages_replace_the_weights_after_fit() -> None:
    """With `use_ema` and no overwriting, `fit` ends with the averages in the variables, as Keras's does."""
    x, y = stack("dense").data(SAMPLES)
    models = parts()
    tape = OneTape(parts(), cross_entropy(), optimizers.SGD(0.5, use_ema=True, ema_momentum=0.8))
    with Pipeline(models, MICROBATCHES, "1f1b", "inproc") as pipe:
        pipe.compile(optimizers.SGD(0.5, use_ema=True, ema_momentum=0.8), cross_entropy(), run_eagerly=True)
        pipe.fit(x, y, batch_size=SAMPLES, epochs=STEPS, shuffle=False, verbose=0)
        ours = pipe.get_weights()
    for _ in range(STEPS):
        tape.train(x, y, MICROBATCHES)
    last = tape.weights()
    tape.optimizer.finalize_variable_values(tape.variables)
    assert_same_bits(ours, tape.weights(), "weight")
    assert difference(ours, last) > 1e-3


def test_what_no_stage_can_decide_is_refused() -> None:
    """A variable of no stage cannot be excluded there; accumulated gradients have no norm of one step."""
    models = parts()
    pipe = Pipeline(models, MICROBATCHES, "1f1b", "inproc")
    decaying = optimizers.AdamW(0.1)
    decaying.exclude_from_weight_decay(var_list=[parts()[0].trainable_variables[0]])
    with pytest.raises(CompileError, match=r"excludes 1 variable object.*var_names="):
        pipe.compile(decaying, cross_entropy())
    with pytest.raises(CompileError, match="use more microbatches"):
        pipe.compile(optimizers.SGD(0.1, global_clipnorm=1.0, gradient_accumulation_steps=2), cross_entropy())
    pipe.close()
