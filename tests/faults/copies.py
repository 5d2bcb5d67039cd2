"""Faults in the copies of the user's objects, which workers and reference get alike: each is another model than the
user's, and right in itself. Only the user's own objects can tell; the check "own" must, and name where it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras

from pipeline.compiled.compiled import Compiled
from stages.keras_internals import layers_of
from stages.recipe.stage_objects import StageObjects
from tests.faults.cases import CASES, Case
from tests.faults.live import replaced

Context = AbstractContextManager[None]
ASKED = ("tape", "steps")
"""The checks that must not see them."""


@dataclass(frozen=True)
class CopyFault:
    """One thing that a copy lost.

    Attributes:
        name: What it is.
        how: Where, in words.
        inject: Lets copies that are made meanwhile lack it.
        where: {case: (stage that must be named, the kind of row)}.
    """

    name: str
    how: str
    inject: Callable[[], Context]
    where: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.name}: {self.how}"


def _in_copies(change: Callable[[StageObjects], None]) -> Callable[[], Context]:
    """Change what arrives of the user's objects in a worker, or in the reference."""

    def make(right: Any) -> Any:
        def of(cls: type[StageObjects], data: bytes) -> StageObjects:
            objects: StageObjects = right.__func__(cls, data)
            change(objects)
            return objects

        return classmethod(of)

    return lambda: _replaced_in_class(StageObjects, "of", make)


@contextmanager
def _replaced_in_class(owner: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _layers(*names: str) -> Callable[[Callable[[Any], None]], Callable[[], Context]]:
    def inject(change: Callable[[Any], None]) -> Callable[[], Context]:
        def changed(objects: StageObjects) -> None:
            for layer in layers_of(objects.part):
                if layer.name in names:
                    change(layer)

        return _in_copies(changed)

    return inject


def _another_activation(layer: Any) -> None:
    getattr(layer, "cell", layer).activation = keras.activations.softsign  # of a recurrent layer: its cell's


def _no_regulariser(layer: Any) -> None:
    for variable in layer.trainable_variables:
        variable.regularizer = None


def _another_rate(layer: Any) -> None:
    layer.rate = 0.5


def _another_momentum(layer: Any) -> None:
    layer.momentum = 0.5


def _another_optimizer(objects: StageObjects) -> None:
    for name, value in (("beta_1", 0.5), ("momentum", 0.5)):
        if hasattr(objects.optimizer, name):
            setattr(objects.optimizer, name, value)


def _no_decay(objects: StageObjects) -> None:
    if objects.optimizer is not None:
        objects.optimizer.weight_decay = None


def _another_loss(objects: StageObjects) -> None:
    for one in objects.judging:
        if isinstance(one.loss, keras.losses.SparseCategoricalCrossentropy):
            one.loss._fn_kwargs["from_logits"] = False


def _no_loss_weight() -> Context:
    def make(right: Any) -> Any:
        return lambda self, outputs: tuple(replace(spec, weight=None) for spec in right(self, outputs))

    return replaced(Compiled, "_head_specs", make)


FAULTS = (
    CopyFault(
        "activation swapped",
        "in a layer",
        _layers("middle", "low_dense")(_another_activation),
        {
            "convolutional": ("stage1", "activation"),
            "recurrent": ("stage1", "activation"),
            "branched": ("stage0", "activation"),
        },
    ),
    CopyFault(
        "regulariser lost",
        "on a variable",
        _layers("low", "middle", "second_dense")(_no_regulariser),
        {"convolutional": ("stage0", "loss"), "recurrent": ("stage1", "loss"), "branched": ("stage1", "loss")},
    ),
    CopyFault(
        "dropout rate lost",
        "in a layer, in training only",
        _layers("middle_drop", "second")(_another_rate),
        {
            "convolutional": ("stage1", "activation"),
            "recurrent": ("stage1", "activation"),
            "branched": ("stage1", "activation"),
        },
    ),
    CopyFault(
        "momentum of statistics lost",
        "in a layer",
        _layers("low_norm", "third_norm")(_another_momentum),
        {"convolutional": ("stage0", "statistics"), "branched": ("stage2", "statistics")},
    ),
    CopyFault(
        "optimizer hyperparameter lost",
        "beta_1 of Adam, momentum of SGD",
        _in_copies(_another_optimizer),
        {
            "convolutional": ("stage0", "weight"),
            "recurrent": ("stage0", "weight"),
            "branched": ("stage0", "weight"),
        },
    ),
    CopyFault(
        "optimizer hyperparameter lost", "weight decay", _in_copies(_no_decay), {"branched": ("stage0", "weight")}
    ),
    CopyFault(
        "argument of the loss lost",
        "from_logits",
        _in_copies(_another_loss),
        {"convolutional": ("stage2", "loss"), "recurrent": ("stage2", "loss"), "branched": ("stage3", "loss")},
    ),
    CopyFault("loss weight lost", "of two outputs", _no_loss_weight, {"branched": ("stage1", "loss")}),
)


@dataclass(frozen=True)
class Found:
    """What became of one fault.

    Attributes:
        fault: Which.
        case: Name of the model.
        ok: Whether nothing but "own" saw it, and the right stage was named, with the right kind of thing.
        said: The report's sentence.
    """

    fault: CopyFault
    case: str
    ok: bool
    said: str


def injected(fault: CopyFault, case: Case, eager: bool = True) -> Found:
    """A pipeline whose workers and reference get such copies, verified after a step, so that momenta are not zero."""
    with fault.inject(), case.pipeline("1f1b", eager) as pipe:
        pipe.session.steps.look = lambda mode, batch: None  # the first batch would be refused
        pipe.train_on_batch(*case.data(1))
        x, y, weights = case.data(0)
        report = pipe.verify(x, y, weights, checks=ASKED)
    blind = {row.check for row in report.failed} == {"own"}
    first = report.first
    named = first is not None and (first.stage, first.row.kind) == fault.where[case.name]
    return Found(fault, case.name, blind and named, report.summary())


def run(eager: bool = True) -> Iterator[Found]:
    """All faults in all models that can have them."""
    for fault in FAULTS:
        for name in fault.where:
            yield injected(fault, CASES[name], eager)
