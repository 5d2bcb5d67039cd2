"""The checks of a `RaggedSteps`'s arguments and inputs, and the words of their errors.

Each function raises `SegmentError` for what the layer is made of, `HandoffError` for a tensor that it receives.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from operator import index
from typing import Any

import keras

from stages.errors import HandoffError, SegmentError

_EMITS = ("output", "read_out")


def check_cell(cell: Any) -> None:
    """Refuse what keeps its state to itself, or has none."""
    expected = "a RaggedSteps expects a cell, a layer with call(inputs, states) and state_size (SimpleRNNCell, GRUCell,"
    expected += " LSTMCell, StackedRNNCells)"
    if isinstance(cell, keras.layers.RNN | keras.layers.Bidirectional):
        raise SegmentError(
            f"{expected}, received the layer {type(cell).__name__}, which keeps its state to itself; pass its cell"
        )
    call = getattr(cell, "call", None)
    explicit = isinstance(cell, keras.layers.Layer) and hasattr(cell, "state_size")
    if not explicit or len(inspect.signature(call).parameters) < 2:  # type: ignore[arg-type]
        raise SegmentError(
            f"{expected}, received {type(cell).__name__}, which has no explicit state; give it a `state_size` and make "
            "`call` return (output, states)"
        )


def check_layers(stop: Any, read_out: Any, emit: str) -> None:
    """Refuse a stop rule or read-out that is no layer, and an output that there is not."""
    for name, layer in (("stop", stop), ("read_out", read_out)):
        if layer is not None and not isinstance(layer, keras.layers.Layer):
            raise SegmentError(
                f"RaggedSteps({name}=...) expects a Keras layer, which every process can make again, received "
                f"{type(layer).__name__}; for a threshold on the norm: stop=NormAbove(threshold)"
            )
    if emit not in _EMITS:
        raise SegmentError(f"RaggedSteps(emit=...) expects 'output' or 'read_out', received {emit!r}")
    if emit == "read_out" and read_out is None:
        raise SegmentError("RaggedSteps(emit='read_out') expects a read_out layer, received None; pass one")
    if read_out is not None and stop is None and emit == "output":
        raise SegmentError(
            "RaggedSteps(read_out=...) expects a use for it, received neither a stop rule nor emit='read_out'; add "
            "one, or put the layer behind this one"
        )


def whole_numbers(steps: Any) -> tuple[int, ...]:
    """The list of steps as plain integers."""
    expected = "RaggedSteps(steps=...) expects a list of whole numbers of at least 0, one per element of the series"
    try:
        found = tuple(steps)
        wrong = [i for i, step in enumerate(found) if isinstance(step, bool) or index(step) < 0]
    except TypeError as error:
        raise SegmentError(f"{expected}, received {steps!r}; for example steps=[3, 4, 2]") from error
    if wrong:
        raise SegmentError(f"{expected}, received {found[wrong[0]]!r} at place {wrong[0]}; no element can have it")
    if not any(found):
        raise SegmentError(f"{expected}, not all of them 0, received {list(found)}; there would be no output at all")
    return tuple(index(step) for step in found)


def longest(steps: tuple[int, ...] | None, max_steps: Any, stop: Any) -> int:
    """The padded length."""
    if steps is not None and stop is not None:
        raise SegmentError(
            f"RaggedSteps expects either steps or a stop rule, received steps={list(steps)} and stop={stop.name!r}; "
            "leave one out"
        )
    if max_steps is None:
        if steps is None:
            what = "a stop rule" if stop is not None else "steps that come as a tensor"
            raise SegmentError(f"RaggedSteps with {what} expects max_steps, the padded length, received None; set it")
        return max(steps)
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise SegmentError(f"RaggedSteps(max_steps=...) expects a whole number of at least 1, received {max_steps!r}")
    if steps is not None and max(steps) > max_steps:
        place = steps.index(max(steps))
        raise SegmentError(
            f"RaggedSteps expects steps of at most max_steps={max_steps}, received {max(steps)} at place {place}; "
            "raise max_steps, or cut the steps"
        )
    return max_steps


def check_series(shape: Sequence[int | None], steps: tuple[int, ...] | None, name: str) -> None:
    """Refuse a series of another rank, of unknown length, or with more or fewer elements than `steps`."""
    if len(shape) != 3:
        raise SegmentError(
            f"layer {name!r}: expected a series (batch, elements, features), received the shape {tuple(shape)}; a "
            "layer below that is recurrent needs return_sequences=True"
        )
    if shape[1] is None:
        raise SegmentError(
            f"layer {name!r}: expected a fixed number of elements, received the shape {tuple(shape)}; give it in "
            "keras.Input((elements, features))"
        )
    if steps is not None and len(steps) != shape[1]:
        raise SegmentError(
            f"layer {name!r}: expected a series of {len(steps)} elements, one for each of steps={list(steps)}, "
            f"received the shape {tuple(shape)} with {shape[1]}; give one number of steps per element"
        )


def check_step_shape(shape: Sequence[int | None], series: Sequence[int | None], name: str) -> None:
    """Refuse a tensor of steps that does not fit the series."""
    fits = len(shape) in (1, 2) and (shape[-1] is None or shape[-1] == series[1])
    if fits and len(shape) == 2:
        fits = shape[0] is None or series[0] is None or shape[0] == series[0]
    if not fits:
        raise HandoffError(
            f"layer {name!r}: expected steps of the shape ({series[1]},), or ({series[0]}, {series[1]}) for each "
            f"sample, received {tuple(shape)} for a series {tuple(series)}; give one number of steps per element"
        )
