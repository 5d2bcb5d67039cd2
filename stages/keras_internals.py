"""Everything of Keras that Keras does not promise: private names, hidden attributes and methods that are replaced.

No other file of `stages` and `pipeline` touches such a name (`tests/test_house.py`). Every function says what of Keras
it relies on, and `tests/stages/test_keras_internals.py` tries that behaviour, so that a new Keras which behaves
otherwise shows as one red file. It was read in Keras 3.8 to 3.15.

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


# -- losses and metrics ------------------------------------------------------------------------------------------


def function_arguments(thing: Any) -> Mapping[str, Any]:
    """The keyword arguments with which a loss or metric calls the function that it wraps; {} if it wraps none.

    Relies on `LossFunctionWrapper._fn_kwargs` and `MeanMetricWrapper._fn_kwargs`.
    """
    return dict(getattr(thing, "_fn_kwargs", {}))


def wrapped_function(thing: Any) -> Any | None:
    """The function that a loss or metric of Keras wraps; None if it wraps none.

    Relies on `LossFunctionWrapper.fn` and `MeanMetricWrapper._fn`.
    """
    found = getattr(thing, "_fn", None) or getattr(thing, "fn", None)
    return found if callable(found) else None


def set_function_arguments(thing: Any, arguments: Mapping[str, Any]) -> None:
    """Change some of the arguments that `function_arguments` gives. Relies on the dict being read at every call."""
    thing._fn_kwargs.update(arguments)


def loss_dtype(loss: Any) -> str:
    """The name of the dtype policy that a Keras loss computes in. Relies on `Loss._dtype_policy`."""
    return str(loss._dtype_policy.name)


def set_loss_dtype(loss: Any, name: str) -> None:
    """Let a Keras loss compute in a dtype policy.

    Relies on `Loss._dtype_policy`, and on `_dtype`, the name of its compute dtype, to which a call converts what it is
    given.
    """
    import keras

    loss._dtype_policy = keras.dtype_policies.get(name)
    loss._dtype = loss._dtype_policy.compute_dtype


# -- optimizers --------------------------------------------------------------------------------------------------


def slots_of(optimizer: Any, count: int) -> Iterator[tuple[str, int, Any]]:
    """(attribute, place of the model's variable or -1, the optimizer's variable) of a built optimizer.

    Args:
        optimizer: The optimizer.
        count: For how many variables it was built.

    Relies on an optimizer keeping a slot in an attribute that is a list with one entry per variable that it was built
    for (None where there is none), and what belongs to no variable in an attribute of its own. (The slots' own names do
    not tell: Adafactor's are like the variables', Nadam numbers one anew in every process.) Two lists of this length
    are no slot: `_variables`, all of the optimizer's own, and `_trainable_variables`, the model's.
    """
    for attribute, value in vars(optimizer).items():
        if isinstance(value, list) and len(value) == count and attribute not in ("_variables", "_trainable_variables"):
            yield from ((attribute, place, slot) for place, slot in enumerate(value) if slot is not None)
        elif not isinstance(value, list):
            yield attribute, -1, value


def update_nothing(optimizer: Any) -> None:
    """One step of a built optimizer without gradients: it is counted, and taken into the averages of the weights.

    Relies on `_backend_apply_gradients([], [])` doing what `apply` does besides the variables' own updates, and on
    `_iterations`, the count of calls of `apply` (`iterations` counts updates), which some Keras raise in there.
    """
    count = optimizer._iterations + 1
    optimizer._backend_apply_gradients([], [])
    optimizer._iterations.assign(count)


def variables_known_to(optimizer: Any) -> list[Any]:
    """The model's variables that an optimizer was built for, in the order of its slots; [] of None and one not built.

    Relies on `_trainable_variables`, which `build` fills.
    """
    return list(getattr(optimizer, "_trainable_variables", ()))


def excluded_from_decay(optimizer: Any, variables: Sequence[Any]) -> list[int]:
    """Which of some variables, by place, were given to `exclude_from_weight_decay(var_list=...)`.

    Relies on `_exclude_from_weight_decay`, keys of variables that `_var_key` makes.
    """
    keys = _excluded_keys(optimizer)
    return [i for i, variable in enumerate(variables) if keys and optimizer._var_key(variable) in keys]


def excluded_from_decay_elsewhere(optimizer: Any, variables: Iterable[Any]) -> int:
    """How many variables were given to `exclude_from_weight_decay(var_list=...)` that are none of these.

    Relies on the same as `excluded_from_decay`.
    """
    keys = _excluded_keys(optimizer)
    return len(keys - {optimizer._var_key(variable) for variable in variables}) if keys else 0


def names_excluded_from_decay(optimizer: Any) -> str | None:
    """The pattern of names that weight decay leaves out; None if no names were given.

    Relies on `_exclude_from_weight_decay_pattern`, the compiled alternatives of ``var_names``, being searched for in
    the path of every variable: given back as one name it means the same.
    """
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return None if pattern is None else str(pattern.pattern)


def _excluded_keys(optimizer: Any) -> set[Any]:
    return set(getattr(optimizer, "_exclude_from_weight_decay", None) or ())


# -- callbacks ---------------------------------------------------------------------------------------------------


def profiles(callback: Any) -> bool:
    """Whether a `keras.callbacks.TensorBoard` would trace batches. Relies on `_start_batch`: the first, or 0."""
    return bool(getattr(callback, "_start_batch", 0))
