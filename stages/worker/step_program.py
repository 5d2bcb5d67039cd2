"""Execute one step's actions on the stages of a worker: wait for inputs, run, send.

    take inputs from the mailbox ─► stage ─► send outputs to the neighbours' inboxes

Waiting is by key, so the order in which messages arrive does not matter; the order of the program alone decides. While
waiting and running, the status board says what for, so that a hang or a kill can be named from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stages.actions import Action, Kind
from stages.loss.heads import Objective, WholeBatch, count_whole_batch, whole_batch
from stages.masks import with_mask
from stages.tape.accumulate import plus
from stages.tape.contract import PassKey
from stages.tape.tensors import to_array, to_tensor
from stages.worker import tied_gradients
from stages.worker.hosted_stage import HostedStage
from stages.worker.observers import CROSSES, GRADIENT, Sight, observer_named
from stages.worker.orders import Mode, StepOrder
from stages.worker.status import StatusBoard
from transport.message import DRIVER, Key, Message


@dataclass
class Links:
    """A worker's way in and out.

    Attributes:
        take: Wait for the message under a key; what it raises when the driver ends the run passes through.
        send: Deliver a message to the process of its destination stage.
        incarnation: Stamped on every message.
        board: Where it is written down what the worker does.
    """

    take: Callable[[Key], Message]
    send: Callable[[Message], None]
    incarnation: int
    board: StatusBoard


@dataclass
class _Judged:
    """What one head compares the whole batch's predictions with.

    Attributes:
        target: (n, ...).
        sample_weight: Or None.
        over_time: Whether every window is judged, or only what the last one gives.
        weights: {(microbatch, window): what its loss weighs}.
    """

    target: np.ndarray[Any, Any]
    sample_weight: np.ndarray[Any, Any] | None
    over_time: bool
    weights: Mapping[tuple[int, int], float]


@dataclass
class _Batch:
    """What a stage holds of the batch during a step."""

    inputs: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    judged: list[_Judged] | None = None
    losses: dict[tuple[int, int], Mapping[int, Any]] = field(default_factory=dict)
    own_losses: dict[tuple[int, int], Any] = field(default_factory=dict)
    outputs: dict[int, dict[int, Any]] = field(default_factory=dict)
    whole: WholeBatch | None = None


class Program:
    """One step on one worker.

    Args:
        order: What to do.
        actions: In which order.
        hosted: The worker's stages by number.
        links: Its way in and out.
    """

    def __init__(
        self, order: StepOrder, actions: Sequence[Action], hosted: Mapping[int, HostedStage], links: Links
    ) -> None:
        self.order, self.actions, self.hosted, self.links = order, actions, hosted, links
        self.grid, self.mode, self.training = order.grid, order.mode, order.mode.training
        self._batches = {index: _Batch() for index in hosted}
        self.current: Action | None = None
        self.spans: list[tuple[float, float]] = []
        self.observer = observer_named(order.observe)

    def run(self) -> dict[int, tuple[list[float | None], float | None]]:
        """Carry out all actions.

        Returns:
            {stage: (each head's loss, own losses or None)}, float32 sums in microbatch order.
        """
        board = self.links.board
        halved = {action.stage for action in self.actions if action.kind is Kind.BACKWARD_INPUT}
        for index, hosted in self.hosted.items():
            hosted.go(self.order.ways)
            hosted.stage.go_in_halves(index in halved)
            hosted.stage.loss_scale = self.order.scale
            hosted.stage.truncate(self.grid.windows, self.order.truncate)
        do = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
        }
        for done, action in enumerate(self.actions):
            self.current = action
            board.begin(self.order.step, action, done)
            do[action.kind](action)
            if self.order.trace:
                self.spans[-1] = (self.spans[-1][0], time.monotonic())
        board.busy()
        if self.training:
            tied_gradients.join(self.hosted, self._send_shared, self._take_shared)
        self.current = None
        return {index: self._losses(index, batch) for index, batch in self._batches.items()}

    def _losses(self, index: int, batch: _Batch) -> tuple[list[float | None], float | None]:
        heads = range(len(self.hosted[index].heads)) if batch.losses else ()
        by_head = [_sum({unit: losses[i] for unit, losses in batch.losses.items() if i in losses}) for i in heads]
        return by_head, _sum(batch.own_losses)

    def _begin(self) -> None:
        """The action has all it needs and starts to compute."""
        self.links.board.running()
        if self.order.trace:
            self.spans.append((time.monotonic(), 0.0))

    def _message(
        self, kind: str, stage: int, source: int, tensor: str = "", microbatch: int = 0, window: int = 0
    ) -> Message:
        self.links.board.waiting(source)
        message = self.links.take(Key(kind, self.order.step, stage, source, tensor, microbatch, window))
        self._see(kind, False, source, stage, tensor, (microbatch, window), message.array)
        return message

    def _see(
        self, kind: str, sent: bool, sender: int, receiver: int, tensor: str, number: tuple[int, int], array: Any
    ) -> None:
        """Let the observer, if there is one, look at what crosses a cut."""
        if self.observer is not None and kind in CROSSES and DRIVER not in (sender, receiver):
            producer, consumer = (receiver, sender) if kind == GRADIENT else (sender, receiver)
            self.observer(Sight(kind, sent, producer, consumer, tensor, *number), array)

    def _take(self, kind: str, stage: int, source: int, tensor: str = "", microbatch: int = 0, window: int = 0) -> Any:
        return self._message(kind, stage, source, tensor, microbatch, window).array

    def _send(
        self, kind: str, stage: int, source: int, tensor: str, action: Action, value: Any | None, masked: bool = False
    ) -> None:
        mark = True if masked else None
        self._post(kind, stage, source, tensor, (action.microbatch, action.window), value, mark)

    def _post(
        self,
        kind: str,
        stage: int,
        source: int,
        tensor: str,
        number: tuple[int, int],
        value: Any | None,
        mark: bool | None = None,
    ) -> None:
        array = None if value is None else to_array(value)
        self._see(kind, True, source, stage, tensor, number, array)
        step = self.order.step
        self.links.send(Message(kind, self.links.incarnation, step, stage, source, tensor, *number, mark, array))

    def _send_shared(self, stage: int, source: int, name: str, number: int, value: Any | None) -> None:
        self._post("shared_gradient", stage, source, name, (number, 0), value)

    def _take_shared(self, stage: int, source: int, name: str, number: int) -> Any | None:
        array = self._take("shared_gradient", stage, source, name, number)
        self.links.board.busy()
        return None if array is None else to_tensor(array)

    def _inputs(self, hosted: HostedStage, action: Action) -> tuple[list[Any], tuple[int, ...]]:
        """The tensors that an action takes, behind them their masks; which of them have one."""
        batch, index = self._batches[action.stage], action.stage
        tensors: list[Any] = []
        masks: dict[int, Any] = {}
        for place, (name, source) in enumerate(hosted.spec.inputs):
            if source == DRIVER:
                if name not in batch.inputs:
                    batch.inputs[name] = self._take("activation", index, DRIVER, name)
                over_time = hosted.takes_over_time(place)
                array = self.grid.part(batch.inputs[name], action.microbatch, action.window, over_time)
            else:
                where = (index, source, name, action.microbatch, action.window)
                message = self._message("activation", *where)
                if message.value is not None:
                    masks[len(tensors)] = to_tensor(self._take("mask", *where))
                assert message.array is not None
                array = message.array
            tensors.append(to_tensor(array))
        return [*tensors, *masks.values()], tuple(masks)

    def _objective(self, hosted: HostedStage, unit: tuple[int, int] | None) -> Objective | None:
        """What the heads need for a microbatch and window; for the whole batch (None) every weight is 1."""
        judged = self._receive_targets(hosted)
        if unit is None:
            weights = [None if one.sample_weight is None else to_tensor(one.sample_weight) for one in judged]
            return Objective(tuple(to_tensor(o.target) for o in judged), tuple(weights), (1.0,) * len(judged))
        which = tuple(i for i, one in enumerate(judged) if one.over_time or self.grid.is_last(unit[1]))
        if not which:
            return None
        part = [judged[i] for i in which]
        return Objective(
            tuple(to_tensor(self.grid.part(one.target, *unit, one.over_time)) for one in part),
            tuple(None if (w := self._weight_of(one, unit)) is None else to_tensor(w) for one in part),
            tuple(one.weights[unit] for one in part),
            which if len(which) < len(judged) else None,
        )

    def _weight_of(self, one: _Judged, unit: tuple[int, int]) -> Any | None:
        """A unit's sample weights: one per sample, or per sample and time step."""
        if one.sample_weight is None:
            return None
        return self.grid.part(one.sample_weight, *unit, one.over_time and one.sample_weight.ndim > 1)

    def _receive_targets(self, hosted: HostedStage) -> list[_Judged]:
        batch, index = self._batches[hosted.spec.index], hosted.spec.index
        if batch.judged is not None:
            return batch.judged
        batch.judged = []
        for head, label in zip(hosted.heads, hosted.labels, strict=True):
            target = self._take("target", index, DRIVER, label)
            weight = None
            if label in self.order.sample_weights:
                weight = self._take("sample_weight", index, DRIVER, label)
            one = _Judged(target, weight, hosted.gives_over_time(head.place), {})
            units = list(self.grid.units(one.over_time))
            weights = head.weights(
                [self.grid.elements(*unit, one.over_time) for unit in units],
                [self.grid.part(target, *unit, one.over_time) for unit in units],
                None if weight is None else [np.asarray(self._weight_of(one, unit)) for unit in units],
                hosted.prediction_masks.get(head.place),
            )
            one = replace(one, weights=dict(zip(units, weights, strict=True)))
            batch.judged.append(one)
        return batch.judged

    def _forward(self, action: Action) -> None:
        hosted, index = self.hosted[action.stage], action.stage
        batch, k = self._batches[index], action.microbatch
        inputs, masked = self._inputs(hosted, action)
        judges = bool(hosted.heads) and self.mode.with_loss
        whole = judges and hosted.heads.couples_samples
        unit = (k, action.window)
        objective = self._objective(hosted, unit) if judges and not whole else None
        self._begin()
        share = self.grid.sizes[k] / self.grid.samples
        opened = hosted.stage.forward_flat(inputs, PassKey(k, action.window), self.training, share, objective, masked)
        if opened.own_loss is not None:
            batch.own_losses[unit] = opened.own_loss
        if objective is not None:
            which = objective.heads if objective.heads is not None else range(len(hosted.heads))
            batch.losses[unit] = dict(zip(which, opened.losses, strict=True))
        counts = objective is not None and hosted.heads.counts_at_once
        if whole or counts:
            places = {head.place for head in hosted.heads}
            batch.outputs[k] = {i: with_mask(opened.outputs[i], opened.masks.get(i)) for i in places}
            complete = len(batch.outputs) == len(self.grid.sizes)
            if whole and complete and not self.training:
                self._whole_batch(hosted)
            if counts and complete:
                self._count_whole_batch(hosted)
        if self.mode is Mode.MASKS:
            judged = {head.place for head in hosted.heads if self._is_given(hosted, head.place, unit)}
            for place in judged & set(opened.masks):
                hosted.prediction_masks.setdefault(place, []).append(np.array(opened.masks[place]))
        for place, (output, (name, consumers)) in enumerate(zip(opened.outputs, hosted.spec.outputs)):  # noqa: B905
            mask = opened.masks.get(place)
            for consumer in consumers:
                with_it = mask is not None and (name, consumer) not in hosted.unmasked
                self._send("activation", consumer, index, name, action, output, with_it)
                if with_it:
                    self._send("mask", consumer, index, name, action, mask)
            if self.mode is Mode.PREDICT and name in hosted.spec.finals and self._is_given(hosted, place, unit):
                self._send("output", DRIVER, index, name, action, output)

    def _is_given(self, hosted: HostedStage, place: int, unit: tuple[int, int]) -> bool:
        """Whether an output counts in a window: one that is not over time is the last window's."""
        return self.grid.is_last(unit[1]) or hosted.gives_over_time(place)

    def _backward(self, action: Action) -> None:
        self._go_backward(action, self.hosted[action.stage].stage.backward_flat)

    def _backward_input(self, action: Action) -> None:
        self._go_backward(action, self.hosted[action.stage].stage.backward_input_flat)

    def _backward_weight(self, action: Action) -> None:
        self._begin()
        self.hosted[action.stage].stage.backward_weight_flat(PassKey(action.microbatch, action.window))

    def _go_backward(self, action: Action, backward: Callable[..., Sequence[Any | None]]) -> None:
        hosted, index = self.hosted[action.stage], action.stage
        gradients = self._output_gradients(hosted, action)
        self._begin()
        found = backward(gradients, PassKey(action.microbatch, action.window))
        for gradient, (name, source) in zip(found, hosted.spec.inputs, strict=True):
            if source != DRIVER:
                self._send("gradient", source, index, name, action, gradient)

    def _output_gradients(self, hosted: HostedStage, action: Action) -> Sequence[Any | None]:
        """What consumers and losses over the whole batch send into each output; None: nothing."""
        gradients = []
        for name, consumers in hosted.spec.outputs:
            total = None
            for consumer in reversed(consumers):  # the order in which one tape would meet them
                array = self._take("gradient", action.stage, consumer, name, action.microbatch, action.window)
                total = plus(total, None if array is None else to_tensor(array))
            gradients.append(total)
        if hosted.heads.couples_samples:
            judged = self._whole_batch(hosted).gradients[action.microbatch]
            gradients = [plus(judged.get(place), gradient) for place, gradient in enumerate(gradients)]
        return gradients

    def _count_whole_batch(self, hosted: HostedStage) -> None:
        """Let metrics that give a number of the whole batch count it, and let its predictions go."""
        outputs = self._batches[hosted.spec.index].outputs
        objective = self._objective(hosted, None)
        assert objective is not None
        count_whole_batch(hosted.heads, [outputs.pop(k) for k in sorted(outputs)], objective)

    def _whole_batch(self, hosted: HostedStage) -> WholeBatch:
        """Losses that couple samples: computed once on the joined predictions."""
        batch = self._batches[hosted.spec.index]
        if batch.whole is None:
            parts = [batch.outputs[k] for k in sorted(batch.outputs)]
            objective = self._objective(hosted, None)
            assert objective is not None
            batch.whole = whole_batch(hosted.heads, parts, objective, self.training, self.order.scale)
            batch.losses[0, 0] = dict(enumerate(batch.whole.values))
        return batch.whole


def _sum(losses: Mapping[tuple[int, int], Any]) -> float | None:
    """The sum in ascending order of microbatches and windows, in the losses' own precision."""
    if not losses:
        return None
    values = [np.asarray(losses[unit]) for unit in sorted(losses)]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return float(total)
