"""An optimizer that has trained goes on: its slots and counts reach the stages, and come back to it.

    model.optimizer ── momentums, iterations ─► the stages' optimizers ── the trained ones ─► model.optimizer

In Keras an optimizer belongs to the variables that it was built for, and goes on with them wherever it is used next.
Here its variables are those of the user's own model, and what it knows of them is what the stages begin with. A new
optimizer object begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from pipeline.compiled.loss_scaling import unscaled
from pipeline.compiled.optimizer_slots import OptimizerSlots, Place
from pipeline.errors import CompileError
from stages.keras_training_internals import variables_known_to
from stages.recipe.by_value import copied
from stages.worker.snapshot import optimizer_slots, write

Parts = Sequence[Sequence[Any]]
"""For each stage its trainable variables, the user's own objects."""


def slots_here(optimizers: Sequence[Any], parts: Parts) -> OptimizerSlots:
    """What optimizers in the user's process know of their variables; `own` has the stages of which they know anything.

    Args:
        optimizers: One for all stages, or one for each.
        parts: The stages' variables.
    """
    described = _described(optimizers, parts)
    found = OptimizerSlots.of((place, name, np.asarray(variable.numpy())) for place, name, variable in described)
    if len(optimizers) == 1 and found.own:
        found.own = dict.fromkeys(range(len(parts)), found.own[0])
    return found


def give_back_slots(optimizers: Sequence[Any], parts: Parts, slots: OptimizerSlots) -> None:
    """The inverse: let them know of their variables what the stages' optimizers know.

    Not the learning rate, which is the user's: a callback may have set it after the last update.
    """
    found = []
    for (stage, k), name, variable in _described(optimizers, parts):
        if name == "learning_rate":
            continue
        values = slots.own_of(stage) if k < 0 else slots.of_variable[stage, k]
        found.append((variable, values[name]))
    write([variable for variable, _ in found], [value for _, value in found], "the user's own optimizer")


def knows_variables(optimizers: Sequence[Any]) -> bool:
    """Whether one of them was built for variables in the user's process."""
    return any(variables_known_to(unscaled(optimizer)) for optimizer in optimizers)


def check_known(optimizers: Sequence[Any], parts: Parts) -> None:
    """Refuse an optimizer that was built for other variables, as Keras does.

    Raises:
        CompileError: A variable of the stages is none of those that it knows.
    """
    for stage, optimizer in enumerate(map(unscaled, optimizers)):
        known = {id(variable) for variable in variables_known_to(optimizer)}
        here = [v for i, part in enumerate(parts) if len(optimizers) == 1 or i == stage for v in part]
        if known and (unknown := [variable for variable in here if id(variable) not in known]):
            raise CompileError(
                f"the optimizer {optimizer.name!r} was built for other variables, it does not know {len(unknown)} of "
                f"these ({unknown[0].path!r} is one), and what it has learned is of no use for them; {_anew(optimizer)}"
            )


def check_none_lost(optimizers: Sequence[Any]) -> None:
    """Refuse an optimizer that has trained in another pipeline, whose workers had its slots.

    Raises:
        CompileError: It would go on at a later step with slots of zeros.
    """
    for optimizer in map(unscaled, optimizers):
        if optimizer is None or not optimizer.built or variables_known_to(optimizer) or not int(optimizer.iterations):
            continue
        if _has_slots(optimizer):
            raise CompileError(
                f"the optimizer {optimizer.name!r} has made {int(optimizer.iterations)} updates in a pipeline, and "
                "what it keeps of the variables is not in this process; to go on, save that pipeline and "
                f"Pipeline.load(...) it; to begin anew, {_anew(optimizer)}"
            )


def _anew(optimizer: Any) -> str:
    return f"pass a new one: {type(optimizer).__name__}.from_config(optimizer.get_config())"


def _described(optimizers: Sequence[Any], parts: Parts) -> Iterator[tuple[Place, str, Any]]:
    """(place, with the index -1 for an optimizer's own; slot name; the optimizer's variable) of all that is known."""
    for stage, optimizer in enumerate(map(unscaled, optimizers)):
        known = variables_known_to(optimizer)
        if not known:
            continue
        places: dict[int, list[Place]] = {}
        for i, part in enumerate(parts):
            for k, variable in enumerate(part if len(optimizers) == 1 or i == stage else ()):
                places.setdefault(id(variable), []).append((i, k))
        for slot, variable in zip(optimizer_slots(optimizer, known), optimizer.variables, strict=True):
            owners = [(stage, -1)] if slot.variable < 0 else places.get(id(known[slot.variable]), [])
            yield from ((place, slot.name, variable) for place in owners)


def _has_slots(optimizer: Any) -> bool:
    """Whether an optimizer keeps anything by variable: tried on a small one."""
    trial = copied(optimizer, "the optimizer", unbuilt=[(optimizer, {})])
    sample = [keras.Variable(np.zeros((1, 1), "float32"), name="sample")]
    trial.build(sample)
    return any(slot.variable >= 0 for slot in optimizer_slots(trial, sample))
