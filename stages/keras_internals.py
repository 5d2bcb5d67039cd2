"""Private names, hidden attributes and replaced methods of Keras's models, layers and tensors: nothing it promises.

What trains them is in `stages.keras_training_internals`; few other files touch such a name (`tests/test_house.py`).
Every function says what of Keras it relies on, and `tests/stages/test_keras_internals.py` tries that behaviour, so that
a new Keras which behaves otherwise shows as one red file. It was read in Keras 3.8 to 3.15.

Importing this module imports no Keras: recipes are made where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# -- models as graphs --------------------------------------------------------------------------------------------


def graph_model(model: Any) -> Any | None:
    """The Functional model that holds a model's graph of calls, or None.

    Args:
        model: Any object. A built Sequential holds a Functional, a Functional is one, of others no graph is known.

    Relies on `Sequential._functional`, which is None before the model is built.
    """
    inner = getattr(model, "_functional", None)
    if inner is not None:
        return inner
    return model if is_functional(model) else None


def is_functional(model: Any) -> bool:
    """Whether something is a Functional model itself. Relies on `_nodes_by_depth`, which nothing else has."""
    return hasattr(model, "_nodes_by_depth")


def nodes_in_order(functional: Any) -> Iterator[Any]:
    """A Functional model's nodes in the order in which Keras runs them, inputs first.

    A node is one call: `operation`, `is_input`, `input_tensors` and `outputs` (flat lists of symbolic tensors),
    `arguments` with `args` and `kwargs`.

    Relies on `_nodes_by_depth`, {depth: nodes}: `call` runs the deepest first, and nodes of one depth in their order.
    """
    by_depth: Mapping[int, Sequence[Any]] = functional._nodes_by_depth
    for depth in sorted(by_depth, reverse=True):
        for node in by_depth[depth]:
            if node.operation is not None:
                yield node


def run_nodes_in_order(functional: Any, nodes: Sequence[Any]) -> None:
    """Let a Functional model run its nodes in this order.

    Relies on `call` reading `_nodes_by_depth` anew at every call, the deepest first, and nothing else for the order.
    """
    functional._nodes_by_depth = {len(nodes) - i: [node] for i, node in enumerate(nodes)}


def node_arguments(node: Any, tensors: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node's call with other tensors in the places of its symbolic ones.

    Args:
        node: One call of a graph.
        tensors: {id of a symbolic tensor: tensor}, of at least those that the node reads.

    Relies on `SymbolicArguments.fill_in`.
    """
    return node.arguments.fill_in(tensors)  # type: ignore[no-any-return]


def calls_of(operation: Any) -> Sequence[Any]:
    """All nodes of a layer or operation, in the order in which it was called; also those of other models.

    Relies on `Operation._inbound_nodes`.
    """
    return operation._inbound_nodes  # type: ignore[no-any-return]


def takes_training(operation: Any) -> bool:
    """Whether a layer's `call` has an argument ``training``.

    Relies on `Layer._call_has_training_arg`; operations that are no layers have none.
    """
    return bool(getattr(operation, "_call_has_training_arg", False))


def maker_of(symbol: Any) -> Any:
    """The layer or operation that makes a symbolic tensor; of an input its InputLayer.

    Relies on `KerasTensor._keras_history.operation`.
    """
    return symbol._keras_history.operation


def input_structure(model: Any) -> Any | None:
    """The nesting (lists, dicts) of a model's inputs as it is called; None: not known, or a bare tensor's.

    Relies on `Functional._inputs_struct`, which has a symbolic tensor at every leaf.
    """
    return getattr(model, "_inputs_struct", None)


def output_structure(functional: Any) -> Any:
    """The nesting (lists, dicts) of a Functional model's outputs.

    Relies on `Functional._outputs_struct`, which has a symbolic tensor at every leaf.
    """
    return functional._outputs_struct


# -- layers and their variables ----------------------------------------------------------------------------------


def layers_of(layer: Any, include_self: bool = True) -> list[Any]:
    """A layer or model and all layers inside it, at any depth, each once, itself first.

    Relies on `Layer._flatten_layers`; copies of a layer list theirs in the same order.
    """
    return list(layer._flatten_layers(include_self=include_self))


def has_layers(thing: Any) -> bool:
    """Whether something is a layer or model, that is: may hold layers."""
    return hasattr(thing, "_flatten_layers")


def own_trainable_variables(layer: Any) -> list[Any]:
    """The variables that a layer itself (not the layers in it) made to be trained, whether frozen now or not.

    Relies on `Layer._trainable_variables`.
    """
    return list(layer._trainable_variables)


def own_other_variables(layer: Any) -> list[Any]:
    """The variables that a layer itself made not to be trained: statistics, counters; not its seed generators' states.

    Relies on `Layer._non_trainable_variables`.
    """
    return list(getattr(layer, "_non_trainable_variables", ()))


def own_seed_generators(layer: Any) -> list[Any]:
    """The `keras.random.SeedGenerator`s of a layer itself; their `state` is a variable that every draw changes.

    Relies on `Layer._seed_generators`.
    """
    return list(getattr(layer, "_seed_generators", ()))


def own_added_losses(layer: Any) -> list[Any]:
    """What a layer itself gave to `add_loss` in its last call.

    Relies on `Layer._losses`.
    """
    return list(getattr(layer, "_losses", ()))


