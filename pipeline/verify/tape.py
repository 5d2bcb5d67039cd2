"""Judge a step by one tape: all that crosses a cut, losses, dL/dvariables; and by itself: what arrived was sent so.

Where in the flow something is decides what is called the first deviation:

    (0, microbatch, window, stage)      forward: what arrives at a stage, then what it gives
    (1, stage)                          losses
    (2, microbatch, -window, -stage)    backward: what comes back to a stage, then what it gives
    (3, -stage, variable)               sums over microbatches
    (3, 1, phase, stage)                those of tied variables: to the owner, its sum, to the copies, theirs
    (4, step, ...)                      updates
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.batch.step import StepResult
from pipeline.compare.compare import FlowOrder, Judged, Pair, judge, largest
from pipeline.compare.tolerance import Tolerance
from stages.loss.precision import loss_number
from stages.worker.observers import ACTIVATION, GRADIENT, MASK, SHARED, Sight

Array = np.ndarray[Any, Any]
Sights = Mapping[Sight, Array | None]
FORWARD, LOSS, BACKWARD, SUMS, UPDATE = range(5)


@dataclass(frozen=True)
class Observed:
    """One step, as the pipeline or the reference made it.

    Attributes:
        result: Losses and more.
        gradients: {stage: dL/dvariable of each trainable variable}.
        seen: What was at the cuts.
    """

    result: StepResult
    gradients: Mapping[int, Sequence[Array | None]]
    seen: Sights


@dataclass(frozen=True)
class Names:
    """The names of stages and variables.

    Attributes:
        stages: By number.
        variables: {(stage, index among its trainable variables): "<stage>/<path>"}.
        tied: Of these, those that other stages have too, and whether the stage is their owner.
        judges: {output label: the stage that has its loss}.
    """

    stages: Sequence[str]
    variables: Mapping[tuple[int, int], str]
    tied: Mapping[tuple[int, int], bool]
    judges: Mapping[str, int]


class Allowance:
    """The tolerance of each kind of comparison.

    Args:
        run_eagerly: Whether stages run eager tapes.
        roundings: What compiling alone changes in the reference, by kind.
        given: The user's own tolerance.
    """

    def __init__(self, run_eagerly: bool, roundings: Mapping[str, float], given: float | None) -> None:
        self._run_eagerly, self._roundings, self._given = run_eagerly, roundings, given

    def of(self, kind: str, dtype: str = "float32") -> Tolerance:
        """For a kind of `StepResult.roundings`, of a dtype."""
        if self._given is not None:
            return Tolerance(self._given, "as given")
        return Tolerance.default(self._run_eagerly, self._roundings.get(kind, 0.0), dtype)

    def to(self, kind: str, parts: Iterable[Pair]) -> Tolerance:
        """For what these parts hold."""
        some = next((a for part in parts for a in (part.theirs, part.ours) if a is not None), None)
        if some is not None and some.dtype.kind in "biu":
            return Tolerance.bits()
        return self.of(kind, "float32" if some is None else some.dtype.name)


def flow_order(sight: Sight) -> FlowOrder:
    """Where in the flow it was seen."""
    forward = sight.what in (ACTIVATION, MASK)
    at = sight.producer if forward == sight.sent else sight.consumer
    if sight.what == SHARED:  # the owner is the first stage that has the variable
        to_owner = sight.consumer < sight.producer
        return (SUMS, 1, 0 if to_owner else 2, sight.consumer)
    if forward:
        return (FORWARD, sight.microbatch, sight.window, at, int(sight.sent))
    return (BACKWARD, sight.microbatch, -sight.window, -at, int(sight.sent))


def order_of_sum(names: Names, stage: int, place: int) -> FlowOrder:
    """Where in the flow a variable's gradient is complete; that of a tied one with its owner first, then in copies."""
    owns = names.tied.get((stage, place))
    return (SUMS, -stage, place) if owns is None else (SUMS, 1, 1 if owns else 3, stage, place)


def where(sight: Sight) -> str:
    """Its microbatch and window, in words."""
    window = f", window {sight.window}" if sight.window else ""
    return f"microbatch {sight.microbatch}{window}"


