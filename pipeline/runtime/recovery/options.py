"""The options of recovery, and the record of what it repaired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from pipeline.errors import ScheduleError
from pipeline.saying import is_whole, not_whole


@dataclass(frozen=True)
class Recovery:
    """A way to get over workers that die or freeze: ``Pipeline(..., recovery=Recovery(...))``.

    Attributes:
        every: After so many updates every worker writes all its values down. More of them cost less, and are made again
            when a worker dies.
        tries: So many times in a row one thing is begun again; the next death in it is raised.
        frozen_seconds: A worker that is to compute, and for so many seconds neither gets on nor takes processor time,
            counts as frozen. None: only one that was stopped (SIGSTOP) does.
    """

    every: int = 1
    tries: int = 3
    frozen_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, number in {"every": self.every, "tries": self.tries}.items():
            if not is_whole(number):
                raise ScheduleError(not_whole(f"`{name}` of Recovery", number))
        seconds = self.frozen_seconds
        number = isinstance(seconds, Real) and not isinstance(seconds, bool)
        if seconds is not None and not (number and math.isfinite(seconds) and seconds > 0):
            raise ScheduleError(f"`frozen_seconds` of Recovery takes seconds above 0 or None, received {seconds!r}")

    @classmethod
    def of(cls, given: Any, scheme: str) -> Recovery | None:
        """From what `Pipeline` takes: True, False, None, or one of these.

        Raises:
            ScheduleError: It is something else, or the stages are threads, which cannot die alone.
        """
        if given is None or given is False:
            return None
        if given is not True and not isinstance(given, cls):
            raise ScheduleError(f"recovery takes True, False or a pipeline.Recovery(...), received {given!r}")
        if scheme == "inproc":
            raise ScheduleError(
                "recovery is for workers that are processes, and with transport='inproc' they are threads of this one, "
                "which cannot die alone; leave one of both out"
            )
        return cls() if given is True else given


@dataclass(frozen=True)
class Repair:
    """One repair: workers had died or were frozen, and others took their place.

    Attributes:
        stage: The name of the first one's stage.
        why: What became of it.
        where: What it was doing, in words; "" where that is not known.
        deaths: How many deaths it took until all was as before.
        time: When the first was noticed, seconds since the epoch.
        seconds: From then until training could go on.
    """

    stage: str
    why: str
    where: str
    deaths: int
    time: float
    seconds: float

    def __str__(self) -> str:
        where = f" {self.where}" if self.where else ""
        again = f", at the {self.deaths}. attempt" if self.deaths > 1 else ""
        return (
            f"the worker of stage {self.stage!r} was lost{where} ({self.why}); training goes on as if it had not been, "
            f"{self.seconds:.2f} s later{again}"
        )


__all__ = ["Recovery", "Repair"]
