"""The base of every worker: it hears orders, answers them, and holds stages and their values.

    driver ── order 1, 2, 3 ... ──► worker ── replies, errors ──► driver

Rules:

1. Orders are numbered; the worker carries them out one by one, and sends a reply of the same number to each that is
   answered (`Order.answered`).
2. An order that is not legal in the worker's state (`stages.worker.states`) is refused, and nothing was done.
3. An exception is reported once, with its traceback, the stage and the action. It never continues with a half-done
   step: the step is undone, to the last bit; of an update or a build that failed it only waits for the end.
4. `Apply` updates the variables of all its stages, at most once a step.
5. The driver may take back what it ordered ("abandon"): whatever the worker waits for, it stops, undoes the step that
   it is in or has just done, forgets what arrived for it, and answers. What was updated stays.

What a step computes, and whose gradients and optimizers there are, is a kind's own: `stages.worker.worker.Worker` is
one part of a pipeline, `pipeline.reference.worker.ReferenceWorker` all parts under one tape. Their methods are abstract
here; no other one is implemented twice.
"""

from __future__ import annotations

import gc
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.actions import Action, actions_from_array
from stages.errors import HandoffError
from stages.recipe.settings import settle
from stages.worker.failure_report import failure_report
from stages.worker.hosted_stage import HostedStage
from stages.worker.kept_values import EVERYTHING, Kept
from stages.worker.observers import NormObserver, ValueObserver
from stages.worker.orders import (
    Apply,
    Build,
    CallService,
    Connect,
    Discard,
    Get,
    Keep,
    Order,
    PutBack,
    Set,
    StepOrder,
    Strips,
    TakePlan,
    TellSeen,
    Unmask,
    of_wire,
)
from stages.worker.reply import Reply, StepReply
from stages.worker.services import do_service
from stages.worker.stage_spec import StageSpec
from stages.worker.states import WorkerState, after
from stages.worker.status import StatusBoard
from stages.worker.told import Abandoned, Stopped, obeyed
from stages.worker.value_groups import read_group, write_group
from transport.channel import Outbox
from transport.errors import TransportError, Unsendable
from transport.mailbox import Mailbox
from transport.message import DRIVER, Key, Message
from transport.registry import open_transport

Array = np.ndarray[Any, Any]
CONNECT_SECONDS = 30.0
"""How long a neighbour may take to accept a connection."""
_NOTHING = Key("abandon", -1)  # no message has it: of what was ordered behind a failed order nothing is carried out
_NAMED = 20
"""So many variables are named that could not be put back."""


def serve(kind: type[BaseWorker], spec: Mapping[str, Any], board: Array) -> None:
    """Open the ways in and out and let a worker of a kind serve until the run ends.

    Args:
        kind: Its class.
        spec: Plain data, and bytes for `StageSpec`: ``worker`` (its number), ``incarnation``, ``transport`` (scheme),
            ``directory`` (for socket files), ``keys`` (of the run, for tcp), ``driver`` (address), ``stages`` (list of
            `StageSpec.plain`), ``own_process``, ``settings`` (of the driver's process).
        board: Memory of the status board, int64 of shape (8,).
    """
    settle(spec["settings"], number=spec["worker"], own_process=spec["own_process"])
    transport = open_transport(spec["transport"], spec["directory"], keys=spec["keys"])
    with transport, transport.bind(None) as inbox, transport.connect(spec["driver"], CONNECT_SECONDS) as driver:
        worker = kind(spec, board, Mailbox(inbox, incarnation=spec["incarnation"]), driver, transport.connect)
        worker.greet(inbox.address)
        worker.serve()


