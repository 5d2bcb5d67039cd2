"""Optimizers: their keys of variables, which are of one process, and how one was before it was built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from stages.keras_training_internals import names_excluded_from_decay
from stages.put_back import quick_read
from stages.recipe.attributes import blank
from stages.recipe.keras_kinds import kinds, samples


def excluded(optimizer: Any) -> list[Any]:
    """The variables of an optimizer's own list that it leaves undecayed; it knows them by keys of one process."""
    keys = optimizer._exclude_from_weight_decay
    return [variable for variable in optimizer._trainable_variables if optimizer._var_key(variable) in keys]


def know_variables(optimizer: Any) -> None:
    """Write an optimizer's keys of its variables, which are of one process, for the variables that are here."""
    import tensorflow as tf

    state = vars(optimizer)
    state["_distribution_strategy"] = tf.distribute.get_strategy()
    for place, variable in enumerate(state.get("_trainable_variables", ())):
        state["_trainable_variables_indices"][optimizer._var_key(variable)] = place
    if "_exclude_from_weight_decay" in state:
        state["_exclude_from_weight_decay"] = {optimizer._var_key(v) for v in state["_exclude_from_weight_decay"]}
        state["_exclude_from_weight_decay_cache"] = {}


def unbuilt_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer as it was before it was built, with its present values and attributes.

    Lists of variables are what `build` fills. A variable that is an attribute was there before, unless `build` makes
    one under the same name: that is tried, on no variables.
    """
    slots = [
        name
        for name, value in state.items()
        if name not in ("_variables", "_trainable_variables") and any(_is_variable(one) for one in _items(value))
    ]
    before = {name: _shallow(value) for name, value in state.items()}
    before |= {name: type(state[name])() if type(state[name]) in (list, dict) else [] for name in slots}
    before |= {"_trainable_variables": [], "_trainable_variables_indices": {}, "built": False, **_tracked_variables()}
    # TensorFlow's own list of what a checkpoint holds, which leads to the variables and slots
    left = {"_self_unconditional_checkpoint_dependencies": list, "_self_unconditional_dependency_names": dict}
    before |= {name: kind() for name, kind in left.items() if name in before}
    remade = _made_by_build(type(optimizer), before) if state.get("built") else set()
    own = [value for name, value in state.items() if _is_variable(value) and name not in remade]
    before["_variables"] += [variable for variable in state["_variables"] if any(variable is one for one in own)]
    for name in remade - vars(samples()[2]).keys():
        before.pop(name, None)
    return before


def _made_by_build(kind: type, state: dict[str, Any]) -> set[str]:
    """The attributes that an optimizer's `build` sets, found by building one like it on no variables."""
    trial = blank(kind)
    left_out = "_exclude_from_weight_decay"
    given = {name: _shallow(value) for name, value in state.items() if name != left_out} | _tracked_variables()
    vars(trial).update(given)
    know_variables(trial)
    trial.build([])
    known = given.keys() | {"_distribution_strategy"}
    return {name for name, value in vars(trial).items() if name not in known or given.get(name, value) is not value}


def set_attributes(optimizer: Any, attributes: Mapping[str, Any]) -> None:
    """Set attributes of an optimizer, as its user would."""
    for name, value in attributes.items():
        setattr(optimizer, name, value)


def rate_of(optimizer: Any) -> Any:
    """What an optimizer's learning rate is: a variable, a schedule or a function."""
    return optimizer._learning_rate


def rate_now(optimizer: Any) -> float:
    """The learning rate of the next update."""
    rate = optimizer.learning_rate
    return float(np.asarray(quick_read(rate)) if isinstance(rate, keras.Variable) else rate)


def rate_is_a_variable(optimizer: Any) -> bool:
    """Whether an optimizer's learning rate is a number that can be set, no schedule and no function."""
    return _is_variable(optimizer._learning_rate)


def as_unbuilt(optimizer: Any, attributes: Mapping[str, Any] | None = None) -> Any:
    """An optimizer like this one as it was before it was built; it shares the variables that it had then.

    Args:
        optimizer: Any optimizer of Keras's.
        attributes: Those that are to be set otherwise.
    """
    made = blank(type(optimizer))
    vars(made).update(unbuilt_state(optimizer, dict(vars(optimizer))) | dict(attributes or {}))
    return made


def _tracked_variables() -> dict[str, Any]:
    """An optimizer's list of its own variables, empty, and the tracker that fills it."""
    variables: list[Any] = []
    return {"_variables": variables, "_tracker": kinds().tracker({"variables": (_is_variable, variables)})}


def _is_variable(thing: Any) -> bool:
    return isinstance(thing, keras.Variable)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _shallow(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict, set) else value


__all__ = [
    "as_unbuilt",
    "excluded",
    "know_variables",
    "rate_is_a_variable",
    "rate_of",
    "set_attributes",
    "unbuilt_state",
]


def leave_undecayed(optimizer: Any, variables: Sequence[Any]) -> None:
    """Exclude variables from weight decay, besides those that the optimizer's pattern of names excludes."""
    names = names_excluded_from_decay(optimizer)
    optimizer.exclude_from_weight_decay(list(variables), None if names is None else [names])
