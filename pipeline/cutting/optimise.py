"""Cuts found by dynamic programming that make the slowest (or largest) stage as fast (or small) as possible.

A pipeline is as fast as its slowest stage, so the *heaviest* stage is minimised, by dynamic programming over the
positions in the model's order:

    best(k, j) = min over i < j of max(best(k - 1, i), load of a stage of the calls i..j-1)

What a stage weighs:

    time        seconds of one microbatch: forward, backward, and the messages that the stage receives and sends,
                activations one way and gradients the other
    parameters  elements of its variables
    memory      bytes: variables, gradients and optimizer slots, and for each microbatch in flight under 1F1B,
                min(stages - i, microbatches), what the backward of its calls reads

A tensor goes straight from the stage that makes it to those that read it, so what merely passes over a stage (a skip
connection) weighs nothing there. A layer or a kept tensor that several calls of a stage share counts once. The way of
the model's inputs and outputs from and to the driver is not counted: they travel whole, before and after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cutting.costs import Costs, Transfer
from pipeline.errors import SplitError
from pipeline.saying import is_whole, not_whole

__all__ = ["BALANCES", "Allowed", "balanced_cuts"]

BALANCES = ("time", "parameters", "memory")
SENDING_SLOTS = 2
"""Adam's: two values beside each trainable one."""

Allowed = Sequence[bool] | Callable[[int, int], bool]
Array = np.ndarray[Any, np.dtype[np.float64]]


def balanced_cuts(
    costs: Costs,
    stages: int,
    by: str = "time",
    *,
    microbatches: int = 8,
    transfer: Transfer | None = None,
    slots: int = SENDING_SLOTS,
    allowed: Allowed | None = None,
) -> tuple[int, ...]:
    """Cuts that make the heaviest stage as light as possible; among equals, those with the least load in total.

    Args:
        costs: What the calls cost.
        stages: How many stages, each of at least one call.
        by: What a stage weighs: ``"time"``, ``"parameters"`` or ``"memory"`` (see the module).
        microbatches: How many the plan will have; for memory.
        transfer: What messages take; for time. Default: `Transfer()`.
        slots: Values that the optimizer keeps beside each trainable one; for memory. Adam: 2, momentum: 1, SGD: 0.
        allowed: Which cuts are possible. ``allowed[p]``: whether a stage may begin before call p, from 0 to the number
            of calls (these two are not asked). Or ``allowed(begin, end)``: whether the calls begin..end-1 may be a
            stage. Default: all are.

    Returns:
        Before which calls the stages after the first begin, ascending.

    Raises:
        SplitError: No such balance, a number below 1, more stages than calls, or no possible cuts.
    """
    calls = len(costs.calls)
    if by not in BALANCES:
        raise SplitError(f"balance must be one of {', '.join(map(repr, BALANCES))}, received {by!r}")
    for name, number in (("stages", stages), ("microbatches", microbatches)):
        if not is_whole(number):
            raise SplitError(not_whole(f"the number of {name}", number))
    if stages > calls:
        raise SplitError(
            f"the model has {calls} layer(s) to give to stages, {stages} stages were asked for; ask for at most {calls}"
        )
    fixed, repeated = _tables(costs, by, transfer or Transfer(), slots)
    barred = _barred(allowed, calls)
    held = [min(stages - stage, microbatches) for stage in range(stages)]
    return _fewest(fixed, repeated, barred, held)


def _fewest(fixed: Array, repeated: Array, barred: Array, held: Sequence[int]) -> tuple[int, ...]:
    """The dynamic programme; all tables are (n + 1, n + 1) over where a stage begins and ends."""
    size = len(fixed)
    start = np.full(size, np.inf)
    start[0] = 0.0
    heaviest, total, choices = start, start.copy(), []
    for count in held:
        load = fixed + count * repeated + barred
        worst = np.maximum(heaviest[:, None], load)
        sums = total[:, None] + load
        heaviest = worst.min(axis=0)
        sums[worst > heaviest] = np.inf
        choices.append(sums.argmin(axis=0))
        total = sums.min(axis=0)
    if not np.isfinite(heaviest[-1]):
        raise SplitError(
            f"the model cannot be cut into {len(held)} stages at the positions that are allowed; ask for fewer stages"
        )
    cuts, end = [], size - 1
    for choice in reversed(choices[1:]):
        end = int(choice[end])
        cuts.append(end)
    return tuple(reversed(cuts))