class BaseWorker(ABC):
    """The state of a worker; see the module for the protocol.

    Args:
        spec: As `serve` takes it, like `board`.
        board: Memory of the status board.
        mailbox: What arrives here.
        driver: The way to the driver.
        connect: Opens a way to an address, within so many seconds.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        board: Array,
        mailbox: Mailbox,
        driver: Outbox,
        connect: Callable[[str, float], Outbox],
    ) -> None:
        self.number: int = spec["worker"]
        self.incarnation: int = spec["incarnation"]
        self.specs = [StageSpec.of(stage) for stage in spec["stages"]]
        self.own_process: bool = spec["own_process"]
        self.board, self.mailbox, self.driver, self._connect = StatusBoard(board), mailbox, driver, connect
        self.state = WorkerState.NEW
        self.hosted: dict[int, HostedStage] = {}
        self.plans: dict[int, list[Action]] = {}
        self._outboxes: dict[int, Outbox] = {DRIVER: driver}
        self._number = 0
        self._building = self._failed = False
        self._updating: int | None = None
        self._applied = -1
        self._last_step = 0
        self._seen: ValueObserver | NormObserver | None = None
        self._kept: dict[int, Kept] = {}
        self._deeds: dict[type[Order], Callable[[Any], Reply]] = {
            Connect: self._do_connect,
            Build: self._do_build,
            Strips: self._do_strips,
            Unmask: self._do_unmask,
            TakePlan: self._do_plan,
            StepOrder: self._do_step,
            Apply: self._do_apply,
            Discard: self._do_discard,
            Get: self._do_get,
            Set: self._do_set,
            CallService: self._do_call,
            Keep: self._do_keep,
            PutBack: self._do_put_back,
            TellSeen: self._do_seen,
            **self.own_deeds(),
        }
        self._known = {order.do: order for order in self._deeds}

    @abstractmethod
    def own_deeds(self) -> Mapping[type[Order], Callable[[Any], Reply]]:
        """What this kind does besides the orders that all kinds understand."""

    @abstractmethod
    def host(self, spec: StageSpec) -> HostedStage:
        """Build a stage."""

    @abstractmethod
    def step(self, order: StepOrder) -> StepReply:
        """Carry out a step up to, not including, its update, and set `_seen`."""

    @abstractmethod
    def apply(self, order: Apply) -> None:
        """Update the variables from the gradients of the last step."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradients of the last step."""

    @abstractmethod
    def undo(self, order: Order) -> bool:
        """Undo what an order that failed half way has changed; whether that could be done."""

    @abstractmethod
    def undo_last_step(self) -> None:
        """Undo the step that is under way, or was the last one, unless an update followed it."""

    @abstractmethod
    def gradients(self, index: int) -> Sequence[Array | None]:
        """A stage's gradients of the last step, in the order of its trainable variables."""

    @abstractmethod
    def given_gradients(self, index: int) -> Sequence[Any | None]:
        """The same as the optimizer gets them: tensors, or rows of an embedding (`tf.IndexedSlices`)."""

    @abstractmethod
    def set_given_gradients(self, index: int, gradients: Sequence[Any | None]) -> None:
        """Put others in their place."""

    @abstractmethod
    def optimizer_values(self, index: int) -> Sequence[Array]:
        """The values of the variables of the optimizer that is kept under a stage's number."""

    @abstractmethod
    def set_optimizer_values(self, index: int, values: Sequence[Array]) -> None:
        """Write them."""

    @abstractmethod
    def at_work(self) -> tuple[int, Action | None]:
        """The step and the action that runs now; (-1, None) outside of a step."""

    def greet(self, address: str) -> None:
        """Tell the driver where this worker's inbox is."""
        self._tell("hello", {"address": address})

    def serve(self) -> None:
        """Carry out orders until the driver ends the run."""
        try:
            while self._serve_one():
                pass
        except Stopped:
            pass
        finally:
            for outbox in self._outboxes.values():
                outbox.close()

    def _serve_one(self) -> bool:
        """Carry out the next order; whether there may be another (rules 3 and 5)."""
        self._number += 1
        order = None
        try:
            message = self._take(_NOTHING if self._failed else Key("command", self._number, self.place))
            self.board.busy()
            order = of_wire(message.value, self._known)
            self.obey(order)
            self.board.idle()
        except Stopped:
            raise
        except Abandoned as taken_back:
            self._abandon(taken_back)
        except Exception as error:
            place = self.at_work()
            lost = isinstance(error, TransportError) and not isinstance(error, Unsendable)
            undone = not lost and order is not None and self.undo(order)
            self._report(error, place, undone)
            self._failed = undone
            if not (undone or lost):
                self._wait_for_the_end()
            return undone
        return True

    def _abandon(self, taken_back: Abandoned) -> None:
        """Be as before the orders that were taken back (rule 5)."""
        if self._last_step >= taken_back.first_step:
            self.undo_last_step()
            self.state = WorkerState.READY if self.state is WorkerState.STEPPED else self.state
        self._number, self._failed = taken_back.number, False
        self.mailbox.clear()
        self._tell("abandoned", None)
        self.board.idle()

    def obey(self, order: Order) -> None:
        """Carry out one order, and answer it if it is answered (rules 1 and 2)."""
        state = after(self.state, order.command, "+".join(repr(spec.name) for spec in self.specs))
        reply = self._deeds[type(order)](order)
        self.state = state
        if order.answered:
            for message in reply.messages(self.incarnation, self._number, self.place):
                self.driver.send(message, CONNECT_SECONDS)

    @property
    def place(self) -> int:
        """The stage under whose number the driver reaches this worker."""
        return self.specs[0].index

    def _take(self, key: Key) -> Message:
        return obeyed(self.mailbox.take((key,)))

    def _taken_array(self, key: Key) -> Array:
        array = self._take(key).array
        assert array is not None
        return array

    def _tell(self, kind: str, value: Any) -> None:
        message = Message(kind, self.incarnation, self._number, DRIVER, self.place, value=value)
        self.driver.send(message, CONNECT_SECONDS)

    def _send(self, message: Message) -> None:
        self._outboxes[message.stage].send(message, CONNECT_SECONDS)

    def _do_connect(self, order: Connect) -> Reply:
        opened: dict[str, Outbox] = {}
        for stage, address in order.peers.items():
            if address not in opened:
                opened[address] = self._connect(address, CONNECT_SECONDS)
            self._outboxes[stage] = opened[address]
        return Reply()

    def _do_build(self, order: Build) -> Reply:
        self._building = True
        for spec in self.specs:
            self.board.building(spec.index)
            self.hosted[spec.index] = self.host(spec)
        self._building = False
        self.board.busy()
        if self.own_process:
            gc.freeze()
        return Reply({str(index): hosted.describe().plain() for index, hosted in self.hosted.items()})

    def _do_strips(self, order: Strips) -> Reply:
        stages = self.hosted.items()
        return Reply({str(i): [one.spec.inputs[place][0] for place in one.stage.strips()] for i, one in stages})

    def _do_unmask(self, order: Unmask) -> Reply:
        for index, pairs in order.pairs.items():
            self.hosted[index].unmasked = frozenset(pairs)
        return Reply()

    def _do_plan(self, order: TakePlan) -> Reply:
        self.plans[order.plan] = list(actions_from_array(self._taken_array(Key("plan", self._number, self.place))))
        return Reply()

    def _do_step(self, order: StepOrder) -> Reply:
        self._last_step = order.step
        return Reply(self.step(order).plain())

    def _do_apply(self, order: Apply) -> Reply:
        if order.step > self._applied:
            self._applied = order.step
            self.apply(order)
        return Reply()

    def _do_discard(self, order: Discard) -> Reply:
        self.discard()
        return Reply()

    def _do_get(self, order: Get) -> Reply:
        found = {index: read_group(self, index, order.what) for index in self.hosted}
        counts = {str(index): len(values) for index, values in found.items()}
        return Reply(counts, [value for values in found.values() for value in values])

    def _do_set(self, order: Set) -> Reply:
        for index, count in order.counts.items():
            keys = [Key("variable", self._number, index, microbatch=i) for i in range(count)]
            write_group(self, index, order.what, [self._take(key).array for key in keys])
        return Reply()

    def _do_call(self, order: CallService) -> Reply:
        for hosted in self.hosted.values():
            do_service(hosted, order.service)
        return Reply()

    def _keep(self, groups: Sequence[str]) -> dict[int, Kept]:
        return {index: Kept(hosted, groups) for index, hosted in self.hosted.items()}

    def _do_keep(self, order: Keep) -> Reply:
        self._kept = self._keep(EVERYTHING)
        return Reply()

    def _do_put_back(self, order: PutBack) -> Reply:
        if not self._kept:
            raise HandoffError("the driver ordered to put back what was set aside, and nothing was: `keep` comes first")
        for kept in self._kept.values():
            kept.put_back()
        changed = {str(index): kept.changed()[:_NAMED] for index, kept in self._kept.items()}
        self._kept = {}
        return Reply(changed)

    def _do_seen(self, order: TellSeen) -> Reply:
        seen = self._seen.seen if isinstance(self._seen, ValueObserver) else {}
        self._seen = None
        return Reply([list(sight) for sight in seen], list(seen.values()))

    def _metrics(self) -> dict[str, float]:
        counting = [one.heads for one in self.hosted.values() if any(head.has_metrics for head in one.heads)]
        return {name: value for heads in counting for name, value in heads.results().items()}

    def _inner_metrics(self) -> dict[str, Any]:
        """The metrics of layers so far, by name."""
        return {name: value for hosted in self.hosted.values() for name, value in hosted.inner_results().items()}

    def _report(self, error: Exception, place: tuple[int, Action | None], undone: bool) -> None:
        """Tell the driver what happened, as far as the driver is still there (rule 3), and whether it left a trace."""
        step, action = place
        at = self._updating if action is None else action.stage
        spec = next((s for s in self.specs if s.index == at), None)
        if spec is None:
            spec = self.specs[min(len(self.hosted), len(self.specs) - 1)]
        doing = {"building": self._building, "updating": self._updating is not None, "undone": undone}
        value = failure_report(error, spec, step, action, **doing)
        try:
            self._tell("error", value)
        except TransportError:
            traceback.print_exc()

    def _wait_for_the_end(self) -> None:
        """Hold on to nothing but the inbox, until the driver says stop (or the process is ended)."""
        self.let_go()
        self.hosted.clear()
        try:
            while self.mailbox.receive().kind != "stop":
                pass
        except TransportError:
            pass

    @abstractmethod
    def let_go(self) -> None:
        """Drop what holds memory: the run has failed."""


__all__ = ["CONNECT_SECONDS", "BaseWorker", "serve"]
