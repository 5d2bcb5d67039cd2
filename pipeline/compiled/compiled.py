"""The arguments of `compile`, checked and described for the workers.

The optimizer objects stay here, so that callbacks can read and set their learning rates; each stage gets one like its
own. What no stage can decide alone is decided here: clipping by a norm over all variables, and loss scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from pipeline.batch.outputs import objectives
from pipeline.compiled.arguments import (
    check_names,
    known_here,
    known_optimizer,
    optimizers_per_stage,
    with_loss_scaling,
)
from pipeline.compiled.counts import Counts
from pipeline.compiled.loss_scaling import LossScaling, unscaled
from pipeline.compiled.optimizer_slots import OptimizerSlots
from pipeline.errors import CompileError
from stages.keras_training_internals import excluded_from_decay, excluded_from_decay_elsewhere
from stages.loss.head import Head
from stages.loss.precision import loss_number
from stages.recipe.by_value import copied
from stages.recipe.describe import described
from stages.recipe.optimizer_state import rate_is_a_variable, rate_now
from stages.recipe.stage_objects import Judging
from stages.worker.stage_spec import HeadSpec


class Compiled:
    """The arguments of `Pipeline.compile`, resolved.

    Args:
        optimizer: For all stages; or a dict by stage names, or a list in their order.
        loss: As `Pipeline.compile` takes it, like the other arguments.
        outputs: (tensor name, label) of the pipeline's outputs.
        stages: The stages' names.
        mixed_float16: Whether the model's dtype policy is `mixed_float16`, for which Keras scales the loss.

    Raises:
        CompileError: A name that Keras does not know, or something that does not fit the outputs or stages.
        RecipeError: Something that a worker cannot import.

    Attributes:
        counts: The optimizers' counts of updates, in the user's process.
        metric_copies: The user's metric objects, each with the copy of it in `heads`.
        metrics_named: Whether it was looked for those that no value can be written into.
    """

    def __init__(
        self,
        optimizer: Any,
        loss: Any,
        metrics: Any,
        weighted_metrics: Any,
        run_eagerly: bool,
        *,
        loss_weights: Any = None,
        outputs: Sequence[tuple[str, str]] = (("y", "y"),),
        stages: Sequence[str] = (),
        mixed_float16: bool = False,
        steps_per_execution: int = 1,
    ) -> None:
        self.run_eagerly, self.steps_per_execution = run_eagerly, steps_per_execution
        given = optimizers_per_stage(optimizer, stages)
        self.optimizers = tuple(with_loss_scaling(known_optimizer(one), mixed_float16) for one in given)
        self.one_optimizer = not isinstance(optimizer, Mapping | list | tuple)
        self._given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
        self._loss_weights, self._stages = loss_weights, tuple(stages)
        labels = [label for _, label in outputs]
        self.objectives = objectives(labels, loss, loss_weights, metrics, weighted_metrics)
        for one in self.objectives:
            check_names(one.loss, one.metrics, one.weighted_metrics)
        self.has_loss = any(one.loss is not None for one in self.objectives)
        self.specs = self._head_specs(outputs) if self.has_loss else ()
        self._judging = {
            one.label: Judging(known_here(one.loss), one.metrics, one.weighted_metrics, _variable(one.weight))
            for one in self.objectives
        }
        self.metric_copies: list[tuple[Any, Any]] = []
        self.metrics_named = False
        self.heads = {spec.label: self._head(spec) for spec in self.specs}
        self.has_metrics = any(head.has_metrics for head in self.heads.values())
        self._constant_rates = [_constant_rate(optimizer) for optimizer in self.optimizers]
        self.loss_scaling = self._only(LossScaling.of, "loss scaling")
        self.global_clipnorm: float | None = self._only(_global_clipnorm, "global_clipnorm")
        self._adjusted: dict[int, dict[str, Any]] = {}
        self.counts = Counts(self.updating)

    @property
    def optimizer(self) -> Any:
        """The first stage's optimizer object: with one for all stages, the user's."""
        return self.optimizers[0]

    @property
    def loss(self) -> Any:
        """The loss as it was given."""
        return self._given["loss"]

    def left_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a later `compile`; what it leaves out is as it was here, as in Keras.

        Args:
            given: ``loss``, ``loss_weights``, ``metrics`` and ``weighted_metrics``. Without a loss both of the first
                stay, with neither kind of metrics both of the last; ``metrics=[]`` ends them.
        """
        found = dict(given)
        if given["loss"] is None:
            found |= {"loss": self._given["loss"], "loss_weights": self._loss_weights}
        if given["metrics"] is None and given["weighted_metrics"] is None:
            found |= {name: self._given[name] for name in ("metrics", "weighted_metrics")}
        return found

    @property
    def updating(self) -> tuple[Any, ...]:
        """The optimizers without loss scaling around them: one for all stages, or one each; some may be None."""
        return tuple(unscaled(optimizer) for optimizer in self.optimizers)

    def adjust(self, optimizer: int, attributes: Mapping[str, Any]) -> None:
        """Let the next update set attributes in the workers' copies of an optimizer, by its number."""
        stages = range(len(self._stages)) if len(self.optimizers) == 1 else [optimizer]
        for stage in stages:
            self._adjusted.setdefault(stage, {}).update(attributes)

    @property
    def to_adjust(self) -> dict[int, dict[str, Any]]:
        """What `adjusted` will give."""
        return self._adjusted

    @property
    def decides_after_steps(self) -> str:
        """What is decided over all stages between any two steps, in words; empty: nothing."""
        if self.loss_scaling is not None:
            return "the scale of the loss is decided between them"
        return "" if self.global_clipnorm is None else "the norm of all gradients decides about their updates"

    def adjusted(self) -> dict[int, dict[str, Any]]:
        """{stage: attributes that its optimizer is to get}; they are told once."""
        found, self._adjusted = self._adjusted, {}
        return found

    def loss_weights(self) -> dict[str, float]:
        """{output label: what its loss weighs now}, of loss weights that are variables."""
        return {label: float(one.weight) for label, one in self._judging.items() if one.weight is not None}

    @property
    def averages(self) -> bool:
        """Whether an optimizer keeps moving averages of the weights, which replace them when training ends."""
        return any(getattr(unscaled(optimizer), "use_ema", False) for optimizer in self.optimizers)

    @property
    def judged(self) -> tuple[str, ...]:
        """The labels of the outputs that need targets."""
        return tuple(self.heads)

    @property
    def loss_labels(self) -> tuple[str, ...]:
        """The labels of outputs whose losses are logged one by one: all with a loss, where there are several."""
        found = tuple(one.label for one in self.objectives if one.loss is not None)
        return found if len(found) > 1 else ()

    def stages_with_other_optimizers(self, before: Compiled | None) -> frozenset[int]:
        """The stages whose optimizer is another object than before; the others go on with its state, as in Keras."""
        stages = range(len(self._stages))
        if before is None or len(self.optimizers) != len(before.optimizers):
            return frozenset(stages)
        return frozenset(i for i in stages if self._inner_of(i) is not before._inner_of(i))

    def recipe(self) -> dict[str, Any]:
        """The arguments of `compile` as plain data, for a checkpoint; see `stages.recipe.describe.described`."""
        optimizer = self.optimizer
        if not self.one_optimizer:
            optimizer = dict(zip(self._stages, self.optimizers, strict=True))
        given = {"optimizer": optimizer, **self._given}
        found = {name: described(thing, name) for name, thing in given.items()}
        weights = described(keras.tree.map_structure(_value, self._loss_weights), "loss_weights")
        return {**found, "loss_weights": weights, **self._how()}

    def judging(self, labels: Sequence[str]) -> list[Judging]:
        """What judges these outputs."""
        return [self._judging[label] for label in labels]

    @property
    def judges(self) -> list[Any]:
        """The losses and metrics that were given, nested as they were."""
        return [self._given[name] for name in ("loss", "metrics", "weighted_metrics") if name in self._given]

    def copies(self) -> dict[str, Any]:
        """The arguments of `keras.Model.compile` for a model of its own, nothing shared with the user's objects."""
        weights = keras.tree.map_structure(_value, self._loss_weights)
        given = {"optimizer": self.optimizer, **self._given, "loss_weights": weights}
        built = [one for one in (self.optimizer, unscaled(self.optimizer)) if one is not None]
        copy = copied(given, "what compile() was given", unbuilt=[(one, {}) for one in built])
        return {**copy, **self._how()}

    def _how(self) -> dict[str, Any]:
        """The arguments of `compile` that are no objects."""
        several = {} if self.steps_per_execution == 1 else {"steps_per_execution": self.steps_per_execution}
        return {"run_eagerly": self.run_eagerly, **several}

    def optimizer_of(self, stage: int, reference: bool = False) -> tuple[Any, dict[str, Any]]:
        """The optimizer that updates a stage, and what is set in the copy that its worker gets.

        The loss is not scaled there, so nothing is to be divided by its scale again. Clipping by the norm over all
        stages is decided over all stages; the reference, which has all of them, clips by itself.

        Args:
            stage: The stage.
            reference: For the reference, where one optimizer for all stages comes with the first.
        """
        optimizer = self._inner_of(stage)
        if reference:
            return (None if stage > 0 and len(self.optimizers) == 1 else optimizer), {"loss_scale_factor": None}
        return optimizer, {"loss_scale_factor": None, "global_clipnorm": None}

    def keep(self) -> Callable[[], None]:
        """Set aside what training changes in the user's process; the returned function puts it back."""
        if self.optimizer is None:
            return lambda: None
        self.build_optimizers()
        iterations = [(iteration, iteration.value.numpy()) for iteration in self.counts.variables]
        scale = None if self.loss_scaling is None else self.loss_scaling.state()

        def put_back() -> None:
            for iteration, value in iterations:
                iteration.assign(value)
            self.counts.hold()
            if self.loss_scaling is not None and scale is not None:
                self.loss_scaling.go_on_from(scale)

        return put_back

    def _inner_of(self, stage: int) -> Any:
        """The optimizer that updates a stage: its own, or the one for all."""
        return unscaled(self.optimizers[stage if len(self.optimizers) > 1 else 0])

    def undecayed(self, stage: int, variables: Sequence[Any]) -> list[int]:
        """Which variable objects, by place, the user's optimizer leaves out of weight decay in a stage."""
        return excluded_from_decay(self._inner_of(stage), variables)

    def check_undecayed(self, variables: Sequence[Sequence[Any]]) -> None:
        """Refuse an optimizer that leaves out variable objects which are in no stage.

        Args:
            variables: For each stage its trainable variables, as far as they are known here.
        """
        for stage, optimizer in enumerate(self.optimizers):
            parts = variables if len(self.optimizers) == 1 else variables[stage : stage + 1]
            lost = excluded_from_decay_elsewhere(unscaled(optimizer), [variable for part in parts for variable in part])
            if lost:
                raise CompileError(
                    f"the optimizer excludes {lost} variable object(s) from weight decay that are no "
                    "trainable variable of these stages; exclude those of the model that was split, or by name: "
                    "optimizer.exclude_from_weight_decay(var_names=['bias'])"
                )

    def _head_specs(self, outputs: Sequence[tuple[str, str]]) -> tuple[HeadSpec, ...]:
        return tuple(
            HeadSpec(
                name,
                one.label,
                _value(one.weight),
                order,
                named=len(outputs) > 1,
            )
            for order, ((name, _), one) in enumerate(zip(outputs, self.objectives, strict=True))
            if one.loss is not None or one.metrics or one.weighted_metrics
        )

    def _head(self, spec: HeadSpec) -> Head:
        """The objective of one output here, where its weights over microbatches are computed."""
        given = self._judging[spec.label]
        one = copied(given, "what compile() was given")
        for own, copy in ((given.metrics, one.metrics), (given.weighted_metrics, one.weighted_metrics)):
            pairs = zip(keras.tree.flatten(own), keras.tree.flatten(copy), strict=True)
            self.metric_copies += [both for both in pairs if isinstance(both[0], keras.metrics.Metric)]
        return Head(one.loss, one.metrics, one.weighted_metrics, label=spec.label if spec.named else None)

    def _only(self, find: Any, what: str) -> Any:
        """What the optimizers say of something that is decided over all stages, so that all must say the same."""
        found = [find(optimizer) for optimizer in self.optimizers]
        if len(found) > 1 and any(one is not None for one in found):
            raise CompileError(f"{what} is decided over all stages together; it needs one optimizer for all of them")
        return found[0]

    def learning_rates(self, stages: int) -> dict[int, float]:
        """Every stage's rate for the next update, but where a schedule in its optimizer decides."""
        pairs = zip(self.optimizers, self._constant_rates, strict=True)
        rates = [rate_now(one) if constant else None for one, constant in pairs]
        each = rates if len(rates) > 1 else rates * stages
        return {i: rate for i, rate in enumerate(each) if rate is not None}

    def rates(self) -> list[float | None]:
        """Every optimizer's rate now; None where a schedule in it decides, or there is none."""
        pairs = zip(self.optimizers, self._constant_rates, strict=True)
        return [float(one.learning_rate) if constant else None for one, constant in pairs]

    def set_rates(self, rates: Sequence[float | None]) -> None:
        """Set what `rates` gave."""
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            if rate is not None:
                optimizer.learning_rate = rate

    @property
    def constant_rate(self) -> bool:
        """Whether the (first) optimizer's rate is a number, not a schedule."""
        return self._constant_rates[0]

    def build_optimizers(self) -> None:
        """Make their counts; the other variables are the workers'."""
        for optimizer in self.optimizers:
            if optimizer is not None and not optimizer.built:
                optimizer.build([])

    def count_update(self) -> None:
        """Let the optimizers of the user's process know that the workers' made one more update."""
        self.counts.count()

    def go_on_from(self, slots: OptimizerSlots, rate: bool = False) -> None:
        """Take over the iterations, and if wanted the learning rate, that the workers' optimizers go on from."""
        for stage, (optimizer, iteration) in enumerate(zip(self.optimizers, self.counts.variables, strict=True)):
            own = slots.own_of(stage)
            iteration.assign(own["iterations"])
            if rate and self._constant_rates[stage]:
                optimizer.learning_rate = float(own["learning_rate"])
        self.counts.hold()

    def needs_optimizer(self) -> None:
        """Refuse to train without one."""
        if self.optimizer is None:
            raise CompileError("training needs an optimizer; call compile(optimizer='adam', loss=...)")

    def clip_scale(self, squared_norms: Sequence[float]) -> float | None:
        """The factor on all gradients that brings their global norm to at most `global_clipnorm`; Keras's formula.

        Args:
            squared_norms: Of every variable's gradient, in the order in which one optimizer has the variables.
        """
        if self.global_clipnorm is None or not squared_norms:
            return None
        norm = np.sqrt(loss_number(keras.ops.sum(keras.ops.stack([loss_number(one) for one in squared_norms]))))
        clip = loss_number(self.global_clipnorm)
        if not norm:
            return 1.0
        return float(clip * np.minimum(loss_number(1.0) / norm, loss_number(1.0) / clip) + (norm - norm))

    def check_windows(self, windows: int) -> None:
        """Refuse a loss over the whole batch where the batch is cut in time."""
        coupling = [head.loss for head in self.heads.values() if head.couples_samples]
        if coupling and windows > 1:
            raise CompileError(
                f"the loss {name_of(coupling[0])} couples the samples of a batch, so it cannot be computed window by "
                "window; use a loss that is a mean or a sum over samples and time, or leave windows out"
            )


def slots_with(optimizer: Any, attributes: Mapping[str, Any]) -> list[str]:
    """The names of what an optimizer that had these attributes would keep for one variable, and of its own."""
    twin = copied(optimizer, "the optimizer", unbuilt=[(optimizer, attributes)])
    twin.build([keras.Variable([0.0], name="one")])
    return [variable.path.rpartition("/")[2] for variable in twin.variables]


def _variable(weight: Any) -> Any:
    """A loss weight that is a variable; None for another one."""
    return weight if hasattr(weight, "assign") else None


def _value(weight: Any) -> Any:
    """A loss weight as it is now: a number, or None."""
    return float(weight) if hasattr(weight, "assign") else weight


def _global_clipnorm(optimizer: Any) -> float | None:
    return None if optimizer is None else unscaled(optimizer).global_clipnorm


def _constant_rate(optimizer: Any) -> bool:
    return optimizer is not None and rate_is_a_variable(unscaled(optimizer))


def name_of(loss: Any) -> str:
    """What a loss is called."""
    return getattr(loss, "__name__", None) or type(loss).__name__
