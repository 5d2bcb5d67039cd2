"""The results of the three witnesses, as plain data that travels from the reference to the driver.

Nothing here imports TensorFlow: the reference's process fills these in, the driver's compares with them. On the wire a
result is a JSON description and a list of arrays (`to_wire`, `from_wire`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Wire = tuple[dict[str, Any], list[Array]]
"""A JSON description, and the arrays that it refers to by their numbers."""


class CutPlace(NamedTuple):
    """The place where a gradient crosses between two stages.

    Attributes:
        producer: The stage whose output the tensor is.
        tensor: Its name.
        consumer: The stage that sends the gradient back.
        microbatch: Number.
        window: Number.
    """

    producer: int
    tensor: str
    consumer: int
    microbatch: int
    window: int


class Size(NamedTuple):
    """The length of the sums that a gradient is made of, for tolerances.

    Attributes:
        terms: Numbers that are added up on the longest way from the inputs to the loss and back.
        dtype: What the model computes in: the dtype with the fewest digits in it.
    """

    terms: int = 1
    dtype: str = "float32"


ONE = Size()
"""Of a sum of one number."""


@dataclass
class WitnessGradients:
    """Gradients that a witness expects.

    Attributes:
        gradients: {stage: dL/dvariable for each trainable variable, None where L does not depend on it}. A variable
            that several stages have carries the sum of all uses in each of them.
        boundary: {cut: dL/dtensor as this consumer should send it, or None}, with the loss scale in it, as what crosses
            a cut has; empty where the witness has no cuts.
        size: How long its sums are.
        rounding: How far the model's own gradients are from those of its float64 twin, as a part of the largest
            |dL/dvariable|: what even one tape is wrong by. 0 where there is no twin.
        rounding_at_cuts: The same of dL/dtensor at cuts.
        loss: The loss of the batch, own losses included; NaN without one.
        refusal: Why the witness cannot be made for this model and batch, naming stage and layer; "" if it was made.
        note: What it cost, in words.
    """

    gradients: dict[int, list[Array | None]] = field(default_factory=dict)
    boundary: dict[CutPlace, Array | None] = field(default_factory=dict)
    size: Size = ONE
    rounding: float = 0.0
    rounding_at_cuts: float = 0.0
    loss: float = float("nan")
    refusal: str = ""
    note: str = ""

    def to_wire(self) -> Wire:
        """As a JSON description and arrays."""
        arrays = _Arrays()
        description = {
            "gradients": [[stage, [arrays.put(g) for g in each]] for stage, each in self.gradients.items()],
            "boundary": [[list(cut), arrays.put(g)] for cut, g in self.boundary.items()],
            "size": list(self.size),
            "rounding": [self.rounding, self.rounding_at_cuts],
            "loss": repr(self.loss),
            "refusal": self.refusal,
            "note": self.note,
        }
        return description, arrays.found

    @classmethod
    def from_wire(cls, description: Mapping[str, Any], arrays: Sequence[Array]) -> WitnessGradients:
        """What `to_wire` was called on."""

        def array(number: int | None) -> Array | None:
            return None if number is None else arrays[number]

        return cls(
            {stage: [array(number) for number in each] for stage, each in description["gradients"]},
            {CutPlace(*cut): array(number) for cut, number in description["boundary"]},
            Size(*description["size"]),
            rounding=description["rounding"][0],
            rounding_at_cuts=description["rounding"][1],
            loss=float(description["loss"]),
            refusal=description["refusal"],
            note=description["note"],
        )


class Direction(NamedTuple):
    """The derivative of the loss along one direction of one variable.

    Attributes:
        stage: Of the variable.
        place: Which of the stage's trainable variables.
        number: Of the direction; see `direction`.
        derivative: By finite differences.
        error: An estimate of how far that may be from the derivative: truncation, rounding, kinks.
        own: The same by one tape over the float64 model. Where it differs, the model's gradient is not the derivative
            of what the model computes (`stop_gradient`, a custom gradient, rounding), and nothing can be said.
    """

    stage: int
    place: int
    number: int
    derivative: float
    error: float
    own: float


@dataclass
class Differences:
    """Directional derivatives by finite differences.

    Attributes:
        directions: One entry per variable and direction.
        seed: Of the directions.
        largest: Largest |dL/dvariable| of the float64 model.
        size: How long its sums are.
        rounding: As in `WitnessGradients`.
        loss: The loss of the batch in float64, own losses included.
        refusal: Why they cannot be made, naming stage and layer; "" if they were.
        note: What it cost, in words.
    """

    directions: list[Direction] = field(default_factory=list)
    seed: int = 0
    largest: float = 0.0
    size: Size = ONE
    rounding: float = 0.0
    loss: float = float("nan")
    refusal: str = ""
    note: str = ""

    def to_wire(self) -> Wire:
        """As a JSON description and arrays: the directions' numbers are one (n, 3) and one (n, 3) array."""
        where = np.array([one[:3] for one in self.directions], np.int64).reshape(-1, 3)
        values = np.array([one[3:] for one in self.directions], np.float64).reshape(-1, 3)
        description = {
            "seed": self.seed,
            "largest": repr(self.largest),
            "size": list(self.size),
            "rounding": self.rounding,
            "loss": repr(self.loss),
            "refusal": self.refusal,
            "note": self.note,
        }
        return description, [where, values]

    @classmethod
    def from_wire(cls, description: Mapping[str, Any], arrays: Sequence[Array]) -> Differences:
        """What `to_wire` was called on."""
        where, values = arrays
        return cls(
            [Direction(*map(int, a), *map(float, b)) for a, b in zip(where, values, strict=True)],
            description["seed"],
            float(description["largest"]),
            Size(*description["size"]),
            description["rounding"],
            float(description["loss"]),
            description["refusal"],
            description["note"],
        )


def direction(seed: int, stage: int, place: int, number: int, shape: Sequence[int]) -> Array:
    """A random direction of one variable, the same in every process.

    Args:
        seed: Of all directions.
        stage: The stage's number.
        place: Which of its trainable variables.
        number: Which direction of it.
        shape: The variable's.

    Returns:
        float64 of that shape, with an L2 norm of 1.
    """
    drawn = np.random.default_rng([seed, stage, place, number]).standard_normal(tuple(shape))
    norm = float(np.linalg.norm(drawn))
    return np.asarray(drawn / norm if norm else drawn)


class _Arrays:
    """Arrays in the order in which they were put."""

    def __init__(self) -> None:
        self.found: list[Array] = []

    def put(self, array: Array | None) -> int | None:
        if array is None:
            return None
        self.found.append(array)
        return len(self.found) - 1


__all__ = ["CutPlace", "Differences", "Direction", "Size", "WitnessGradients", "direction"]
