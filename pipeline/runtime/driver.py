"""Tell workers what to do and hear what they say.

    driver ── numbered commands ──► every worker
    driver ◄── one reply each ───── every worker        (activations never pass through here)

Rules:

1. Commands go to all workers with one number; a command that is answered is answered by all.
2. A step is done, or undone in every stage: what raises in a layer, does not fit a message or is interrupted is taken
   back (`abandon`), and the run goes on. What cannot be taken back, a lost worker above all, ends it
   (`pipeline.runtime.recovery` then begins another). `Crew` starts the workers, watches them, and ends them.
3. Ctrl-C waits for the end of a step; a second one takes the step back; a third one ends the run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from pipeline.batch.step import Batch, StepResult, result_of
from pipeline.plan.placing import placed
from pipeline.plan.plan import Plan
from pipeline.plan.schedules.forward_only import forward_only
from pipeline.runtime.batch_messages import batch_messages, joined_outputs, order_of
from pipeline.runtime.crew import LOOK_SECONDS, Crew
from pipeline.runtime.driver_notes import DriverNotes
from pipeline.runtime.interrupts import deferred_interrupts
from pipeline.runtime.launch import Launcher
from pipeline.runtime.neighbours import neighbours, unmasked_pairs, upstream_of
from pipeline.runtime.post_mortem import can_be_taken_back
from pipeline.runtime.turns import Turns
from stages.actions import actions_to_array
from stages.grid import is_over_time
from stages.worker.description import StageDescription, TensorInfo
from stages.worker.observers import Sight
from stages.worker.orders import (
    Apply,
    Build,
    CallService,
    Connect,
    Discard,
    Get,
    Keep,
    Mode,
    Order,
    PutBack,
    Service,
    Set,
    StepOrder,
    Strips,
    TakePlan,
    TellSeen,
    Unmask,
)
from stages.worker.reply import Reply, StepReply
from stages.worker.stage_spec import StageSpec
from transport.errors import PeerLost, TransportError, Watched
from transport.message import Message
from transport.registry import AUTO

Array = np.ndarray[Any, Any]


class Driver:
    """A running set of workers.

    Args:
        placement: For each worker the stages it hosts.
        threads: Size of TensorFlow's thread pools in each worker.
        transport: ``"inproc"``, ``"local"``, ``"ipc"``, ``"tcp"`` or a tcp address of the driver's own inbox.
        entry: What a worker runs, ``"module:function"``.
        incarnation: Stamped on every message.
        look_seconds: How often a long wait looks whether anybody still runs.
        turns: Whose turn it is, of several threads.
        launcher: Where workers are started; None: on this host.
    """

    def __init__(
        self,
        placement: Sequence[Sequence[StageSpec]],
        *,
        threads: int,
        transport: str = AUTO,
        entry: str = "stages.worker.worker:main",
        incarnation: int = 0,
        look_seconds: float = LOOK_SECONDS,
        turns: Turns | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.incarnation = incarnation
        self._turns = turns or Turns()
        self.scheme = transport.partition("://")[0]
        self.descriptions: dict[int, StageDescription] = {}
        self._number = 0
        self._step = 0
        self._undecided = False
        self._plans: dict[tuple[str, int, int, tuple[int, ...]], tuple[int, Plan]] = {}
        self._announced = 0
        self._mask_plans: dict[tuple[int, int], Plan] = {}
        self._crew = Crew(placement, incarnation, look_seconds)
        self.placement = self._crew.placement
        self._worker_of = {spec.index: w for w, specs in enumerate(self.placement) for spec in specs}
        weakref.finalize(self, self._crew.close, "their pipeline was dropped").atexit = False
        with self._crew.ending_on_failure():
            self._crew.start(transport, threads, entry, launcher)
            self._connect_and_build()

    @property
    def closed(self) -> bool:
        """Whether the workers are gone."""
        return self._crew.closed_because is not None

    @property
    def specs(self) -> dict[int, StageSpec]:
        """The stages by number."""
        return {spec.index: spec for specs in self.placement for spec in specs}

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids; None for threads."""
        return self._crew.pids

    @property
    def number(self) -> int:
        """The last order's."""
        return self._number

    def _connect_and_build(self) -> None:
        addresses = {stage: self._crew.addresses[w] for stage, w in self._worker_of.items()}
        connected = self._order(lambda w: Connect({stage: addresses[stage] for stage in neighbours(self.placement[w])}))
        built = self._order(Build())
        self._replies(connected)
        self._crew.all_connected()
        for reply in self._replies(built):
            self.descriptions |= {int(i): StageDescription.from_plain(found) for i, found in reply.value.items()}
        stages = self.descriptions.values()
        masks = any(stage.masks for stage in stages)
        if masks:
            self._settle_masks()
        self._masks_count = masks and any(stage.mean_loss for stage in stages)

    def _settle_masks(self) -> None:
        """Give a mask to those consumers only that would find it in one process.

        Attention layers take the mask off the tensor that they read; a later reader of the same tensor finds none.
        """
        strips = {int(i): names for reply in self._replies(self._order(Strips())) for i, names in reply.value.items()}
        pairs = unmasked_pairs(self.specs, strips)
        self._order(lambda w: Unmask({spec.index: pairs[spec.index] for spec in self.placement[w]}))

    def run(
        self,
        plan: Plan,
        mode: Mode,
        batch: Batch,
        *,
        trace: bool = False,
        norms: bool = False,
        loss_scale: float | None = None,
        observe: str = "",
    ) -> StepResult:
        """One step up to, not including, its update.

        Args:
            plan: The order of actions; each worker gets its own once.
            mode: What it is for.
            batch: The data.
            trace: Whether to return when each action began and ended.
            norms: Whether to return the squared norm of all gradients.
            loss_scale: Factor on the loss while it is differentiated; then `finite` is returned too.
            observe: ``"values"`` (for `seen`) or ``"norms"`` of tensors at the cuts; see `stages.worker.observers`.
        """
        with self.going_on():
            if self._masks_count and mode.with_loss:
                self._masks_count = self._masked(batch)
            order = order_of(plan, mode, batch)
            order = replace(order, trace=trace, squared_norms=norms, loss_scale=loss_scale, observe=observe)
            notes = DriverNotes() if trace else None
            answers = self.answers(self.begin_step(order, plan, batch, notes))
            outputs = self._outputs(batch) if mode is Mode.PREDICT else None
            return result_of(answers, self.specs, batch, outputs, None if notes is None else notes.record(answers))

    @property
    def next_step(self) -> int:
        """The number that the next step will have."""
        return self._step + 1

    @property
    def looks_at_masks(self) -> bool:
        """Whether the masks of a batch decide what its microbatches weigh, before it is trained."""
        return self._masks_count

    def begin_step(self, order: StepOrder, plan: Plan, batch: Batch, notes: DriverNotes | None = None) -> int:
        """Order a step, which gets its number and its plan's here, and feed it; the order's number."""
        self.discard()  # if whoever ordered the last step failed before its update: nothing of it may go into this one
        identity = self._announce(plan)
        self._step += 1
        self._undecided = order.mode.training
        number = self._order(replace(order, step=self._step, plan=identity))
        send = self._crew.send if notes is None else notes.around(self._crew.send)
        for worker, message in batch_messages(self.placement, order.mode, batch, self.incarnation, self._step):
            send(worker, message)
        return number

    def answers(self, number: int) -> list[StepReply]:
        """The workers' answers to a step's order."""
        return [StepReply.from_plain(reply.value) for reply in self._replies(number)]

    def _masked(self, batch: Batch) -> bool:
        """Let the loss's stage learn which elements of the predictions count; whether any mask arrived there.

        What a microbatch weighs in a masked mean depends on the masks of all microbatches, so they go first.
        """
        size = (len(batch.sizes), max(1, len(batch.lengths)))
        plan = self._mask_plans.get(size)
        if plan is None:
            plan = self._mask_plans[size] = forward_only(len(self._worker_of), size[0], windows=size[1])
        number = self.begin_step(order_of(plan, Mode.MASKS, batch), plan, batch)
        return any(answer.masked for answer in self.answers(number))

    def apply(
        self,
        learning_rates: Mapping[int, float],
        scale: float | None = None,
        divisor: float | None = None,
        attributes: Mapping[int, Mapping[str, Any]] | None = None,
        write_down: bool = True,
    ) -> None:
        """Let every stage update its variables from the step just run. Returns at once; order is kept.

        Args:
            learning_rates: {stage: rate}; stages that are not there keep theirs.
            scale: Factor on all gradients, for clipping by a global norm.
            divisor: What they are divided by first, for loss scaling.
            attributes: {stage: {name: value}} of its optimizer that are set before, from now on.
            write_down: Whether workers whose values are to outlive them write them down.
        """
        with self._turns, self._crew.ending_on_failure():
            self._order(Apply(self._step, learning_rates, scale, divisor, attributes or {}, write_down))
            self._undecided = False

    def discard(self) -> None:
        """Forget the gradients of the step just run; nothing is done where there are none."""
        if self._undecided:
            with self._turns, self._crew.ending_on_failure():
                self._order(Discard())
                self._undecided = False

    def get(self, what: str) -> dict[int, list[Array | None]]:
        """Read variables or gradients of every stage; see `HostedStage.variables` for the names."""
        found: dict[int, list[Array | None]] = {}
        for reply in self.ask(Get(what)):
            arrays = iter(reply.arrays)
            found |= {int(index): list(islice(arrays, count)) for index, count in reply.value.items()}
        return dict(sorted(found.items()))

    def set(self, what: str, values: Mapping[int, Sequence[Array | None]]) -> None:
        """Write variables of every stage; all arrays of a stage, in order."""
        with self.going_on():
            number = self._number + 1
            for index, arrays in values.items():
                for i, array in enumerate(arrays):
                    value = None if array is None else np.array(array)
                    message = Message("variable", self.incarnation, number, index, microbatch=i, array=value)
                    self._crew.send(self._worker_of[index], message)
            counts = {index: len(arrays) for index, arrays in values.items()}
            self._order(lambda w: Set(what, {s.index: counts[s.index] for s in self.placement[w] if s.index in counts}))
            self._replies(number)

    def keep(self) -> None:
        """Let every stage set all its values aside until `put_back`."""
        self.ask(Keep())

    def put_back(self) -> dict[int, list[str]]:
        """Let every stage put back what it set aside.

        Returns:
            {stage: paths of variables whose bits are not as they were}; all lists should be empty.
        """
        return {int(i): paths for reply in self.ask(PutBack()) for i, paths in reply.value.items()}

    @contextmanager
    def keeping(self) -> Iterator[dict[int, list[str]]]:
        """Set all values aside, and put them back at the end whatever happened, as far as the workers are still there.

        Yields:
            A dict, filled at the end: {stage: paths of variables whose bits are not as they were}, as `put_back` says.
        """
        with self._turns:  # no other thread's step may come in between
            self.keep()
            changed: dict[int, list[str]] = {}
            try:
                yield changed
            finally:
                if not self.closed:
                    changed |= self.put_back()

    def seen(self) -> dict[Sight, Array | None]:
        """What a step that ran with ``observe="values"`` saw at the cuts; it is forgotten there."""
        return {
            Sight(*sight): array
            for reply in self.ask(TellSeen())
            for sight, array in zip(reply.value, reply.arrays, strict=True)
        }

    def ask(self, order: Order) -> list[Reply]:
        """Give an order that is answered to every worker; the answers, in the order of the workers."""
        with self.going_on():
            return self._replies(self._order(order))

    def call(self, service: Service) -> None:
        """A small service in every stage."""
        self.ask(CallService(service))

    def close(self, because: str = "close() was called") -> None:
        """End every worker and free everything. Idempotent."""
        self._crew.close(because)

    def abandon_step(self) -> None:
        """Undo, in every stage, the step just run, which will not be followed by its update."""
        with self._turns, deferred_interrupts(), self._crew.ending_on_failure():
            self._abandon(self._step)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Take back what was ordered where it fails, so that the workers go on; else end them (rule 2)."""
        with self._turns, deferred_interrupts():
            first, taken_back = self._step + 1, None
            with self._crew.ending_on_failure():
                try:
                    yield
                except BaseException as error:
                    if not can_be_taken_back(error):
                        raise
                    try:
                        self._abandon(first)
                    except (Watched, PeerLost):
                        raise  # a worker died meanwhile
                    except TransportError:
                        raise error from None  # the way to a worker is damaged
                    taken_back = error
            if taken_back is not None:
                raise taken_back

    def _abandon(self, first_step: int) -> None:
        """Let the workers be as they were before a step, and before all orders since."""
        self._number += 1
        self._crew.abandon(self._number, first_step)
        self._undecided = self._undecided and self._step < first_step

    def _announce(self, plan: Plan) -> int:
        """Send a plan the first time it is used; return its number."""
        key = (plan.name, plan.microbatches, plan.windows, plan.placement)
        known = self._plans.get(key)
        if known is not None and (known[1] is plan or known[1] == plan):
            return known[0]
        identity = self._announced  # never one that workers know another plan by
        self._announced += 1
        self._plans[key] = (identity, plan)
        number = self._order(TakePlan(identity))
        here = placed(plan, [self._worker_of[stage] for stage in range(plan.stages)], upstream_of(self.specs))
        for worker, program in enumerate(here.programs):
            array = actions_to_array(program)
            self._crew.send(worker, Message("plan", self.incarnation, number, self._crew.place(worker), array=array))
        return identity

    def _outputs(self, batch: Batch) -> dict[str, Array]:
        def over_time(stage: int, name: str) -> bool:
            return (told := self.output_spec(stage, name)) is not None and is_over_time(told.shape)

        return joined_outputs(self._crew.wait, list(self.specs.values()), batch, self._step, over_time)

    def output_spec(self, stage: int, name: str) -> TensorInfo | None:
        """Dtype and shape of a stage's output, where its model tells."""
        outputs = self.descriptions[stage].outputs
        return None if outputs is None else outputs[[one for one, _ in self.specs[stage].outputs].index(name)]

    def _order(self, order: Order | Callable[[int], Order]) -> int:
        """Give every worker an order, the same or, by a function of the worker's number, its own; its number."""
        self._crew.check_open()
        self._number += 1
        same = order.plain() if isinstance(order, Order) else None
        for worker in range(len(self.placement)):
            value = order(worker).plain() if same is None else same  # type: ignore[operator]
            stage = self._crew.place(worker)
            self._crew.send(worker, Message("command", self.incarnation, self._number, stage, value=value))
        return self._number

    def _replies(self, number: int) -> list[Reply]:
        """The workers' answers to an order, in the order of the workers."""
        return [Reply.receive(self._crew.wait, number, self._crew.place(w)) for w in range(len(self.placement))]


__all__ = ["Driver"]
