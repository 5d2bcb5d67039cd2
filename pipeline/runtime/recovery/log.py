"""The log of a driver whose workers may die: what was ordered since their values were last known to be written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.batch.step import Batch, StepResult
from pipeline.errors import RecoveryError
from pipeline.plan.plan import Plan
from pipeline.runtime.driver import Driver
from stages.worker.orders import Mode


@dataclass(eq=False)
class UndecidedStep:
    """A step with gradients, which is not yet decided upon.

    Attributes:
        plan, mode, batch, options: As `Driver.run` takes them.
        result: What it gave.
    """

    plan: Plan
    mode: Mode
    batch: Batch
    options: Mapping[str, Any]
    result: StepResult

    def again(self, driver: Driver) -> None:
        """Make it once more.

        Raises:
            RecoveryError: It gave other numbers.
        """
        result = driver.run(self.plan, self.mode, self.batch, **self.options)
        before, now = _numbers(self.result), _numbers(result)
        if before != now:
            name = next(name for name in before if before[name] != now[name])
            raise RecoveryError(
                f"a worker died, and the step that was made again from the values before it gave another {name}: "
                f"{now[name]} in place of {before[name]}. Something in the model does not give the same numbers twice "
                "(a layer that counts in Python or draws from TensorFlow's own generator); load the last checkpoint"
            )


@dataclass(eq=False)
class DecidedStep:
    """A step that was decided upon: its update was ordered, or its gradients were dropped.

    Attributes:
        run: The step.
        update: As `Driver.apply` takes it; None: dropped, what the step itself changed stays.
        written: Whether workers write their values down behind it.
        number: The order's, once it was given.
    """

    run: UndecidedStep
    update: Mapping[str, Any] | None
    written: bool
    number: int | None = None

    def give(self, driver: Driver) -> None:
        """Order it."""
        if self.update is None:
            driver.discard()
        else:
            driver.apply(**self.update, write_down=self.written)
        self.number = driver.number

    def again(self, driver: Driver) -> None:
        """Make the step, and what was decided, once more."""
        self.run.again(driver)
        self.give(driver)


@dataclass
class Log:
    """The last boundary, and what is made again from there.

    Attributes:
        boundary: The number of the last order behind which every worker is known to have written down its values;
            None: they are each worker's last ones.
        attributes: {stage: {name: value}} that optimizers were given up to there since the workers were built.
        decided: The steps behind it, in order.
    """

    boundary: int | None = None
    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)
    decided: list[DecidedStep] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether workers may be writing down something that is not known to be whole."""
        return any(one.written for one in self.decided)

    def through(self, number: int) -> None:
        """Every worker has written down its values behind the order of this number: what came before is done."""
        self.boundary = number
        while self.decided and (self.decided[0].number or number + 1) <= number:
            update = self.decided.pop(0).update or {}
            for stage, some in (update.get("attributes") or {}).items():
                self.attributes.setdefault(stage, {}).update(some)

    def confirm(self) -> None:
        """Every worker has carried out all that is in the log."""
        for one in reversed(self.decided):
            if one.written and one.number is not None:
                self.through(one.number)
                return


def _numbers(result: StepResult) -> dict[str, str]:
    """What must be the same again, bit for bit: Python writes numbers so that no two have one text."""
    return {
        "loss": repr(result.loss),
        "losses": repr(sorted(result.losses.items())),
        "metrics": repr(sorted(result.metrics.items())),
        "norms of gradients": repr(sorted(result.squared_norms.items())),
        "finiteness": repr(result.finite),
    }


__all__ = ["DecidedStep", "Log", "UndecidedStep"]
