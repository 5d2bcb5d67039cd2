"""A driver whose workers may die: others take their place, with the same values, and what was under way is made again.

    inner driver, incarnation 0      a worker dies: all of its workers are ended
           │ values written down at the last boundary, in memory that outlived them
           ▼
    inner driver, incarnation 1      those values, then the log behind them, then what was under way

Rules:

1. A boundary is where all values are written down (`stages.worker.boundary`). The log holds what was decided since the
   last one that all workers are known to have written; what a user was told is in one of both, and never told again.
2. Before an order that makes another boundary, the last one is confirmed: of its two slots each worker has at most one
   that is newer, so that the confirmed boundary can be read whatever dies when.
3. An incarnation that is left is dead: its processes are killed through descriptors that name no other ones, and waited
   for, before another begins, which has sockets, memory and (over tcp) keys of its own. Nothing that is left of the
   old one can reach the new one.
4. Only deaths are got over. What a worker reports (an exception) is raised as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from pipeline.batch.step import Batch, StepResult
from pipeline.errors import WorkerDiedError
from pipeline.plan.plan import Plan
from pipeline.runtime.driver import Driver
from pipeline.runtime.interrupts import deferred_interrupts
from pipeline.runtime.launch.errors import ServerGoneError
from pipeline.runtime.recovery.launcher import LastingLauncher
from pipeline.runtime.recovery.log import DecidedStep, Log, UndecidedStep
from pipeline.runtime.recovery.options import Recovery, Repair
from pipeline.runtime.turns import Turns
from stages.worker.observers import Sight
from stages.worker.orders import CallService, Get, Mode, Order
from stages.worker.recovery_orders import GoOnAs, WriteDown
from stages.worker.reply import Reply
from stages.worker.stage_spec import StageSpec
from stages.worker.written_values import ByGroup

Array = np.ndarray[Any, Any]
Found = TypeVar("Found")
Death = WorkerDiedError | ServerGoneError
DEATHS = (WorkerDiedError, ServerGoneError)
_log = logging.getLogger("tapeline")
_Values = tuple[ByGroup, Mapping[int, Any]]
_NOTHING: _Values = ({}, {})


class LastingDriver(Driver):
    """Stands where a `Driver` stands, and hands everything on to one that it replaces when a worker dies.

    Args:
        placement: For each worker the stages it hosts.
        recovery: The options.
        repairs: Gets a record of each repair.
        threads: As for `Driver`, like `transport` and `turns`.
    """

    def __init__(
        self,
        placement: Sequence[Sequence[StageSpec]],
        *,
        recovery: Recovery,
        repairs: list[Repair],
        threads: int,
        transport: str,
        turns: Turns,
    ) -> None:
        self.placement = tuple(tuple(specs) for specs in placement)
        self.scheme = transport.partition("://")[0]
        self.incarnation = -1
        self._turns = turns
        self._recovery, self._repairs = recovery, repairs
        self._given: dict[str, Any] = {"threads": threads, "transport": transport, "turns": turns}
        self._history = Log()
        self._pending: UndecidedStep | None = None
        self._sights: dict[Sight, Array | None] = {}
        self._kept: _Values | None = None
        self._ashore: _Values | None = _NOTHING
        self._updates = 0
        self._inner: Driver | None = None
        self._launcher: LastingLauncher | None = None
        self._newest: LastingLauncher | None = None
        self._lost: list[tuple[float, str, str, str]] = []
        self._certain(lambda inner: None)

    @property
    def closed(self) -> bool:
        """Whether the workers are gone for good."""
        return self._ashore is None and (self._inner is None or self._inner.closed)

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids at present."""
        return [] if self._inner is None else self._inner.pids

    @property
    def number(self) -> int:
        """The last order's of the present workers."""
        return 0 if self._inner is None else self._inner.number

    def run(self, plan: Plan, mode: Mode, batch: Batch, **options: Any) -> StepResult:
        """See `Driver.run`."""
        self.discard()

        def deed(inner: Driver) -> tuple[StepResult, dict[Sight, Array | None]]:
            result = inner.run(plan, mode, batch, **options)
            return result, inner.seen() if options.get("observe") == "values" else {}

        result, self._sights = self._certain(deed, boundary=not mode.training)
        if mode.training:
            self._pending = UndecidedStep(plan, mode, batch, options, result)
        return result

    def apply(
        self,
        learning_rates: Mapping[int, float],
        scale: float | None = None,
        divisor: float | None = None,
        attributes: Mapping[int, Mapping[str, Any]] | None = None,
        write_down: bool = True,
    ) -> None:
        """See `Driver.apply`; the update is made whatever dies from now on."""
        self._updates += 1
        update = {"learning_rates": learning_rates, "scale": scale, "divisor": divisor, "attributes": attributes}
        self._decide(update, write_down and self._updates % self._recovery.every == 0)

    def discard(self) -> None:
        """See `Driver.discard`."""
        if self._pending is not None:
            self._decide(None, written=True)

    def abandon_step(self) -> None:
        """See `Driver.abandon_step`."""
        self._pending = None
        self._certain(lambda inner: inner.abandon_step())

    def set(self, what: str, values: Mapping[int, Sequence[Array | None]]) -> None:
        """See `Driver.set`."""
        self._certain(lambda inner: inner.set(what, values), boundary=True)

    def keep(self) -> None:
        """See `Driver.keep`."""
        self._certain(lambda inner: inner.keep(), boundary=True)
        assert self._launcher is not None
        self._kept = self._launcher.read(self._history.boundary)

    def put_back(self) -> dict[int, list[str]]:
        """See `Driver.put_back`."""
        changed = self._certain(lambda inner: inner.put_back(), boundary=True)
        self._kept = None
        return changed

    def seen(self) -> dict[Sight, Array | None]:
        """See `Driver.seen`."""
        found, self._sights = self._sights, {}
        return found

    def ask(self, order: Order) -> list[Reply]:
        """See `Driver.ask`."""
        return self._certain(lambda inner: inner.ask(order), boundary=isinstance(order, CallService))

    def close(self, because: str = "close() was called") -> None:
        """See `Driver.close`."""
        self._ashore = self._pending = self._kept = None
        if self._inner is not None:
            self._inner.close(because)
        if self._launcher is not None:
            self._launcher.forget()

    def _decide(self, update: Mapping[str, Any] | None, written: bool) -> None:
        """Update by the step just run, or drop its gradients, and have that in the log before anything is ordered."""
        run, self._pending = self._pending, None
        if run is None or (update is None and run.mode is not Mode.TRAIN):  # the workers say what is wrong, or drop it
            given = {} if update is None else update
            self._certain(lambda inner: inner.discard() if update is None else inner.apply(**given), answered=False)
            return
        decided = DecidedStep(run, update, written)
        self._history.decided.append(decided)

        def give(inner: Driver) -> None:
            if decided in self._history.decided:  # else it was made again already
                decided.give(inner)

        self._certain(give, answered=False)

    def _certain(self, deed: Callable[[Driver], Found], *, boundary: bool = False, answered: bool = True) -> Found:
        """Do something with the workers, and do it again with others from the same values where some die.

        Args:
            deed: What is done.
            boundary: Whether workers write their values down behind it.
            answered: Whether they have carried out everything when it is done.
        """
        with self._turns, deferred_interrupts():
            tries = _Tries(self._recovery.tries)
            while True:
                try:
                    inner = self._afloat()
                    if boundary and self._history.is_open:
                        inner.ask(Get("count"))
                        self._history.confirm()
                    found = deed(inner)
                    break
                except DEATHS as death:
                    self._save(death)
                    tries.count(death)
                except BaseException:
                    if boundary and self._inner is not None and not self._inner.closed:
                        self._anew_from_here(self._inner)
                    raise
            if boundary:
                self._history.through(inner.number)
            elif answered:
                self._history.confirm()
            return found

    def _anew_from_here(self, inner: Driver) -> None:
        """After an order that was taken back half way: what the workers have now is a boundary."""
        self._history.boundary = None
        try:
            inner.ask(WriteDown())
            self._history.through(inner.number)
        except DEATHS as death:
            self._save(death)

    def _save(self, death: Death) -> None:
        """Note a death, and take what the dead wrote down to where it lasts."""
        stage = death.stage if isinstance(death, WorkerDiedError) else self.placement[0][0].name
        why = (self._newest and self._newest.why(stage)) or _why(death)
        where = ""
        if isinstance(death, WorkerDiedError) and death.action:
            where = f"{'in' if death.running else 'after'} {death.action}, {self._updates} update(s) made"
        self._lost.append((getattr(death, "noticed", 0.0) or time.time(), stage, why, where))
        if self._ashore is not None or self._launcher is None:
            return
        log = self._history
        for one in [*log.decided]:
            if log.boundary is not None and one.written and one.number and self._launcher.all_wrote(one.number):
                log.through(one.number)
        self._ashore = self._launcher.read(log.boundary)
        self._launcher.forget()

    def _afloat(self) -> Driver:
        """The workers, new ones if the last are gone."""
        if self._ashore is None:
            assert self._inner is not None
            return self._inner
        log, self.incarnation = self._history, self.incarnation + 1
        self._newest = launcher = LastingLauncher(self._recovery.frozen_seconds)
        inner = Driver(self.placement, incarnation=self.incarnation, launcher=launcher, **self._given)
        try:
            if self._kept is not None:
                _give(inner, *self._kept)
                inner.keep()
            _give(inner, *self._ashore, log.attributes)
            for one in log.decided:
                one.again(inner)
            inner.ask(WriteDown())
            number = inner.number
            if self._pending is not None:
                self._pending.again(inner)
        except BaseException:
            inner.close("they could not be made what those before them were")
            launcher.forget()
            raise
        log.through(number)
        self._inner, self._launcher, self._ashore = inner, launcher, None
        self.descriptions = inner.descriptions
        self._tell()
        return inner

    def _tell(self) -> None:
        """Say and note that a repair is done."""
        if self._lost:
            (since, stage, why, where), deaths, self._lost = self._lost[0], len(self._lost), []
            repair = Repair(stage, why, where, deaths, since, time.time() - since)
            self._repairs.append(repair)
            _log.warning("%s", repair)


