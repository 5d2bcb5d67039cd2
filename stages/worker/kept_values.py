"""A stage's values set aside and put back: what makes a look at a running stage leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.put_back import quick_read
from stages.recipe.held_attributes import HeldAttributes
from stages.tape.tensors import to_array
from stages.worker import snapshot
from stages.worker.hosted_stage import HostedStage

EVERYTHING = ("model", "optimizer", "metrics", "besides", "layer states")
"""All of a stage's variables, as `HostedStage.variables` calls them."""
CHANGED_BY_STEPS = ("states", "metrics", "besides")
"""Those that a step changes by itself: statistics, seeds, layer states, metrics, and variables of the user's losses."""


class Kept:
    """Copies of a stage's variables, and of the states that it keeps for its next batch.

    Args:
        hosted: The stage.
        groups: Which variables.
    """

    def __init__(self, hosted: HostedStage, groups: Sequence[str] = EVERYTHING) -> None:
        self._hosted = hosted
        self._values = {group: snapshot.read(hosted.variables(group)) for group in groups}
        self._attributes = HeldAttributes(hosted.metrics_of_own_classes if "metrics" in groups else ())
        carried = hosted.stage.carried
        self._states = None if carried is None else carried.kept

    def put_back(self) -> None:
        """Set everything to what it was; metrics that did not exist yet begin anew."""
        self._attributes.put_back()
        for group, values in self._values.items():
            variables = self._hosted.variables(group)
            if group == "metrics" and len(values) != len(variables):
                self._hosted.heads.reset()
                inner = [v for metric in self._hosted.inner_metrics for v in metric.variables]  # listed last
                snapshot.write(inner, values[len(values) - len(inner) :], group)
            else:
                snapshot.write(variables, values, group)
        if self._hosted.stage.carried is not None and self._states is not None:
            self._hosted.stage.carried.kept = self._states

    def changed(self) -> list[str]:
        """Paths of the variables, and "kept states", whose bits are not what they were."""
        found: list[str] = []
        for group, values in self._values.items():
            variables = self._hosted.variables(group)
            if len(variables) != len(values):
                continue  # metrics that did not exist: a fresh one has counted nothing
            found += [
                snapshot.path_of(variable)
                for variable, before, now in zip(variables, values, snapshot.read(variables), strict=True)
                if before.tobytes() != now.tobytes()
            ]
        carried = self._hosted.stage.carried
        if carried is not None and self._states is not None and _bits(carried.kept) != _bits(self._states):
            found.append("kept states")
        return found


class Undo:
    """The values that a step changes by itself, held so that it can be undone: KBs, and no copy until they change.

    Args:
        hosted: The stage, before the step.
        updates: Whether updates are undone too: then a copy of all weights and slots is held as soon as they change.
    """

    def __init__(self, hosted: HostedStage, updates: bool = False) -> None:
        self._hosted = hosted
        changed = [*_changed_by_steps(hosted), *(_changed_by_updates(hosted) if updates else ())]
        self._held = {id(one): (one, quick_read(one)) for one in changed}
        self._attributes = HeldAttributes(hosted.metrics_of_own_classes)
        self._states = None if hosted.stage.carried is None else hosted.stage.carried.kept

    def put_back(self) -> None:
        """Set them to what they were, and forget gradients and open tapes; metrics that are new begin anew."""
        self._hosted.stage.zero_gradients(failed=True)
        self._attributes.put_back()
        if any(id(variable) not in self._held for variable in _changed_by_steps(self._hosted)):
            self._hosted.reset_metrics()
        for variable, value in self._held.values():
            variable.assign(value)
        if self._hosted.stage.carried is not None and self._states is not None:
            self._hosted.stage.carried.kept = self._states


def _changed_by_steps(hosted: HostedStage) -> list[Any]:
    """TensorFlow's variables of statistics, seeds, metrics, and of the user's losses."""
    return [getattr(one, "value", one) for group in CHANGED_BY_STEPS for one in hosted.variables(group)]


def _changed_by_updates(hosted: HostedStage) -> list[Any]:
    """TensorFlow's variables of the model and its optimizer."""
    return [getattr(one, "value", one) for group in ("model", "optimizer") for one in hosted.variables(group)]


def _bits(kept: Any) -> list[list[tuple[str, tuple[int, ...], bytes]]]:
    """Dtype, shape and bits of every state, microbatch by microbatch."""
    arrays = [[to_array(state) for state in kept[k]] for k in sorted(kept)]
    return [[(array.dtype.name, array.shape, array.tobytes()) for array in one] for one in arrays]
