"""A worker: one process (or thread) that hosts stages of a pipeline and does what the driver says.

    driver ── order 1, 2, 3 ... ──► worker ── replies, losses, errors ──► driver
                                      ▲  │ activations, gradients
                                      │  ▼
                                 neighbouring workers

The protocol is that of `stages.worker.base`; here is what a step, an update and a look at gradients are.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.actions import Action
from stages.errors import HandoffError
from stages.recipe.optimizer_state import rate_now
from stages.worker import snapshot
from stages.worker.base import BaseWorker, serve
from stages.worker.boundary import BoundaryWriter
from stages.worker.hosted_stage import HostedStage
from stages.worker.kept_values import CHANGED_BY_STEPS, Undo
from stages.worker.observers import NormObserver
from stages.worker.orders import Apply, Get, Keep, Mode, Order, StepOrder, TellSeen
from stages.worker.recovery_orders import GoOnAs, WriteDown
from stages.worker.reply import Reply, StepReply
from stages.worker.stage_spec import StageSpec
from stages.worker.step_notes import NoteTaker
from stages.worker.step_program import Links, Program
from stages.worker.too_large import in_users_words
from transport.errors import MessageTooLarge
from transport.message import Message

Array = np.ndarray[Any, Any]


def main(spec: Mapping[str, Any], board: Array) -> None:
    """Entry of a worker; the arguments are those of `serve`."""
    serve(Worker, spec, board)


class Worker(BaseWorker):
    """A worker of a pipeline: its stages' actions in the order of a plan."""

    def __init__(self, spec: Mapping[str, Any], *given: Any) -> None:
        super().__init__(spec, *given)
        memory = spec.get("memory")
        self._boundary = None if memory is None else BoundaryWriter(memory, self.hosted)
        if self._boundary is not None:
            self._deeds = {kind: self._written_down(deed, self._boundary) for kind, deed in self._deeds.items()}
        self._program: Program | None = None
        self._stepped: set[Mode] = set()
        self._undo: dict[int, Undo] = {}
        self._keeps_undo = False

    def own_deeds(self) -> Mapping[type[Order], Callable[[Any], Reply]]:
        """To become what another worker was."""
        return {GoOnAs: self._do_go_on_as, WriteDown: lambda order: Reply()}

    def host(self, spec: StageSpec) -> HostedStage:
        """Build a stage, with its optimizer."""
        return HostedStage(spec)

    def _written_down(self, deed: Callable[[Any], Reply], boundary: BoundaryWriter) -> Callable[[Any], Reply]:
        """A deed behind which the values are written down, before it is answered."""

        def both(order: Order) -> Reply:
            reply = deed(order)
            boundary.passed(order, self._number)
            return reply

        return both

    def _do_go_on_as(self, order: GoOnAs) -> Reply:
        for index, hosted in self.hosted.items():
            if attributes := order.attributes.get(index):
                hosted.adjust_optimizer(attributes)
            hosted.heads.build(order.examples[index])
        return Reply()

    def step(self, order: StepOrder) -> StepReply:
        """Run the stages' actions of a plan."""
        self._keeps_undo = order.undo_to > 0
        if order.undo_to in (0, order.step):
            self._undo = {index: Undo(hosted, self._keeps_undo) for index, hosted in self.hosted.items()}
        # Of a look at masks nothing is left either: so the undo of the step behind it is the undo of both.
        before = self._keep(CHANGED_BY_STEPS) if order.mode.only_looks else {}
        if order.mode is Mode.MASKS:
            for hosted in self.hosted.values():
                hosted.prediction_masks = {}
        links = Links(self._take, self._hand_over, self.incarnation, self.board)
        taker = NoteTaker() if order.trace else None
        if taker is not None:
            links = taker.around(links)
        program = self._program = Program(order, self.plans[order.plan], self.hosted, links)
        losses = program.run()
        stages = self.hosted.values()
        squared_norms = {
            (i, k): norm
            for i, hosted in self.hosted.items()
            for k, norm in (hosted.squared_norms(order.scale) if order.squared_norms else {}).items()
        }
        finite = order.loss_scale is None or all(hosted.all_finite() for hosted in stages)
        for kept in before.values():
            kept.put_back()
        counts = order.mode.with_loss and not before
        self._seen, self._program = program.observer, None
        reply = StepReply(
            losses,
            metrics=self._metrics() if counts else {},
            inner_metrics=self._inner_metrics() if counts else {},
            masked=any(hosted.prediction_masks for hosted in stages),
            spans=program.spans,
            notes=None if taker is None else taker.notes([one.update_times for one in stages]),
            squared_norms=squared_norms,
            finite=finite,
            squares=self._seen.squares if isinstance(self._seen, NormObserver) else {},
        )
        self.mailbox.clear(order.step + 1)
        if self.own_process and order.mode not in self._stepped:
            self._stepped.add(order.mode)
            gc.freeze()
        return reply

    def _hand_over(self, message: Message) -> None:
        """Send a message of a step to its stage; what is for a stage of this worker stays here."""
        try:
            if message.stage in self.hosted:
                self.mailbox.deliver(message)
            else:
                self._send(message)
        except MessageTooLarge as error:
            raise in_users_words(error, message) from None

    def apply(self, order: Apply) -> None:
        """One update of every stage."""
        self._undo = self._undo if self._keeps_undo else {}
        for index, hosted in self.hosted.items():
            rate = order.learning_rates.get(index)
            if rate is not None and rate_now(hosted.optimizer) != rate:
                hosted.optimizer.learning_rate = rate
            if attributes := order.attributes.get(index):
                hosted.adjust_optimizer(attributes)
            begin, self._updating = time.monotonic(), index
            hosted.stage.apply(hosted.optimizer, order.scale, order.divisor)
            hosted.update_times = (begin, time.monotonic())
        self._updating = None

    def discard(self) -> None:
        """Set the accumulated gradients to zero."""
        self._undo = {}
        for hosted in self.hosted.values():
            hosted.stage.zero_gradients()

    def undo(self, order: Order) -> bool:
        """A step is undone; a question has changed nothing; an update that failed half way is done for."""
        if isinstance(order, StepOrder):
            if order.step == self._last_step:  # else it was refused, and nothing was done
                self.undo_last_step()
            return True
        return isinstance(order, Get | TellSeen | Keep)

    def undo_last_step(self) -> None:
        """Put back what it changed in the stages."""
        for undo in self._undo.values():
            undo.put_back()
        self._undo, self._program = {}, None
        if self._boundary is not None:
            self._boundary.take_back_step()

    def gradients(self, index: int) -> Sequence[Array | None]:
        """The accumulated ones."""
        return self.hosted[index].gradients()

    def given_gradients(self, index: int) -> Sequence[Any | None]:
        """The accumulated ones."""
        return self.hosted[index].stage.as_given()

    def set_given_gradients(self, index: int, gradients: Sequence[Any | None]) -> None:
        """Refused: a pipeline's gradients are those of its own step."""
        raise HandoffError(
            f"the gradients of stage {self.hosted[index].spec.name!r} are its own step's; none can be set"
        )

    def optimizer_values(self, index: int) -> Sequence[Array]:
        """The stage's own optimizer's."""
        return snapshot.read(self.hosted[index].variables("optimizer"))

    def set_optimizer_values(self, index: int, values: Sequence[Array]) -> None:
        """Write them."""
        self.hosted[index].set("optimizer", values)

    def at_work(self) -> tuple[int, Action | None]:
        """What its program is about."""
        return (-1, None) if self._program is None else (self._program.order.step, self._program.current)

    def let_go(self) -> None:
        """Drop the program, which holds the batch."""
        self._program = None


__all__ = ["Worker", "main", "serve"]