def hand_off(seen: Sights, names: Names) -> list[Judged]:
    """What arrived beside what was sent."""
    found = []
    for (what, producer, consumer, tensor), sights in _groups(seen).items():
        backward = what == GRADIENT
        receiver, sender = (producer, consumer) if backward else (consumer, producer)
        parts = [
            Pair(
                seen.get(sight._replace(sent=False)),
                seen.get(sight._replace(sent=True)),
                flow_order(sight._replace(sent=False)),
                where(sight),
            )
            for sight in sights
        ]
        kind = "received output gradient" if backward or what == SHARED else "received activation"
        found.append(
            judge(
                "hand-off",
                kind,
                names.stages[receiver],
                _named(what, tensor),
                parts,
                Tolerance.bits(),
                peer=names.stages[sender],
            )
        )
    return found


def at_cuts(ours: Sights, theirs: Sights, names: Names, allowed: Allowance) -> list[Judged]:
    """What every stage gives to others beside what one tape has there."""
    judged = []
    scale = largest(a for sight, a in theirs.items() if sight.what == GRADIENT)
    groups = _groups({sight: None for sight in (*theirs, *ours) if sight.sent and sight.what != SHARED})
    for (what, producer, consumer, tensor), sights in groups.items():
        backward = what == GRADIENT
        giver, other = (consumer, producer) if backward else (producer, consumer)
        parts = [Pair(ours.get(sight), theirs.get(sight), flow_order(sight), where(sight)) for sight in sights]
        judged.append(
            judge(
                "tape",
                "output gradient" if backward else "activation",
                names.stages[giver],
                _named(what, tensor),
                parts,
                allowed.to(f"{what} at a cut", parts),
                scale=scale if backward else None,
                peer=names.stages[other],
                zero_is_none=backward,
            )
        )
    return judged


def losses(ours: StepResult, theirs: StepResult, names: Names, tolerance: Tolerance) -> list[Judged]:
    """Every output's loss and every stage's own losses, then their sum."""
    found = []

    def add(stage: int, name: str, a: float | None, b: float | None) -> None:
        place = stage if stage >= 0 else len(names.stages)
        part = Pair(_scalar(a), _scalar(b), (LOSS, place))
        title = names.stages[stage] if stage >= 0 else ""
        found.append(judge("tape", "loss", title, name, [part], tolerance, scale=max(abs(b or 0.0), total)))

    total = abs(theirs.loss or 0.0)
    for label in theirs.losses:
        add(names.judges.get(label, -1), label, ours.losses.get(label), theirs.losses[label])
    for stage in sorted({*ours.own_losses, *theirs.own_losses}):
        title = f"{names.stages[stage]}: own losses"
        add(stage, title, ours.own_losses.get(stage), theirs.own_losses.get(stage))
    add(-1, "loss", ours.loss, theirs.loss)
    return found


def variable_gradients(ours: Observed, theirs: Observed, names: Names, allowed: Allowance) -> list[Judged]:
    """dL/dvariables of every stage, relative to the largest of the model."""
    scale = largest(g for part in theirs.gradients.values() for g in part)
    judged = []
    for (i, k), name in names.variables.items():
        parts = [Pair(ours.gradients[i][k], theirs.gradients[i][k], order_of_sum(names, i, k))]
        tolerance = allowed.to("gradient", parts)
        judged.append(judge("tape", "gradient", names.stages[i], name, parts, tolerance, scale=scale))
    return judged


def _named(what: str, tensor: str) -> str:
    return f"{tensor} (mask)" if what == MASK else tensor


def _scalar(value: float | None) -> Array | None:
    return None if value is None else np.asarray(loss_number(value))


def _groups(seen: Iterable[Sight]) -> dict[tuple[str, int, int, str], list[Sight]]:
    """Sights by what crosses where, each microbatch and window once."""
    found: dict[tuple[str, int, int, str], dict[Sight, None]] = {}
    for sight in seen:
        place = (sight.what, sight.producer, sight.consumer, sight.tensor)
        found.setdefault(place, {})[sight._replace(sent=True)] = None
    return {place: sorted(sights) for place, sights in found.items()}
