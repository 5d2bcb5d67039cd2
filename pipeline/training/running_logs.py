"""The logs of an epoch so far, as Keras shows them: mean losses over samples, and metrics.

A plain object beside the trainer: what is set on a Keras model is looked through by Keras every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.batch.step import StepResult
from stages.loss.precision import float_of_losses, loss_number


class RunningLogs:
    """Logs since the last reset.

    Attributes:
        last: {name: value} after the last batch; {} before the first.
        order: The names in Keras's order, kept over resets.
        totals: {name: the sum of that loss times samples}, in the float type of losses.
        samples: How many samples were counted, in the same.
        shown: Whether Keras's own mean of the loss was set since the last reset.
    """

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.order: list[str] = []
        self.shown = False
        self.totals: dict[str, np.floating[Any]] = {}
        self.samples = loss_number(0)

    def reset(self) -> None:
        """Start counting anew."""
        self.totals, self.samples, self.last = {}, loss_number(0), {}
        self.shown = False

    def add(self, result: StepResult, labels: Sequence[str], samples: int) -> dict[str, Any]:
        """The logs after one more batch: mean losses over samples since the last reset, then the metrics.

        Args:
            result: Of the batch's step.
            labels: Of the outputs whose losses are logged one by one, as ``<output>_loss``, unweighted.
            samples: How many the batch has.
        """
        losses = {"loss": result.loss or 0.0, **{f"{label}_loss": result.losses[label] for label in labels}}
        for name, value in losses.items():
            total = self.totals.get(name, loss_number(0.0))
            self.totals[name] = total + loss_number(value) * loss_number(samples)
        self.samples = self.samples + loss_number(samples)
        metrics = {
            n: v if isinstance(v, float) else np.asarray(v, float_of_losses()) for n, v in result.metrics.items()
        }
        if len(losses) > 1:
            metrics = dict(sorted(metrics.items()))
        self.last = {**{name: float(total / self.samples) for name, total in self.totals.items()}, **metrics}
        self.order = list(self.last)
        return self.last

    def state(self) -> dict[str, Any]:
        """All of it, plain data."""
        return dict(vars(self))

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Be as where `state` was asked."""
        for name in vars(self):
            setattr(self, name, state[name])

    def returned(self, logs: Mapping[str, Any], return_dict: bool) -> Any:
        """Logs as Keras's methods return them: a dict, the loss alone, or [loss, *metrics]."""
        if return_dict:
            return dict(sorted(logs.items()))
        values = [logs[name] for name in sorted(logs, key=self.order.index)]
        return values[0] if len(values) == 1 else values


__all__ = ["RunningLogs"]
