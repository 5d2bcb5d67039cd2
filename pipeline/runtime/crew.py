"""The workers of a run: start them, reach them, notice when one dies, end them all.

    driver ── messages ──► every worker
    driver ◄── messages ── every worker
           ◄── sentinel ── every worker        (readable once it is gone, whatever ended it)

Rules:

1. Every wait also watches the workers. The first death or reported exception ends the run: all workers are stopped, and
   one error names the stage, the step and the action.
2. After `close`, whatever the reason, no process, socket file or shared memory of the run remains.
3. A crew belongs to the process that started it; a forked copy of that process does not touch it.
4. A crew that runs is held here, so that the cyclic garbage collector, which finalises in no order, never meets its
   sockets: a ZeroMQ context that goes first waits for them for ever. A dropped `Driver` closes its crew.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.errors import PipelineClosedError, StalledError, WorkerError
from pipeline.runtime.interrupts import deferred_interrupts, interruptible
from pipeline.runtime.launch import Launcher, LocalLauncher, ThreadLauncher, WorkerHandle
from pipeline.runtime.post_mortem import describe_worker, died, failed, stalled
from pipeline.runtime.socket_directory import SocketDirectory
from stages.recipe.settings import settings
from stages.worker.stage_spec import StageSpec
from stages.worker.too_large import in_users_words
from transport.channel import Outbox, Transport
from transport.endpoints import tcp_host_port
from transport.errors import (
    BadAddress,
    ChannelClosed,
    MessageTooLarge,
    PeerLost,
    TransportError,
    TransportTimeout,
    Watched,
)
from transport.mailbox import Mailbox
from transport.message import DRIVER, Key, Message
from transport.registry import new_keys, open_transport

START_SECONDS = 120.0
"""How long a worker may take until it can be talked to; a cold start imports TensorFlow."""
_CONNECT_SECONDS = 0.5
"""How long it is tried to reach a worker before it is looked whether all are there."""
LOOK_SECONDS = 5.0
"""How often a long wait looks whether anybody still runs."""
_LEAVE_SECONDS = 2.0
"""How long a worker may take to leave by itself."""
_LEAVE_AFTER_FAILURE_SECONDS = 0.3
"""The same when the run has failed: nothing that a worker still computes has a use."""
_DEATH_SECONDS = 1.0
"""How long a process may take to be gone after its connection was lost."""


class Crew:
    """The workers of one run, `start`ed once.

    Args:
        placement: For each worker the stages it hosts.
        incarnation: Stamped on every message.
        look_seconds: How often a long wait looks whether anybody still runs.
    """

    def __init__(
        self, placement: Sequence[Sequence[StageSpec]], incarnation: int = 0, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self.placement = tuple(tuple(specs) for specs in placement)
        self.incarnation = incarnation
        self.closed_because: str | None = None
        self.addresses: list[str] = []
        self._look_seconds = look_seconds
        self._owner = os.getpid()
        self._handles: list[WorkerHandle] = []
        self._outboxes: list[Outbox] = []
        self._directory: SocketDirectory | None = None
        self._launcher: Launcher | None = None
        self._transport: Transport | None = None

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids; None for threads."""
        return [handle.pid for handle in self._handles]

    def place(self, worker: int) -> int:
        """The stage under whose number messages reach a worker."""
        return self.placement[worker][0].index

    def start(self, transport: str, threads: int, entry: str, launcher: Launcher | None = None) -> None:
        """Start the workers and open a way to each.

        Args:
            transport: ``"inproc"``, ``"local"``, ``"ipc"``, ``"tcp"`` or a tcp address of the driver's own inbox.
            threads: Size of TensorFlow's thread pools in each worker.
            entry: What a worker runs, ``"module:function"``.
            launcher: Where; None: on this host, in processes or threads as the transport says.
        """
        _crews.add(self)
        scheme = transport.partition("://")[0]
        self._directory = SocketDirectory() if scheme == "ipc" else None
        self._launcher = launcher or (ThreadLauncher() if scheme == "inproc" else LocalLauncher())
        directory = None if self._directory is None else self._directory.path
        keys = new_keys(scheme)
        self._transport = open_transport(scheme, directory, keys=keys)
        inbox = self._transport.bind(transport if "://" in transport else None)
        self._mailbox = Mailbox(inbox, incarnation=self.incarnation)
        for number, specs in enumerate(self.placement):
            spec = {
                "worker": number,
                "incarnation": self.incarnation,
                "transport": scheme,
                "directory": directory,
                "keys": keys,
                "driver": inbox.address,
                "stages": [stage.plain() for stage in specs],
                "own_process": scheme != "inproc",
                "settings": settings(),
            }
            name = "+".join(stage.name for stage in specs)
            self._handles.append(self._launcher.launch(name, entry, spec, threads))
        self._mailbox.watch = [handle.sentinel for handle in self._handles]
        hellos = [self.wait(Key("hello", 0, DRIVER, self.place(w)), START_SECONDS) for w in range(len(self._handles))]
        self.addresses = [str(hello.value["address"]) for hello in hellos]  # type: ignore[index,call-overload]
        self._outboxes = [self._connect(self._transport, address) for address in self.addresses]

    def _connect(self, transport: Transport, address: str) -> Outbox:
        """A way to a worker that said where it is; one that dies now is not waited for."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return transport.connect(address, _CONNECT_SECONDS)
            except TransportTimeout:
                gone = next((one for one in self._handles if not one.alive()), None)
                if gone is not None:
                    raise Watched(gone.sentinel) from None
                if time.monotonic() > deadline:
                    raise

    def all_connected(self) -> None:
        """Every connection stands, also between workers: the socket files are not needed any more."""
        if self._directory is not None:
            self._directory.remove()

    def send(self, worker: int, message: Message) -> None:
        """Send to a worker.

        Raises:
            PipelineClosedError: The workers are gone.
            MessageTooLarge: The message is above the limits; nothing of it was sent.
        """
        self.check_open()
        try:
            self._outboxes[worker].send(message)
        except MessageTooLarge as error:
            raise in_users_words(error, message) from None

    def check_open(self) -> None:
        """Refuse to go on without workers.

        Raises:
            PipelineClosedError: They are gone; says since when.
        """
        if self.closed_because is not None:
            raise PipelineClosedError(
                f"this pipeline's workers are gone ({self.closed_because}); make a new Pipeline, or "
                "Pipeline.load(...) the last checkpoint"
            )

    def wait(self, key: Key, timeout: float | None = None) -> Message:
        """Wait for one message.

        Raises:
            WorkerError: A worker reported an exception.
            StalledError: Nobody runs any more and every worker waits, or the time is over.
            Watched: A worker is gone; `ending_on_failure` turns that into what it means.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        before = None
        while True:
            try:
                with interruptible():
                    message = self._mailbox.take((key,), self._look_seconds)
            except TransportTimeout:
                boards = [handle.board.tolist() for handle in self._handles]
                if boards == before and stalled(boards):
                    raise StalledError(self._who_waits("every worker waits and nobody runs")) from None
                before = boards
                if deadline is not None and time.monotonic() > deadline:
                    raise StalledError(self._who_waits(f"no answer within {timeout:.0f} s")) from None
                continue
            if message.kind != "error":
                return message
            raise self._explain(message.value)

    def abandon(self, number: int, first_step: int) -> None:
        """Take back what the workers were ordered and wait until all of them stand where they stood before.

        Args:
            number: The last order's.
            first_step: The first step that does not count.

        Raises:
            WorkerError: One of them cannot go on.
        """
        for worker in range(len(self.placement)):
            place = self.place(worker)
            self.send(worker, Message("abandon", self.incarnation, number, place, value=first_step))
        for worker in range(len(self.placement)):
            while True:
                try:
                    self.wait(Key("abandoned", number, DRIVER, self.place(worker)))
                    break
                except WorkerError as late:  # it failed by itself before it heard
                    if not late.undone:
                        raise
        self._mailbox.clear()  # answers to what was taken back

    @contextmanager
    def ending_on_failure(self) -> Iterator[None]:
        """Close the crew when anything escapes, and turn what the transport noticed into what it means (rule 1)."""
        try:
            yield
        except PipelineClosedError:
            raise
        except BaseException as error:
            meaning = self._meaning(error)
            self.close(_in_short(meaning or error), _LEAVE_AFTER_FAILURE_SECONDS)
            if meaning is not None:
                raise meaning from None
            raise

    def close(self, because: str, leave_seconds: float = _LEAVE_SECONDS) -> None:
        """End every worker and free everything. Idempotent.

        Args:
            because: For whoever uses the crew afterwards.
            leave_seconds: How long workers may take to leave by themselves before they are killed.
        """
        if self.closed_because is not None or self._owner != os.getpid():
            return
        self.closed_because = because
        _crews.discard(self)
        with deferred_interrupts():
            try:
                self._let_leave(leave_seconds)
            finally:
                if self._launcher is not None:
                    self._launcher.close()
                if self._transport is not None:
                    self._transport.close()
                if self._directory is not None:
                    self._directory.remove()

    def _let_leave(self, seconds: float) -> None:
        for worker, outbox in enumerate(self._outboxes):
            try:
                outbox.send(Message("stop", self.incarnation, stage=self.place(worker)), seconds)
            except TransportError:
                continue  # it is gone already
        deadline = time.monotonic() + (seconds if self._outboxes else 0.0)
        for handle in self._handles:
            handle.join(max(0.0, deadline - time.monotonic()))

    def _meaning(self, error: BaseException) -> WorkerError | None:
        """What a watched process or a lost connection says: the report of a worker, else the death of one."""
        if not isinstance(error, Watched | PeerLost):
            return None
        dead = self._dead_worker()
        report = self._reported()
        if report is not None:
            return self._explain(report)
        return None if dead is None else self._death_of(dead)

    def _explain(self, report: Any) -> WorkerError:
        """The error of a worker's report; when it only lost its neighbour, that of the neighbour."""
        if report["type"] in _LOST:
            dead = self._dead_worker()
            if dead is not None:
                return self._death_of(dead)
        return failed(report)

    def _death_of(self, worker: int) -> WorkerError:
        return died(self._handles[worker], self.placement[worker], self._who_waits(""))

    def _reported(self) -> Any | None:
        """The first exception that a worker has reported and nobody has read yet."""
        self._mailbox.watch = ()
        try:
            while True:
                message = self._mailbox.receive(0.0)
                if message.kind == "error":
                    return message.value
        except TransportError:
            return None

    def _dead_worker(self) -> int | None:
        deadline = time.monotonic() + _DEATH_SECONDS
        while True:
            for number, handle in enumerate(self._handles):
                if handle.join(0.0):
                    return number
            if time.monotonic() > deadline:
                return None
            self._handles[0].join(0.02)

    def _who_waits(self, why: str) -> str:
        names = {spec.index: spec.name for specs in self.placement for spec in specs}
        lines = [f"  {describe_worker(handle, names)}" for handle in self._handles]
        return "\n".join([why, *lines]) if why else "\n".join(lines)


def _in_short(error: BaseException) -> str:
    """An error in one line, for whoever asks later why the workers are gone."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def check_transport(transport: str) -> None:
    """Refuse a transport that cannot be, before anything is started.

    Raises:
        BadAddress: An unknown scheme, or an address that is none.
    """
    scheme, address, _ = transport.partition("://")
    open_transport(scheme).close()
    if address and scheme != "tcp":
        raise BadAddress(f"only tcp takes an address of one's own, received {transport!r}; say {scheme!r}")
    if address:
        tcp_host_port(transport)


_LOST = (PeerLost.__name__, ChannelClosed.__name__, TransportTimeout.__name__)
"""What a worker reports that cannot reach another one."""
_crews: set[Crew] = set()
"""Those that run (rule 4)."""


@atexit.register
def _close_all() -> None:
    """Close what the user left open, while the modules that it takes are still there."""
    for crew in list(_crews):
        crew.close("the program ends")