class _Tries:
    """Counts the deaths while one thing is done."""

    def __init__(self, most: int) -> None:
        self._most, self._deaths = most, 0
        self._last: tuple[str, str] | None = None

    def count(self, death: Death) -> None:
        """One more.

        Raises:
            WorkerDiedError, ServerGoneError: It is too much, or a worker died twice while it computed the same.
        """
        self._deaths += 1
        place = None
        if isinstance(death, WorkerDiedError) and death.running:
            place = death.stage, death.action
        if place is not None and place == self._last:
            raise _given_up(death, "it died there twice, so it would again: something in this step ends the process")
        if self._deaths > self._most:
            raise _given_up(death, f"workers died {self._deaths} times in a row, and tries={self._most}")
        self._last = place


def _given_up(death: Death, why: str) -> Death:
    """The error when no other try is made."""
    text = f"{str(death).partition(chr(10))[0]}\n{why}. Nothing of it was kept; the values from before it are not lost"
    if not isinstance(death, WorkerDiedError):
        return ServerGoneError(text)
    told: dict[str, Any] = {"stage": death.stage, "action": death.action, "step": death.step}
    return WorkerDiedError(text, **told, worker_traceback=death.worker_traceback)


def _why(death: Death) -> str:
    """The reason in a few words."""
    return str(death).partition("\n")[0].partition(": ")[2].partition(". ")[0] or type(death).__name__


def _give(
    inner: Driver,
    values: ByGroup,
    examples: Mapping[int, Any],
    attributes: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Let fresh workers be what others were."""
    if not values:
        return
    inner.ask(GoOnAs(attributes or {}, examples))
    for group, by_stage in values.items():
        if any(by_stage.values()):
            inner.set(group, by_stage)


__all__ = ["LastingDriver"]