def _barred(allowed: Allowed | None, calls: int) -> Array:
    """0 where a stage may begin and end, infinite elsewhere."""
    barred = np.full((calls + 1, calls + 1), np.inf)
    barred[np.triu_indices(calls + 1, 1)] = 0.0
    if callable(allowed):
        for begin in range(calls):
            for end in range(begin + 1, calls + 1):
                if not allowed(begin, end):
                    barred[begin, end] = np.inf
    elif allowed is not None:
        if len(allowed) != calls + 1:
            raise SplitError(
                f"`allowed` must have one value for each position, {calls + 1} of them, received {len(allowed)}"
            )
        barred[[position for position in range(1, calls) if not allowed[position]]] = np.inf
    return barred


def _tables(costs: Costs, by: str, transfer: Transfer, slots: int) -> tuple[Array, Array]:
    """For a stage of the calls begin..end-1 what it weighs once, and what it weighs for each microbatch in flight."""
    size = len(costs.calls) + 1
    fixed, repeated = np.zeros((size, size)), np.zeros((size, size))
    traffic = _Traffic(costs, transfer)
    walks: Mapping[str, Callable[[int], Iterator[tuple[float, float]]]] = {
        "time": lambda begin: _times(costs, traffic, begin),
        "parameters": lambda begin: _parameters(costs, begin),
        "memory": lambda begin: _memories(costs, slots, begin),
    }
    for begin in range(size - 1):
        for end, (once, each) in enumerate(walks[by](begin), begin + 1):
            fixed[begin, end], repeated[begin, end] = once, each
    return fixed, repeated


class _Traffic:
    """What crosses: who makes a tensor, who reads it last, and how long it takes there (and its gradient back)."""

    def __init__(self, costs: Costs, transfer: Transfer) -> None:
        self.maker = costs.makers()
        self.last_reader = {tensor: positions[-1] for tensor, positions in costs.readers().items()}
        self.seconds = {
            number: transfer.seconds([tensor.bytes * costs.samples] * (2 if tensor.differentiable else 1))
            for number, tensor in costs.tensors.items()
        }


def _times(costs: Costs, traffic: _Traffic, begin: int) -> Iterator[tuple[float, float]]:
    """Loads of the stages that begin here, each one call longer than the one before."""
    busy = 0.0
    taken: set[int] = set()
    leaving: set[int] = set()
    for position, call in enumerate(costs.calls[begin:], begin):
        busy += call.seconds
        for tensor in set(call.reads):
            if traffic.maker.get(tensor, begin) < begin and tensor not in taken:
                taken.add(tensor)
                busy += traffic.seconds[tensor]
            if traffic.last_reader[tensor] == position:
                leaving.discard(tensor)
        leaving |= {tensor for tensor in call.makes if traffic.last_reader.get(tensor, -1) > position}
        yield busy + sum(traffic.seconds[tensor] for tensor in leaving), 0.0


def _parameters(costs: Costs, begin: int) -> Iterator[tuple[float, float]]:
    seen: set[int] = set()
    total = 0
    for call in costs.calls[begin:]:
        for weight in call.weights:
            if weight.key not in seen:
                seen.add(weight.key)
                total += weight.count
        yield float(total), 0.0


def _memories(costs: Costs, slots: int, begin: int) -> Iterator[tuple[float, float]]:
    seen: set[int | str] = set()
    once = each = 0
    for call in costs.calls[begin:]:
        for weight in call.weights:
            if weight.key not in seen:
                seen.add(weight.key)
                once += weight.bytes * (2 + slots if weight.trainable else 1)
        for name, size in call.kept:
            if name not in seen:
                seen.add(name)
                each += size
        yield float(once), float(each)
