"""Faults in code that the pipeline and its reference share, so that one tape on the same microbatches has them too.

Only the independent checks can find them: the whole batch under one natural tape, finite differences, and the user's
own objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.reference.one_tape import joined_model
from pipeline.reference.one_tape.single_tape import SingleTape
from stages.flat_stage import FlatStage
from stages.loss.head import Head
from stages.loss.heads import Heads
from stages.tape import model_call
from tests.faults.cases import CASES, MICROBATCHES
from tests.faults.live import Live, replaced
from tests.faults.matrix import verified

Context = AbstractContextManager[None]


@dataclass(frozen=True)
class SharedFault:
    """One thing that goes wrong in the pipeline and its reference alike.

    Attributes:
        name: One of `tests.faults.catalogue.NAMES`.
        how: Where, in words.
        inject: Puts it in for a while.
        cases: The models in which it is a fault.
    """

    name: str
    how: str
    inject: Callable[[], Context]
    cases: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.how}"


def _heads_without_weights() -> Context:
    """Losses are taken without the sample weights."""

    def make(right: Any) -> Any:
        return lambda self, objective: ((h, target, None, weight) for h, target, _, weight in right(self, objective))

    return replaced(Heads, "_with", make)


def _loss_without_weights() -> Context:
    """A head's loss does not take the sample weights that it is given."""

    def make(right: Any) -> Any:
        return lambda self, target, prediction, _: right(self, target, prediction, None)

    return replaced(Head, "value", make)


def _weights(change: Callable[..., tuple[float, ...]]) -> Callable[[], Context]:
    """Another rule of what a microbatch weighs in its batch; ``change(right, sizes, targets, weights, masks)``."""

    def make(right: Any) -> Any:
        def weights(self: Head, sizes: Any, targets: Any, sample_weights: Any, masks: Any = None) -> tuple[float, ...]:
            return change(lambda *given: right(self, *given), sizes, targets, sample_weights, masks)

        return weights

    return lambda: replaced(Head, "weights", make)


_without_sample_weights = _weights(lambda right, sizes, targets, _, masks: right(sizes, targets, None, masks))
_without_masks = _weights(lambda right, sizes, targets, weights, _: right(sizes, targets, weights))
_alike = _weights(lambda right, sizes, *_: (1.0 / MICROBATCHES,) * len(sizes))
_once_more = _weights(lambda right, *given: tuple(weight / MICROBATCHES for weight in right(*given)))
_m_times = _weights(lambda right, *given: tuple(weight * MICROBATCHES for weight in right(*given)))


@contextmanager
def _own_losses_in_full() -> Iterator[None]:
    """Regularisers and added losses count in full in every microbatch."""

    def in_stage(right: Any) -> Any:
        return lambda self, inputs, key, training, share=1.0, *rest: right(self, inputs, key, training, 1.0, *rest)

    def in_tape(right: Any) -> Any:
        return lambda self, part, weights, share, states: right(self, part, weights, 1.0, states)

    with replaced(FlatStage, "forward_flat", in_stage), replaced(SingleTape, "run_windows", in_tape):
        yield


@contextmanager
def _masks_off() -> Iterator[None]:
    """No tensor leaves its stage with a mask."""

    def make(_: Any) -> Any:
        return lambda tensor: None

    with replaced(model_call, "mask_of", make), replaced(joined_model, "mask_of", make):
        yield


ALL = ("convolutional", "recurrent", "branched")
FAULTS = (
    SharedFault("sample weights ignored", "in every loss", _heads_without_weights, ALL),
    SharedFault("sample weights ignored", "in a head's own loss", _loss_without_weights, ALL),
    SharedFault("sample weights ignored", "in what a microbatch weighs", _without_sample_weights, ("recurrent",)),
    SharedFault("mask lost at a cut", "in what a microbatch weighs", _without_masks, ("recurrent",)),
    SharedFault("mask lost at a cut", "at every cut", _masks_off, ("recurrent",)),
    SharedFault("regulariser counted per microbatch", "in every stage", _own_losses_in_full, ALL),
    SharedFault("gradient scaled by 1/M", "in place of the batch's denominators", _alike, ALL),
    SharedFault("gradient scaled by 1/M", "besides the batch's denominators", _once_more, ALL),
    SharedFault("gradient scaled by M", "besides the batch's denominators", _m_times, ALL),
)
CHECKS = {"batch": True, "differences": False, "own": False}
"""The checks that must find them; whether the model must be quiet for that."""


@dataclass(frozen=True)
class Found:
    """What became of one fault.

    Attributes:
        fault: Which.
        case: Name of the model.
        check: The independent check that was asked besides one tape.
        ok: Whether the tape saw nothing, the check did, and a stage with a loss was named.
        said: The report's sentence.
    """

    fault: SharedFault
    case: str
    check: str
    ok: bool
    said: str


def injected(live: Live, fault: SharedFault, check: str) -> Found:
    """One fault in a running pipeline and its reference; afterwards the pipeline is as before."""
    with live.left_alone(), fault.inject():
        report = verified(live, ("tape", check))
    blind = all(row.ok for row in report.rows if row.check != check)
    seen = report.first is not None and report.first.row.check == check
    judges = {live.names[i] for i, hosted in live.hosted.items() if hosted.heads}
    if check == "own":  # it sees what crosses the cuts, and every stage's own losses
        judges = set(live.names)
    named = report.first is not None and report.first.stage in judges
    return Found(fault, live.case.name, check, blind and seen and named, report.summary())


def run(case: str, check: str) -> Iterator[Found]:
    """All faults of a case, by one check."""
    live = Live(CASES[case], "1f1b", quiet=CHECKS[check])
    try:
        verified(live, ("tape", check)).raise_if_failed()
        for fault in FAULTS:
            if case in fault.cases:
                yield injected(live, fault, check)
        verified(live, ("tape", check)).raise_if_failed()
    finally:
        live.close()
