"""Private names and hidden attributes of Keras's losses, metrics, optimizers and callbacks: nothing it promises.

The same rules as for `stages.keras_internals`, which has models, layers and tensors: every function says what of Keras
it relies on, and `tests/stages/test_keras_training_internals.py` tries that behaviour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

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


def callback_attributes(callback: Any) -> dict[str, Any]:
    """The attributes of a callback object that are not Keras's own in every callback: {name: value}.

    Relies on `Callback` itself keeping ``params``, ``_model`` and ``validation_data`` only.
    """
    return {name: one for name, one in vars(callback).items() if name not in ("params", "_model", "validation_data")}


def set_callback_attributes(callback: Any, values: Mapping[str, Any]) -> None:
    """Set what `callback_attributes` gave."""
    for name, value in values.items():
        setattr(callback, name, value)


def counts_of_tensorboard(callback: Any) -> tuple[str, ...]:
    """The attributes of a TensorBoard in which it counts batches, by which it numbers what it writes.

    Relies on `TensorBoard._global_train_batch` and `_global_test_batch`.
    """
    return tuple(name for name in ("_global_train_batch", "_global_test_batch") if hasattr(callback, name))


# -- random numbers ----------------------------------------------------------------------------------------------


def global_seed_state(make: bool = False) -> Any | None:
    """The variable from which random operations draw that were given no seed; None: there is none as yet.

    Args:
        make: Whether to make it then.

    Relies on the global attribute "global_seed_generator", and on `global_seed_generator()`, which makes it.
    """
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    if make:
        return seed_generator.global_seed_generator().state
    found = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return None if found is None else found.state
