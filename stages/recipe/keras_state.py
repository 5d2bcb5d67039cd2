"""How Keras and TensorFlow objects are taken apart into their state, and put together again.

Keras itself copies an object through its configuration, the arguments it was made with, and loses what they do not say:
attributes set later, regularisers put on a built variable, what `adapt` found, arrays drawn in `__init__`. Here an
object is its class and its `__dict__`. Only what belongs to one process is made anew: TensorFlow's variables, tables
and functions, the wrappers that Keras puts around `build`, the identities by which trackers and optimizers know
variables.

A graph of calls belongs to a Functional model and not to its layers: nodes travel with the models that have them. The
layers' own lists of nodes lead to every other model that calls the layer; they stay behind, and are written anew for
the models that travelled (`_wire`).

All private names of Keras and TensorFlow that copying needs are in this file and in `tensorflow_state`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import keras

from stages.recipe.restoring import restoring

FLOATS = ("float16", "bfloat16", "float32", "float64")

Reduced = tuple[Any, ...]
"""As `pickle` takes an object apart: function, arguments, state, list items, dict items, what sets the state."""


class Kinds(NamedTuple):
    """Classes of Keras that have no public name, found through an object that has one."""

    saveable: Any
    optimizer: type
    tracker: type
    node: type
    tracked: tuple[type, ...]


@cache
def kinds() -> Kinds:
    """The classes; not made at import, since that would make objects in a process that is to be forked."""
    layer = keras.Layer(name="sample")
    layer.some = [[], {}, set()]
    symbol = keras.Input((1,), name="sample")
    return Kinds(
        next(kind for kind in keras.Operation.__mro__ if kind.__name__ == "KerasSaveable"),
        next(kind for kind in keras.optimizers.Optimizer.__mro__ if kind.__name__ == "BaseOptimizer"),
        type(layer._tracker),
        type(symbol._keras_history.operation._inbound_nodes[0]),
        (type(layer.some), *(kind for kind in _tracked_kinds(type(layer.some)))),
    )


def _tracked_kinds(tracked_list: type) -> list[type]:
    """Keras's own dict and set, which live beside its own list."""
    module = inspect.getmodule(tracked_list)
    names = ("TrackedDict", "TrackedOrderedDict", "TrackedSet")
    return [getattr(module, name) for name in names if hasattr(module, name)]


class Writing(Protocol):
    """One copy that is being written.

    Attributes:
        floats: The dtype that every floating dtype becomes; None: they stay.
        unbuilt: {id of an optimizer: attributes to set}, for optimizers of which the copy is to be built anew.
    """

    floats: str | None
    unbuilt: Mapping[int, Mapping[str, Any]]


def reduce_keras(thing: Any, writing: Writing) -> Reduced | None:
    """Take a Keras object apart; None: it is none, or pickle's own way is right for it."""
    known = kinds()
    kind: Any = type(thing)
    if isinstance(thing, known.saveable) and kind.__reduce__ is known.saveable.__reduce__:
        state = _state(thing)
        if (attributes := writing.unbuilt.get(id(thing))) is not None:
            state = {**unbuilt_state(thing, state), **attributes}
        return _blank, (kind,), _in_floats(state, writing.floats), None, None, _fill_keras
    if isinstance(thing, keras.DTypePolicy) and writing.floats is not None:
        return keras.dtype_policies.get, (writing.floats,)
    if isinstance(thing, known.node):
        return _blank, (kind,), _state_of_node(thing), None, None, _fill_node
    if isinstance(thing, keras.KerasTensor):
        return _blank, (kind,), _in_floats(_state_of_symbol(thing), writing.floats), None, None, fill
    if isinstance(thing, known.tracker):
        return _blank, (kind,), _state_of_tracker(thing), None, None, _fill_tracker
    if type(thing) in known.tracked:
        return _reduce_tracked(thing)
    return None


def _blank(kind: type) -> Any:
    """A new object of a class, with nothing of its own but what Keras puts around every layer's methods."""
    if issubclass(kind, keras.Layer):
        return keras.Layer.__new__(kind)
    return object.__new__(kind)


def fill(thing: Any, state: Any) -> None:
    """Give an object its attributes as they were, past every `__setattr__` that would track or convert them."""
    slots: Mapping[str, Any] | None = None
    if isinstance(state, tuple):  # as `copyreg` gives the state of a class with __slots__
        state, slots = state
    if state:
        vars(thing).update(state)
    for name, value in (slots or {}).items():
        object.__setattr__(thing, name, value)


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object has in its own attributes; {} of one without any."""
    return dict(getattr(thing, "__dict__", {}))


def _in_floats(state: dict[str, Any], floats: str | None) -> dict[str, Any]:
    """A state in which every floating dtype that has a name is `floats`."""
    if floats is None:
        return state
    named = {name for name, value in state.items() if "dtype" in name and isinstance(value, str) and value in FLOATS}
    return state | dict.fromkeys(named, floats)


# -- layers, models, operations, losses, metrics, optimizers ---------------------------------------------------------


def _state(thing: Any) -> dict[str, Any]:
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
            state["_exclude_from_weight_decay"] = _excluded(thing)
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
        restoring().later(lambda: _know_variables(thing))
    if "_nodes_by_depth" in state:
        restoring().later(lambda: _know_nodes(thing))


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


# -- optimizers ------------------------------------------------------------------------------------------------------


def _excluded(optimizer: Any) -> list[Any]:
    """The variables of an optimizer's own list that it leaves undecayed; it knows them by keys of one process."""
    keys = optimizer._exclude_from_weight_decay
    return [variable for variable in optimizer._trainable_variables if optimizer._var_key(variable) in keys]


