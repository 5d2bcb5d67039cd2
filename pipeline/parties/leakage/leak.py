"""A measured leak: what crossed where, how well which attack read it, and what nothing and everything would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stages.worker.observers import ACTIVATION, GRADIENT

INPUTS, LABELS = "inputs", "labels"


@dataclass(frozen=True)
class Measure:
    """A measure of leakage.

    Attributes:
        about: `INPUTS` or `LABELS`.
        through: What is read: ``"activation"`` or ``"gradient"``.
        name: Its name.
        nothing: Its value where nothing leaks and there are very many rows; None where that depends on the data.
        everything: Its value where all is read.
        told: What it is, in words.
    """

    about: str
    through: str
    name: str
    nothing: float | None
    everything: float
    told: str


_AREA = "area under the ROC curve of the worst class"
MEASURES: Final = (
    Measure(LABELS, GRADIENT, "norm", 0.5, 1.0, f"{_AREA}, by the gradient's norm"),
    Measure(LABELS, GRADIENT, "cosine", 0.5, 1.0, f"{_AREA}, by the angle to one known row"),
    Measure(LABELS, GRADIENT, "spectral", 0.5, 1.0, f"{_AREA}, along the main direction, nothing known"),
    Measure(LABELS, ACTIVATION, "logistic", 0.5, 1.0, f"{_AREA}, by logistic regression on half of the rows"),
    Measure(LABELS, ACTIVATION, "clusters", None, 1.0, "accuracy of clusters that know no label"),
    Measure(LABELS, ACTIVATION, "commonest", None, 1.0, "accuracy of naming all rows alike, for comparison"),
    Measure(INPUTS, ACTIVATION, "dcor²", 0.0, 1.0, "squared distance correlation, bias-corrected"),
    Measure(INPUTS, ACTIVATION, "ridge", 0.0, 1.0, "R² of inputs drawn again by ridge regression from half of them"),
    Measure(INPUTS, ACTIVATION, "nearest", 0.0, 1.0, "R² of inputs drawn again from the nearest known rows"),
    Measure(INPUTS, ACTIVATION, "column", 0.0, 1.0, "R² of the single column of inputs that is drawn best"),
    Measure(INPUTS, ACTIVATION, "psnr", None, float("inf"), "decibels of the better drawing"),
    Measure(INPUTS, ACTIVATION, "ssim", 0.0, 1.0, "likeness of the better drawing to the image"),
)
BY_NAME: Final = {measure.name: measure for measure in MEASURES}


@dataclass(frozen=True)
class LeakPath:
    """The path of a tensor across a cut, to the stage that can read it.

    Attributes:
        what: ``"activation"`` or ``"gradient"``.
        sender: Name of the stage that sends it.
        receiver: Name of the stage that gets it.
        tensor: The tensor's name.
    """

    what: str
    sender: str
    receiver: str
    tensor: str


@dataclass(frozen=True)
class Leak:
    """One measured value.

    Attributes:
        epoch: From 1, as Keras's progress bar counts.
        crossing: What was read.
        measure: By what.
        target: The name of the input or output that was read off.
        value: The measure's value.
        nothing: What it would be if nothing leaked: of attacks on labels measured, on labels dealt out anew.
        rows: How many rows it was measured on.
    """

    epoch: int
    crossing: LeakPath
    measure: Measure
    target: str
    value: float
    nothing: float | None
    rows: int


def read_of_all(leak: Leak) -> float:
    """How far a leak is from nothing, 0, to everything, 1; below 0 where an attacker is worse than one who guesses."""
    nothing = leak.nothing or 0.0
    return (leak.value - nothing) / max(leak.measure.everything - nothing, 1e-9)
