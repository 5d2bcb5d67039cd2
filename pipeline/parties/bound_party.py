"""A party's stages as a plan wants them: looked at before any other party is asked, all faults at once.

What would silently train something else is refused here: a mask that a cut would lose, a loss that is no mean or sum
over microbatches, a layer's own loss that is no mean, states that are kept from batch to batch, a layer in two stages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.errors import PartyPlanError
from pipeline.own.added_losses import no_mean
from pipeline.own.layer_calls import recorded_calls
from pipeline.parties.party import Party
from pipeline.parties.party_plan import PartyEdge, PartyPlan, PartyStage
from stages import Stage
from stages.errors import StageError
from stages.keras_internals import layers_of
from stages.loss.head import Head
from stages.loss.ways import Way
from stages.put_back import held_by, random_numbers_put_back, values_put_back
from stages.recipe.overrides import why_training_would_differ
from stages.tape.contract import Opened, PassKey
from transport.dtypes import DTYPES

TASKS = ("train", "evaluate", "predict")
"""What parties may do together; all must be asked for the same."""
_LOOK = (3, 2)
"""Rows of the microbatches with which stages are looked at."""
_SHORT = ("accuracy", "acc", "crossentropy", "ce")
"""Metrics for which Keras's `compile` takes those that suit the loss."""
_LOOKING = threading.Lock()
"""Calls of layers are noted for the whole process, so one look is taken at a time."""


