"""A running pipeline whose workers are threads here, and the seams at which faults are put into it.

    driver ─► mailbox ─► program ─► stage ─► tapes ─► sums ─► optimizer
                 ▲          ▼
              frames ◄── outbox

Only the live workers' own objects are changed, one attribute at a time, and changed back: the reference of `verify`,
which is made of other objects of the same classes, stays right. Faults in code that both share are in
`tests.faults.shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import Pipeline
from stages.tape.eager import EagerTapes
from stages.worker import snapshot
from stages.worker import worker as worker_module
from stages.worker.hosted_stage import HostedStage
from stages.worker.worker import Worker, serve
from tests.faults.cases import RATE, Case
from tests.faults.frames import Change, Damaged
from transport.message import DRIVER, Key, Message

GRADIENT, ACTIVATION, MASK, SHARED = "gradient", "activation", "mask", "shared_gradient"
Gradients = Sequence[Any | None]


@dataclass(frozen=True)
class Edge:
    """A tensor on its way from one stage to another.

    Attributes:
        producer: Number of the stage that gives the tensor; of a shared gradient: that sends it.
        consumer: That takes it; of a shared gradient: that receives it.
        tensor: Its name.
        masked: Whether a mask goes with it.
    """

    producer: int
    consumer: int
    tensor: str
    masked: bool = False

    @property
    def skips(self) -> bool:
        """Whether it passes over a stage."""
        return self.consumer - self.producer > 1


class Live:
    """A started pipeline with its workers' objects at hand; it has been trained for one step.

    Args:
        case: What it runs.
        schedule: Its name.
        eager: Eager tapes or compiled functions.
        quiet: Without statistics and random numbers.
    """

    def __init__(self, case: Case, schedule: str, eager: bool = True, quiet: bool = False) -> None:
        self.case, self.schedule, self.eager = case, schedule, eager
        self.pipe = case.pipeline(schedule, eager, quiet=quiet)
        with recorded_workers() as self._workers:
            self.train()
        self.pipe.optimizer.learning_rate = RATE
        self.hosted = {i: hosted for worker in self._workers for i, hosted in sorted(worker.hosted.items())}
        self.edges = self._edges()

    def train(self) -> None:
        """One step on another batch than the verified one."""
        x, y, weights = self.case.data(1)
        self.pipe.train_on_batch(x, y, weights)

    def other_step(self) -> None:
        """Forward and backward of another batch, which leave nothing."""
        self.pipe.gradients(*self.case.data(2))

    def worker(self, stage: int) -> Worker:
        """The worker that hosts a stage."""
        return next(worker for worker in self._workers if stage in worker.hosted)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names."""
        return self.pipe.names

    def _edges(self) -> tuple[Edge, ...]:
        masked: set[tuple[int, str]] = set()

        def look(key: Key, fetch: Callable[[Key], Message]) -> Message:
            message = fetch(key)
            if key.kind == MASK:
                masked.add((key.stage, key.tensor))
            return message

        found = [Edge(i, c, n) for i, hosted in self.hosted.items() for n, cs in hosted.spec.outputs for c in cs]
        with _all([arriving(self, stage, look) for stage in self.hosted]):
            self.other_step()
        return tuple(Edge(e.producer, e.consumer, e.tensor, (e.consumer, e.tensor) in masked) for e in found)

    def values(self) -> dict[tuple[int, str], list[np.ndarray[Any, Any]]]:
        """All variables of all stages."""
        groups = ("model", "optimizer", "metrics")
        return {(i, g): snapshot.read(hosted.variables(g)) for i, hosted in self.hosted.items() for g in groups}

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Afterwards all variables are what they were, whatever a fault did to them.

        So is what the driver has learned: when no mask has reached a loss once, it does not look again.
        """
        before, driver = self.values(), self.pipe.session.workers.driver()
        looks_for_masks = driver._masks_count
        masks = {i: hosted.prediction_masks for i, hosted in self.hosted.items()}
        try:
            yield
        finally:
            driver._masks_count = looks_for_masks
            for i, hosted in self.hosted.items():
                hosted.prediction_masks = masks[i]
            for (stage, group), values in before.items():
                snapshot.write(self.hosted[stage].variables(group), values, group)

    def close(self) -> None:
        """End the pipeline."""
        self.pipe.close()


@contextmanager
def recorded_workers() -> Iterator[list[Worker]]:
    """The workers that start meanwhile."""
    found: list[Worker] = []

    class Recorded(Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    def main(_: Any) -> Any:
        return lambda spec, board: serve(Recorded, spec, board)

    with replaced(worker_module, "main", main):
        yield found


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put `make(original)` in the place of an object's attribute for a while."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def _all(managers: Sequence[Any]) -> Iterator[None]:
    if not managers:
        yield
        return
    with managers[0], _all(managers[1:]):
        yield


def arriving(live: Live, stage: int, change: Callable[[Key, Callable[[Key], Message]], Message]) -> Any:
    """Change what a stage's program takes out of its mailbox; ``change(key, fetch)`` gives the message."""
    mailbox = live.worker(stage).mailbox

    def make(take: Callable[..., Message]) -> Callable[..., Message]:
        def taken(keys: Sequence[Key], timeout: float | None = None) -> Message:
            (key,) = keys
            return change(key, lambda wanted: take((wanted,), timeout))

        return taken

    return replaced(mailbox, "take", make)


