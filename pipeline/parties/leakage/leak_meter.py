"""A callback that measures at every cut, epoch by epoch, what a receiver can tell about inputs and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipeline.batch.step import StepResult
from pipeline.errors import CompileError, DataError
from pipeline.parties.leakage.distance_correlation import flat_rows, unbiased_distance_correlation
from pipeline.parties.leakage.inversion import LEAST_ROWS, inversion_leaks
from pipeline.parties.leakage.labels import by_chance, classes_of, embedding_leaks, gradient_leaks
from pipeline.parties.leakage.leak import BY_NAME, INPUTS, LABELS, Leak, LeakPath, read_of_all
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from pipeline.saying import is_whole, not_whole
from stages.worker.observers import ACTIVATION, GRADIENT, Sight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
_DEALT = {GRADIENT: 8, ACTIVATION: 1}
"""How often labels are dealt out anew, to see what an attack reads where nothing leaks."""


class LeakMeter(StepWatcher):
    """Measure what activations at the cuts say about inputs, and gradients and activations about labels.

    Training is bit for bit the same with it. In each measured epoch the first `rows` rows are noted as they cross, and
    looked at together at the epoch's end: a batch by itself has too few for a verdict. What is measured: see
    `pipeline.parties.leakage.leak.MEASURES`.

    Args:
        every: Measure the first epoch and every so many-th after it.
        rows: How many rows to look at, at least 8. Distances take 8 x rows² bytes.
        inputs: Whether to measure what activations say about inputs.
        labels: Whether to measure what gradients and activations say about labels.
        seed: Of the halves that teach and judge an attacker.

    Attributes:
        leaks: Everything that was measured, in the order of time.
        left_out: What could not be measured, with the reason, in sentences.

    Raises:
        CompileError: An argument is out of its range.

    Example:
        >>> meter = LeakMeter()
        >>> pipe.fit(x, y, epochs=5, callbacks=[meter])
        >>> print(meter)
        >>> meter.save("leaks.png")
    """

    def __init__(
        self, every: int = 1, rows: int = 1024, inputs: bool = True, labels: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        if not is_whole(every):
            raise CompileError(not_whole("`every`", every))
        if not is_whole(rows, LEAST_ROWS):
            raise CompileError(not_whole("`rows`", rows, LEAST_ROWS))
        if not (inputs or labels):
            raise CompileError("a LeakMeter measures inputs, labels or both, received inputs=False, labels=False")
        self.every, self.rows, self.seed = every, rows, seed
        self.about = tuple(what for what, asked in ((INPUTS, inputs), (LABELS, labels)) if asked)
        self.leaks: list[Leak] = []
        self.left_out: list[str] = []
        self._data: tuple[Any, Any] = (None, None)
        self._noted: dict[Any, list[Array]] = {}
        self._count = 0
        self._asked = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin anew."""
        super().on_epoch_begin(epoch, logs)
        self._noted, self._count = {}, 0

    def before_step(self, session: Session, data: tuple[Any, Any, Any]) -> str:
        """Let the workers keep what crosses, until there are enough rows."""
        super().before_step(session, data)
        if session.setup.options.windows > 1:
            raise CompileError("a LeakMeter does not measure what crosses in windows of time; train without windows=")
        self._data = data[0], data[1]
        self._asked = self._epoch % self.every == 0 and self._count < self.rows
        return "values" if self._asked else ""

    def after_step(self, session: Session, result: StepResult) -> None:
        """Note what crossed, with the inputs and labels of the same rows."""
        if not self._asked:
            return
        crossed = _whole(session, session.workers.driver().seen())
        for kind, values in zip((INPUTS, LABELS), self._data, strict=True):
            for name, rows in _named_rows(values, kind):
                self._noted.setdefault((kind, name), []).append(rows)
        for crossing, rows in crossed.items():
            self._noted.setdefault(crossing, []).append(rows)
        self._count += len(next(iter(crossed.values()), ()))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measure."""
        noted = {}
        for key, parts in self._noted.items():
            try:
                noted[key] = np.concatenate(parts)[: self.rows]
            except ValueError:  # batches of unequal lengths
                self._left_out(f"{key[1] if isinstance(key, tuple) else key.tensor!r}: its rows have not one shape")
        crossed = {key: rows for key, rows in noted.items() if isinstance(key, LeakPath)}
        for crossing, rows in crossed.items():
            for kind, name in (key for key in noted if not isinstance(key, LeakPath)):
                if kind in self.about:
                    self._measure(epoch + 1, crossing, rows, kind, name, noted[kind, name])
        self._noted = {}

    def _measure(self, epoch: int, crossing: LeakPath, rows: Array, kind: str, name: str, truth: Array) -> None:
        try:
            found = _measured(crossing.what, kind, rows, truth, self.seed)
        except DataError as error:
            self._left_out(f"{kind} {name!r} through {crossing.what} {crossing.tensor!r}: {error}")
            return
        self.leaks += [
            Leak(epoch, crossing, BY_NAME[measure], name, value, nothing, len(rows))
            for measure, (value, nothing) in found.items()
        ]

    def _left_out(self, said: str) -> None:
        if said not in self.left_out:
            self.left_out.append(said)

    def worst(self, about: str) -> Leak:
        """The leak that says most, of all that go from nothing to everything.

        Args:
            about: ``"inputs"`` or ``"labels"``.

        Raises:
            DataError: Nothing of that kind was measured.
        """
        known = [leak for leak in self.leaks if leak.measure.about == about and leak.nothing is not None]
        if not known:
            raise DataError(f"no leak of {about} was measured" + "".join(f"; {said}" for said in self.left_out[:1]))
        return max(known, key=read_of_all)

    def save(self, path: str | Path) -> Path:
        """Draw the leaks over the epochs and save the picture; the suffix chooses the format (png, svg, pdf)."""
        from pipeline.parties.leakage.leak_figure import save_leaks

        return save_leaks(self, Path(path))

    def figure(self) -> Figure:
        """The figure that `save` saves."""
        from pipeline.parties.leakage.leak_figure import leak_figure

        return leak_figure(self)

    def __str__(self) -> str:
        from pipeline.parties.leakage.leak_text import leak_text

        return leak_text(self)


def _measured(what: str, kind: str, rows: Array, truth: Array, seed: int) -> dict[str, tuple[float, float | None]]:
    """The measures of what crossed against what it should not tell, each with what it would be if nothing leaked."""
    if kind == LABELS:
        classes_of(truth)
        attack = gradient_leaks if what == GRADIENT else partial(embedding_leaks, seed=seed)
        values = attack(rows, truth)
        dealt = gradient_leaks if what == GRADIENT else partial(embedding_leaks, seed=seed, clusters=False)
        chance = by_chance(dealt, rows, truth, seed, _DEALT[what]) if values else {}
        return {
            name: (value, None if BY_NAME[name].nothing is None else chance[name]) for name, value in values.items()
        }
    if what == GRADIENT:
        return {}
    flat = flat_rows(truth)
    spread = flat.std(axis=0)
    even = (flat - flat.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)  # a small column counts like a large one
    found = {"dcor²": unbiased_distance_correlation(rows, even), **inversion_leaks(rows, truth, seed)}
    return {name: (value, BY_NAME[name].nothing) for name, value in found.items()}


def _whole(session: Session, seen: Mapping[Sight, Array | None]) -> dict[LeakPath, Array]:
    """What each receiver got, all microbatches joined; of an activation what was sent, of a gradient too."""
    names, parts = session.setup.wires.names, dict[LeakPath, dict[int, Array]]()
    for sight, array in seen.items():
        if sight.sent and sight.what in (ACTIVATION, GRADIENT) and array is not None:
            ends = names[sight.producer], names[sight.consumer]
            sender, receiver = ends if sight.what == ACTIVATION else ends[::-1]
            crossing = LeakPath(sight.what, sender, receiver, sight.tensor)
            parts.setdefault(crossing, {})[sight.microbatch] = array
    return {key: np.concatenate([array for _, array in sorted(some.items())]) for key, some in parts.items()}


def _named_rows(values: Any, kind: str) -> Iterator[tuple[str, Array]]:
    """Arrays of a structure of inputs or targets, by their paths; the kind's own name where there is one alone."""
    if values is None:
        return
    flat = keras.tree.flatten_with_path(values)
    for path, array in flat:
        yield ".".join(map(str, path)) or kind, np.asarray(array)
