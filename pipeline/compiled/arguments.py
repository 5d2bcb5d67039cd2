"""The arguments of `compile` as a user gives them: names looked up, optimizers per stage, what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from pipeline.compiled.loss_scaling import unscaled
from pipeline.errors import CompileError
from pipeline.saying import did_you_mean


def refuse_options(*, steps_per_execution: int, jit_compile: bool | str) -> None:
    """Refuse what `keras.Model.compile` takes and a pipeline cannot do, before it is silently something else."""
    if type(steps_per_execution) is not int or steps_per_execution < 1:
        raise CompileError(
            f"steps_per_execution must be a whole number of at least 1, received {steps_per_execution!r}"
        )
    if jit_compile not in ("auto", False):
        raise CompileError(
            f"jit_compile must be 'auto' or False, received {jit_compile!r}: XLA draws other random numbers than "
            "TensorFlow, so the pipeline would not be exact"
        )


def optimizers_per_stage(optimizer: Any, stages: Sequence[str]) -> list[Any]:
    """One optimizer for all stages, or one for each in their order."""
    if isinstance(optimizer, Mapping):
        if set(optimizer) != set(stages):
            raise CompileError(
                f"optimizers by stage must name every stage ({', '.join(map(repr, stages))}), received "
                f"{', '.join(map(repr, optimizer))}"
            )
        given = [optimizer[name] for name in stages]
    elif isinstance(optimizer, list | tuple):
        given = list(optimizer)
        if len(given) != len(stages):
            raise CompileError(
                f"give one optimizer for all stages or one for each of {len(stages)}, in their order; received "
                f"{len(given)}"
            )
    else:
        return [optimizer]
    objects = [id(one) for one in given if one is not None and not isinstance(one, str)]
    if len(set(objects)) != len(objects):
        raise CompileError("each stage needs an optimizer object of its own; the same object is there twice")
    return given


def known_optimizer(optimizer: Any) -> Any:
    """A Keras optimizer, from its name or itself.

    Raises:
        CompileError: Keras knows none of that name, or it would mean something else in a pipeline.
    """
    if isinstance(optimizer, str):
        _known(optimizer, keras.optimizers, "optimizer")
    try:
        found = keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        raise CompileError(f"unknown optimizer: {error}") from error
    inner = unscaled(found)
    if getattr(inner, "gradient_accumulation_steps", None) and getattr(inner, "global_clipnorm", None):
        raise CompileError(
            "global_clipnorm with gradient_accumulation_steps would clip the gradients of every step here, where Keras "
            "clips their mean; use more microbatches in place of gradient_accumulation_steps, or clipnorm"
        )
    return found


def known_here(loss: Any) -> Any:
    """A loss; one that is called by a name that was registered here, which a worker would not know, itself."""
    found = keras.saving.get_registered_object(loss) if isinstance(loss, str) else None
    if found is None:
        return loss
    return found() if inspect.isclass(found) else found


_SHORT_NAMES = {
    "loss": ("mse", "mae", "mape", "msle"),
    "metric": ("mse", "mae", "mape", "msle", "accuracy", "crossentropy"),
}
"""Names that Keras knows and does not list."""


def _known(name: str, module: Any, what: str) -> None:
    """Refuse a name that Keras does not know, with the nearest ones."""
    try:
        module.get(name)
    except ValueError:
        helpers = ("get", "serialize", "deserialize")
        names = [n for n in dir(module) if not n.startswith("_") and n not in helpers]
        hint = did_you_mean(name, [*names, *_SHORT_NAMES.get(what, ())], most=3)
        raise CompileError(f"Keras knows no {what} called {name!r}{hint}") from None


def with_loss_scaling(optimizer: Any, mixed_float16: bool) -> Any:
    """The optimizer with loss scaling where Keras would add it."""
    if not mixed_float16 or optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")


def check_names(loss: Any, metrics: Any, weighted_metrics: Any) -> None:
    """Refuse names of losses and metrics that Keras does not know."""
    if isinstance(loss, str):
        _known(loss, keras.losses, "loss")
    for given in (metrics, weighted_metrics):
        for metric in given if isinstance(given, list | tuple) else [] if given is None else [given]:
            if isinstance(metric, str) and metric not in ("accuracy", "acc"):
                _known(metric, keras.metrics, "metric")
