"""The arrays that running workers hold: variables, optimizer slots and weights, read and written stage by stage."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.compiled.optimizer_slots import OptimizerSlots, described_slots
from pipeline.errors import DataError
from pipeline.runtime.driver import Driver
from pipeline.runtime.setup import Setup

Array = np.ndarray[Any, Any]


def values_of(driver: Driver, what: str) -> dict[int, list[Array]]:
    """{stage: its ``model``, ``weights`` or ``optimizer`` variables, in order} as arrays of their shapes and dtypes."""
    return {i: [array for array in arrays if array is not None] for i, arrays in driver.get(what).items()}


def optimizer_slots_of(driver: Driver) -> OptimizerSlots:
    """The optimizers' values by the variable that they belong to."""
    return OptimizerSlots.of_stages(described_slots(driver.descriptions), values_of(driver, "optimizer"))


def digest(value: Any) -> int:
    """A number by which the bits of an array or a variable are known again."""
    return zlib.crc32(np.ascontiguousarray(value.numpy() if hasattr(value, "numpy") else value).tobytes())


class Values:
    """Reads and writes the workers' variables.

    Args:
        setup: What the pipeline is made of.
        driver: Gives the running workers, started if they are not yet.

    Attributes:
        ahead: Whether the workers' values were changed since the user's own models last got them.
        told: The digests of the weights that the user was last told, or set here.
    """

    def __init__(self, setup: Setup, driver: Callable[[], Driver]) -> None:
        self._setup, self._driver = setup, driver
        self.ahead = False
        self.told: frozenset[int] = frozenset()

    def read(self, what: str) -> dict[int, list[Array]]:
        """{stage: its ``model``, ``weights``, ``optimizer`` or ``kept states`` values, in order}."""
        return values_of(self._driver(), what)

    def slots(self) -> OptimizerSlots:
        """The optimizers' values by the variable that they belong to."""
        return optimizer_slots_of(self._driver())

    def variable_names(self) -> dict[tuple[int, int], tuple[str, bool]]:
        """{(stage, index among its trainable variables): ("<stage>/<path>", whether no earlier stage has it too)}."""
        driver, found = self._driver(), {}
        for i, stage in driver.descriptions.items():
            others = {tie.place for tie in driver.specs[i].ties if tie.stages[0] != i}
            for variable in stage.variables:
                if variable.trained:
                    name = f"{self._setup.wires.names[i]}/{variable.name}"
                    found[i, variable.place] = (name, variable.place not in others)
        return dict(sorted(found.items()))

    def get_weights(self) -> list[Array]:
        """All weights, in the order of `get_weights` of the model that was split, else stage after stage."""
        values = self.read("weights")
        found = [values[i][k] for (i, k), *_ in self._weight_places()]
        self.told = frozenset(map(digest, found))
        return found

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights, in the order of `get_weights`.

        Raises:
            DataError: The number of arrays, or a shape, does not fit; nothing was set.
        """
        places = self._weight_places()
        if len(weights) != len(places):
            raise DataError(f"set_weights expects {len(places)} array(s), received {len(weights)}")
        by_place = {place: value for uses, value in zip(places, weights, strict=True) for place in uses}
        stages = range(len(self._setup.segments))
        self._set_weights({i: [by_place[p] for p in sorted(by_place) if p[0] == i] for i in stages})
        kinds = {
            (i, k): w.dtype for i, stage in self._driver().descriptions.items() for k, w in enumerate(stage.weights)
        }
        self.told = frozenset(digest(np.asarray(value).astype(kinds[place])) for place, value in by_place.items())
        self.ahead = True

    def _weight_places(self) -> list[list[tuple[int, int]]]:
        """(stage, index among its weights) of every weight; several where several stages have it."""
        described, original = sorted(self._driver().descriptions.items()), self._setup.original
        uses: dict[Any, list[tuple[int, int]]] = {}
        for i, stage in described:
            model = self._setup.models.get(i)
            weights = [None] * len(stage.weights) if model is None else model.weights
            for k, weight in enumerate(weights):
                uses.setdefault((i, k) if weight is None else id(weight), []).append((i, k))
        return list(uses.values()) if original is None else [uses[id(weight)] for weight in original.weights]

    def _set_weights(self, weights: Mapping[int, Sequence[Any]]) -> None:
        """Set every stage's weights, in order.

        Raises:
            DataError: A shape does not fit; nothing was set.
        """
        arrays = {i: [np.asarray(value) for value in part] for i, part in weights.items()}
        for i, part in arrays.items():
            for weight, array in zip(self._driver().descriptions[i].weights, part, strict=True):
                if weight.shape != array.shape:
                    raise DataError(
                        f"stage {self._setup.wires.names[i]!r}: the weight {weight.name!r} has the shape "
                        f"{weight.shape}, received {array.shape}"
                    )
        self._driver().set("weights", arrays)


__all__ = ["Values", "digest", "optimizer_slots_of", "values_of"]
