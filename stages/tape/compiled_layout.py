"""The flat lists of tensors that a stage's compiled functions take and give, and the meaning of each place.

forward    inputs, masks, targets, sample weights, weights of losses  ──► outputs, own loss, losses, what is kept
backward   what is kept, seeds  ──► dL/dinputs, then values (n, ...) and places (n,) of each embedding's rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import tensorflow as tf

from stages.loss.heads import Objective
from stages.loss.precision import float_of_losses
from stages.tape.accumulate import dense
from stages.tape.backward_halves import Halves
from stages.tape.direct_calls import unportable
from stages.tape.embedding_rows import parts_of
from stages.tape.tensors import is_differentiable


def scalar_spec() -> Any:
    """The signature of a `scalar`."""
    return tf.TensorSpec((), float_of_losses())


def scalar(value: float) -> Any:
    """A tensor of rank 0 in the float type of losses."""
    return _scalar_of(value, float_of_losses())


@lru_cache(maxsize=256)
def _scalar_of(value: float, dtype: str) -> Any:
    return tf.constant(value, dtype)


@dataclass(frozen=True, slots=True)
class WayBack:
    """The places of a backward's values and results, for outputs of which some have a gradient.

    Attributes:
        seeds: (output, whether it has a gradient) of every seed that is no scalar.
        inputs: For each input the number of its gradient among the results, or None.
        variables: For each variable, whether its gradient depends on a seed that was given.
    """

    seeds: tuple[tuple[int, bool], ...]
    inputs: tuple[int | None, ...]
    variables: tuple[bool, ...]


@dataclass
class Layout:
    """The arguments of a compiled function, and what its trace learned.

    Attributes:
        inputs: How many input tensors there are, masks included.
        takes: Which inputs have a mask.
        weighted: With an objective: which heads have sample weights; None without one.
        heads: With an objective: which heads it is for; None: all.
        window: 0, or 1 for any later window, which has no regularisers of weights.
        variables: What is differentiated besides inputs: the part's trainable variables when it was traced.
        places: Where each of their gradients is summed.
        wanted: Which inputs are differentiated.
        outputs: Dtypes of the outputs, masks included.
        structure: The nesting of the outputs, with 0 at its leaves.
        masked: Which outputs have a mask.
        own: Whether the part has losses of its own.
        depends: For each wanted input and then each variable, the seeds its gradient depends on; None if it has none.
        rows: Which variables' gradients are rows of an embedding.
        fixed_rows: Those of them that are looked up once for all samples.
        ways_back: As `way_back` found them.
    """

    inputs: int
    takes: tuple[int, ...] = ()
    weighted: tuple[bool, ...] | None = None
    heads: tuple[int, ...] | None = None
    window: int = 0
    variables: tuple[Any, ...] = ()
    places: tuple[int, ...] = ()
    wanted: tuple[bool, ...] = ()
    outputs: tuple[Any, ...] = ()
    structure: Any = None
    masked: tuple[int, ...] = ()
    own: bool = False
    depends: tuple[frozenset[int] | None, ...] = ()
    rows: tuple[int, ...] = ()
    fixed_rows: frozenset[int] = frozenset()
    ways_back: dict[tuple[bool, ...] | None, WayBack] = field(default_factory=dict)

    def unpack(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Objective | None]:
        """Inputs, and the objective that stands behind them."""
        if self.weighted is None:
            return arguments, None
        end = len(arguments) - len(self.weighted)
        tensors, weights = arguments[:end], arguments[end:]
        return tensors[: self.inputs], Objective.of_tensors(tensors[self.inputs :], self.weighted, weights, self.heads)

    def results(self, found: Sequence[Any]) -> tuple[tuple[Any, ...], Any | None, tuple[Any, ...], list[Any]]:
        """Outputs, own loss, the heads' losses, and what is kept for backward."""
        ends = list(accumulate((len(self.outputs), self.own, len(self.weighted or ())), initial=0))
        outputs = tuple(unportable(t, dtype) for t, dtype in zip(found, self.outputs))  # noqa: B905 - a prefix
        own = found[ends[1]] if self.own else None
        return outputs, own, tuple(found[ends[2] : ends[3]]), list(found[ends[3] :])

    def flat(self, gradients: Sequence[Any | None], inputs: int) -> list[Any | None]:
        """Gradients of inputs and variables as tensors: behind all of them, the places of embeddings' rows."""
        pairs = [parts_of(gradient) for gradient in gradients[inputs:]]
        self.rows = tuple(i for i, (_, places) in enumerate(pairs) if places is not None)
        values: list[Any] = [values for values, _ in pairs]
        self.fixed_rows = frozenset(i for i in self.rows if values[i].shape[0] is not None)
        return [*(dense(gradient) for gradient in gradients[:inputs]), *values, *(pairs[i][1] for i in self.rows)]

    def way_back(self, given: tuple[bool, ...] | None) -> WayBack:
        """How a backward's values and results are placed; found out once.

        Args:
            given: Which outputs have a gradient; None: a fused function's, whose one seed is the losses'.
        """
        if given not in self.ways_back:
            self.ways_back[given] = self._way_back(given)
        return self.ways_back[given]

    def _way_back(self, given: tuple[bool, ...] | None) -> WayBack:
        there = dict(enumerate(given or ()))
        places = [] if given is None else [i for i, dtype in enumerate(self.outputs) if is_differentiable(dtype)]
        alive = {n for n, i in enumerate(places) if there.get(i)}
        alive |= {0} if given is None else set(range(len(places), len(places) + scalar_seeds(self)))
        reached = [seeds is not None and not seeds.isdisjoint(alive) for seeds in self.depends]
        count, results, inputs = sum(self.wanted), accumulate((s is not None for s in self.depends), initial=0), []
        numbers = iter([n if yes else None for n, yes in zip(results, reached[:count])])  # noqa: B905 - a prefix
        inputs = [next(numbers) if yes else None for yes in self.wanted]
        return WayBack(tuple((i, bool(there.get(i))) for i in places), tuple(inputs), tuple(reached[count:]))