class BoundParty:
    """A party under a plan.

    Args:
        plan: The plan.
        name: Which of its parties this is.
        party: Models and data.
        task: One of `TASKS`.

    Attributes:
        stages: {name: its stage}, each behind those that it takes from.
        rows: How many rows it has; None: it has neither x nor y.

    Raises:
        PartyPlanError: They do not fit; a line for each fault.
    """

    def __init__(self, plan: PartyPlan, name: str, party: Party, task: str = "train") -> None:
        if name not in plan.parties:
            raise PartyPlanError(f"the plan has no party {name!r}; it has {', '.join(plan.parties)}")
        if task not in TASKS:
            raise PartyPlanError(f"parties can {', '.join(TASKS)}; received {task!r}")
        self.plan, self.name, self.party, self.task = plan, name, party, task
        own = plan.stages_of(name)
        models = party.models(stage.name for stage in own)
        self.optimizer, unknown = _optimizer(party)
        faults = [*self._data_faults(own), *_model_faults(models), *unknown]
        self.rows = None if faults else party.rows
        if faults:
            raise _faults(name, faults)
        self.stages = {stage.name: self._stage(stage, models[stage.name]) for stage in own}
        faults += self._training_faults()
        for stage in own:
            faults += self._look(stage)
        if faults:
            raise _faults(name, faults)
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable)

    @property
    def trainable(self) -> list[Any]:
        """All trainable variables, stage after stage."""
        return [variable for stage in self.stages.values() for variable in stage.trainable_variables]

    @property
    def variables(self) -> list[Any]:
        """Everything that training changes here: weights, statistics, seeds, the optimizer's, metrics."""
        found = [variable for stage in self.stages.values() for variable in stage.model.variables]
        found += [] if self.optimizer is None else list(self.optimizer.variables)
        return found + [variable for stage in self.stages.values() for variable in stage.heads.variables]

    @property
    def head(self) -> Head | None:
        """Loss and metrics, at the party with y."""
        return next((head for stage in self.stages.values() for head in stage.heads), None)

    def count_anew(self) -> None:
        """Reset all metrics, also those that have counted elsewhere and are not yet built into a head."""
        for metric in keras.tree.flatten(self.party.metrics):
            if isinstance(metric, keras.metrics.Metric):
                metric.reset_state()
        if self.head is not None:
            self.head.reset()

    def inputs(self, stage: str, rows: np.ndarray[Any, Any]) -> list[Any]:
        """A stage's own x of some rows, as tensors."""
        return [tf.constant(array[rows]) for array in self.party.x] if self.plan.stage(stage).x else []

    def weights(self, sizes: tuple[int, ...], targets: list[np.ndarray[Any, Any]]) -> tuple[float, ...]:
        """What each microbatch's loss weighs in the batch's."""
        assert self.head is not None
        return self.head.weights(sizes, targets, None)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Give all values back at the end of a block."""
        with values_put_back(self.variables), random_numbers_put_back():
            yield
        for stage in self.stages.values():
            stage.zero_gradients(failed=True)

    def _stage(self, stage: PartyStage, model: Any) -> Stage:
        own = len(self.party.x) if stage.x else 0
        wanted = [False] * own + [True] * len(self.plan.into(stage.name))
        heads = [Head(self.party.loss, self.party.metrics)] if stage.y else []
        try:
            return Stage(model, stage.name, heads=heads, input_gradients=wanted)
        except StageError as error:
            raise _faults(self.name, [str(error)]) from error

    def _data_faults(self, own: tuple[PartyStage, ...]) -> list[str]:
        party, found = self.party, []
        takes, judges = sum(stage.x for stage in own), any(stage.y for stage in own)
        if takes > 1:
            found.append("x goes into one stage of a party; several of its stages have x = true")
        if bool(party.x) != bool(takes):
            found.append("the plan says x = true, and there is no x" if takes else "there is x, and no stage takes it")
        if judges and party.y is None and self.task != "predict":
            found.append("the plan says y = true, and there is no y")
        if not judges and party.y is not None:
            found.append("there is y, and none of its stages has y = true")
        if judges and party.loss is None and self.task != "predict":
            found.append("the party with y has the loss, and there is none")
        if not judges and (party.loss is not None or party.metrics is not None):
            found.append("loss and metrics are for the party with y")
        if (party.x or party.y is not None) and party.ids is None:
            found.append("ids are missing: without them nobody knows whether the rows of two parties are the same")
        try:
            rows = party.rows
        except PartyPlanError as error:
            found.append(str(error))
        else:
            if rows is None and (takes or judges):
                found.append("there are no rows")
        return found

    def _training_faults(self) -> list[str]:
        found = []
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            found.append("loss scaling is decided over all variables; give each party an optimizer without it")
        if self.optimizer is None and self.trainable and self.task == "train":
            found.append("there are variables to train, and no optimizer; give one, or freeze the layers")
        shared = [id(variable) for stage in self.stages.values() for variable in stage.model.variables]
        if len(shared) != len(set(shared)):
            found.append("two stages share a layer: its gradients would have to be joined; make it two layers")
        if self.head is not None and self.plan.microbatches > 1 and self.task != "predict":
            loss, metrics = self.head.known
            if loss not in (Way.PARTS, Way.SUM):
                found.append(
                    "the loss is not known to be a mean or sum over samples; use one of Keras's, or microbatches = 1"
                )
            if metrics is not Way.PARTS:
                found.append("a metric is not known to count samples; use Keras's own, or microbatches = 1")
        for name, stage in self.stages.items():
            differs = why_training_would_differ(stage.model)
            if differs and self.task == "train":
                found.append(f"stages.{name}: {differs}")
            halves = [layer.name for layer in layers_of(stage.model) if layer.compute_dtype == "float16"]
            if halves and self.task == "train":
                found.append(f"stages.{name}: the layer {halves[0]!r} computes in float16, which needs loss scaling")
            kept = [layer.name for layer in layers_of(stage.model) if getattr(layer, "stateful", False)]
            if kept:
                found.append(f"stages.{name}: the layer {kept[0]!r} is stateful=True, which no party's batches can be")
        return found

    def _look(self, stage: PartyStage) -> list[str]:
        """Run a stage on few rows, and look at what it gives."""
        into, out = self.plan.into(stage.name), self.plan.out_of(stage.name)
        try:
            with _LOOKING, self.undisturbed(), recorded_calls(adding=True) as calls:
                opened = [self._tried(stage, into, place, size) for place, size in enumerate(_LOOK)]
        except StageError as error:
            return [f"stages.{stage.name}: {error}"]
        found, values = [], opened[0].values
        if opened[0].masked:
            found.append(
                f"stages.{stage.name}: its output has a Keras mask, which would be lost on the way; end the masking in "
                "this stage"
            )
        names = [f"edges.{edge.tensor}" for edge in out] or [f"stages.{stage.name}: what y judges"]
        if len(values) != len(names):
            return [*found, f"stages.{stage.name}: the model has {len(values)} outputs, the plan has {len(names)}"]
        for edge, value in zip(out, values, strict=False):
            shape, dtype = tuple(value.shape)[1:], value.dtype.name
            if (shape, dtype) != (edge.shape, edge.dtype) or value.shape[0] != _LOOK[0]:
                found.append(
                    f"edges.{edge.tensor}: the plan says {edge.dtype} {edge.shape}, the model gives {dtype} {shape}"
                )
        with _LOOKING:
            several = self.plan.microbatches > 1 and self.task == "train"
            added = no_mean(calls, len(_LOOK), training=True) if several else ""
        return found + ([f"stages.{stage.name}: {added}; use microbatches = 1"] if added else [])

    def _tried(self, stage: PartyStage, into: tuple[PartyEdge, ...], place: int, size: int) -> Opened:
        draw = np.random.default_rng(place)
        rows = np.arange(size) % (self.rows or 1)
        given = self.inputs(stage.name, rows)
        given += [tf.constant(draw.normal(size=(size, *e.shape)).astype(DTYPES[e.dtype])) for e in into]
        return self.stages[stage.name].forward_flat(given, PassKey(place), self.task == "train", size / sum(_LOOK))


def _model_faults(models: dict[str, Any]) -> list[str]:
    return [
        f"stages.{name}: the model is not built; begin it with keras.Input(shape), or call it once"
        for name, model in models.items()
        if isinstance(model, keras.Layer) and not model.built
    ]


def _optimizer(party: Party) -> tuple[Any, list[str]]:
    """The party's optimizer, and what of optimizer, loss and metrics Keras does not know."""
    optimizer, found = None, []
    words = [("optimizer", keras.optimizers.get, party.optimizer), ("loss", keras.losses.get, party.loss)]
    named = party.metrics if isinstance(party.metrics, list | tuple) else [party.metrics]
    words += [("metrics", keras.metrics.get, one) for one in named if isinstance(one, str) and one not in _SHORT]
    for what, get, given in words:
        try:
            made = None if given is None else get(given)
        except (ValueError, TypeError):
            found.append(f"{what}: Keras has none that is {given!r:.80}")
        else:
            optimizer = made if what == "optimizer" else optimizer
    return optimizer, found


def _faults(name: str, faults: list[str]) -> PartyPlanError:
    lines = [f"  {number}. {fault}" for number, fault in enumerate(faults, 1)]
    return PartyPlanError("\n".join([f"the party {name!r} does not fit the plan:", *lines]))


class LastCommit:
    """The values of a party's variables at its last commit: no copy until they change.

    Args:
        party: Whose.
    """

    def __init__(self, party: BoundParty) -> None:
        self._party = party
        self._held = [(variable, held_by(variable).read_value()) for variable in party.variables]

    def put_back(self) -> None:
        """Set everything to what it was; metrics that are new begin anew."""
        for stage in self._party.stages.values():
            stage.zero_gradients(failed=True)
        if self._party.head is not None:
            self._party.head.reset()
        for variable, value in self._held:
            held_by(variable).assign(value)


__all__ = ["TASKS", "BoundParty", "LastCommit"]
