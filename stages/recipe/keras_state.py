"""Keras and TensorFlow objects taken apart into their state, and put together again.

Keras itself copies an object through its configuration, the arguments it was made with, and loses what they do not say:
attributes set later, regularisers put on a built variable, what `adapt` found, arrays drawn in `__init__`. Here an
object is its class and its `__dict__`. Only what belongs to one process is made anew: TensorFlow's variables, tables
and functions, the wrappers that Keras puts around `build`, the identities by which trackers and optimizers know
variables.

Graphs of calls, optimizers and trackers have files of their own beside this one (`stages.recipe.graph_state`,
`optimizer_state`, `tracked_state`), and TensorFlow's objects `tensorflow_state`. All private names of Keras and
TensorFlow that copying needs are in these files.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import keras

from stages.recipe.attributes import Reduced, Writing, blank, fill, in_floats
from stages.recipe.graph_state import fill_node, know_nodes, state_of_node, state_of_symbol
from stages.recipe.keras_kinds import kinds
from stages.recipe.optimizer_state import excluded, know_variables, unbuilt_state
from stages.recipe.restoring import restoring
from stages.recipe.tracked_state import fill_tracker, reduce_tracked, state_of_tracker


def reduce_keras(thing: Any, writing: Writing) -> Reduced | None:
    """Take a Keras object apart; None: it is none, or pickle's own way is right for it."""
    known = kinds()
    kind: Any = type(thing)
    ways = (known.saveable.__reduce__, object.__reduce__)  # before Keras 3.9 an operation has no way of its own
    if isinstance(thing, (known.saveable, keras.Operation)) and kind.__reduce__ in ways:
        state = state_of(thing)
        if (attributes := writing.unbuilt.get(id(thing))) is not None:
            state = {**unbuilt_state(thing, state), **attributes}
        return blank, (kind,), in_floats(state, writing.floats), None, None, _fill_keras
    if isinstance(thing, keras.DTypePolicy) and writing.floats is not None:
        return keras.dtype_policies.get, (writing.floats,)
    if isinstance(thing, known.node):
        return blank, (kind,), state_of_node(thing), None, None, fill_node
    if isinstance(thing, keras.KerasTensor):
        return blank, (kind,), in_floats(state_of_symbol(thing), writing.floats), None, None, fill
    if isinstance(thing, known.tracker):
        return blank, (kind,), state_of_tracker(thing), None, None, fill_tracker
    if type(thing) in known.tracked:
        return reduce_tracked(thing)
    return None


def state_of(thing: Any) -> dict[str, Any]:
    """The attributes of a layer, model, operation, loss, metric or optimizer, but for what belongs to one process."""
    state = _own_state(thing)
    if isinstance(thing, keras.Operation):
        state |= {name: [] for name in ("_inbound_nodes", "_outbound_nodes") if name in state}
    if isinstance(thing, keras.Layer):
        for name in [name for name, value in state.items() if _is_wrapper(value)]:
            del state[name]
        # tensors that the last call left: of that call, and Keras forgets them before the next
        empty: dict[str, Any] = {"_losses": [], "_loss_ids": set(), "_losses_override": []}
        state |= {name: value for name, value in empty.items() if name in state}
    if isinstance(thing, keras.Model):
        state = _uncompiled(state)
    if isinstance(thing, kinds().optimizer):
        for name in ("_distribution_strategy", "_exclude_from_weight_decay_cache"):
            state.pop(name, None)
        state |= {name: {} for name in ("_trainable_variables_indices",) if name in state}
        if "_exclude_from_weight_decay" in state:
            state["_exclude_from_weight_decay"] = excluded(thing)
    return state


def _own_state(thing: Any) -> dict[str, Any]:
    """What an object's class says its state is, or its `__dict__`."""
    own = getattr(type(thing), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        return {"__getstate__": own(thing)}
    return dict(vars(thing))


def _fill_keras(thing: Any, state: dict[str, Any]) -> None:
    if "__getstate__" in state:
        given = state["__getstate__"]
        if hasattr(thing, "__setstate__"):
            thing.__setstate__(given)
        else:
            fill(thing, given)
        return
    fill(thing, state)
    if isinstance(thing, kinds().optimizer):
        restoring().later(lambda: know_variables(thing))
    if "_nodes_by_depth" in state:
        restoring().later(lambda: know_nodes(thing))


@cache
def _wrapper_codes() -> frozenset[Any]:
    """The code of the wrappers that Keras puts around methods of every new layer."""
    layer = keras.Layer(name="sample")
    found = [value.__code__ for value in vars(layer).values() if inspect.isfunction(value)]
    return frozenset(found)


def _is_wrapper(value: Any) -> bool:
    return inspect.isfunction(value) and value.__code__ in _wrapper_codes()


@cache
def _compile_state() -> tuple[dict[str, Any], frozenset[str]]:
    """What `Model.compile` and the training after it change: the values before, and the names that were not there."""
    model = keras.Sequential(name="sample")
    before = dict(vars(model))
    model.compile(optimizer=keras.optimizers.SGD(name="sample"), loss="mse", metrics=["mse"])
    changed = {name for name, value in vars(model).items() if name not in before or before[name] is not value}
    changed |= {"_run_eagerly", "steps_per_execution", "train_function", "test_function", "predict_function"}
    changed |= {"history", "_eval_epoch_iterator", "_initial_epoch"}
    return {name: before[name] for name in changed & before.keys()}, frozenset(changed - before.keys())


def _uncompiled(state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without what it was compiled with: no part of the model, and a pipeline has its own."""
    before, added = _compile_state()
    state = {name: value for name, value in state.items() if name not in added}
    state |= {name: value for name, value in before.items() if name in state}
    names = before.keys() | added
    if "_self_unconditional_checkpoint_dependencies" in state:  # TensorFlow's list of what a checkpoint holds
        kept = [one for one in state["_self_unconditional_checkpoint_dependencies"] if one.name not in names]
        state["_self_unconditional_checkpoint_dependencies"] = kept
    if "_self_unconditional_dependency_names" in state:
        known = state["_self_unconditional_dependency_names"]
        state["_self_unconditional_dependency_names"] = {n: one for n, one in known.items() if n not in names}
    return state


__all__ = ["reduce_keras", "state_of"]
