"""Execute one step's actions on the stages of a worker: wait for inputs, run, send.

    take inputs from the mailbox ─► stage ─► send outputs to the neighbours' inboxes

Waiting is by key, so the order in which messages arrive does not matter; the order of the program alone decides. While
waiting and running, the status board says what for, so that a hang or a kill can be named from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from stages.actions import Action, Kind
from stages.hosted import HostedStage
from stages.part import mask_of, with_mask
from stages.tapes import Key as TapeKey
from stages.tapes import Objective
from stages.tensors import to_array, to_tensor
from transport.message import DRIVER, Key, Message

IDLE, WAITING, RUNNING, BUILDING = range(4)
"""Phases on the status board: (phase, step, kind, stage, microbatch, window, source awaited, actions done)."""


@dataclass(frozen=True)
class StepOrder:
    """What the driver asks for in one step.

    Attributes:
        step: The step's number.
        mode: ``train`` and ``gradients`` go forward and backward, ``test`` computes the loss, ``predict`` the outputs;
            ``masks`` only finds out which elements of the predictions count, for the weights of the next step.
        sizes: Samples per microbatch.
        sample_weight: Whether sample weights come along.
        trace: Whether to note when each action began and ended.
    """

    step: int
    mode: str
    sizes: tuple[int, ...]
    sample_weight: bool = False
    trace: bool = False

    @property
    def training(self) -> bool:
        """Whether layers run in training mode, under tapes."""
        return self.mode in ("train", "gradients")


class Stopped(Exception):  # noqa: N818 - not an error: the driver asked for it
    """The driver ended the run while this worker waited."""


@dataclass
class Links:
    """A worker's way in and out.

    Attributes:
        take: Wait for the message under a key; raises Stopped when the driver ends the run.
        send: Deliver a message to the process of its destination stage.
        incarnation: Stamped on every message.
        board: The status board, int64 of shape (8,).
    """

    take: Callable[[Key], Message]
    send: Callable[[Message], None]
    incarnation: int
    board: np.ndarray[Any, Any]


@dataclass
class _Batch:
    """What a stage holds of the batch during a step."""

    inputs: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    target: np.ndarray[Any, Any] | None = None
    sample_weight: np.ndarray[Any, Any] | None = None
    weights: tuple[float, ...] = ()
    losses: dict[int, Any] = field(default_factory=dict)
    own_losses: dict[int, Any] = field(default_factory=dict)
    outputs: dict[int, Sequence[Any]] = field(default_factory=dict)
    loss_gradients: dict[int, Sequence[Any]] | None = None


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
        bounds = accumulate(order.sizes, initial=0)
        self._slices = tuple(slice(a, b) for a, b in pairwise(bounds))
        self._total = sum(order.sizes)
        self._batches = {index: _Batch() for index in hosted}
        self.current: Action | None = None
        self.spans: list[tuple[float, float]] = []

    def run(self) -> dict[str, Any]:
        """Carry out all actions.

        Returns:
            ``losses``: {stage: [objective or None, own losses or None]}, float32 sums in microbatch order.
        """
        board = self.links.board
        do = {Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward}
        for done, action in enumerate(self.actions):
            self.current = action
            board[1:6] = (self.order.step, action.kind, action.stage, action.microbatch, action.window)
            board[7] = done
            do[action.kind](action)
            if self.order.trace:
                self.spans[-1] = (self.spans[-1][0], time.monotonic())
        self.current = None
        board[0] = IDLE
        return {
            "losses": {
                str(index): [_sum(batch.losses), _sum(batch.own_losses)] for index, batch in self._batches.items()
            }
        }

    def _begin(self) -> None:
        """The action has all it needs and starts to compute."""
        self.links.board[0] = RUNNING
        if self.order.trace:
            self.spans.append((time.monotonic(), 0.0))

    def _message(
        self, kind: str, stage: int, source: int, tensor: str = "", microbatch: int = 0, window: int = 0
    ) -> Message:
        self.links.board[6] = source
        self.links.board[0] = WAITING
        return self.links.take(Key(kind, self.order.step, stage, source, tensor, microbatch, window))

    def _take(self, kind: str, stage: int, source: int, tensor: str = "", microbatch: int = 0, window: int = 0) -> Any:
        return self._message(kind, stage, source, tensor, microbatch, window).array

    def _send(
        self, kind: str, stage: int, source: int, tensor: str, action: Action, value: Any | None, masked: bool = False
    ) -> None:
        array = None if value is None else to_array(value)
        self.links.send(
            Message(
                kind,
                self.links.incarnation,
                self.order.step,
                stage,
                source,
                tensor,
                action.microbatch,
                action.window,
                True if masked else None,
                array,
            )
        )

    def _inputs(self, hosted: HostedStage, action: Action) -> tuple[list[Any], tuple[int, ...]]:
        """The tensors that an action takes, behind them their masks; which of them have one."""
        batch, index = self._batches[action.stage], action.stage
        tensors: list[Any] = []
        masks: dict[int, Any] = {}
        for name, source in hosted.spec.inputs:
            if source == DRIVER:
                if name not in batch.inputs:
                    batch.inputs[name] = self._take("activation", index, DRIVER, name)
                array = batch.inputs[name][self._slices[action.microbatch]]
            else:
                where = (index, source, name, action.microbatch, action.window)
                message = self._message("activation", *where)
                if message.value is not None:
                    masks[len(tensors)] = to_tensor(self._take("mask", *where))
                assert message.array is not None
                array = message.array
            tensors.append(to_tensor(array))
        return [*tensors, *masks.values()], tuple(masks)

    def _objective(self, hosted: HostedStage, microbatch: int) -> Objective:
        batch = self._batches[hosted.spec.index]
        self._receive_targets(hosted, batch)
        part = self._slices[microbatch]
        assert batch.target is not None
        weight = None if batch.sample_weight is None else to_tensor(batch.sample_weight[part])
        return Objective(to_tensor(batch.target[part]), weight, batch.weights[microbatch])

    def _receive_targets(self, hosted: HostedStage, batch: _Batch) -> None:
        if batch.target is not None:
            return
        index = hosted.spec.index
        assert hosted.head is not None
        batch.target = self._take("target", index, DRIVER)
        if self.order.sample_weight:
            batch.sample_weight = self._take("sample_weight", index, DRIVER)
        weights = batch.sample_weight
        batch.weights = hosted.head.weights(
            self.order.sizes,
            [batch.target[part] for part in self._slices],
            None if weights is None else [weights[part] for part in self._slices],
            hosted.prediction_masks,
        )

    def _forward(self, action: Action) -> None:
        hosted, index = self.hosted[action.stage], action.stage
        batch, k = self._batches[index], action.microbatch
        inputs, masked = self._inputs(hosted, action)
        head = hosted.head if self.order.mode not in ("predict", "masks") else None
        whole = head is not None and head.couples_samples
        objective = None if head is None or whole else self._objective(hosted, k)
        self._begin()
        share = self.order.sizes[k] / self._total
        opened = hosted.stage.open(inputs, TapeKey(k, action.window), self.order.training, share, objective, masked)
        if opened.own_loss is not None:
            batch.own_losses[k] = opened.own_loss
        if opened.loss is not None:
            batch.losses[k] = opened.loss
        if whole:
            batch.outputs[k] = (with_mask(opened.outputs[0], opened.masks.get(0)),)
            if not self.order.training and len(batch.outputs) == len(self.order.sizes):
                self._whole_batch_loss(hosted, batch)
        if self.order.mode == "masks" and hosted.head is not None and 0 in opened.masks:
            hosted.prediction_masks = [*(hosted.prediction_masks or ()), np.array(opened.masks[0])]
        for place, (output, (name, consumers)) in enumerate(zip(opened.outputs, hosted.spec.outputs)):  # noqa: B905
            mask = opened.masks.get(place)
            for consumer in consumers:
                with_it = mask is not None and (name, consumer) not in hosted.unmasked
                self._send("activation", consumer, index, name, action, output, with_it)
                if with_it:
                    self._send("mask", consumer, index, name, action, mask)
            if self.order.mode == "predict" and not consumers:
                self._send("output", DRIVER, index, name, action, output)

    def _backward(self, action: Action) -> None:
        hosted, index = self.hosted[action.stage], action.stage
        gradients = self._output_gradients(hosted, action)
        self._begin()
        found = hosted.stage.close(gradients, TapeKey(action.microbatch, action.window))
        for gradient, (name, source) in zip(found, hosted.spec.inputs, strict=True):
            if source != DRIVER:
                self._send("gradient", source, index, name, action, gradient)

    def _output_gradients(self, hosted: HostedStage, action: Action) -> Sequence[Any | None]:
        batch = self._batches[action.stage]
        if hosted.head is not None:
            if not hosted.head.couples_samples:
                return ()
            if batch.loss_gradients is None:
                self._whole_batch_loss(hosted, batch)
            assert batch.loss_gradients is not None
            return batch.loss_gradients[action.microbatch]
        gradients = []
        for name, consumers in hosted.spec.outputs:
            total = None
            for consumer in reversed(consumers):  # the order in which one tape would meet them
                array = self._take("gradient", action.stage, consumer, name, action.microbatch, action.window)
                if array is not None:
                    total = to_tensor(array) if total is None else total + to_tensor(array)
            gradients.append(total)
        return gradients

    def _whole_batch_loss(self, hosted: HostedStage, batch: _Batch) -> None:
        """A loss that couples samples: computed once on the joined predictions, its gradient cut into microbatches."""
        head = hosted.head
        assert head is not None
        self._receive_targets(hosted, batch)
        assert batch.target is not None
        parts = [batch.outputs[k][0] for k in sorted(batch.outputs)]
        masks = [mask_of(part) for part in parts]
        prediction = tf.concat(parts, axis=0)
        target = to_tensor(batch.target)
        weights = None if batch.sample_weight is None else to_tensor(batch.sample_weight)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(prediction)
            judged = prediction if masks[0] is None else with_mask(prediction, tf.concat(masks, axis=0))
            loss = head.value(target, judged, weights)
        head.update(target, judged, weights)
        batch.losses[0] = loss
        if self.order.training:
            gradient = tf.split(tape.gradient(loss, prediction), list(self.order.sizes))
            batch.loss_gradients = {k: (part,) for k, part in enumerate(gradient)}


def _sum(losses: Mapping[int, Any]) -> float | None:
    """The sum in ascending order of microbatches, in the losses' own precision."""
    if not losses:
        return None
    values = [np.asarray(losses[k]) for k in sorted(losses)]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return float(total)
