"""The actions of a step (forward, backward, ...) and what each depends on.

One `dependencies` serves the validator, the simulator and the worker, so a plan that was checked before
launch waits at run time for exactly what it was checked against.  Nothing here knows TensorFlow.

    stage 0   F0.0 ──────────────────────────► B0.0          F  forward          I  input-gradient half
                │ activation                     ▲           B  backward         W  weight-gradient half
                ▼                                │ gradient
    stage 1   F1.0 ────────► B1.0 ───────────────┘           F1.0 = forward, stage 1, microbatch 0

The rules of `dependencies`, numbered because tests cite them (s stage, m microbatch, w window):

1. F(s,m,w) needs F(u,m,w) of every stage u upstream of s: the activations.
2. F(s,m,w) needs F(s,m,w-1): the state that its own previous window hands over.
3. B(s,m,w) needs F(s,m,w): the tape.
4. B(s,m,w) needs the input gradients of every stage d downstream of s: B(d,m,w), or I(d,m,w) where d's
   backward comes in halves.
5. B(s,m,w) needs the same of its own next window, B(s,m,w+1) or I(s,m,w+1): the state's gradient; not where
   truncation cuts it, behind every `truncate`-th window.
6. I needs what B needs; W(s,m,w) needs I(s,m,w).
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Action", "Kind", "Wiring", "actions_from_array", "actions_to_array", "chain", "dependencies", "open_tapes"]


class Kind(enum.IntEnum):
    """The kind of an action; the numbers travel, so they never change."""

    FORWARD = 0
    BACKWARD = 1
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3

    @property
    def letter(self) -> str:
        """The letter that stands for the kind in drawings: F, B, I or W."""
        return _LETTERS[self]

    @property
    def phrase(self) -> str:
        """The kind in the words of an error message."""
        return _PHRASES[self]


_LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W"}
_PHRASES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "input gradient",
    Kind.BACKWARD_WEIGHT: "weight gradient",
}


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One deed of a worker: a kind, done by `stage`, on one microbatch of one window (all counted from 0)."""

    kind: Kind
    stage: int
    microbatch: int
    window: int = 0

    def __hash__(self) -> int:  # the one that dataclasses make asks the kind for its name's: a plan is full of look-ups
        return self.kind + 4 * self.window + (self.stage << 16) + (self.microbatch << 32)

    def __str__(self) -> str:
        """Short form: `F0.3` is the forward of stage 0 on microbatch 3; `F0.3/2` is its window 2."""
        window = f"/{self.window}" if self.window else ""
        return f"{self.kind.letter}{self.stage}.{self.microbatch}{window}"

    def describe(self) -> str:
        """The action in words, without its stage (errors name that themselves): `forward of microbatch 3`."""
        window = f", window {self.window}" if self.window else ""
        return f"{self.kind.phrase} of microbatch {self.microbatch}{window}"


class Wiring(Mapping[int, tuple[int, ...]]):
    """A mapping from each stage to the stages upstream of it, with its inverse.

    A chain of three is `{0: (), 1: (0,), 2: (1,)}`; a skip edge over the middle makes its last entry `2: (0, 1)`;
    two bottoms under one top are `{0: (), 1: (), 2: (0, 1)}`.  Immutable; equal to any mapping of equal content.

    Args:
        upstream: for each stage the stages whose outputs it takes. A stage that only appears upstream takes
            none. Nothing is checked here: `pipeline.plan.plan.validate` reports a cycle or an unknown stage
            together with everything else that is wrong.
    """

    __slots__ = ("_downstream", "_upstream")

    def __init__(self, upstream: Mapping[int, Iterable[int]]) -> None:
        above = {stage: tuple(sources) for stage, sources in upstream.items()}
        for source in sorted({source for sources in above.values() for source in sources}):
            above.setdefault(source, ())
        below: dict[int, list[int]] = {stage: [] for stage in above}
        for stage in sorted(above):
            for source in dict.fromkeys(above[stage]):
                below[source].append(stage)
        self._upstream = {stage: above[stage] for stage in sorted(above)}
        self._downstream = {stage: tuple(sinks) for stage, sinks in below.items()}

    @classmethod
    def of(cls, wiring: Mapping[int, Iterable[int]]) -> Wiring:
        """`wiring` itself if it is a `Wiring` already, else one made of it."""
        return wiring if isinstance(wiring, cls) else cls(wiring)

    def __getitem__(self, stage: int) -> tuple[int, ...]:
        return self._upstream[stage]

    def __iter__(self) -> Iterator[int]:
        return iter(self._upstream)

    def __len__(self) -> int:
        return len(self._upstream)

    def __repr__(self) -> str:
        return f"Wiring({self._upstream})"

    def upstream(self, stage: int) -> tuple[int, ...]:
        """The stages whose outputs `stage` takes, as given; () for a stage the wiring does not know."""
        return self._upstream.get(stage, ())

    def downstream(self, stage: int) -> tuple[int, ...]:
        """The stages that take an output of `stage`, ascending: the order in which gradients are summed."""
        return self._downstream.get(stage, ())