@dataclass(frozen=True, slots=True)
class FunctionPair:
    """Forward and backward of one signature.

    Attributes:
        forward: Arguments → outputs, losses, what is kept.
        backward: Its values are what is kept, then the seeds; its results the dL/dinputs that exist.
        layout: Of both.
        halved: Whether dL/dvariables are added up by the backward's second function, or by its only one, which leaves
            values and places of embeddings' rows.
    """

    forward: Callable[..., list[Any]]
    backward: Halves
    layout: Layout
    halved: bool


@dataclass(frozen=True, slots=True)
class HalfPass:
    """A backward whose input half is done: what the weight half takes.

    Attributes:
        functions: Both halves.
        layout: Theirs.
        left: What the first half left for the second.
        reached: For each variable, whether its gradient depends on a seed that was given.
    """

    functions: Halves
    layout: Layout
    left: Sequence[Any]
    reached: Sequence[bool]


@dataclass(frozen=True, slots=True)
class OpenPass:
    """A finished forward whose backward is still to come."""

    pair: FunctionPair | None
    kept: tuple[Any, ...]
    outputs: tuple[Any, ...]
    share: float
    input_gradients: tuple[Any | None, ...] | None = None
    half: HalfPass | None = None


def signature_of(tensor: Any) -> Any:
    """The signature of tensors like this one: any batch size."""
    if tensor.shape.rank:
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def flat_arguments(inputs: Sequence[Any], objective: Objective | None) -> tuple[Any, ...]:
    """What a compiled forward is called with: inputs, then what the objective needs; `Layout.unpack` is the inverse."""
    if objective is None:
        return tuple(inputs)
    return (*inputs, *objective.tensors(), *(scalar(weight) for weight in objective.weights))


def scalar_seeds(layout: Layout) -> int:
    """How many seeds are scalars: one for own losses, one for the heads' losses."""
    return layout.own + (layout.weighted is not None)
