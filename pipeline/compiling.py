"""What `compile` was given, checked and described for the workers.

The optimizer object stays here, so that callbacks can read and set its learning rate; each stage gets one like it. A
norm over all variables cannot be taken by a stage alone, so clipping by global norm is decided here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import keras
import numpy as np

from pipeline.errors import CompileError
from pipeline.schedules import gpipe
from stages.loss import Head
from stages.recipes import describe


class Compiled:
    """The arguments of `Pipeline.compile`, resolved.

    Raises:
        CompileError: A name that Keras does not know, or an optimizer that a pipeline cannot use.
        RecipeError: Something that a worker cannot import.
    """

    def __init__(self, optimizer: Any, loss: Any, metrics: Any, weighted_metrics: Any, run_eagerly: bool) -> None:
        self.run_eagerly = run_eagerly
        self.optimizer = _optimizer(optimizer)
        self._check_names(loss, metrics, weighted_metrics)
        self._given = (optimizer, loss, metrics, weighted_metrics)
        recipe = Head.recipe(loss, metrics, weighted_metrics)
        self.head = Head.from_recipe(recipe)
        self.has_loss = loss is not None
        self.head_recipe = recipe if self.has_loss else None
        self.has_metrics = self.head.has_metrics
        config = {} if self.optimizer is None else self.optimizer.get_config()
        self.global_clipnorm: float | None = config.get("global_clipnorm")
        self.constant_rate = not isinstance(config.get("learning_rate"), dict)
        self.optimizer_recipe = self._recipe()

    def recipe(self) -> dict[str, Any]:
        """The arguments of `compile` as plain data."""
        names = ("loss", "metrics", "weighted_metrics")
        described = {name: describe(thing, name) for name, thing in zip(names, self._given[1:], strict=True)}
        return {"optimizer": describe(self.optimizer, "the optimizer"), **described, "run_eagerly": self.run_eagerly}

    def _recipe(self) -> Any:
        if self.optimizer is None:
            return None
        recipe = describe(self.optimizer, "the optimizer")
        config = recipe["keras"]["config"]
        config["global_clipnorm"] = None  # decided over all stages together
        config["loss_scale_factor"] = None  # the loss is not scaled here, so nothing is to be divided by it again
        return recipe

    @staticmethod
    def _check_names(loss: Any, metrics: Any, weighted_metrics: Any) -> None:
        if isinstance(loss, dict | list | tuple):
            raise CompileError("a pipeline has one output and one loss; received several losses")
        if isinstance(loss, str):
            _known(loss, keras.losses, "loss")
        for given in (metrics, weighted_metrics):
            for metric in given if isinstance(given, list | tuple) else [] if given is None else [given]:
                if isinstance(metric, str) and metric not in ("accuracy", "acc"):
                    _known(metric, keras.metrics, "metric")

    def learning_rate(self) -> float | None:
        """The rate for the next update; None where a schedule in the optimizer decides."""
        return float(self.optimizer.learning_rate) if self.constant_rate else None

    def count_update(self) -> None:
        """Let the optimizer of the user's process know that the workers' made one more update."""
        self._iteration.value.assign_add(1)

    def go_on_from(self, shared: Mapping[str, Any], rate: bool = False) -> None:
        """Take over the iterations, and if wanted the learning rate, that the workers' optimizers go on from."""
        self._iteration.assign(shared["iterations"])
        if rate and self.constant_rate:
            self.optimizer.learning_rate = float(shared["learning_rate"])

    @cached_property
    def _iteration(self) -> Any:
        """The count of all updates; `optimizer.iterations` counts accumulated ones only."""
        return next(variable for variable in self.optimizer.variables if variable.name == "iteration")

    def needs_optimizer(self) -> None:
        """Refuse to train without one."""
        if self.optimizer is None:
            raise CompileError("training needs an optimizer; call compile(optimizer='adam', loss=...)")

    def clip_scale(self, squared_norm: float | None) -> float | None:
        """The factor on all gradients that brings their global norm to at most `global_clipnorm`; Keras's formula."""
        if self.global_clipnorm is None or squared_norm is None:
            return None
        norm = np.sqrt(np.float32(squared_norm))
        clip = np.float32(self.global_clipnorm)
        if not norm:
            return 1.0
        return float(clip * np.minimum(np.float32(1.0) / norm, np.float32(1.0) / clip) + (norm - norm))

    def check_schedule(self, schedule: Any, microbatches: int) -> None:
        """Refuse a loss over the whole batch under a schedule that goes backward before all forwards are done."""
        if not self.head.couples_samples or microbatches == 1 or schedule in ("gpipe", gpipe):
            return
        raise CompileError(
            f"the loss {_name_of(self.head.loss)} couples the samples of a batch, so its gradient exists only when the "
            f"whole batch went forward; the schedule {schedule!r} goes backward earlier. "
            "Use Pipeline(..., schedule='gpipe')"
        )


def refuse_options(*, loss_weights: Any, steps_per_execution: int, jit_compile: bool | str) -> None:
    """Refuse what `keras.Model.compile` takes and a pipeline cannot do, before it is silently something else."""
    if loss_weights is not None:
        raise CompileError("loss_weights weigh several losses against each other; a pipeline has one loss")
    if steps_per_execution != 1:
        raise CompileError(
            f"steps_per_execution must be 1, received {steps_per_execution}: a pipeline's step is several processes' "
            "work; for less overhead a sample, use a larger batch with more microbatches"
        )
    if jit_compile not in ("auto", False):
        raise CompileError(
            f"jit_compile must be 'auto' or False, received {jit_compile!r}: XLA draws other random numbers than "
            "TensorFlow, so the pipeline would not be exact"
        )


def _optimizer(optimizer: Any) -> Any:
    if isinstance(optimizer, str):
        _known(optimizer, keras.optimizers, "optimizer")
    try:
        found = keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        raise CompileError(f"unknown optimizer: {error}") from error
    if getattr(found, "gradient_accumulation_steps", None) and getattr(found, "global_clipnorm", None):
        raise CompileError(
            "global_clipnorm with gradient_accumulation_steps would clip the gradients of every step here, where Keras "
            "clips their mean; use more microbatches in place of gradient_accumulation_steps, or clipnorm"
        )
    if isinstance(found, keras.optimizers.LossScaleOptimizer):
        raise CompileError(
            "LossScaleOptimizer decides on a stage's gradients alone, so stages could disagree on skipping an update; "
            "use the inner optimizer, with bfloat16 where memory matters"
        )
    return found


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
        names = {n.lower(): n for n in dir(module) if not n.startswith("_") and n not in helpers}
        names |= {n: n for n in _SHORT_NAMES.get(what, ())}
        near = [names[n] for n in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)]
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise CompileError(f"Keras knows no {what} called {name!r}{hint}") from None


def _name_of(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__