def chain(stages: int) -> Wiring:
    """The wiring of `stages` stages in a row, each fed by the one before it."""
    return Wiring({stage: (stage - 1,) if stage else () for stage in range(stages)})


def dependencies(
    action: Action,
    wiring: Mapping[int, Iterable[int]],
    *,
    windows: int = 1,
    truncate: int | None = None,
    halved: Container[tuple[int, int, int]] = frozenset(),
) -> tuple[Action, ...]:
    """The actions that must have finished before `action` may start (rules 1 to 6 of this module).

    Args:
        action: the action that wants to start.
        wiring: stage -> its upstream stages; a `Wiring` is fastest, others are inverted anew.
        windows: how many windows the plan has; the last one has no later window to wait for.
        truncate: how many windows a state's gradient goes back through; None: all.
        halved: the (stage, microbatch, window) whose backward is an input half and a weight half.

    Returns:
        The actions needed, own tape or state first, then neighbours in the wiring's order. An action on the
        same stage needs no message; every other one arrives as an activation or as a gradient.
    """
    wiring = Wiring.of(wiring)
    stage, microbatch, window = action.stage, action.microbatch, action.window
    if action.kind is Kind.FORWARD:
        state = (Action(Kind.FORWARD, stage, microbatch, window - 1),) if window else ()
        sources = wiring.upstream(stage)
        return (*state, *(Action(Kind.FORWARD, source, microbatch, window) for source in sources))
    if action.kind is Kind.BACKWARD_WEIGHT:
        return (Action(Kind.BACKWARD_INPUT, stage, microbatch, window),)

    def gradient(of: int, at: int) -> Action:
        kind = Kind.BACKWARD_INPUT if (of, microbatch, at) in halved else Kind.BACKWARD
        return Action(kind, of, microbatch, at)

    tape = Action(Kind.FORWARD, stage, microbatch, window)
    later = window + 1 < windows and (truncate is None or (window + 1) % truncate)
    state = (gradient(stage, window + 1),) if later else ()
    return (tape, *state, *(gradient(sink, window) for sink in wiring.downstream(stage)))


def open_tapes(program: Iterable[Action]) -> list[int]:
    """How many tapes are open after each action of a program.

    A forward opens one. A backward closes it, and so does the weight half; the input half does not, as the weight
    half still reads the tape.
    """
    step = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: 0, Kind.BACKWARD_WEIGHT: -1}
    return list(accumulate(step[action.kind] for action in program))


def actions_to_array(program: Iterable[Action]) -> NDArray[np.int32]:
    """A program as one array, so that it travels as one tensor.

    Returns:
        Shape (actions, 4), int32; the columns are kind, stage, microbatch, window.
    """
    import numpy as np

    rows = [(action.kind, action.stage, action.microbatch, action.window) for action in program]
    return np.array(rows, dtype=np.int32).reshape(len(rows), 4)


def actions_from_array(array: NDArray[np.int32]) -> tuple[Action, ...]:
    """The program that `actions_to_array` turned into `array`.

    Args:
        array: shape (actions, 4), of an integer dtype.

    Raises:
        ValueError: the shape or dtype differs, a kind is unknown, or an index is negative.
    """
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iu":
        raise ValueError(
            "a program is an integer array of shape (actions, 4), each row (kind, stage, microbatch, window); "
            f"received shape {array.shape}, dtype {array.dtype}"
        )
    known = {int(kind) for kind in Kind}
    program = []
    for index, (kind, *where) in enumerate(array.tolist()):
        if kind not in known or min(where) < 0:
            raise ValueError(
                f"row {index} of a program is {[kind, *where]}: expected a kind of {sorted(known)}, and a stage, "
                "microbatch and window of at least 0"
            )
        program.append(Action(Kind(kind), *where))
    return tuple(program)
