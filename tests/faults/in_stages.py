"""Faults inside a stage: it computes, sums or keeps something wrong, and hands that on faithfully."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from stages.tape.direct_calls import portable
from stages.tape.eager import EagerTapes
from stages.tape.model_call import CallState, changed_by_calls
from stages.worker import step_program, tied_gradients
from tests.faults.cases import MICROBATCHES
from tests.faults.live import Live, adding, closing, opening, replaced
from tests.faults.places import Place, is_square

Context = AbstractContextManager[None]
Inject = Callable[[Live, Place], Context]
FIRST, LAST = 0, MICROBATCHES - 1
ONE_M, M = 1.0 / MICROBATCHES, float(MICROBATCHES)
EARLY = 0.99
"""What a premature update makes of a variable."""


def scaled_sum(factor: float) -> Inject:
    """Every microbatch's gradients of the stage's variables."""

    def change(_: int, gradients: list[Any]) -> list[Any]:
        return [None if g is None else tf.convert_to_tensor(g) * factor for g in gradients]

    return lambda live, place: adding(live, place.stage, change)


def _only_second(change: Callable[[Any], Any]) -> Inject:
    def changed(microbatch: int, gradients: list[Any]) -> list[Any]:
        return [None if g is None else change(g) for g in gradients] if microbatch == 1 else gradients

    return lambda live, place: adding(live, place.stage, changed)


dropped = _only_second(lambda _: None)
doubled = _only_second(lambda gradient: 2 * tf.convert_to_tensor(gradient))


def scaled_output_gradient(factor: float) -> Inject:
    """What the stage computes for one of its inputs."""

    def inject(live: Live, place: Place) -> Context:
        assert place.edge is not None
        stage = live.hosted[place.edge.consumer]
        number = [name for name, _ in stage.spec.inputs].index(place.edge.tensor)

        def around(backward: Any, *given: Any) -> tuple[Any, ...]:
            return tuple(g * factor if i == number else g for i, g in enumerate(backward(*given)))

        return closing(live, place.edge.consumer, around)

    return inject


def _with_objective(change: Callable[[Any], Any]) -> Inject:
    """The heads of the stage get another objective."""

    def inject(live: Live, place: Place) -> Context:
        def around(
            forward: Any, inputs: Any, key: Any, training: bool, share: float, objective: Any, *rest: Any
        ) -> Any:
            return forward(inputs, key, training, share, None if objective is None else change(objective), *rest)

        return opening(live, place.stage, around)

    return inject


def scaled_loss(factor: float) -> Inject:
    """What a microbatch's loss weighs."""
    return _with_objective(lambda o: replace(o, weights=tuple(weight * factor for weight in o.weights)))


unweighted = _with_objective(lambda o: replace(o, sample_weights=(None,) * len(o.sample_weights)))


def _updated_after(microbatch: int) -> Inject:
    def inject(live: Live, place: Place) -> Context:
        def around(forward: Any, inputs: Any, key: Any, *rest: Any) -> Any:
            found = forward(inputs, key, *rest)
            if key.microbatch == microbatch:
                for variable in live.hosted[place.stage].stage.trainable_variables:
                    variable.assign(variable * EARLY)
            return found

        return opening(live, place.stage, around)

    return inject


updated_after_the_first_forward = _updated_after(FIRST)
updated_after_the_last_forward = _updated_after(LAST)


def left_out(live: Live, place: Place) -> Context:
    """Of the gradients that come back from several consumers, only the nearest one's counts."""
    name = f"tapeline-{live.names[place.stage]}"

    def make(plus: Any) -> Any:
        def added(far: Any, near: Any) -> Any:
            mine = threading.current_thread().name == name
            return near if mine and far is not None else plus(far, near)

        return added

    return replaced(step_program, "plus", make)


def not_summed(live: Live, place: Place) -> Context:
    """The owner of a shared variable forgets the other stages' contributions."""
    return replaced(tied_gradients, "summed_uses", lambda summed: lambda contributions: summed(contributions[:1]))


def not_replaced(live: Live, place: Place) -> Context:
    """A copy goes on with its own contribution."""
    return replaced(live.hosted[place.stage].stage, "replace", lambda _: lambda *_: None)


@contextmanager
def _retraced(live: Live, place: Place) -> Iterator[None]:
    """Compiled functions are made anew, with the fault and again without it."""
    functions = getattr(live.hosted[place.stage].stage._tapes, "_functions", {})
    kept = dict(functions)
    functions.clear()
    try:
        yield
    finally:
        functions.clear()
        functions.update(kept)


@contextmanager
def without_own_losses(live: Live, place: Place) -> Iterator[None]:
    """Nobody reads the model's losses."""
    part = live.hosted[place.stage].stage._part
    forgetting = replaced(part, "call", lambda call: lambda *given, **named: call(*given, **named)._replace(own=()))
    with _retraced(live, place), forgetting:
        yield


def own_losses_per_microbatch(live: Live, place: Place) -> Context:
    """They count in full in every microbatch."""

    def around(forward: Any, inputs: Any, key: Any, training: bool, share: float, *rest: Any) -> Any:
        return forward(inputs, key, training, 1.0, *rest)

    return opening(live, place.stage, around)


def transposed(live: Live, place: Place) -> Context:
    """The stage gives its square outputs with two axes exchanged."""
    hosted = live.hosted[place.stage]
    numbers = [i for i, (name, to) in enumerate(hosted.spec.outputs) if to and is_square(hosted, name)]

    def around(forward: Any, *given: Any) -> Any:
        opened = forward(*given)
        swapped = [
            tf.einsum("nij...->nji...", output) if i in numbers else output for i, output in enumerate(opened.outputs)
        ]
        return opened._replace(outputs=tuple(swapped))

    return opening(live, place.stage, around)


def masks_not_counted(live: Live, place: Place) -> Context:
    """What a microbatch weighs is said without the masks of its predictions."""
    (head,) = live.hosted[place.stage].heads
    return replaced(
        head, "weights", lambda right: lambda sizes, targets, weights, masks=None: right(sizes, targets, weights)
    )


def redrawn(live: Live, place: Place) -> Context:
    """The forward pass is computed again from the random numbers of now, not from those of then."""
    stage = live.hosted[place.stage].stage
    tapes: Any = stage._tapes
    states = CallState(stage.model)

    def make(backward: Any) -> Any:
        def again(key: Any, *given: Any) -> Any:
            now, record = states.read(), tapes._open[key]
            if isinstance(tapes, EagerTapes):
                tapes._open[key] = replace(record, before=now)
            elif record.pair is not None:
                kept = record.kept[: len(record.kept) - len(now)]
                tapes._open[key] = replace(record, kept=(*kept, *map(portable, now)))
            return backward(key, *given)

        return again

    return replaced(tapes, "backward_input", make)


def statistics_twice(live: Live, place: Place) -> Context:
    """Moving averages take every microbatch twice, as when a forward pass is computed again carelessly."""
    stage = live.hosted[place.stage].stage
    layers = [one for one in stage.model._flatten_layers() if isinstance(one, keras.layers.BatchNormalization)]
    averages = {id(v) for layer in layers for v in (layer.moving_mean, layer.moving_variance)}
    others = [variable for variable in changed_by_calls(stage.model) if id(variable) not in averages]

    def make(forward: Any) -> Any:
        def twice(key: Any, given: Any) -> Any:
            opened = forward(key, given)
            before = [variable.numpy() for variable in others]
            stage._part.call(given.inputs, True, given.masked)
            for variable, value in zip(others, before, strict=True):
                variable.assign(value)
            return opened

        return twice

    return replaced(stage._tapes, "forward", make)
