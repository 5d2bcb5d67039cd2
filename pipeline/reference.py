"""The reference of `verify`: one tape over the joined model, in a worker process of its own.

A process of its own, since results of convolutions depend on the size of TensorFlow's thread pools, which is set once
per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.reference_batch import Whole
from pipeline.single_tape import SingleTape
from stages.grid import Grid
from stages.part import States
from stages.worker import Worker, serve
from transport.message import DRIVER, Key

Array = np.ndarray[Any, Any]


class ReferenceWorker(Worker):
    """A worker that hosts all stages and computes a step's gradients under one tape."""

    def _do_step(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        hosted = [self.hosted[index] for index in sorted(self.hosted)]
        inputs, targets, sample_weights = {}, {}, {}
        for stage in hosted:
            index = stage.spec.index
            for name, source in stage.spec.inputs:
                if source == DRIVER:
                    inputs[name] = self._array("activation", order["step"], index, name)
            for label in stage.labels if order["mode"] != "masks" else ():
                targets[label] = self._array("target", order["step"], index, label)
                if label in order["sample_weights"]:
                    sample_weights[label] = self._array("sample_weight", order["step"], index, label)
        if order["mode"] == "masks":
            return {"losses": {}, "masked": False}  # the joined model looks for itself
        grid = Grid(tuple(order["sizes"]), tuple(order["lengths"]))
        batch = Whole(inputs, targets, sample_weights, grid, order["loss_scale"], order["truncate"])
        tape = SingleTape(hosted)
        weights = tape.weights(batch)
        compiled = not hosted[0].spec.run_eagerly and not tape.couples
        states = [States(stage.stage.model) for stage in hosted]
        before = [state.read() for state in states]
        losses, self._found = tape.sums(batch, weights, compiled=False)
        rounding = 0.0
        if compiled:
            for state, values in zip(states, before, strict=True):
                state.write(values)
            eager = self._found
            losses, self._found = tape.sums(batch, weights, compiled=True)
            rounding = largest_difference(eager, self._found)
        return {"losses": losses, "metrics": {}, "rounding": rounding}

    def _array(self, kind: str, step: int, stage: int, tensor: str) -> Array:
        array = self._take(Key(kind, step, stage, DRIVER, tensor)).array
        assert array is not None
        return array

    def _gradients_of(self, index: int) -> list[Array | None]:
        """The part of the one tape's gradients that belongs to a stage."""
        return [None if g is None else np.array(g) for g in self._found[index]]


def main(spec: Mapping[str, Any], board: Array) -> None:
    """Entry of the reference's process; the arguments are a worker's."""
    serve(ReferenceWorker, spec, board)


def largest_difference(some: Mapping[int, list[Any]], others: Mapping[int, list[Any]]) -> float:
    """The largest difference of two sets of gradients, as a part of the largest |gradient|; finite entries only."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for i, part in some.items()
        for a, b in zip(part, others[i], strict=True)
        if a is not None and b is not None
    ]
    largest = max((float(np.max(np.abs(b), initial=0.0)) for _, b in pairs), default=0.0)
    apart = max((float(np.nanmax(np.abs(a - b), initial=0.0)) for a, b in pairs), default=0.0)
    return apart / largest if largest and np.isfinite(apart) and np.isfinite(largest) else 0.0


__all__ = ["ReferenceWorker", "main"]