def _know_variables(optimizer: Any) -> None:
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
    for name in remade - vars(_samples()[2]).keys():
        before.pop(name, None)
    return before


def _made_by_build(kind: type, state: dict[str, Any]) -> set[str]:
    """The attributes that an optimizer's `build` sets, found by building one like it on no variables."""
    trial = _blank(kind)
    left_out = "_exclude_from_weight_decay"
    given = {name: _shallow(value) for name, value in state.items() if name != left_out} | _tracked_variables()
    vars(trial).update(given)
    _know_variables(trial)
    trial.build([])
    known = given.keys() | {"_distribution_strategy"}
    return {name for name, value in vars(trial).items() if name not in known or given.get(name, value) is not value}


def rate_is_a_variable(optimizer: Any) -> bool:
    """Whether an optimizer's learning rate is a number that can be set, no schedule and no function."""
    return _is_variable(optimizer._learning_rate)


def as_unbuilt(optimizer: Any) -> Any:
    """An optimizer like this one as it was before it was built; it shares the variables that it had then."""
    made = _blank(type(optimizer))
    vars(made).update(unbuilt_state(optimizer, dict(vars(optimizer))))
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


# -- graphs of calls -------------------------------------------------------------------------------------------------


def _state_of_node(node: Any) -> dict[str, Any]:
    nodes = node.operation._inbound_nodes
    place = next((i for i, one in enumerate(nodes) if one is node), len(nodes))
    return {"state": dict(vars(node)), "place": place, "history": [_has_history(one) for one in node.outputs]}


def _know_nodes(model: Any) -> None:
    """Write a model's keys of its calls, which are of one process."""
    from keras.src.ops.function import make_node_key

    nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes]
    places = [next(i for i, one in enumerate(node.operation._inbound_nodes) if one is node) for node in nodes]
    vars(model)["_nodes"] = {make_node_key(n.operation, place) for n, place in zip(nodes, places, strict=True)}


def _has_history(symbol: Any) -> bool:
    return hasattr(symbol, "_keras_history")


def _fill_node(node: Any, state: dict[str, Any]) -> None:
    fill(node, state["state"])
    restoring().nodes.append((state["place"], node, state["history"]))


def _state_of_symbol(symbol: Any) -> dict[str, Any]:
    """A symbolic tensor without the call that made it; `wire_calls` says that again where the call travels too."""
    state = dict(vars(symbol))
    state.pop("_keras_history", None)
    return state


def wire_calls(nodes: Iterable[tuple[int, Any, list[bool]]]) -> None:
    """Let operations and symbolic tensors know the calls that are here.

    Args:
        nodes: (which of its operation's calls it was, the node, which of its outputs say where they come from).
    """
    history = type(keras.Input((1,), name="sample")._keras_history)
    for _, node, known in sorted(nodes, key=lambda one: one[0]):
        calls = node.operation._inbound_nodes
        calls.append(node)
        for place, (symbol, there) in enumerate(zip(node.outputs, known, strict=True)):
            if there:
                symbol._keras_history = history(node.operation, len(calls) - 1, place)
    for _, node, _ in nodes:
        for symbol in node.arguments.keras_tensors:
            if not _has_history(symbol):  # the call that made it is of no model that is here
                symbol._keras_history = history(None, 0, 0)
            elif symbol._keras_history.operation is not None:
                symbol._keras_history.operation._outbound_nodes.append(node)


# -- trackers: what an object's attributes hold, by kind -------------------------------------------------------------


@cache
def _tests() -> dict[Any, tuple[int, str]]:
    """The code of Keras's own tests of what a tracker looks for: {code: (sample, store)}."""
    return {
        test.__code__: (number, store)
        for number, sample in enumerate(_samples())
        for store, (test, _) in sample._tracker.config.items()
    }


@cache
def _samples() -> tuple[Any, ...]:
    return (
        keras.Layer(name="sample"),
        keras.metrics.Mean(name="sample"),
        keras.optimizers.SGD(name="sample"),
    )


def _state_of_tracker(tracker: Any) -> dict[str, Any]:
    state = dict(vars(tracker))
    state["config"] = {
        store: (_tests().get(getattr(test, "__code__", None), test), found)
        for store, (test, found) in tracker.config.items()
    }
    state["stored_ids"] = None  # of one process
    return state


def _fill_tracker(tracker: Any, state: dict[str, Any]) -> None:
    fill(tracker, state)
    tracker.config = {
        store: (_samples()[test[0]]._tracker.config[test[1]][0] if isinstance(test, tuple) else test, found)
        for store, (test, found) in state["config"].items()
    }
    tracker.stored_ids = {}
    restoring().later(lambda: _know_stored(tracker))


def _know_stored(tracker: Any) -> None:
    tracker.stored_ids = {store: {id(one) for one in found} for store, (_, found) in tracker.config.items()}


def _reduce_tracked(collection: Any) -> Reduced:
    """Keras's own list, dict or set: filled before it knows its tracker, so that nothing is tracked again."""
    kind, state = type(collection), dict(vars(collection))
    if isinstance(collection, list):
        return kind, (), state, iter(list(collection)), None, fill
    if isinstance(collection, Mapping):
        return kind, (), state, None, iter(list(collection.items())), fill
    return kind, (), (state, list(collection)), None, None, _fill_set


def _fill_set(collection: set[Any], state: tuple[dict[str, Any], list[Any]]) -> None:
    own, items = state
    set.update(collection, items)
    fill(collection, own)


__all__ = [
    "FLOATS",
    "Reduced",
    "Writing",
    "as_unbuilt",
    "attributes_of",
    "fill",
    "kinds",
    "rate_is_a_variable",
    "reduce_keras",
    "wire_calls",
]
