"""A stage as a worker hosts it: the `FlatStage`, where its tensors come from and go to, its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import keras
import numpy as np

from stages.errors import SegmentError
from stages.flat_stage import FlatStage
from stages.grid import is_over_time
from stages.keras_internals import layers_of
from stages.loss.head import Head
from stages.loss.heads import Heads
from stages.loss.ways import Ways
from stages.recipe.optimizer_state import as_unbuilt, leave_undecayed, set_attributes
from stages.recipe.segment import build_part
from stages.recipe.stage_objects import Judging, StageObjects
from stages.tape.model_call import changed_by_calls, metrics_of_layers, states_of_layers
from stages.tape.optimizer_update import rescaled
from stages.variable_names import unique_names
from stages.worker import snapshot
from stages.worker.description import NOT_TRAINED, StageDescription, TensorInfo, VariableInfo
from stages.worker.stage_spec import HeadSpec, StageSpec
from transport.message import DRIVER


class HostedStage:
    """A built stage with its surroundings.

    Args:
        spec: What the driver says of it.
        updates: Whether it has an optimizer of its own.

    Attributes:
        objects: Copies of the user's objects: part, losses, metrics, optimizer.
    """

    def __init__(self, spec: StageSpec, updates: bool = True) -> None:
        self.spec = replace(spec, objects=b"")
        self._found: dict[str, tuple[int | None, list[Any]]] = {}
        self._over_time: dict[tuple[str, int], bool] = {}
        if spec.seed is not None:
            keras.utils.set_random_seed(spec.seed)
        self.objects = StageObjects.of(spec.objects)
        model = build_part(self.objects.part, spec.name)
        self.labels = [head.label for head in spec.heads]
        self.ties = spec.ties
        self.stage = FlatStage(
            model,
            spec.name,
            run_eagerly=spec.run_eagerly,
            recompute=spec.recompute,
            input_gradients=[source != DRIVER for _, source in spec.inputs],
            heads=[self._head(*both) for both in zip(spec.heads, self.objects.judging, strict=True)],
            consumed=[bool(consumers) for _, consumers in spec.outputs],
            tied=[tie.place for tie in self.ties],
            states=spec.states,
        )
        if self.stage.carried is not None:
            self.stage.carried.persists = spec.keeps_state
        self._check_arity()
        for tie in self.ties:
            if tie.stages[0] != spec.index:
                self.stage.trainable_variables[tie.place].regularizer = None  # counts once, in the owner
        self.stage.settle()
        self.unmasked: frozenset[tuple[str, int]] = frozenset()
        """(tensor, consumer) pairs that get no mask, since an earlier consumer takes it off; see `Part.strips`."""
        self.prediction_masks: dict[int, list[np.ndarray[Any, Any]]] = {}
        """{output: its masks per microbatch}, for the denominators of masked means."""
        self.update_times: tuple[float, float] | None = None
        """(begin, end) of the last update, seconds of this process's monotonic clock; None before the first."""
        self.optimizer: Any = self.objects.optimizer if updates else None
        if self.optimizer is not None:
            self._build_optimizer()

    @property
    def heads(self) -> Heads:
        """The objectives of the stage's outputs."""
        return self.stage.heads

    def _head(self, spec: HeadSpec, judging: Judging) -> Head:
        place = [name for name, _ in self.spec.outputs].index(spec.output)
        label = spec.label if spec.named else None
        given = (judging.loss, judging.metrics, judging.weighted_metrics)
        for metric in keras.tree.flatten([judging.metrics, judging.weighted_metrics]):
            if isinstance(metric, keras.metrics.Metric) and metric.variables:
                metric.reset_state()  # the user's own may have counted already
        return Head(*given, place=place, label=label, weight=spec.weight if judging.weight is None else judging.weight)

    @property
    def inner_metrics(self) -> list[Any]:
        """The metrics that layers of the model update when they are called, each once."""
        return self._once_a_trace("inner", lambda: metrics_of_layers(self.stage.model))

    def _once_a_trace(self, what: str, find: Callable[[], list[Any]]) -> list[Any]:
        """What is found in the model's layers, looked for again after every new trace: only there can it change.

        A model that is run eagerly may make variables in any call, and is looked through each time.
        """
        traces = self.stage.traces
        known = self._found.get(what)
        if known is None or traces is None or known[0] != traces:
            known = self._found[what] = (traces, find())
        return known[1]

    @cached_property
    def metrics_of_own_classes(self) -> list[Any]:
        """The metric objects of the stage's outputs whose classes are not Keras's, each once."""
        given = keras.tree.flatten([[one.metrics, one.weighted_metrics] for one in self.objects.judging])
        metrics = {id(one): one for one in given if isinstance(one, keras.metrics.Metric)}.values()
        return [one for one in metrics if not type(one).__module__.startswith("keras.")]

    def inner_results(self) -> dict[str, Any]:
        """Their values so far, by the names that Keras's logs give them."""
        found: dict[str, Any] = {}
        for metric in self.inner_metrics:
            result = metric.result()
            found |= result if isinstance(result, dict) else {metric.name: result}
        return {name: np.asarray(value).tolist() for name, value in found.items()}

    def reset_metrics(self) -> None:
        """Let all metrics count anew."""
        self.heads.reset()
        for metric in self.inner_metrics:
            metric.reset_state()

    def go(self, ways: Mapping[str, Ways]) -> None:
        """Say how losses and metrics are made of microbatches, by the outputs' labels; the others as they are known."""
        self.heads.go([ways.get(label) for label in self.labels])

    def takes_over_time(self, place: int) -> bool:
        """Whether an input has the time as its second axis."""
        return self._is_over_time("inputs", place)

    def gives_over_time(self, place: int) -> bool:
        """Whether an output has the time as its second axis."""
        return self._is_over_time("outputs", place)

    def _is_over_time(self, what: str, place: int) -> bool:
        if (what, place) not in self._over_time:
            self._over_time[what, place] = is_over_time(_shape_of(self.stage.model, what, place))
        return self._over_time[what, place]

    def _check_arity(self) -> None:
        """Refuse a segment whose names do not match its model."""
        for label, names in (("input", self.spec.inputs), ("output", self.spec.outputs)):
            tensors = getattr(self.stage.model, f"{label}s", None)
            if tensors is not None and len(tensors) != len(names) + len(self.spec.states):
                raise SegmentError(
                    f"stage {self.spec.name!r}: the segment names {len(names)} {label}(s) "
                    f"({', '.join(name for name, _ in names)}), its model has {len(tensors)}"
                    + (f" with {len(self.spec.states)} state(s)" if self.spec.states else "")
                )

    def variables(self, what: str) -> list[Any]:
        """The variables that a name stands for.

        Args:
            what: ``model`` (all of the model's, seed states included), ``model 3`` (one of them, by place), ``weights``
                (what Keras's `get_weights` gives), ``optimizer``, ``count`` (of its updates), ``metrics``, ``states``
                (what a forward pass changes by itself), ``layer states`` (of stateful layers), or ``besides`` (what
                came along with losses and layers and is none of the model's).
        """
        model = self.stage.model
        if what.startswith("model "):
            return [model.variables[int(what.removeprefix("model "))]]
        found: dict[str, Callable[[], Any]] = {
            "model": lambda: model.variables,
            "weights": lambda: model.weights,
            "optimizer": lambda: [] if self.optimizer is None else self.optimizer.variables,
            "count": lambda: [v for v in found["optimizer"]() if v.name == "iteration"],
            "metrics": lambda: [*self.heads.variables, *(v for m in self.inner_metrics for v in m.variables)],
            "states": lambda: self._once_a_trace("states", lambda: changed_by_calls(model)),
            "layer states": lambda: states_of_layers(model),
            "besides": lambda: self.objects.variables,
        }
        return list(found[what]())

    def set(self, what: str, values: Sequence[np.ndarray[Any, Any]]) -> None:
        """Write the variables that a name stands for, after all values were checked.

        Raises:
            HandoffError: The number of values, or a shape, does not fit; nothing was written.
        """
        snapshot.write(self.variables(what), values, f"stage {self.spec.name!r}")
        if what in ("model", "weights") and self.optimizer is not None and not self._has_stepped():
            self.optimizer = as_unbuilt(self.optimizer)
            self._build_optimizer()  # some slots (ScheduleFreeAdamW) begin as copies of the weights

    def reset_state(self) -> None:
        """Forget the states that the last batch left: those handed on, and those in variables of stateful layers."""
        if self.stage.carried is not None:
            self.stage.carried.reset()
        for state in states_of_layers(self.stage.model):
            state.assign(keras.ops.zeros_like(state.value))

    def adjust_optimizer(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the optimizer, which the next update reads."""
        set_attributes(self.optimizer, attributes)
        self.stage.forget_updates()

    def _build_optimizer(self) -> None:
        variables = self.stage.trainable_variables
        if self.spec.undecayed:
            leave_undecayed(self.optimizer, [variables[place] for place in self.spec.undecayed])
        self.optimizer.build(variables)

    def _has_stepped(self) -> bool:
        return any(variable.name == "iteration" and int(variable) for variable in self.optimizer.variables)

    def variable_names(self) -> list[str]:
        """A name for each of the model's variables: its path in the user's own model, ``#2`` behind repeated ones."""
        return unique_names(self.spec.paths or [variable.path for variable in self.stage.model.variables])

    def describe(self) -> StageDescription:
        """What the driver should know of the built stage: names, shapes, dtypes, slots."""
        model, trainable = self.stage.model, self.stage.trainable_variables
        index = {id(variable): i for i, variable in enumerate(trainable)}
        variables = self.variables("model")
        weights = {id(weight) for weight in model.weights}
        return StageDescription(
            variables=tuple(
                VariableInfo(
                    name,
                    variable.dtype,
                    tuple(variable.shape),
                    place=index.get(id(variable), NOT_TRAINED),
                    is_weight=id(variable) in weights,
                )
                for name, variable in zip(self.variable_names(), variables, strict=True)
            ),
            slots=() if self.optimizer is None else tuple(snapshot.optimizer_slots(self.optimizer, trainable)),
            masks=makes_masks(model),
            mean_loss=any(head.is_mean for head in self.heads),
            inputs=_tensor_infos(getattr(model, "inputs", None)),
            outputs=_tensor_infos(getattr(model, "outputs", None)),
        )

    def squared_norms(self, loss_scale: float = 1.0) -> dict[int, float]:
        """{place of a variable: sum of squares of its gradient}, for clipping by the norm over all stages.

        As in Keras: of what the optimizer gets, so that an embedding's rows are squared before they are summed. Those
        of variables that an earlier stage has too are that stage's.

        Args:
            loss_scale: How much too large the accumulated gradients are.
        """
        given = {k: g for k, g in enumerate(self.stage.as_given()) if g is not None and k not in self._others}
        divided = rescaled(list(given.values()), None, None if loss_scale == 1 else loss_scale)
        return {k: float(keras.ops.sum(keras.ops.square(g))) for k, g in zip(given, divided, strict=True)}

    def all_finite(self) -> bool:
        """Whether no accumulated gradient has an infinity or a NaN, for loss scaling."""
        return all(bool(np.isfinite(g).all()) for g in self._own_gradients())

    @property
    def _others(self) -> frozenset[int]:
        """Which variables (by place) belong to an earlier stage."""
        return frozenset(tie.place for tie in self.ties if tie.stages[0] != self.spec.index)

    def _own_gradients(self) -> Iterator[np.ndarray[Any, Any]]:
        others = self._others
        return (g for place, g in enumerate(self.gradients()) if g is not None and place not in others)

    def gradients(self) -> list[np.ndarray[Any, Any] | None]:
        """Accumulated gradients in the order of the trainable variables."""
        return [None if g is None else np.array(g) for g in self.stage.accumulated()]


def makes_masks(model: Any) -> bool:
    """Whether a model may begin a mask (most layers only pass one on)."""
    return any(_begins_mask(layer) for layer in layers_of(model))


def _begins_mask(layer: Any) -> bool:
    if isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False):
        return True
    foreign = type(layer).__module__.split(".")[0] not in ("keras", "stages")
    return foreign and type(layer).compute_mask is not keras.Layer.compute_mask


def _shape_of(model: Any, what: str, place: int) -> Sequence[int | None] | None:
    tensors = getattr(model, what, None)
    return None if tensors is None else tuple(tensors[place].shape)


def _tensor_infos(tensors: Sequence[Any] | None) -> tuple[TensorInfo, ...] | None:
    """Dtype and shape of symbolic tensors."""
    if tensors is None:
        return None
    return tuple(TensorInfo(keras.backend.standardize_dtype(t.dtype), tuple(t.shape)) for t in tensors)
