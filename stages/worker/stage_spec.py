"""The specification of one stage for its worker: plain data and, as bytes, copies of the user's objects.

Written by the driver, sent at launch; the worker builds its `HostedStage` from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HeadSpec:
    """The objective of one output.

    Attributes:
        output: The tensor's name.
        label: The output's name for targets and sample weights.
        weight: The loss weight, or None.
        order: Its number among all outputs of the model, the order in which losses are added.
        named: Whether metrics are called after the output, since there are several.
    """

    output: str
    label: str
    weight: float | None = None
    order: int = 0
    named: bool = False


@dataclass(frozen=True)
class Tie:
    """A trainable variable that several stages have: one value, one gradient, the sum of theirs.

    Attributes:
        name: The same in all of these stages.
        place: Which of this stage's trainable variables it is.
        stages: The stages, ascending. The first is the owner: it sums, and reports the gradient.
    """

    name: str
    place: int
    stages: Sequence[int]


@dataclass(frozen=True)
class StageSpec:
    """The specification of one stage for its worker.

    Attributes:
        index: The stage's number.
        name: Its name.
        objects: The user's objects (`StageObjects.packed`).
        inputs: (tensor name, producing stage or DRIVER) in the order of the model's inputs.
        outputs: (tensor name, consuming stages ascending) in the order of the model's outputs.
        states: Names of the states that the stage hands to its own next window, behind its inputs and outputs.
        keeps_state: Whether the next batch begins with the states that the one before it left.
        finals: Which of the outputs (by name) are outputs of the whole model.
        heads: The objectives of outputs.
        ties: Trainable variables that other stages have too.
        undecayed: Trainable variables (by place) that weight decay leaves out, besides those that its names say.
        run_eagerly: Eager tapes or compiled functions.
        recompute: Keep inputs only, compute the forward pass again in backward.
        seed: For the builder's initialisers; None leaves the process's own.
        paths: The paths of the model's variables, in order, as they are in the user's own model, which may hold this
            one's layers in folders (models inside models); empty where the model is built by its worker.
    """

    index: int
    name: str
    objects: bytes
    inputs: Sequence[tuple[str, int]]
    outputs: Sequence[tuple[str, Sequence[int]]]
    states: Sequence[str] = ()
    keeps_state: bool = False
    finals: Sequence[str] = ()
    heads: Sequence[HeadSpec] = ()
    ties: Sequence[Tie] = ()
    undecayed: Sequence[int] = ()
    run_eagerly: bool = False
    recompute: bool = False
    seed: int | None = None
    paths: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON, and bytes."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> StageSpec:
        """From JSON, and bytes."""
        heads = tuple(HeadSpec(**head) for head in data["heads"])
        ties = tuple(Tie(**tie) for tie in data["ties"])
        return cls(**{**data, "heads": heads, "ties": ties})