def on_the_wire(live: Live, sender: int, receiver: int, change: Change) -> Any:
    """Change the frames that a stage sends to another, behind the codec."""
    outbox = live.worker(sender)._outboxes[receiver]
    return replaced(outbox, "_inbox", lambda inbox: Damaged(inbox, change))


def opening(live: Live, stage: int, around: Callable[..., Any]) -> Any:
    """Change a stage's forward; ``around(forward, inputs, key, training, share, objective, masked)``."""
    return replaced(live.hosted[stage].stage, "forward_flat", lambda right: lambda *given: around(right, *given))


def closing(live: Live, stage: int, around: Callable[..., Any]) -> Any:
    """Change a stage's backward, whole or its first half; ``around(backward, gradients, key)`` gives dL/dinputs."""
    owner = live.hosted[stage].stage
    both = [
        replaced(owner, name, lambda right: lambda *given: around(right, *given))
        for name in ("backward_flat", "backward_input_flat")
    ]
    return _all(both)


def applying(live: Live, stage: int, around: Callable[..., None]) -> Any:
    """Change a stage's update; ``around(apply, optimizer, scale, divisor)``."""
    return replaced(live.hosted[stage].stage, "apply", lambda right: lambda *given: around(right, *given))


@contextmanager
def adding(live: Live, stage: int, change: Callable[[int, list[Any | None]], list[Any | None]]) -> Iterator[None]:
    """Change what each microbatch adds to a stage's gradients; ``change(microbatch, gradients)``."""
    tapes: Any = live.hosted[stage].stage._tapes
    if isinstance(tapes, EagerTapes):

        def add(right: Any) -> Any:
            return lambda number, gradients, complete=True: right(number, change(number, list(gradients)), complete)

        with replaced(tapes._sum, "add", add):
            yield
        return

    def accumulate(right: Any) -> Any:
        def accumulated(key: Any, *given: Any, **named: Any) -> Any:
            def added_rows(add: Any) -> Any:
                def changed(variable: int, gradient: Any, fixed: bool = False) -> None:
                    (values,) = change(key.microbatch, [gradient.values])
                    if values is not None:
                        add(variable, tf.IndexedSlices(values, gradient.indices, gradient.dense_shape), fixed)

                return changed

            tapes._prepare()
            before = [value.numpy() for value in tapes._accumulators]
            with replaced(tapes._rows, "add", added_rows):
                found = right(key, *given, **named)
            added = [value.numpy() - old for value, old in zip(tapes._accumulators, before, strict=True)]
            if any(part.any() for part in added):
                for value, old, part in zip(
                    tapes._accumulators, before, change(key.microbatch, list(added)), strict=True
                ):
                    value.assign(old if part is None else old + part)
            return found

        return accumulated

    with ExitStack() as stack:
        for way in ("forward", "backward_input", "backward_weight"):
            stack.enter_context(replaced(tapes, way, accumulate))
        yield


def has(hosted: HostedStage, kind: type) -> bool:
    """Whether a stage has a layer of a kind."""
    return any(isinstance(layer, kind) for layer in hosted.stage.model._flatten_layers())


__all__ = ["ACTIVATION", "DRIVER", "GRADIENT", "MASK", "SHARED", "Edge", "Live", "Pipeline"]
