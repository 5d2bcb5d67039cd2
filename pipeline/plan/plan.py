"""A plan: for every worker its actions in order, as data that is made and checked before anything runs.

Nothing is decided while a step runs: a worker takes the next action of its program and waits for what
`stages.actions.dependencies` says it needs.  So a hang, a forgotten microbatch or an order of summation that
would change the numbers is found here, in milliseconds, without a process and without TensorFlow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.errors import PlanError, ScheduleError
from pipeline.plan import rules
from pipeline.plan.clock import Tick, run_clock
from stages.actions import Action, Kind, Wiring, chain, dependencies, open_tapes

__all__ = ["Plan", "validate"]


if TYPE_CHECKING:
    from pipeline.plan.arrays import PlanArrays

MANY_WORKERS, MANY_ACTIONS = 16, 4096
"""From so many on arrays are faster than a loop."""


@dataclass(frozen=True)
class Plan:
    """The actions of every worker within one step, in order.

    Attributes:
        name: the schedule's name, for errors and drawings.
        stages: number of stages.
        microbatches: number of microbatches in the step.
        programs: for each worker, its actions in the order in which it takes them.
        placement: for each stage, the worker that hosts it. Left out: stage i is on worker i.
        windows: number of windows of the time axis; 1 where there is no time axis.
        truncate: number of windows that a state's gradient goes back through; None: all.
        training: whether every forward has a backward; False for evaluation and prediction.
        in_flight: for each worker, the most tapes that the schedule promises to hold open at once. Left out:
            nothing is promised.
    """

    name: str
    stages: int
    microbatches: int
    programs: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...] = ()
    windows: int = 1
    training: bool = True
    in_flight: tuple[int, ...] = ()
    truncate: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "programs", tuple(tuple(program) for program in self.programs))
        object.__setattr__(self, "placement", tuple(self.placement) or tuple(range(self.stages)))
        object.__setattr__(self, "in_flight", tuple(self.in_flight))

    @property
    def workers(self) -> int:
        """The number of workers."""
        return len(self.programs)

    def actions(self) -> Iterator[tuple[int, Action]]:
        """Every (worker, action), worker by worker in program order."""
        for worker, program in enumerate(self.programs):
            for action in program:
                yield worker, action

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """The stages that `worker` hosts, ascending."""
        return tuple(stage for stage, host in enumerate(self.placement) if host == worker)

    @cached_property
    def halved(self) -> frozenset[tuple[int, int, int]]:
        """The (stage, microbatch, window) whose backward comes as an input half and a weight half."""
        return frozenset(
            (action.stage, action.microbatch, action.window)
            for _, action in self.actions()
            if action.kind is Kind.BACKWARD_INPUT
        )

    def dependencies(self, action: Action, wiring: Mapping[int, Iterable[int]] | None = None) -> tuple[Action, ...]:
        """What `action` needs in this plan.

        Args:
            action: an action of the plan.
            wiring: stage -> upstream stages; None means a chain. A `Wiring` is fastest.

        Returns:
            The actions that must have finished before, as `stages.actions.dependencies` gives them.
        """
        wiring = chain(self.stages) if wiring is None else wiring
        return dependencies(action, wiring, windows=self.windows, truncate=self.truncate, halved=self.halved)

    def needs(self, wiring: Mapping[int, Iterable[int]] | None = None) -> Mapping[Action, tuple[Action, ...]]:
        """{action: what it needs, as `dependencies` says} of all actions of the plan, kept for the wiring asked last.

        Args:
            wiring: stage -> upstream stages; None means a chain.
        """
        of = Wiring.of(chain(self.stages) if wiring is None else wiring)
        known: tuple[Wiring, dict[Action, tuple[Action, ...]]] | None = self.__dict__.get("_known_needs")
        if known is None or known[0] != of:
            same = {action: action for _, action in self.actions()}
            found = {
                action: tuple(same.get(needed, needed) for needed in self.dependencies(action, of)) for action in same
            }
            known = self.__dict__["_known_needs"] = (of, found)
        return known[1]

    def arrays(self, wiring: Mapping[int, Iterable[int]] | None = None) -> PlanArrays | None:
        """A large plan as arrays, kept for the wiring asked last; None for a small one, and where something is wrong.

        Args:
            wiring: stage -> upstream stages, each known and no circle; None means a chain.
        """
        if self.workers < MANY_WORKERS or sum(map(len, self.programs)) < MANY_ACTIONS:
            return None
        from pipeline.plan.arrays import PlanArrays  # NumPy is imported with the first large plan

        of = Wiring.of(chain(self.stages) if wiring is None else wiring)
        known: tuple[Wiring, PlanArrays | None] | None = self.__dict__.get("_known_arrays")
        if known is None or known[0] != of:
            known = self.__dict__["_known_arrays"] = (of, PlanArrays.of(self, of))
        return known[1]

    def peak_in_flight(self) -> tuple[int, ...]:
        """For each worker, the most tapes open at once: forwards done whose backward has not finished.

        The programs alone decide it, no clock is needed. All 0 for a plan without training.
        """
        if not self.training:
            return (0,) * self.workers
        return tuple(max(open_tapes(program), default=0) for program in self.programs)

    def counts(self) -> dict[Kind, int]:
        """How many actions of each kind the plan has."""
        return dict(Counter(action.kind for _, action in self.actions()))

    def validate(self, wiring: Mapping[int, Iterable[int]] | None = None) -> Plan:
        """The plan itself, once it has passed `validate`."""
        return validate(self, wiring)

    def text(self, wiring: Mapping[int, Iterable[int]] | None = None, *, forward: int = 1, backward: int = 1) -> str:
        """A drawing of the plan: one row a worker, one column a slot of time, a dot where the worker waits.

        Args:
            wiring: stage -> upstream stages; None means a chain.
            forward: slots that a forward takes, at least 1.
            backward: slots that a backward takes, at least 1; a half takes `backward / 2`, rounded up.

        Returns:
            Lines of text. The first says what is drawn; the last column how many tapes the worker holds open
            at most and how many slots it waits. A cell is a letter (F forward, B backward, I input gradient,
            W weight gradient) and the microbatch; `B2.0` names the stage too, where a worker has several;
            `F0/1` names the window, where there are several.

        Raises:
            PlanError: the programs cannot run to their end, so that there is no time to draw.
            ScheduleError: an action would take no slot.
        """
        if min(forward, backward) < 1:
            raise ScheduleError(f"an action takes at least 1 slot, received forward={forward}, backward={backward}")
        needs = Wiring.of(chain(self.stages) if wiring is None else wiring)
        slots = {Kind.FORWARD: forward, Kind.BACKWARD: backward}
        clock = run_clock(
            self.programs,
            self.needs(needs).__getitem__,
            lambda a: slots.get(a.kind, -(-backward // 2)),
        )
        if clock.blocked:
            raise PlanError(self.name, rules.faults(self, needs))
        return self._draw(clock.ticks)

    def _draw(self, ticks: tuple[Tick, ...]) -> str:
        slots = int(max((tick.end for tick in ticks), default=0))
        cells = [["·"] * slots for _ in range(self.workers)]
        for tick in ticks:
            start, end = int(tick.start), int(tick.end)
            cells[tick.worker][start:end] = [self._label(tick), *["─"] * (end - start - 1)]
        width = max((len(cell) for row in cells for cell in row), default=1)
        gutter = len(f"worker {self.workers - 1}")
        lines = [self.headline()]
        for worker, (row, held) in enumerate(zip(cells, self.peak_in_flight(), strict=True)):
            body = " ".join(cell * width if cell == "─" else cell.ljust(width) for cell in row)
            waits = f"waits {row.count('·')} of {slots}"
            holds = f"holds {held}, " if self.training else ""
            lines.append(f"{f'worker {worker}':<{gutter}} │ {body} │ {holds}{waits}")
        return "\n".join(lines)

    def _label(self, tick: Tick) -> str:
        action = tick.action
        stage = f"{action.stage}." if len(self.stages_of(tick.worker)) > 1 else ""
        window = f"/{action.window}" if self.windows > 1 else ""
        return f"{action.kind.letter}{stage}{action.microbatch}{window}"

    def headline(self) -> str:
        """One line that names the schedule and its size: `1f1b: 3 stages, 4 microbatches`."""
        parts = [_count(self.stages, "stage"), _count(self.microbatches, "microbatch", "microbatches")]
        if self.windows > 1:
            cut = "" if self.truncate is None else f", gradients through {self.truncate}"
            parts.append(_count(self.windows, "window") + cut)
        if self.workers != self.stages:
            parts.append(_count(self.workers, "worker"))
        return f"{self.name}: {', '.join(parts)}"

    def __str__(self) -> str:
        return self.headline()


def validate(plan: Plan, wiring: Mapping[int, Iterable[int]] | None = None) -> Plan:
    """Check everything that can be known before a plan runs.

    Args:
        plan: the plan.
        wiring: stage -> upstream stages; None means a chain.

    Returns:
        The plan, so that a call can be chained.

    Raises:
        PlanError: with every fault found, by the numbered rules of `pipeline.plan.rules`.
    """
    faults = rules.faults(plan, chain(plan.stages) if wiring is None else wiring)
    if faults:
        raise PlanError(plan.name, faults)
    return plan


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