def replace_in(layer: Any, old: Any, new: Any) -> None:
    """Let a layer have one object (a variable, a seed generator) wherever it has another now.

    Relies on a layer keeping its variables and generators in attributes of its own, and in lists that are attributes;
    Keras's tracker would refuse the change to a built layer, so the instance's dict is written.
    """
    for name, value in vars(layer).items():
        if value is old:
            layer.__dict__[name] = new
        elif isinstance(value, list) and any(item is old for item in value):
            value[:] = [new if item is old else item for item in value]


def forget_variables(layer: Any, variables: Iterable[Any]) -> None:
    """Let a layer not list variables any more that it made not to be trained.

    Relies on `Layer._non_trainable_variables` being the list that `Layer.variables` reads.
    """
    gone = {id(variable) for variable in variables}
    layer._non_trainable_variables[:] = [one for one in layer._non_trainable_variables if id(one) not in gone]


@contextmanager
def standing_in(values: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Let Keras variables be read as other tensors for a while.

    Args:
        values: (variable, tensor) pairs; a tensor has its variable's shape and dtype.

    Relies on `Variable._value`: what every read of a Keras variable gives, and what its value is written to.
    """
    before = []
    try:
        for variable, tensor in values:
            before.append((variable, variable._value))
            variable._value = tensor
        yield
    finally:
        for variable, value in before:
            variable._value = value


# -- methods that are replaced -----------------------------------------------------------------------------------

CallMethod = Callable[..., Any]


def wrap_call(layer: Any, wrap: Callable[[CallMethod], CallMethod]) -> Callable[[], None]:
    """Replace a layer's `call` by what `wrap` makes of it; the returned function puts back what was there.

    Relies on `Layer.__call__` looking `self.call` up at every call. The instance's attribute is set past Keras's own
    `__setattr__`, which would track it.
    """
    before = layer.__dict__.get("call")
    object.__setattr__(layer, "call", wrap(layer.call))

    def put_back() -> None:
        if before is None:
            layer.__dict__.pop("call", None)
        else:
            object.__setattr__(layer, "call", before)

    return put_back


def let_inner_layers_mask(model: Any) -> None:
    """Tell Keras that a model hands masks on, where it does not say so: the layers inside it do by themselves.

    Relies on Keras asking `supports_masking` and `compute_mask` of what is called with a mask on an input: without
    them it takes the mask off, or warns.
    """
    if not model.supports_masking:
        model.supports_masking = True
        model.compute_mask = lambda inputs, previous_mask: None


def layer_call() -> tuple[type, str]:
    """For `tensorflow_internals.replaced`: (layer, ...) of every call of any layer or model.

    Relies on no class of Keras having a `__call__` of its own that does not call `keras.Layer`'s.
    """
    import keras

    return keras.Layer, "__call__"


def predictions() -> list[tuple[type, str]]:
    """Each for `tensorflow_internals.replaced`: (model, ...) of the methods that compute with a model and give NumPy.

    Relies on all models of Keras having them from `keras.Model`.
    """
    import keras

    return [(keras.Model, "predict"), (keras.Model, "predict_on_batch")]


@contextmanager
def replaced_draws(replace: Mapping[str, Callable[[CallMethod], CallMethod]]) -> Iterator[None]:
    """Replace random functions of Keras's TensorFlow backend in the whole process for a while.

    Args:
        replace: {name, as in `keras.random`: makes a function of the one that is there}.

    Relies on layers and `keras.random` looking functions up in `keras.src.backend.random` at every call.
    """
    import keras

    module = keras.src.backend.random
    before = {name: getattr(module, name) for name in replace}
    try:
        for name, make in replace.items():
            setattr(module, name, make(before[name]))
        yield
    finally:
        for name, draw in before.items():
            setattr(module, name, draw)


@contextmanager
def keeping_the_global_seed() -> Iterator[None]:
    """Draws without a seed (`keras.random.normal(shape)`) made inside are as if they had not been made.

    Relies on Keras drawing for them from one generator for the process, the global attribute
    ``"global_seed_generator"``, which is made when it is first needed.
    """
    import keras

    name, state = "global_seed_generator", keras.src.backend.common.global_state
    generator = state.get_global_attribute(name)
    before = None if generator is None else generator.state.value.read_value()
    try:
        yield
    finally:
        state.set_global_attribute(name, generator)
        if before is not None:
            generator.state.value.assign(before)


# -- what rides on tensors ---------------------------------------------------------------------------------------


def mask_of(tensor: Any) -> Any | None:
    """The Keras mask that rides on a tensor, or None. Relies on the attribute `_keras_mask`."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any | None) -> None:
    """Put a Keras mask on a tensor, or take it off. Relies on layers, losses and metrics reading `_keras_mask`."""
    tensor._keras_mask = mask


def logits_of(tensor: Any) -> Any | None:
    """The argument of the softmax or sigmoid that made a tensor, or None.

    Relies on the attribute `_keras_logits`, which those activations set and Keras's cross-entropies use in place of
    the tensor itself.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    """Let Keras's cross-entropies use these logits in place of a tensor; see `logits_of`."""
    tensor._keras_logits = logits
